"""Chunked log-probabilities of a prompt equal the dense ones, on any mesh, without the dense memory."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxinfer.decode.prompt_logprobs import prompt_logprobs

prompt_logprobs_jit = jax.jit(prompt_logprobs, static_argnums=3, static_argnames=("chunk", "transform"))


def soft_cap(logits: jax.Array) -> jax.Array:
    return 3.0 * jnp.tanh(logits / 3.0)


def same(logits: jax.Array) -> jax.Array:
    return logits


def run(tensor: int, hidden_TD, head_VD, targets_T, top: int, chunk: int, transform=same):
    mesh = jax.make_mesh((1, tensor), ("pipe", "tensor"), axis_types=(AxisType.Explicit,) * 2)
    with jax.set_mesh(mesh):
        head_VD = jax.device_put(head_VD, NamedSharding(mesh, P("tensor")))
        hidden_TD, targets_T = jax.device_put((hidden_TD, targets_T), NamedSharding(mesh, P()))
        return prompt_logprobs_jit(hidden_TD, head_VD, targets_T, top, chunk=chunk, transform=transform)


def problem(tokens: int, vocab: int, size: int, seed: int):
    rng = np.random.default_rng(seed)
    # Small integers make the matmul exact and its ties real.
    hidden_TD = rng.integers(-2, 3, (tokens, size)).astype(np.float32)
    head_VD = rng.integers(-1, 2, (vocab, size)).astype(np.float32)
    return hidden_TD, head_VD, rng.integers(0, vocab, tokens).astype(np.int32)


@pytest.mark.parametrize("tensor", [1, 2, 8])
@pytest.mark.parametrize(("chunk", "top", "transform"), [(1, 3, same), (7, 20, soft_cap), (1000, 200, soft_cap)])
def test_chunks_and_shards_equal_the_dense_computation(tensor, chunk, top, transform):
    hidden_TD, head_VD, targets_T = problem(tokens=9, vocab=96, size=6, seed=chunk)
    result = run(tensor, hidden_TD, head_VD, targets_T, top, chunk, transform)

    logits_TV = np.asarray(transform(jnp.asarray(hidden_TD @ head_VD.T)))
    logprobs_TV = scipy.special.log_softmax(logits_TV.astype(np.float64), axis=1)
    top_ids_TL = np.argsort(-logits_TV, axis=1, kind="stable")[:, :top]
    # Log-sum-exp over up to 96 chunks: one rounding of a number below 16 for each.
    close = {"rtol": 0, "atol": 96 * 16 * np.finfo(np.float32).eps / 2}
    np.testing.assert_allclose(result.logprob_T, logprobs_TV[np.arange(9), targets_T], **close)
    np.testing.assert_array_equal(result.top_ids_TL, top_ids_TL)
    np.testing.assert_allclose(result.top_logprobs_TL, np.take_along_axis(logprobs_TV, top_ids_TL, axis=1), **close)


def test_logits_of_bfloat16_weights_are_float32():
    hidden_TD, head_VD, targets_T = problem(tokens=4, vocab=32, size=6, seed=1)
    expected = run(2, hidden_TD, head_VD, targets_T, 3, 8)
    actual = run(2, jnp.bfloat16(hidden_TD), jnp.bfloat16(head_VD), targets_T, 3, 8)
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def test_padding_and_unknown_targets_stay_in_their_rows():
    hidden_TD, head_VD, targets_T = problem(tokens=5, vocab=32, size=6, seed=2)
    clean = run(2, hidden_TD, head_VD, targets_T, 4, 8)
    hidden_TD[3:], targets_T[3:] = np.nan, -1
    targets_T[0] = 32
    padded = run(2, hidden_TD, head_VD, targets_T, 4, 8)
    assert padded.logprob_T[0] == -np.inf
    np.testing.assert_array_equal(padded.logprob_T[1:3], clean.logprob_T[1:3])
    np.testing.assert_array_equal(padded.top_ids_TL[:3], clean.top_ids_TL[:3])
    np.testing.assert_array_equal(padded.top_logprobs_TL[:3], clean.top_logprobs_TL[:3])


def test_the_logits_of_the_whole_prompt_never_exist():
    tokens, vocab, chunk = 128, 8192, 256
    hidden_TD, head_VD, targets_T = problem(tokens, vocab, size=4, seed=3)
    mesh = jax.make_mesh((1, 1), ("pipe", "tensor"), axis_types=(AxisType.Explicit,) * 2)

    def dense(hidden_TD, head_VD, targets_T):
        logprobs_TV = jax.nn.log_softmax(hidden_TD @ head_VD.T, axis=1)
        return jnp.take_along_axis(logprobs_TV, targets_T[:, None], axis=1), jax.lax.top_k(logprobs_TV, 5)

    def temporary_bytes(function) -> int:
        with jax.set_mesh(mesh):
            return (
                jax.jit(function).lower(hidden_TD, head_VD, targets_T).compile().memory_analysis().temp_size_in_bytes
            )

    logits_TV_bytes = tokens * vocab * 4
    assert temporary_bytes(dense) >= logits_TV_bytes
    # A few arrays of [T, C] and their sort, none of [T, V].
    chunked = partial(prompt_logprobs, top=5, chunk=chunk, transform=same)
    assert temporary_bytes(chunked) <= 8 * tokens * chunk * 4 <= logits_TV_bytes / 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"top": 0, "chunk": 4}, r"top = 0 must be at least 1"),
        ({"top": 1, "chunk": 0}, r"chunk = 0 must be at least 1"),
    ],
)
def test_sizes_out_of_range_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        run(1, *problem(tokens=2, vocab=32, size=4, seed=4), **arguments)
