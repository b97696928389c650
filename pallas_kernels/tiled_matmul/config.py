"""How the kernel cuts a problem: its config, the shared memory that takes, and which config a problem gets."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import jax.numpy as jnp

from pallas_kernels.checks import require
from pallas_kernels.dispatch import MULTIPROCESSORS, Refusal
from pallas_kernels.hopper import SHARED_BYTES, buffer_bytes
from pallas_kernels.streaming_matmul.arguments import Arguments

CONSUMERS = 2  # warpgroups that multiply
ROWS = 64  # tokens of each
TILE_ROWS = CONSUMERS * ROWS
TILE_D = 64
PIECE = 64  # columns of the result that leave at once
SLOTS = 2  # such pieces on their way


@dataclass(frozen=True)
class Shape:
    """All that a config depends on, known when the program is traced."""

    tokens: int
    hidden: int
    outputs: int
    gated: bool
    residual: bool
    dtype: jnp.dtype

    @classmethod
    def of(cls, arguments: Arguments) -> Shape:
        residual, dtype = arguments.residual_MN is not None, jnp.dtype(arguments.x.dtype)
        return cls(arguments.tokens, arguments.hidden, arguments.outputs, arguments.gated, residual, dtype)

    @property
    def halves(self) -> int:
        """Columns of the weight for one of the result: a gated result has two."""
        return 2 if self.gated else 1

    @property
    def row_tiles(self) -> int:
        return math.ceil(self.tokens / TILE_ROWS)


@dataclass(frozen=True)
class Config:
    """A block multiplies 128 tokens by `columns` columns of the weight, gate and up together, 64 rows of it at a time.

    Attributes:
        stages: such steps on their way at once.
        cluster: blocks of as many tiles of tokens which have the same columns: each reads its part of the weight's
            tile for all of them.
        band: rows of clusters whose tiles follow each other, column by column, so that what neighbours in time read
            is in the L2 cache.
    """

    columns: int
    stages: int = 4
    cluster: int = 1
    band: int = 4

    def __post_init__(self):
        require(self.columns in (NARROW, WIDE), "columns", self.columns, f"{NARROW}, {WIDE}")
        require(self.stages >= 2, "stages", self.stages, "at least 2")
        require(self.cluster in (1, 2), "cluster", self.cluster, "1, 2")
        require(self.band >= 1, "band", self.band, "at least 1")

    def width(self, shape: Shape) -> int:
        """Columns of the result that a tile has."""
        return self.columns // shape.halves

    def rows(self, shape: Shape) -> int:
        """Of clusters."""
        return math.ceil(shape.row_tiles / self.cluster)

    def tiles(self, shape: Shape) -> int:
        """Of clusters."""
        return self.rows(shape) * (shape.outputs // self.width(shape))

    def rounds(self, shape: Shape, blocks: int) -> int:
        """Tiles that the busiest of so many blocks multiplies."""
        return math.ceil(self.tiles(shape) / (blocks // self.cluster))

    def busy(self, shape: Shape, blocks: int) -> float:
        """The part of all blocks' time in which they multiply tokens that there are."""
        done = shape.tokens * shape.outputs * shape.halves
        return done / (self.rounds(shape, blocks) * blocks * TILE_ROWS * self.columns)

    def buffers(self, shape: Shape) -> dict[str, tuple[int, ...]]:
        """The shared memory of a block by name: the ring of stages, and pieces of the result on their way."""
        return {
            "x_ring": (self.stages, TILE_ROWS, TILE_D),
            "w_ring": (self.stages, shape.halves, TILE_D, self.width(shape)),
            "pieces": (CONSUMERS, SLOTS, ROWS, PIECE),
        }

    def smem_bytes(self, shape: Shape) -> int:
        """Of a block; what is launched is what is counted."""
        return BARRIERS + sum(buffer_bytes(buffer, shape.dtype) for buffer in self.buffers(shape).values())

    def check(self, shape: Shape) -> None:
        """Raises ValueError where the kernel cannot run so."""
        width = self.width(shape)
        require(shape.outputs % width == 0, "columns", self.columns, f"such that {width} divides N = {shape.outputs}")
        used = self.smem_bytes(shape)
        require(used <= SHARED_BYTES, "shared memory of the config", used, f"at most {SHARED_BYTES} bytes")


BARRIERS = 1024  # bytes, at most
WIDE, NARROW = 256, 128
COST_OF_NARROW = 1.1  # of a number in a tile of 128 columns, beside one of 256, as measured


def config_for(shape: Shape, blocks: int = MULTIPROCESSORS) -> Config:
    """That whose busiest block has least to do."""

    def work(config: Config) -> float:
        return config.rounds(shape, blocks) * config.columns * (COST_OF_NARROW if config.columns == NARROW else 1.0)

    return min(_fitting(shape), key=work)


def _fitting(shape: Shape) -> Iterator[Config]:
    if shape.outputs % (WIDE // shape.halves) == 0:
        yield Config(WIDE, cluster=2 if shape.row_tiles % 2 == 0 else 1)
    # As many bytes on their way. A cluster is slower here: what it saves is less than its blocks wait for each other.
    yield Config(NARROW, stages=6)


def unsupported(arguments: Arguments) -> Refusal | None:
    """Why the kernel cannot take these arguments; None if it can."""
    shape, residual = Shape.of(arguments), arguments.residual_MN
    if shape.dtype not in (jnp.bfloat16, jnp.float16):
        return Refusal("x.dtype", shape.dtype, "bfloat16, float16, which the tensor cores take")
    if shape.hidden % TILE_D:
        return Refusal("w.shape", arguments.w.shape, f"D a multiple of {TILE_D}")
    width = NARROW // shape.halves
    if shape.outputs % width:
        return Refusal("w.shape", arguments.w.shape, f"N a multiple of {width}")
    if residual is not None and residual.dtype != shape.dtype:
        return Refusal("residual.dtype", residual.dtype, f"{shape.dtype}, as x")
    return None


LEAST_BUSY = 0.8


def slower(shape: Shape) -> str | None:
    """Why XLA is the better choice, although the kernel could run; None if it is not."""
    if config_for(shape).busy(shape, MULTIPROCESSORS) >= LEAST_BUSY:
        return None
    return "XLA is faster where tiles of 128 tokens leave blocks idle, as measured"
