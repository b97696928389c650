"""Sizes of the Mosaic GPU kernel: what they may be, the shared memory they take, and which are chosen."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.blockwise import Options, PagedKV

MAX_SHARED_BYTES = 227 * 1024  # of a block on Hopper
ALIGNMENT = 1024  # of every buffer
CONSUMERS = 2  # warpgroups that compute
HEAD_SIZES = (64, 96, 128, 256)
DTYPES = ("bfloat16", "float16")


@dataclass(frozen=True)
class Config:
    """One way to run the kernel.

    Args:
      block_q: query rows of a consumer; a block works on twice as many.
      block_kv: keys of a step.
      stages: blocks of keys, and of values, that shared memory holds.
      blocks: CUDA blocks that share the work; None is one per multiprocessor.
      interpretable: weights reach the second product through shared memory instead of registers, and mbarriers
        stand for named barriers: what JAX's interpreter can run. Slower.
    """

    block_q: int = 64
    block_kv: int = 128
    stages: int = 2
    blocks: int | None = None
    interpretable: bool = False

    def __post_init__(self):
        if self.block_q % 64 or not 64 <= self.block_q <= 128:
            raise ValueError(f"block_q is {self.block_q}; allowed: 64 and 128")
        if self.block_kv % 64 or not 64 <= self.block_kv <= 256:
            raise ValueError(f"block_kv is {self.block_kv}; allowed: multiples of 64 up to 256")
        if not 2 <= self.stages <= 3:
            raise ValueError(f"stages is {self.stages}; allowed: 2 and 3, for which there are named barriers")
        if self.blocks is not None and self.blocks < 1:
            raise ValueError(f"blocks is {self.blocks}; allowed: None and numbers above 0")

    @property
    def tile_rows(self) -> int:
        return CONSUMERS * self.block_q

    def copies(self, page_size: int) -> int:
        """TMA copies that fill a block of keys; each lies within a page."""
        return max(1, self.block_kv // page_size)


# Guesses: none is measured yet. By head size.
TUNED_H200 = {
    64: Config(block_kv=128, stages=3),
    96: Config(block_kv=128, stages=2),
    128: Config(block_kv=128, stages=2),
    256: Config(block_kv=64, stages=2),
}


def choose(head_size: int, page_size: int, options: Options) -> Config:
    """The config for a problem that `unsupported` has nothing against."""
    del page_size, options  # until a measurement says that they matter
    return TUNED_H200[head_size]


def candidates(head_size: int, page_size: int, dtype: jnp.dtype) -> list[Config]:
    """What a tuner should try: all that fits the shared memory and the registers."""
    sizes = itertools.product((64, 128), (64, 128, 192, 256), (2, 3))
    return [
        config
        for config in itertools.starmap(Config, sizes)
        if _fits_pages(config, page_size)
        and config.block_q * (head_size + 1.5 * config.block_kv) <= 200 * 128  # registers: values, scores, weights
        and shared_bytes(scratch(config, head_size, page_size, dtype)) <= MAX_SHARED_BYTES
    ]


def unsupported(q_TNH: jax.Array, kv: PagedKV, options: Options) -> str | None:
    """Why the kernel cannot take an input that the public op allows; None if it can."""
    dtype, head_size, page_size = q_TNH.dtype, q_TNH.shape[-1], kv.page_size
    if dtype.name not in DTYPES:
        return f"q.dtype is {dtype}; allowed: {', '.join(DTYPES)}"
    if kv.k_PSKH.dtype != dtype:
        return f"k_pages.dtype is {kv.k_PSKH.dtype}; allowed: {dtype}, as q"
    if head_size not in HEAD_SIZES:
        return f"the head size is {head_size}; allowed: {', '.join(map(str, HEAD_SIZES))}"
    block_kv = TUNED_H200[head_size].block_kv
    if not _fits_pages(TUNED_H200[head_size], page_size):
        return (
            f"pages hold {page_size} tokens; allowed: multiples of 8 that divide {block_kv}, multiples of {block_kv}"
        )
    if options.scale <= 0:
        return f"scale is {options.scale}; allowed: above 0"
    return None


def _fits_pages(config: Config, page_size: int) -> bool:
    return page_size % config.block_kv == 0 or (page_size % 8 == 0 and config.block_kv % page_size == 0)


def scratch(config: Config, head_size: int, page_size: int, dtype: jnp.dtype) -> dict:
    """The shared memory of a block, by the names that the kernel gives it."""
    kv = _swizzled((config.stages, config.block_kv, head_size), dtype)
    kv_full = plgpu.Barrier(num_arrivals=config.copies(page_size), num_barriers=config.stages)
    types = {
        "q": _swizzled((config.tile_rows, head_size), dtype),
        "k": kv,
        "v": kv,
        "q_full": plgpu.Barrier(),
        "k_full": kv_full,
        "v_full": kv_full,
        "out": _swizzled((CONSUMERS, config.block_q, min(head_size, 128)), dtype, rows=1),
        "lse": plgpu.SMEM((CONSUMERS, config.block_q), jnp.float32),
    }
    if config.interpretable:
        to_consumers = plgpu.Barrier(num_barriers=CONSUMERS)
        free = plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=config.stages)
        types |= {"turn": to_consumers, "cleaned": to_consumers, "q_free": free, "k_free": free, "v_free": free}
        types["p"] = _swizzled((CONSUMERS, config.block_q, config.block_kv), dtype)
    return types


def shared_bytes(types: dict) -> int:
    """Shared memory that `scratch` takes; barriers have 1 KB in all."""
    buffers = jax.tree.leaves(types, is_leaf=lambda x: isinstance(x, plgpu.Barrier))
    sizes = (math.prod(x.shape) * jnp.dtype(x.dtype).itemsize for x in buffers if not isinstance(x, plgpu.Barrier))
    return ALIGNMENT + sum(-(-size // ALIGNMENT) * ALIGNMENT for size in sizes)


def _swizzled(shape: tuple[int, ...], dtype: jnp.dtype, rows: int = 8):
    """Memory swizzled against bank conflicts, in tiles of up to 128 bytes by `rows`: 8 are what wgmma reads."""
    swizzle = next(size for size in (128, 64, 32) if shape[-1] * dtype.itemsize % size == 0)
    tiles = plgpu.TilingTransform((rows, swizzle // dtype.itemsize))  # pyright: ignore[reportAbstractUsage]
    return plgpu.SMEM(shape, dtype, transforms=(tiles, plgpu.SwizzleTransform(swizzle)))  # pyright: ignore
