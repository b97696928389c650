"""One launch of a kernel on a small problem, in a process of its own that `compute-sanitizer` can watch.

    python -m tests.pallas_kernels.sanitized NAME

The result is held to that of the XLA implementation.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.flash_attention import flash_attention
from pallas_kernels.flash_attention.problems import Problem as Prefill
from pallas_kernels.flash_decoding import flash_decoding, pack_tree_mask
from pallas_kernels.flash_decoding.problems import Problem as Decoding
from pallas_kernels.models import Heads, random_cache, random_scales
from pallas_kernels.streaming_matmul import streaming_matmul, streaming_mlp
from pallas_kernels.streaming_matmul.problems import Problem as Product
from pallas_kernels.streaming_matmul.problems import Row
from pallas_kernels.tiled_matmul import tiled_matmul
from pallas_kernels.tiled_matmul.problems import Problem as ManyTokens

Run = Callable[[str], jax.Array]  # of the name of an implementation
KEY, BF16 = jax.random.key(0), jnp.dtype(jnp.bfloat16)
HEADS = Heads(8, 2, 128)
TOLERANCE = 0.05  # of outputs of about unit size: bf16 rounds each to 0.004 of it


def prefill(batch: int = 2, length: int = 200, queries: int = 200, cache: str | None = None) -> Run:
    """The last `queries` positions of each sequence; `cache` is the dtype of quantized pages."""

    def run(implementation: str) -> jax.Array:
        problem = Prefill(HEADS, batch, length)
        arguments = problem.arguments(KEY, BF16)
        q_TNH = arguments["q_TNH"]
        arguments["q_TNH"] = q_TNH.reshape(batch, length, -1)[:, -queries:].reshape(-1, *q_TNH.shape[1:])
        arguments["cu_q_R1"] = queries * jnp.arange(batch + 1, dtype=jnp.int32)
        if cache is not None:
            k, v, table = random_cache(KEY, HEADS, (length,) * batch, problem.page_size, jnp.dtype(cache))
            arguments |= {"k_pages_PSKH": k, "v_pages_PSKH": v, "page_table_RJ": table}
            arguments |= {"k_scales_PKS": random_scales(KEY, k), "v_scales_PKS": random_scales(KEY, v)}
        return flash_attention(**arguments, **HEADS.options, implementation=implementation)

    return run


def decoding(queries: int = 2, cache: str | None = None, tree: bool = False) -> Run:
    """Lengths that cut units between CTAs, so that parts are signalled and joined."""

    def run(implementation: str) -> jax.Array:
        problem = Decoding(HEADS, batch=3, length=700, queries=queries, shortest=5, cache=cache)
        arguments = problem.arguments(KEY, BF16)
        if tree:
            arguments["tree_mask_BQW"] = pack_tree_mask(jax.random.bernoulli(KEY, 0.5, (3, queries, queries)))
        return flash_decoding(**arguments, **HEADS.options, implementation=implementation)

    return run


def product(tokens: int, hidden: int) -> Run:
    def run(implementation: str) -> jax.Array:
        x_MD, w_DN = Product(tokens, hidden, 320).inputs(KEY, BF16)
        norm_scale_D = jnp.ones(hidden, BF16)
        return streaming_matmul(x_MD, w_DN, norm_scale_D=norm_scale_D, implementation=implementation)

    return run


def row(implementation: str) -> jax.Array:
    arguments = Row(tokens=3, hidden=1024, inner=1024, heads=1024).inputs(KEY, BF16)
    return streaming_mlp(**arguments, implementation=implementation)


def many(implementation: str) -> jax.Array:
    """Gated, in clusters of two, with a residual, and with rows that no token has."""
    problem = ManyTokens(248, 128, 4480, "DcN", residual=True)
    return tiled_matmul(**problem.arguments(KEY, BF16), w_axes="DcN", implementation=implementation)


ATTENTION = {
    "flash_attention": prefill(),
    "flash_attention_int8": prefill(cache="int8"),
    "flash_attention_fp8": prefill(cache="float8_e4m3fn"),
    "flash_attention_split": prefill(batch=1, length=2100, queries=40),
    "flash_decoding": decoding(),
    "flash_decoding_int8": decoding(cache="int8"),
    "flash_decoding_fp8": decoding(cache="float8_e4m3fn"),
    "flash_decoding_tree": decoding(queries=6, tree=True),
}
KERNELS = ATTENTION | {
    "streaming_matmul": product(5, 512),
    "streaming_matmul_deep": product(16, 4096),
    "streaming_mlp": row,
    "tiled_matmul": many,
}


def out_of_bounds() -> jax.Array:
    """Reads far behind an array of one kilobyte."""

    def kernel(x_ref, place_ref, out_ref):
        out_ref[...] = x_ref[pl.ds(place_ref[0], 128)]

    run = plgpu.kernel(kernel, out_type=jax.ShapeDtypeStruct((128,), jnp.float32), kernel_name="flash_planted")
    return run(jnp.ones(256, jnp.float32), jnp.full(1, 2**30, jnp.int32))


def unordered() -> jax.Array:
    """Two warpgroups write the same shared memory."""

    def kernel(x_ref, out_ref, smem):
        warpgroup = lax.axis_index("wg")
        smem[...] = x_ref[...] + warpgroup.astype(jnp.float32)
        out_ref[warpgroup] = smem[...]

    run = plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((2, 128), jnp.float32),
        scratch_types=(plgpu.SMEM((128,), jnp.float32),),
        num_threads=2,
        thread_name="wg",
        kernel_name="flash_planted",
    )
    return run(jnp.arange(128, dtype=jnp.float32))


PLANTED = {"out_of_bounds": out_of_bounds, "unordered": unordered}


def main(name: str) -> None:
    if name in PLANTED:
        jax.block_until_ready(jax.jit(PLANTED[name])())
        return
    run = KERNELS[name]
    ours, plain = (np.asarray(jax.jit(run, static_argnums=0)(i), np.float32) for i in ("mosaic_gpu", "xla"))
    np.testing.assert_allclose(ours, plain, atol=TOLERANCE * np.abs(plain).max())


if __name__ == "__main__":
    main(sys.argv[1])
