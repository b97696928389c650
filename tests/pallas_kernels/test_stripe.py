"""Attention over the stripes of sequences whose pages are dealt out, and over keys that are not all there."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.blockwise import Options, PagedKV
from pallas_kernels.flash_attention import flash_attention
from pallas_kernels.flash_attention import xla as attention_xla
from pallas_kernels.flash_decoding import flash_decoding
from pallas_kernels.flash_decoding import xla as decoding_xla
from pallas_kernels.stripe import Stripe
from tests.pallas_kernels.cases import Case, Inputs, assert_close, oracle

PREFILL = {
    "whole prompts and tails": Case((0, 1, 7, 8, 9, 31, 64, 3), (0, 1, 7, 8, 2, 31, 11, 5), soft_cap=1.5),
    "window": Case((90, 33, 5), (9, 33, 1), window=24, g=4),
    "short window, odd page size": Case((53, 0, 40, 20), (19, 0, 3, 1), window=2, page_size=5),
}
DECODE = {
    "one query": Case((1, 0, 7, 8, 9, 31, 64), (1,) * 7, padding=0, g=4),
    "window": Case((61, 3, 24, 70), (1,) * 4, padding=0, window=9),
    "drafted tokens, window": Case((61, 3, 24), (3,) * 3, padding=0, window=7, page_size=3),
    "drafted tokens that form a tree": Case((61, 4, 24), (4,) * 3, padding=0, tree=True),
}
SMALL = {"tile_queries": 4, "tiles_at_once": 3, "block_keys": 16}  # many tiles and blocks


def dealt(table_BJ: jax.Array, ranks: int, rank: int) -> jax.Array:
    """The row of every sequence's pages that one rank has."""
    padded_BJ = jnp.pad(table_BJ, ((0, 0), (0, -table_BJ.shape[1] % ranks)))
    return padded_BJ[:, rank::ranks]


def merged(parts) -> tuple[np.ndarray, np.ndarray]:
    """Of attention over parts of the keys, that over all, in float64."""
    outs, lses = (np.asarray(x, np.float64) for x in zip(*parts, strict=True))
    lse = np.logaddexp.reduce(lses)
    share = np.where(np.isneginf(lses), 0.0, np.exp(lses - np.where(np.isneginf(lse), 0.0, lse)))
    return (outs * share[..., None]).sum(0), lse


@pytest.mark.parametrize("name", PREFILL)
def test_stripes_of_prefill_make_the_whole(name):
    inputs, ranks = Inputs(PREFILL[name]), 2
    q, k, v, table, cu_q, lengths = inputs.arguments()
    run = partial(flash_attention, **inputs.options, return_lse=True)

    def part(rank, implementation):
        stripe = Stripe(jnp.int32(rank), ranks)
        return run(q, k, v, dealt(table, ranks, rank), cu_q, lengths, stripe=stripe, implementation=implementation)

    for implementation in ("reference", "xla"):
        assert_close(merged([part(rank, implementation) for rank in range(ranks)]), oracle(inputs))


@pytest.mark.parametrize("name", PREFILL)
def test_stripes_of_prefill_in_many_tiles_and_blocks(name):
    inputs, ranks = Inputs(PREFILL[name], seed=1), 3
    q, k, v, table, cu_q, lengths = inputs.arguments()

    def part(rank):
        given = q, PagedKV(k, v), dealt(table, ranks, rank), cu_q, lengths, None, Options(**inputs.case.options)
        return attention_xla.flash_attention(*given, stripe=Stripe(jnp.int32(rank), ranks), **SMALL)

    assert_close(merged([part(rank) for rank in range(ranks)]), oracle(inputs))


@pytest.mark.parametrize("name", DECODE)
def test_stripes_of_decoding_make_the_whole(name):
    inputs, ranks = Inputs(DECODE[name]), 2
    q, k, v, table, _, lengths = inputs.arguments()
    q_BQNH = q.reshape(len(lengths), -1, *q.shape[1:])

    def part(rank, implementation):
        out_BQNH, lse_BQN = flash_decoding(
            q_BQNH, k, v, dealt(table, ranks, rank), lengths, tree_mask_BQW=inputs.tree_mask,
            stripe=Stripe(jnp.int32(rank), ranks), implementation=implementation, **inputs.options, return_lse=True,
        )  # fmt: skip
        return out_BQNH.reshape(q.shape), lse_BQN.reshape(q.shape[:2])

    for implementation in ("reference", "xla"):
        assert_close(merged([part(rank, implementation) for rank in range(ranks)]), oracle(inputs))


def test_stripes_of_decoding_in_many_blocks():
    inputs, ranks = Inputs(DECODE["one query"], seed=2), 3
    q, k, v, table, _, lengths = inputs.arguments()

    def part(rank):
        given = q[:, None], PagedKV(k, v), dealt(table, ranks, rank), lengths, None, Options(**inputs.case.options)
        out_BQNH, lse_BQN = decoding_xla.flash_decoding(*given, stripe=Stripe(jnp.int32(rank), ranks), block_keys=8)
        return out_BQNH[:, 0], lse_BQN[:, 0]

    assert_close(merged([part(rank) for rank in range(ranks)]), oracle(inputs))


@pytest.mark.parametrize("name", PREFILL)
def test_keys_that_are_there_and_the_others_make_the_whole(name):
    """The first keys of each sequence, and those that come after them as a sequence that begins there."""
    inputs = Inputs(PREFILL[name], seed=3)
    q, k, v, table, cu_q, lengths = inputs.arguments()
    pages_R = np.asarray(lengths) // inputs.case.page_size // 2
    there_R = jnp.asarray(pages_R * inputs.case.page_size, jnp.int32)
    column_RJ = np.minimum(pages_R[:, None] + np.arange(table.shape[1])[None], table.shape[1] - 1)
    rest_RJ = jnp.asarray(np.take_along_axis(np.asarray(table), column_RJ, axis=1))
    for implementation in ("reference", "xla"):
        run = partial(flash_attention, **inputs.options, return_lse=True, implementation=implementation)
        first = run(q, k, v, table, cu_q, lengths, kv_lengths_R=there_R)
        # Queries before the first key that is left see none.
        assert_close(merged([first, run(q, k, v, rest_RJ, cu_q, lengths - there_R)]), oracle(inputs))


def test_only_xla_takes_them():
    inputs = Inputs(PREFILL["window"])
    q, k, v, table, cu_q, lengths = inputs.arguments()
    stripe = Stripe(jnp.int32(0), 2)
    with pytest.raises(ValueError, match=r"mosaic_gpu.*stripe is one of 2"):
        flash_attention(q, k, v, table, cu_q, lengths, **inputs.options, stripe=stripe, implementation="mosaic_gpu")
    with pytest.raises(ValueError, match=r"cudnn.*kv_lengths is an array"):
        flash_attention(
            q, k, v, table, cu_q, lengths, **inputs.options, kv_lengths_R=lengths, implementation="cudnn"
        )  # fmt: skip
    with pytest.raises(ValueError, match=r"stripe is 2; allowed: None or a Stripe"):
        flash_attention(q, k, v, table, cu_q, lengths, **inputs.options, stripe=2)  # pyright: ignore[reportArgumentType]
