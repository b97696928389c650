"""Which config a problem gets: the shared memory that one takes, those that fit, and the choice among them."""

import itertools
from dataclasses import replace
from pathlib import Path

import jax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import tuned
from pallas_kernels.flash_decoding.config import Config
from pallas_kernels.flash_decoding.shared import scratch_memory
from pallas_kernels.flash_decoding.units import Shape
from pallas_kernels.hopper import BUFFER_ALIGNMENT, SHARED_BYTES, buffer_bytes

MOST_STAGES = 6
FEW_ROWS = 8  # of queries: no more than these have configs of their own, which are those of most decode steps
TUNED = Path(__file__).with_name("tuned.json")


def shared_memory(shape: Shape, config: Config) -> int:
    """Bytes of shared memory of one CTA; BUFFER_ALIGNMENT stands for all barriers, and for what reductions need."""

    def size(buffer) -> int:
        if isinstance(buffer, plgpu.Barrier):
            return 0
        if isinstance(buffer, plgpu.RefUnion):
            return max(map(size, buffer.refs))
        return buffer_bytes(buffer.shape, buffer.dtype)

    kinds = (plgpu.Barrier, plgpu.RefUnion)
    buffers = jax.tree.leaves(scratch_memory(shape, config), is_leaf=lambda x: isinstance(x, kinds))
    return 2 * BUFFER_ALIGNMENT + sum(map(size, buffers))


def tuning_key(shape: Shape) -> str:
    rows = "" if shape.padded_rows <= FEW_ROWS else f", more than {FEW_ROWS} rows"
    return f"H={shape.head_size} of {8 * shape.kv_dtype.itemsize} bits{rows}"


def candidates(shape: Shape, multiprocessors: int) -> list[Config]:
    """What a search should time: all that fit."""
    sizes = itertools.product(range(2, MOST_STAGES + 1), (1, 2), (1, 2))
    found = (Config(multiprocessors, *size) for size in sizes)
    return [config for config in found if shared_memory(shape, config) <= SHARED_BYTES]


def choose(shape: Shape, multiprocessors: int) -> Config:
    """One CTA on every multiprocessor; the fastest sizes where some were measured, else as many stages as fit.

    There may be no more CTAs than can run at once: some wait for others.
    """
    found = tuned.find(TUNED, tuning_key(shape))
    if isinstance(found, dict):
        config = replace(Config(**found), ctas=multiprocessors)
        if shared_memory(shape, config) <= SHARED_BYTES:  # with more rows than it was measured with it may not
            return config
    sizes = itertools.product((2, 1), (2, 1), range(MOST_STAGES, 1, -1))
    wanted = (Config(multiprocessors, stages, buffers, pipelines) for pipelines, buffers, stages in sizes)
    return next(config for config in wanted if shared_memory(shape, config) <= SHARED_BYTES)
