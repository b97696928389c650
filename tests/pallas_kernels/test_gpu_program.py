"""The interpreter must find a race that is there, and only that."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from tests.pallas_kernels.gpu_program import interpreted, lower

ROWS = 128


def hand_over(x: jax.Array, *, ordered: bool) -> jax.Array:
    """One warpgroup writes shared memory, another reads it: after a barrier, or without one."""

    def kernel(x_ref, out_ref, smem, barrier):
        @pl.when(lax.axis_index("wg") == 0)
        def _():
            smem[...] = x_ref[...] + 1
            plgpu.commit_smem()
            plgpu.barrier_arrive(barrier)

        @pl.when(lax.axis_index("wg") == 1)
        def _():
            if ordered:
                plgpu.barrier_wait(barrier)
            out_ref[...] = smem[...]

    run = plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct(x.shape, x.dtype),
        scratch_types=(plgpu.SMEM(x.shape, x.dtype), plgpu.Barrier()),
        num_threads=2,
        thread_name="wg",
    )
    return run(x)


def test_an_ordered_hand_over_passes():
    x = jnp.arange(ROWS, dtype=jnp.float32)
    with interpreted():
        out = jax.jit(lambda x: hand_over(x, ordered=True))(x)
    np.testing.assert_array_equal(np.asarray(out), np.arange(1, ROWS + 1))


def test_a_planted_race_fails():
    """When it is compiled, and when that was done before."""
    x = jnp.arange(ROWS, dtype=jnp.float32)
    run = jax.jit(lambda x: hand_over(x, ordered=False))
    for _ in range(2):
        with pytest.raises(Exception, match="race"), interpreted():
            jax.block_until_ready(run(x))


def test_a_second_kernel_does_not_hide_the_race_of_the_first():
    x = jnp.arange(ROWS, dtype=jnp.float32)
    both = jax.jit(lambda x: hand_over(hand_over(x, ordered=False), ordered=True))
    with pytest.raises(Exception, match="race"), interpreted():
        jax.block_until_ready(both(x))


def test_a_kernel_lowers_for_a_gpu_that_is_not_there():
    text = lower(hand_over, jax.ShapeDtypeStruct((ROWS,), jnp.float32), ordered=True)
    assert "mosaic_gpu" in text
