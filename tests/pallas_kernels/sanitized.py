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
from pallas_kernels.flash_decoding import flash_decoding
from pallas_kernels.flash_decoding.problems import Problem as Decoding
from pallas_kernels.models import Heads
from pallas_kernels.streaming_matmul import streaming_matmul, streaming_mlp
from pallas_kernels.streaming_matmul.problems import Problem as Product
from pallas_kernels.streaming_matmul.problems import Row

KEY, BF16 = jax.random.key(0), jnp.dtype(jnp.bfloat16)
HEADS = Heads(8, 2, 128)
TOLERANCE = 0.05  # of outputs of about unit size: bf16 rounds each to 0.004 of it


def prefill(implementation: str) -> jax.Array:
    problem = Prefill(HEADS, batch=2, length=200)
    return flash_attention(**problem.arguments(KEY, BF16), **problem.heads.options, implementation=implementation)


def decoding(cache: str | None = None) -> Callable[[str], jax.Array]:
    """Lengths that cut units between CTAs, so that parts are signalled and joined."""

    def run(implementation: str) -> jax.Array:
        problem = Decoding(HEADS, batch=3, length=700, queries=2, shortest=5, cache=cache)
        arguments = problem.arguments(KEY, BF16)
        return flash_decoding(**arguments, **problem.heads.options, implementation=implementation)

    return run


def product(tokens: int, hidden: int) -> Callable[[str], jax.Array]:
    def run(implementation: str) -> jax.Array:
        x_MD, w_DN = Product(tokens, hidden, 320).inputs(KEY, BF16)
        norm_scale_D = jnp.ones(hidden, BF16)
        return streaming_matmul(x_MD, w_DN, norm_scale_D=norm_scale_D, implementation=implementation)

    return run


def row(implementation: str) -> jax.Array:
    arguments = Row(tokens=3, hidden=1024, inner=1024, heads=1024).inputs(KEY, BF16)
    return streaming_mlp(**arguments, implementation=implementation)


KERNELS = {
    "flash_attention": prefill,
    "flash_decoding": decoding(),
    "flash_decoding_int8": decoding("int8"),
    "streaming_matmul": product(5, 512),
    "streaming_matmul_deep": product(16, 4096),
    "streaming_mlp": row,
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
