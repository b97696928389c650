"""Joins the parts that several CTAs left of a unit: out = sum of exp(lse_i - lse) out_i (FlashDecoding, Dao 2023).

The pipeline in whose stretch a unit begins joins its parts, at the end of the kernel, when the others have signalled
that theirs are written. A kernel of its own after the first would cost two launches and their latencies: on an H200,
12 to 15 us a call. It is there for the interpreter, which knows no signals between CTAs.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.blockwise import LOWEST, ceil_div

WIDTH = 128  # columns that a warpgroup loads at once; parts are padded to a multiple of it
# Rows whose loads are under way together, and parts of each: the parts of a unit with many rows are few.
MOST_ROWS_AT_ONCE, MOST_PARTS_AT_ONCE, AT_ONCE = 16, 8, 32


def merge(results: Any, merge_C4: jax.Array, sinks_UR: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """Writes the units that were cut into the results of the whole ones, in place, as a kernel of its own.

    Args:
        results: `Outputs` of the kernel: out, lse, part, part_lse.
        merge_C4: `Schedule.merge_C4`.
        sinks_UR: the sink of every row of a slot's units.
    """
    out, lse, part, part_lse = results
    out_ref, lse_ref = jax.new_ref(out), jax.new_ref(lse)

    def kernel(inputs, outputs, rows_smem):
        merge_ref, part_ref, part_lse_ref, sinks_ref = inputs
        out_ref, lse_ref = outputs
        join(lax.axis_index("stretch"), merge_ref, part_ref, part_lse_ref, sinks_ref, out_ref, lse_ref, rows_smem)

    run = plgpu.kernel(
        kernel,
        scratch_types=(plgpu.SMEM((rows_at_once(out.shape[1]), padded(out.shape[2])), out.dtype),),
        grid=(len(merge_C4),),
        grid_names=("stretch",),
        kernel_name="flash_decoding_merge",
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )
    run((merge_C4, part, part_lse, sinks_UR), (out_ref, lse_ref))
    return jax.freeze(out_ref), jax.freeze(lse_ref)


def rows_at_once(rows: int) -> int:
    return min(rows, MOST_ROWS_AT_ONCE)


def padded(head_size: int) -> int:
    """Columns of a part in memory."""
    return ceil_div(head_size, WIDTH) * WIDTH


def join(stretch, merge_ref, part_ref, part_lse_ref, sinks_ref, out_ref, lse_ref, rows_smem) -> None:
    """Joins the parts of the unit that begins in this stretch and ends in another, if there is one.

    Args:
        rows_smem: room for `rows_at_once` rows, padded.
    """
    unit, first, rest, count = (merge_ref[stretch, i] for i in range(4))
    rows, head_size = out_ref.shape[1:]
    at_once = rows_at_once(rows)

    @pl.when(unit >= 0)
    def _():
        @pl.loop(0, ceil_div(rows, at_once))
        def _(group):
            chosen = [group * at_once + i for i in range(at_once)]
            within = [jnp.minimum(row, rows - 1) for row in chosen]
            joined = _join_rows(part_ref, part_lse_ref, first, rest, count, within)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            for i, (row, (values, lse)) in enumerate(zip(within, joined, strict=True)):
                if sinks_ref is not None:
                    lse, decay = with_sink(lse, sinks_ref[lax.rem(unit, sinks_ref.shape[0]), row])
                    values = values * decay
                rows_smem[i] = values.astype(rows_smem.dtype)
                lse_ref[unit, row] = lse
            plgpu.commit_smem()
            for i, row in enumerate(chosen):
                copy = partial(plgpu.copy_smem_to_gmem, rows_smem.at[i, pl.ds(0, head_size)])
                pl.when(row < rows)(partial(copy, out_ref.at[unit, within[i]]))

        plgpu.wait_smem_to_gmem(0)


def _join_rows(part_ref, part_lse_ref, first, rest, count, rows: list) -> list[tuple[Any, Any]]:
    """Values and log-sum-exp of some rows of a unit, from its beginning and the `count` parts from `rest` on."""

    at_once = min(MOST_PARTS_AT_ONCE, AT_ONCE // len(rows))

    def add(i, carry):
        numbers = [i * at_once + j for j in range(at_once)]
        index = [(j, rest + jnp.minimum(j, count - 1)) for j in numbers]
        lses = [[jnp.where(j < count, part_lse_ref[p, row], -jnp.inf) for j, p in index] for row in rows]
        loaded = [list(zip(lses[i], [part_ref[p, row] for _, p in index], strict=True)) for i, row in enumerate(rows)]
        return tuple(_add_parts(state, parts) for state, parts in zip(carry, loaded, strict=True))

    begin = tuple(
        (part_ref[first, row], jnp.maximum(part_lse_ref[first, row], LOWEST), jnp.float32(1)) for row in rows
    )
    states = lax.fori_loop(0, ceil_div(count, at_once), add, begin)
    return [
        (values * (1 / total), jnp.where(maximum > LOWEST, maximum + jnp.log(total), -jnp.inf))
        for values, maximum, total in states
    ]


def _add_parts(state, parts):
    values, maximum, total = state
    new_maximum = maximum
    for lse, _ in parts:
        new_maximum = jnp.maximum(new_maximum, lse)
    decay = jnp.exp(maximum - new_maximum)
    values, total = values * decay, total * decay
    for lse, part in parts:
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
