"""Bad arguments raise a ValueError that names the argument, and the choice of an implementation is said once."""

import logging

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import dispatch
from pallas_kernels.flash_attention import flash_attention
from pallas_kernels.flash_decoding import flash_decoding
from pallas_kernels.streaming_matmul import streaming_matmul, streaming_mlp, takes
from pallas_kernels.tiled_matmul import tiled_matmul

SCALES = jnp.ones((5, 2, 4), jnp.float32)
BYTES = jnp.ones((5, 4, 2, 8), jnp.int8)


def prefill_arguments() -> dict:
    return {
        "q_TNH": jnp.ones((6, 4, 8), jnp.float32),
        "k_pages_PSKH": jnp.ones((5, 4, 2, 8), jnp.float32),
        "v_pages_PSKH": jnp.ones((5, 4, 2, 8), jnp.float32),
        "page_table_RJ": jnp.zeros((2, 3), jnp.int32),
        "cu_q_R1": jnp.array([0, 4, 6], jnp.int32),
        "lengths_R": jnp.array([4, 12], jnp.int32),
        "scale": 0.5,
    }


def ints(*values):
    return jnp.array(values, jnp.int32)


WRONG = {
    "rank of q": ({"q_TNH": jnp.ones((6, 8), jnp.float32)}, "q.shape"),
    "no tokens": ({"q_TNH": jnp.ones((0, 4, 8), jnp.float32)}, "q.shape"),
    "dtype of q": ({"q_TNH": jnp.ones((6, 4, 8), jnp.int32)}, "q.dtype"),
    "heads": ({"q_TNH": jnp.ones((6, 3, 8), jnp.float32)}, "k_pages.shape"),
    "head size": ({"q_TNH": jnp.ones((6, 4, 16), jnp.float32)}, "k_pages.shape"),
    "rank of the pages": ({"k_pages_PSKH": jnp.ones((5, 4, 16), jnp.float32)}, "k_pages.shape"),
    "v unlike k": ({"v_pages_PSKH": jnp.ones((6, 4, 2, 8), jnp.float32)}, "v_pages.shape"),
    "dtype of v": ({"v_pages_PSKH": jnp.ones((5, 4, 2, 8), jnp.bfloat16)}, "v_pages.dtype"),
    "scales of plain pages": ({"v_scales_PKS": SCALES}, "v_scales"),
    "no scales": ({"k_pages_PSKH": BYTES, "v_pages_PSKH": BYTES}, "k_scales"),
    "scales by slot, not by head": (
        {"k_pages_PSKH": BYTES, "v_pages_PSKH": BYTES, "k_scales_PKS": SCALES, "v_scales_PKS": SCALES.swapaxes(1, 2)},
        r"v_scales.shape is \(5, 4, 2\); allowed: \(5, 2, 4\)",
    ),
    "dtype of the table": ({"page_table_RJ": jnp.zeros((2, 3), jnp.int16)}, "page_table.dtype"),
    "page below the pool": ({"page_table_RJ": ints([0, 1, 2], [0, -1, 0])}, "page_table"),
    "page beyond the pool": ({"page_table_RJ": ints([0, 1, 2], [0, 5, 0])}, r"page_table .*\[5\].* 0 to 4"),
    "rows of lengths": ({"lengths_R": ints(4, 4, 4)}, "lengths.shape"),
    "length beyond the table": ({"lengths_R": ints(4, 13)}, r"lengths .*\[13\].* 0 to 12"),
    "negative length": ({"lengths_R": ints(4, -1)}, "lengths"),
    "borders": ({"cu_q_R1": ints(0, 6)}, "cu_q.shape"),
    "falling borders": ({"cu_q_R1": ints(0, 4, 3)}, "cu_q"),
    "borders beyond the tokens": ({"cu_q_R1": ints(0, 4, 7)}, r"cu_q\[-1\] is 7"),
    "window": ({"window": 0}, "window is 0"),
    "half a key": ({"window": 2.5}, "window is 2.5; allowed: None or a whole number from 1 to"),
    "window beyond 32 bits": ({"window": 2**40}, f"window is {2**40}; allowed"),
    "window that is none": ({"window": True}, "window is True; allowed"),
    "soft cap": ({"soft_cap": 0.0}, "soft_cap is 0"),
    "soft cap in an array": ({"soft_cap": jnp.ones(())}, r"soft_cap is an array of shape \(\); allowed"),
    "scale": ({"scale": float("nan")}, "scale is nan"),
    "no scale": ({"scale": None}, "scale is None; allowed: a finite number"),
    "scale in words": ({"scale": "a"}, "scale is 'a'; allowed: a finite number"),
    "scale in an array": ({"scale": jnp.ones(())}, r"scale is an array of shape \(\); allowed: a finite number"),
    "no q": ({"q_TNH": None}, "q is a NoneType; allowed: an array"),
    "pages in a list": ({"k_pages_PSKH": [1.0]}, "k_pages is a list; allowed: an array"),
    "values in a list": ({"v_pages_PSKH": [1.0]}, "v_pages is a list; allowed: an array"),
    "lengths in a list": ({"lengths_R": [4, 12]}, "lengths is a list; allowed: an array"),
    "table in a list": ({"page_table_RJ": [[0]]}, "page_table is a list; allowed: an array"),
    "borders in a list": ({"cu_q_R1": [0, 4, 6]}, "cu_q is a list; allowed: an array"),
    "sinks in a list": ({"sinks_N": [0.0]}, "sinks is a list; allowed: an array"),
    "sinks": ({"sinks_N": jnp.ones((2,), jnp.float32)}, "sinks.shape"),
    "table without numbers": (
        {"page_table_RJ": jax.ShapeDtypeStruct((2, 3), jnp.int32)},
        "page_table is a ShapeDtypeStruct; allowed: an array",
    ),
    "lengths without numbers": (
        {"lengths_R": jax.ShapeDtypeStruct((2,), jnp.int32)}, "lengths is a ShapeDtypeStruct; allowed: an array",
    ),
    "borders without numbers": (
        {"cu_q_R1": jax.ShapeDtypeStruct((3,), jnp.int32)}, "cu_q is a ShapeDtypeStruct; allowed: an array",
    ),
    "q without numbers": (
        {"q_TNH": jax.ShapeDtypeStruct((6, 4, 8), jnp.float32)}, "q is a ShapeDtypeStruct; allowed: an array",
    ),
    "implementations": ({"implementation": ["xla"]}, r"implementation=\['xla'\] of flash_attention does not exist"),
    "implementation": ({"implementation": "mosaic"}, "mosaic.*allowed: auto, mosaic_gpu, cudnn, xla, reference"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_prefill_names_what_is_wrong(name):
    change, message = WRONG[name]
    with pytest.raises(ValueError, match=message):
        flash_attention(**(prefill_arguments() | change))


def test_the_unchanged_arguments_are_right():
    assert flash_attention(**prefill_arguments()).shape == (6, 4, 8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q_BQNH": jnp.ones((3, 1, 4, 8), jnp.float32)}, "q.shape .*2 slots"),
        ({"q_BQNH": jnp.ones((2, 4, 8), jnp.float32)}, "q.shape"),
        ({"q_BQNH": jnp.ones((2, 1, 3, 8), jnp.float32)}, "k_pages.shape"),
        ({"page_table_BJ": ints([0, 1, 2], [0, 5, 0])}, r"page_table .*\[5\].* 0 to 4"),
        ({"lengths_B": ints(4, 13)}, "lengths"),
        ({"lengths_B": jax.ShapeDtypeStruct((2,), jnp.int32)}, "lengths is a ShapeDtypeStruct; allowed: an array"),
        ({"page_table_BJ": jax.ShapeDtypeStruct((2, 3), jnp.int32)}, "page_table is a ShapeDtypeStruct; allowed"),
        ({"lengths_B": [4, 12]}, "lengths is a list; allowed: an array"),
        ({"window": 0}, "window is 0"),
        ({"schedule": "x"}, "schedule is a str; allowed: None or what `plan` gives"),
        ({"tree_mask_BQW": [0]}, "tree_mask is a list; allowed: an array"),
        ({"implementation": "cuda"}, "implementation='cuda' of flash_decoding"),
        ({"implementation": ["xla"]}, r"implementation=\['xla'\] of flash_decoding"),
    ],
)
def test_decoding_names_what_is_wrong(change, message):
    prefill = prefill_arguments()
    arguments = {
        "q_BQNH": jnp.ones((2, 1, 4, 8), jnp.float32),
        "k_pages_PSKH": prefill["k_pages_PSKH"],
        "v_pages_PSKH": prefill["v_pages_PSKH"],
        "page_table_BJ": prefill["page_table_RJ"],
        "lengths_B": prefill["lengths_R"],
        "scale": 0.5,
    }
    with pytest.raises(ValueError, match=message):
        flash_decoding(**(arguments | change))


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="says what a CPU does")
@pytest.mark.parametrize("op", [flash_attention, flash_decoding, streaming_matmul, streaming_mlp, tiled_matmul])
def test_a_kernel_asked_for_by_name_says_that_there_is_no_gpu(op):
    def ones(*shape):
        return jnp.ones(shape, jnp.bfloat16)

    pages, table, ten = ones(2, 16, 1, 64), ints([0]), ints(10)
    arguments = {
        flash_attention: {"q_TNH": ones(4, 2, 64), "cu_q_R1": ints(0, 4), "lengths_R": ten, "page_table_RJ": table},
        flash_decoding: {"q_BQNH": ones(1, 4, 2, 64), "lengths_B": ten, "page_table_BJ": table},
        streaming_matmul: {"x": ones(3, 128), "w": ones(128, 64)},
        tiled_matmul: {"x_MD": ones(128, 128), "w": ones(128, 128)},
        streaming_mlp: {"x_MD": ones(1, 1024), "up_DcF": ones(1024, 2, 1024), "down_FD": ones(1024, 1024)},
    }[op]
    if op in (flash_attention, flash_decoding):
        arguments |= {"k_pages_PSKH": pages, "v_pages_PSKH": pages, "scale": 0.5}
    if op is streaming_mlp:
        arguments |= {"norm_scale_D": ones(1024)}
    reason = "no kernel written for the backend 'cpu' exists"
    with pytest.raises(ValueError, match=f"implementation='mosaic_gpu' of {op.__name__} cannot run: {reason}"):
        op(**arguments, implementation="mosaic_gpu")


