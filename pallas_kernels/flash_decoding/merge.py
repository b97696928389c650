"""Joins the parts that several CTAs left of a unit: out = sum of exp(lse_i - lse) out_i (FlashDecoding, Dao 2023)."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.blockwise import LOWEST

WIDTH = 128  # columns that a warpgroup loads at once; parts are padded to a multiple of it
AT_ONCE = 8  # parts of which the loads are under way together


def merge(
    out_URH: jax.Array,
    lse_UR: jax.Array,
    part_GRH: jax.Array,
    part_lse_GR: jax.Array,
    merge_C4: jax.Array,
    sinks_UR: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """Writes the units that were cut into the results of the whole ones, in place.

    Args:
        out_URH, lse_UR: results by unit and row; those of cut units hold nothing yet.
        part_GRH, part_lse_GR: float32 parts, normalized, columns padded to a multiple of `WIDTH`.
        merge_C4: `Schedule.merge_C4`.
        sinks_UR: the sink of every row of a slot's units.
    """
    out_ref, lse_ref = jax.new_ref(out_URH), jax.new_ref(lse_UR)
    run = plgpu.kernel(
        _kernel,
        scratch_types=(plgpu.SMEM((part_GRH.shape[-1],), out_URH.dtype),),
        grid=(len(merge_C4), out_URH.shape[1]),
        grid_names=("cta", "row"),
        kernel_name="flash_decoding_merge",
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )
    run((merge_C4, part_GRH, part_lse_GR, sinks_UR), (out_ref, lse_ref))
    return jax.freeze(out_ref), jax.freeze(lse_ref)


def _kernel(inputs, outputs, row_smem):
    merge_ref, part_ref, part_lse_ref, sinks_ref = inputs
    out_ref, lse_ref = outputs
    cta, row = lax.axis_index("cta"), lax.axis_index("row")
    unit, first, rest, count = (merge_ref[cta, i] for i in range(4))

    @pl.when(unit >= 0)
    def _():
        add = partial(_add_parts, part_ref, part_lse_ref, row, rest, count)
        begin = part_ref[first, row], jnp.maximum(part_lse_ref[first, row], LOWEST), jnp.float32(1)
        values, maximum, total = lax.fori_loop(0, (count + AT_ONCE - 1) // AT_ONCE, add, begin)
        lse = jnp.where(maximum > LOWEST, maximum + jnp.log(total), -jnp.inf)
        weight = 1 / total
        if sinks_ref is not None:
            lse, decay = with_sink(lse, sinks_ref[lax.rem(unit, sinks_ref.shape[0]), row])
            weight *= decay
        row_smem[...] = (values * weight).astype(row_smem.dtype)
        lse_ref[unit, row] = lse
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(row_smem.at[pl.ds(0, out_ref.shape[-1])], out_ref.at[unit, row])
        plgpu.wait_smem_to_gmem(0)


def _add_parts(part_ref, part_lse_ref, row, rest, count, i, carry):
    """Adds `AT_ONCE` parts, loaded together; past the last one a part has weight 0."""
    values, maximum, total = carry
    index = [i * AT_ONCE + j for j in range(AT_ONCE)]
    place = [rest + jnp.minimum(j, count - 1) for j in index]
    lses = [jnp.where(j < count, part_lse_ref[p, row], -jnp.inf) for j, p in zip(index, place, strict=True)]
    parts = [part_ref[p, row] for p in place]
    new_maximum = maximum
    for lse in lses:
        new_maximum = jnp.maximum(new_maximum, lse)
    decay = jnp.exp(maximum - new_maximum)
    values, total = values * decay, total * decay
    for lse, part in zip(lses, parts, strict=True):
        weight = jnp.exp(lse - new_maximum)
        values, total = values + part * weight, total + weight
    return values, new_maximum, total


def with_sink(lse, sink):
    """The log-sum-exp with one more term, and what the values without it are to be multiplied by.

    A row that saw nothing stays so.
    """
    top = jnp.maximum(lse, sink)
    joint = top + jnp.log(jnp.exp(lse - top) + jnp.exp(sink - top))
    seen = lse > LOWEST
    return jnp.where(seen, joint, -jnp.inf), jnp.where(seen, jnp.exp(lse - joint), 0.0)
