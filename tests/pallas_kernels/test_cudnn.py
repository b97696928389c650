"""cuDNN under the attention ops: what it is asked, which inputs and which GPUs it is chosen for, and its results."""

import re
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo as fused

from pallas_kernels import cudnn, dispatch
from pallas_kernels.blockwise import Options, PagedKV
from pallas_kernels.flash_attention import flash_attention
from pallas_kernels.flash_attention import problems as prefill
from pallas_kernels.flash_attention import xla as attention_xla
from pallas_kernels.flash_decoding import flash_decoding
from pallas_kernels.flash_decoding import problems as decoding
from pallas_kernels.flash_decoding import xla as decoding_xla
from pallas_kernels.models import Heads
from tests.pallas_kernels.cases import Case, Inputs, assert_close, oracle
from tests.pallas_kernels.gpu_program import lower

HEADS = Heads(4, 2, 64)
CHUNKS = {
    "prompts, chunk tails, more queries than keys": Case(
        (0, 1, 7, 8, 9, 31, 64, 64, 41, 3, 0), (0, 1, 7, 8, 9, 31, 64, 5, 13, 5, 2), g=4
    ),
    "window": Case((53, 8, 30), (19, 8, 1), window=5),
    "window of some pages and sinks": Case((90, 33), (9, 33), window=24, g=8, sinks=True),
    "window of one key": Case((20, 3), (20, 1), window=1, g=1),
    "window beyond the table": Case((20, 3), (20, 1), window=1000),
    "sinks, odd page size": Case((23, 0, 40, 3, 12), (23, 0, 2, 5, 12), sinks=True, page_size=5),
    "nothing but padding": Case((0, 0), (0, 0)),
}
SLOTS = {
    "one query, empty slots, sinks": Case((1, 0, 7, 8, 9, 31, 64, 0), (1,) * 8, g=4, padding=0, sinks=True),
    "drafted tokens": Case((37, 4, 2, 0), (4,) * 4, padding=0, g=1),
    "window": Case((61, 3, 24, 90), (1,) * 4, padding=0, window=24, g=8),
}


@pytest.fixture
def cudnn_here(monkeypatch):
    """JAX asks for the version of cuDNN where it lowers a call of it."""
    monkeypatch.setattr(fused, "cuda_versions", object())
    monkeypatch.setattr(fused, "check_cudnn_version", lambda: 91900)


@pytest.fixture
def in_plain_jax(monkeypatch):
    """What `fused.dot_product_attention` does, with garbage in the rows that it need not write."""

    def attend(q, k, v, *, q_seqlen, kv_seqlen, scale, mask_type, sliding_window_length, return_residual):
        assert return_residual
        (B, T, N, H), (S, K) = q.shape, k.shape[1:3]
        causal = mask_type == fused.MaskType.PADDING_CAUSAL
        assert causal or (mask_type == fused.MaskType.PADDING and sliding_window_length is None)
        row_T1, key_1S = jnp.arange(T)[:, None], jnp.arange(S)[None]
        seen_BTS = jnp.broadcast_to((key_1S < kv_seqlen[:, None])[:, None], (B, T, S))
        if causal:
            window = sliding_window_length or S
            seen_BTS &= ((key_1S <= row_T1) & (key_1S > row_T1 - window))[None]
        scores = jnp.einsum("BTKgH,BSKH->BKgTS", q.reshape(B, T, K, N // K, H), k) * scale
        scores = jnp.where(seen_BTS[:, None, None], scores, -jnp.inf)
        out = jnp.einsum("BKgTS,BSKH->BTKgH", jax.nn.softmax(scores, axis=-1), v).reshape(q.shape)
        lse = jax.nn.logsumexp(scores, axis=-1).reshape(B, N, T)
        written_BT = q_seqlen[:, None] > row_T1.T
        return jnp.where(written_BT[..., None, None], out, jnp.nan), jnp.where(written_BT[:, None], lse, jnp.nan)

    monkeypatch.setattr(fused, "dot_product_attention", attend)


@pytest.fixture
def attend(in_plain_jax):
    """A function of its own in every test: traces are kept by it, and those with the real cuDNN would be found."""
    return partial(cudnn.attend)


MANY, ODD, ONE = (4, 16), (7, 8), (64, 1000)  # queries and keys of a tile


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        *(("prompts, chunk tails, more queries than keys", sizes) for sizes in (MANY, ODD, ONE)),
        ("window", MANY),
        ("sinks, odd page size", ODD),
        ("window of some pages and sinks", ODD),
        ("window of one key", MANY),
        ("window beyond the table", ONE),
        ("nothing but padding", MANY),
    ],
)
def test_tiles_of_prefill_are_the_float64_loop(attend, name, sizes):
    inputs, (tile_queries, block_keys) = Inputs(CHUNKS[name]), sizes
    q, k, v, *rest = inputs.arguments()
    found = attention_xla.flash_attention(
        q, PagedKV(k, v), *rest, inputs.options["sinks_N"], Options(**inputs.case.options),
        attend=attend, tile_queries=tile_queries, tiles_at_once=2, block_keys=block_keys,
    )  # fmt: skip
    assert_close(found, oracle(inputs))