def test_values_are_not_looked_at_under_a_trace():
    arguments = prefill_arguments()
    table = arguments.pop("page_table_RJ") + 99
    traced = jax.eval_shape(lambda table: flash_attention(**arguments, page_table_RJ=table), table)
    assert traced.shape == (6, 4, 8)


def test_auto_says_once_for_all_sizes_why_it_is_not_the_kernel(caplog, monkeypatch):
    monkeypatch.setattr(dispatch, "compute_capability", lambda: dispatch.HOPPER)
    dispatch._log_once.cache_clear()  # another test may have heard it
    w = jax.ShapeDtypeStruct((256, 192), jnp.bfloat16)
    with caplog.at_level(logging.INFO, "pallas_kernels"):
        for tokens in (65, 66, 67):
            assert not takes(jax.ShapeDtypeStruct((tokens, 256), jnp.bfloat16), w)
    assert [record.getMessage() for record in caplog.records] == [
        "streaming_matmul runs as xla: mosaic_gpu: not with this x.shape; allowed: at most 64 tokens"
    ]


def test_auto_says_once_what_it_chose(caplog):
    available = {"xla": len, "reference": sum}
    with caplog.at_level(logging.INFO, "pallas_kernels"):
        assert dispatch.choose("an op of this test", "auto", available, {}) is len
        assert dispatch.choose("an op of this test", "auto", available, {}) is len
        assert dispatch.choose("an op of this test", "reference", available, {}) is sum
    assert [record.getMessage() for record in caplog.records] == [
        f"an op of this test runs as xla: no kernel written for the backend {jax.default_backend()!r} exists"
    ]
