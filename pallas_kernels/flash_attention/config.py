"""Sizes of the Mosaic GPU kernel: what they may be, the shared memory they take, and which are chosen."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import tuned
from pallas_kernels.blockwise import Options, PagedKV, ceil_div
from pallas_kernels.dispatch import Refusal
from pallas_kernels.hopper import (
    BUFFER_ALIGNMENT,
    DTYPES,
    HEAD_SIZES,
    QUANTIZED_DTYPES,
    SHARED_BYTES,
    buffer_bytes,
)

TMA_ALIGNMENT = 128  # in shared memory
CONSUMERS = 2  # warpgroups that compute
MAX_SPLITS = 16
ITEM_NUMBERS = 2  # that consumers may read: of this item, which one of them may just begin, and of the next
BLOCKS_OF_A_PART = 8  # at least, on average, for a part to be worth its merge


@dataclass(frozen=True)
class Config:
    """One way to run the kernel.

    Args:
      block_q: query rows of a consumer; a block works on twice as many.
      block_kv: keys of a step.
      stages: blocks of keys, and of values, that shared memory holds.
      blocks: CUDA blocks that share the work; None is one per multiprocessor.
      splits: parts of the keys of a tile, each worked on alone. Their results, in float32, are merged afterwards.
      interpretable: weights reach the second product through shared memory instead of registers, and mbarriers
        stand for named barriers: what JAX's interpreter can run. Slower.
    """

    block_q: int = 64
    block_kv: int = 128
    stages: int = 2
    blocks: int | None = None
    splits: int = 1
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
        if not 1 <= self.splits <= MAX_SPLITS:
            raise ValueError(f"splits is {self.splits}; allowed: 1 to {MAX_SPLITS}")

    @property
    def tile_rows(self) -> int:
        return CONSUMERS * self.block_q

    def copies(self, page_size: int) -> int:
        """TMA copies that fill a block of keys; each lies within a page."""
        return max(1, self.block_kv // page_size)


TUNED = Path(__file__).with_name("tuned.json")


def choose(q_TNH: jax.Array, kv: PagedKV) -> Config:
    """The config for a problem that `unsupported` has nothing against: the fastest where some were measured."""
    found = tuned.find(TUNED, tuning_key(q_TNH.shape[-1], kv.k_PSKH.dtype, kv.page_size))
    return Config(**found) if isinstance(found, dict) else heuristic(q_TNH.shape[-1], kv.k_scales_PKS is not None)


def tuning_key(head_size: int, kv_dtype: jnp.dtype, page_size: int) -> str:
    return f"H={head_size} of {8 * kv_dtype.itemsize} bits, S={page_size}"


def heuristic(head_size: int, quantized: bool) -> Config:
    """Large blocks, and as many as fit."""
    return Config(block_kv=64 if head_size > 128 else 128, stages=3 if head_size == 64 and not quantized else 2)


def for_few_queries(config: Config, q_TNH: jax.Array, keys: int, multiprocessors: int) -> Config:
    """Splits the keys, of which a sequence has up to `keys`, where the tiles of the queries are too few for the GPU: a
    chunk of 128 queries and 32 heads is 32 tiles, each of which would go over the whole context alone."""
    T, N, _ = q_TNH.shape
    most = min(MAX_SPLITS, keys // (BLOCKS_OF_A_PART * config.block_kv))
    return replace(config, splits=max(1, min(most, multiprocessors // (ceil_div(T, config.tile_rows) * N))))


def candidates(q_TNH: jax.Array, kv: PagedKV) -> list[Config]:
    """What a tuner should try: all that fits the shared memory and the registers."""
    head_size = q_TNH.shape[-1]
    sizes = itertools.product((64, 128), (64, 128, 192, 256), (2, 3))
    return [
        config
        for config in itertools.starmap(Config, sizes)
        if _fits_pages(config, kv.page_size)
        and config.block_q * (head_size + 1.5 * config.block_kv) <= 200 * 128  # registers: values, scores, weights
        and shared_bytes(scratch(config, head_size, kv.page_size, q_TNH.dtype, kv.k_PSKH.dtype)) <= SHARED_BYTES
    ]


def unsupported(q_TNH: jax.Array, kv: PagedKV, options: Options) -> Refusal | None:
    """Why the kernel cannot take an input that the public op allows; None if it can."""
    dtype, kv_dtype, head_size, page_size = q_TNH.dtype, kv.k_PSKH.dtype, q_TNH.shape[-1], kv.page_size
    if dtype.name not in DTYPES:
        return Refusal("q.dtype", dtype, ", ".join(DTYPES))
    if kv_dtype != dtype and kv_dtype.name not in QUANTIZED_DTYPES:
        return Refusal("k_pages.dtype", kv_dtype, ", ".join((dtype.name, *QUANTIZED_DTYPES)))
    if head_size not in HEAD_SIZES:
        return Refusal("q.shape", q_TNH.shape, f"head sizes {', '.join(map(str, HEAD_SIZES))}")
    config = choose(q_TNH, kv)
    if not _fits_pages(config, page_size):
        allowed = f"multiples of 8 that divide {config.block_kv}, and multiples of {config.block_kv}"
        return Refusal("k_pages.shape", kv.k_PSKH.shape, f"slots of a page: {allowed}")
    if options.scale <= 0:
        return Refusal("scale", options.scale, "above 0")
    return None


def _fits_pages(config: Config, page_size: int) -> bool:
    return page_size % config.block_kv == 0 or (page_size % 8 == 0 and config.block_kv % page_size == 0)


def scratch(config: Config, head_size: int, page_size: int, dtype: jnp.dtype, kv_dtype: jnp.dtype) -> dict:
    """The shared memory of a block, by the names that the kernel gives it."""
    quantized, stages = kv_dtype != dtype, config.stages
    kv = _swizzled((stages, config.block_kv, head_size), dtype)
    kv_full = plgpu.Barrier(num_arrivals=config.copies(page_size), num_barriers=stages)
    out_dtype = result_dtype(config, dtype)
    out_columns = head_size if head_size <= (96 if quantized else 128) else 64
    if out_dtype.itemsize > dtype.itemsize:  # no more bytes, in rows that TMA can copy
        out_columns = 64 if out_columns == 128 else 32
    types = {
        "q": _swizzled((config.tile_rows, head_size), dtype),
        "k": kv,
        "v": kv,
        "q_full": plgpu.Barrier(),
        "k_full": kv_full,
        "v_full": kv_full,
        "out": _rows((CONSUMERS, config.block_q, out_columns), out_dtype),
        # The last row holds the numbers of items, which would take 1 KB in a buffer of their own.
        "lse": plgpu.SMEM((CONSUMERS + 1, config.block_q), jnp.float32),
        "items_full": plgpu.Barrier(num_barriers=ITEM_NUMBERS),
    }
    if quantized:
        # One for keys and one for values; one for both where there is no room.
        raw_blocks = 2 if head_size <= 128 else 1
        types["raw"] = _swizzled((raw_blocks, config.block_kv, head_size), kv_dtype)
        types["raw_full"] = plgpu.Barrier(num_arrivals=config.copies(page_size), num_barriers=raw_blocks)
        types["scales"] = plgpu.SMEM((2, stages, config.block_kv), jnp.float32)
        # A block of keys is there when the producer has converted it, and the scales of keys and values are.
        types["k_full"] = plgpu.Barrier(num_arrivals=1 + 2 * config.copies(page_size), num_barriers=stages)
        types["v_full"] = plgpu.Barrier(num_barriers=stages)
    if config.interpretable:
        to_consumers = plgpu.Barrier(num_barriers=CONSUMERS)
        free = plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=stages)
        types |= {
            "turn": to_consumers,
            "cleaned": plgpu.Barrier(num_arrivals=CONSUMERS),
            "q_free": free,
            "k_free": free,
            "v_free": free,
        }
        types["p"] = _swizzled((CONSUMERS, config.block_q, config.block_kv), dtype)
    return types


def result_dtype(config: Config, dtype: jnp.dtype) -> jnp.dtype:
    """Of what a tile leaves: what is merged afterwards is rounded only then."""
    return dtype if config.splits == 1 else jnp.dtype(jnp.float32)


def shared_bytes(types: dict) -> int:
    """Shared memory that `scratch` takes; barriers have 1 KB in all."""
    buffers = jax.tree.leaves(types, is_leaf=lambda x: isinstance(x, plgpu.Barrier))
    return BUFFER_ALIGNMENT + sum(buffer_bytes(x.shape, x.dtype) for x in buffers if not isinstance(x, plgpu.Barrier))


def _rows(shape: tuple[int, ...], dtype: jnp.dtype):
    """Memory of which single rows are copied: swizzled where each begins at a multiple of TMA's 128 bytes."""
    aligned = shape[-1] * dtype.itemsize % TMA_ALIGNMENT == 0
    return _swizzled(shape, dtype, rows=1) if aligned else plgpu.SMEM(shape, dtype)


def _swizzled(shape: tuple[int, ...], dtype: jnp.dtype, rows: int = 8):
    """Memory swizzled against bank conflicts, in tiles of `rows` (8 is what wgmma reads) by 64 or 32 columns."""
    columns = 64 if shape[-1] % 64 == 0 and dtype.itemsize <= 2 else 32
    tiles = plgpu.TilingTransform((rows, columns))  # pyright: ignore[reportAbstractUsage]
    swizzle = plgpu.SwizzleTransform(columns * dtype.itemsize)  # pyright: ignore[reportAbstractUsage]
    return plgpu.SMEM(shape, dtype, transforms=(tiles, swizzle))