@pytest.mark.parametrize("block_keys", [16, 1000])
@pytest.mark.parametrize("name", SLOTS)
def test_slots_of_decoding_are_the_float64_loop(attend, name, block_keys):
    inputs = Inputs(SLOTS[name], seed=1)
    q, k, v, table, _, lengths = inputs.arguments()
    B, (T, N, H) = len(lengths), q.shape
    out, lse = decoding_xla.flash_decoding(
        q.reshape(B, T // B, N, H), PagedKV(k, v), table, lengths, inputs.options["sinks_N"],
        Options(**inputs.case.options), attend=attend, block_keys=block_keys,
    )  # fmt: skip
    assert_close((out.reshape(T, N, H), lse.reshape(T, N)), oracle(inputs))


def test_quantized_pages_are_value_times_scale(attend):
    inputs = Inputs(CHUNKS["sinks, odd page size"], seed=4)
    (k, v), (k_scales, v_scales) = inputs.quantize("int8", seed=4)
    q, _, _, *rest = inputs.arguments()
    found = attention_xla.flash_attention(
        q, PagedKV(k, v, k_scales, v_scales), *rest, inputs.options["sinks_N"], Options(**inputs.case.options),
        attend=attend, tile_queries=8,
    )  # fmt: skip
    assert_close(found, oracle(inputs))


def arguments(op, change: dict, dtype=jnp.bfloat16) -> tuple[dict, dict]:
    """Shapes of a problem of two sequences unless `slots` says how many, and its static options."""
    sizes = {name: change[name] for name in ("queries", "cache") if name in change}
    problem = {
        flash_attention: prefill.Problem(HEADS, 2, 1024),
        flash_decoding: decoding.Problem(HEADS, change.get("slots", 2), change.get("keys", 1024), **sizes),
    }[op]
    arrays = jax.eval_shape(lambda key: problem.arguments(key, jnp.dtype(dtype)), jax.random.key(0))
    if "head_size" in change:
        arrays = {
            name: jax.ShapeDtypeStruct((*x.shape[:-1], change["head_size"]), x.dtype) if x.ndim >= 3 else x
            for name, x in arrays.items()
        }
    return arrays, HEADS.options | {name: change[name] for name in ("window", "soft_cap", "scale") if name in change}


def called(op, change: dict, implementation: str = "cudnn", dtype=jnp.bfloat16) -> str:
    arrays, options = arguments(op, change, dtype)
    run = partial(op, **options, implementation=implementation)
    return lower(lambda arrays: run(**arrays), arrays)


@pytest.mark.parametrize(
    ("op", "change", "calls"),
    [
        (flash_attention, {}, 2),
        (flash_attention, {"window": 128}, 1),
        (flash_decoding, {}, 1),
        (flash_decoding, {"window": 128}, 1),
        (flash_decoding, {"queries": 3}, 2),
        (flash_decoding, {"cache": "int8"}, 1),
    ],
)
def test_it_lowers_for_a_gpu_that_is_not_there(cudnn_here, op, change, calls):
    """The keys that all queries see are one call, those with a causal mask another."""
    assert called(op, change).count("@__cudnn$fmhaSoftmax(") == calls


REFUSED = {
    "dtype": (flash_attention, {}, "q.dtype is float32; allowed: bfloat16, float16", jnp.float32),
    "soft cap": (flash_attention, {"soft_cap": 50.0}, "soft_cap is 50.0; allowed: None", jnp.bfloat16),
    "scale": (flash_decoding, {"scale": -1.0}, "scale is -1.0; allowed: above 0", jnp.bfloat16),
    "large heads": (flash_decoding, {"head_size": 256}, r"q.shape is \(.*, 256\); allowed: .* up to 128", jnp.float16),
    "odd heads": (flash_attention, {"head_size": 20}, r"q.shape is \(.*, 20\); allowed: .*les of 8", jnp.float16),
    "window": (flash_decoding, {"window": 9, "queries": 2}, "window is 9 with 2 queries in a slot", jnp.bfloat16),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_it_does_not_take_is_named(cudnn_here, name):
    op, change, message, dtype = REFUSED[name]
    with pytest.raises(ValueError, match=f"implementation='cudnn' of {op.__name__} cannot run: {message}"):
        called(op, change, dtype=dtype)


def test_without_cudnn_it_says_so():
    if fused.cuda_versions is not None:
        pytest.skip("cuDNN is here")
    with pytest.raises(ValueError, match="JAX finds no cuDNN here"):
        called(flash_attention, {})


def ran(monkeypatch, capability: tuple[int, int], op, change: dict, dtype=jnp.bfloat16) -> str:
    """What `auto` is on such a GPU."""
    chosen = []
    automatic = dispatch.automatic
    with monkeypatch.context() as patch:
        patch.setattr(dispatch, "compute_capability", lambda: capability)
        patch.setattr(dispatch, "automatic", lambda refusals: chosen.append(automatic(refusals)) or ("xla", "a test"))
        called(op, change, "auto", dtype)
    ((name, why),) = chosen
    return f"{name}: {why}"


A100, L4, T4, H200 = (8, 0), (8, 9), (7, 5), (9, 0)


@pytest.mark.parametrize(
    ("gpu", "op", "change", "choice"),
    [
        (H200, flash_attention, {}, "mosaic_gpu: written for this GPU"),
        (H200, flash_attention, {"head_size": 40}, "cudnn: mosaic_gpu: not with this q.shape; allowed: head sizes 64"),
        (
            A100,
            flash_attention,
            {},
            "cudnn: mosaic_gpu: the kernels need compute capability 9.0, and this GPU has 8.0",
        ),
        (L4, flash_decoding, {}, "cudnn: mosaic_gpu: the kernels need compute capability 9.0, and this GPU has 8.9"),
        (L4, flash_attention, {"soft_cap": 5.0}, "xla: .* 8.9; cudnn: not with this soft_cap; allowed: None"),
        (
            T4,
            flash_decoding,
            {},
            "xla: .*; cudnn: cuDNN's attention needs compute capability 8.0, and this GPU has 7.5",
        ),
    ],
)
def test_auto_is_chosen_by_gpu_and_input(cudnn_here, monkeypatch, gpu, op, change, choice):
    found = ran(monkeypatch, gpu, op, change)
    assert re.match(choice, found), found


def test_large_heads_are_for_hopper(cudnn_here, monkeypatch):
    for gpu, refusal in ((A100, True), (H200, False)):
        monkeypatch.setattr(dispatch, "compute_capability", lambda gpu=gpu: gpu)
        q = jax.ShapeDtypeStruct((1, 1, 4, 256), jnp.bfloat16)
        assert bool(cudnn.unsupported(q, Options(1.0))) == refusal


def test_by_name_on_the_wrong_gpu_it_says_so(cudnn_here, monkeypatch):
    monkeypatch.setattr(dispatch, "compute_capability", lambda: T4)
    with pytest.raises(ValueError, match=r"cuDNN's attention needs compute capability 8\.0, and this GPU has 7\.5"):
        called(flash_decoding, {})


def test_few_queries_are_left_to_xla():
    slower = sys.modules["pallas_kernels.flash_attention.cudnn"].slower
    assert "below 512 queries" in slower(jax.ShapeDtypeStruct((511, 4, 64), jnp.bfloat16))
    assert slower(jax.ShapeDtypeStruct((512, 4, 64), jnp.bfloat16)) is None


@pytest.mark.parametrize(
    ("change", "choice"),
    [
        ({"slots": 1, "keys": 8192}, "xla: .* one sequence of up to 8192 keys"),
        ({"slots": 1, "keys": 8193}, "cudnn"),
        ({"slots": 1, "keys": 131_072}, "cudnn"),
        ({"slots": 1, "keys": 131_072, "window": 4096}, "xla"),
        ({"slots": 2, "keys": 8192}, "cudnn"),
    ],
)
def test_one_sequence_of_few_keys_is_left_to_xla(cudnn_here, monkeypatch, change, choice):
    found = ran(monkeypatch, A100, flash_decoding, change)
    assert re.match(choice, found), found


GPU_CASES = {
    "whole prompts": Case((1, 7, 64, 1000, 0, 131), (1, 7, 64, 1000, 0, 131), g=4, head_size=64, page_size=16),
    "chunk tails": Case((700, 41, 1030), (5, 13, 530), g=4, head_size=128, page_size=16),
    "window and sinks": Case((900, 33), (90, 33), g=8, window=128, sinks=True, head_size=64, page_size=16),
    "more queries than keys": Case((3, 0, 12), (5, 2, 12), head_size=64, page_size=16),
    "decoding": Case((1, 700, 0, 65), (1,) * 4, g=4, padding=0, head_size=128, page_size=16),
    "decoding, window": Case((1, 700, 0, 65), (1,) * 4, g=4, padding=0, head_size=96, page_size=16, window=40),
    "verification": Case((1, 700, 0, 65), (8,) * 4, g=4, padding=0, head_size=128, page_size=16),
}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("name", GPU_CASES)
def test_on_a_gpu_it_equals_float64(name, dtype):
    """Weights and output are rounded to 16 bits, and where two parts merge, so are theirs."""
    inputs = Inputs(GPU_CASES[name], seed=5)
    inputs.round_to(dtype)
    q, k, v, table, cu_q, lengths = inputs.arguments(dtype)
    options = inputs.options | {"implementation": "cudnn", "return_lse": True}
    if len(set(inputs.case.queries)) == 1:
        slots = len(lengths)
        out, lse = flash_decoding(q.reshape(slots, -1, *q.shape[1:]), k, v, table, lengths, **options)
        out, lse = out.reshape(q.shape), lse.reshape(q.shape[:2])
    else:
        out, lse = flash_attention(q, k, v, table, cu_q, lengths, **options)
    exact_out, exact_lse = oracle(inputs)
    largest = max(np.abs(v).max() for _, v in inputs.kv if v.size)
    assert_close([out], [exact_out], atol=3 * float(jnp.finfo(dtype).eps) * float(largest) + 1e-5)
    assert_close([lse], [exact_lse], atol=1e-4)
