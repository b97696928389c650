"""How the kernel cuts a problem: its config, the shared memory that takes, and which config a problem gets."""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp

from pallas_kernels.checks import require
from pallas_kernels.streaming_matmul.arguments import Arguments

MAX_TOKENS = 64
# One H100 or H200 (SXM): streaming multiprocessors, and the shared memory of one and of one block of it.
SMS = 132
SMEM_OF_SM = 228 * 1024
SMEM_OF_BLOCK = 227 * 1024
# What a block takes besides its buffers: the system's 1 KB, barriers, and the scratch of a sum across warps.
SMEM_OVERHEAD = 1024 + 1024 + 2048
ALIGNMENT = 1024  # of every buffer, as Mosaic GPU places them


@dataclass(frozen=True)
class Shape:
    """All that a config depends on, known when the program is traced."""

    tokens: int
    hidden: int
    outputs: int
    w_axes: str
    dtype: jnp.dtype
    out_dtype: jnp.dtype
    norm_dtype: jnp.dtype | None = None
    bias_dtype: jnp.dtype | None = None
    residual_dtype: jnp.dtype | None = None

    @classmethod
    def of(cls, arguments: Arguments) -> "Shape":
        def dtype(array: jax.Array | None) -> jnp.dtype | None:
            return None if array is None else jnp.dtype(array.dtype)

        return cls(
            tokens=arguments.x_MD.shape[0],
            hidden=arguments.x_MD.shape[1],
            outputs=arguments.outputs,
            w_axes=arguments.w_axes,
            dtype=jnp.dtype(arguments.x_MD.dtype),
            out_dtype=jnp.dtype(arguments.out_dtype),
            norm_dtype=dtype(arguments.norm_scale_D),
            bias_dtype=dtype(arguments.bias),
            residual_dtype=dtype(arguments.residual_MN),
        )

    @property
    def halves(self) -> int:
        """Columns of the weight for one of the result: a gated result has two."""
        return 2 if "c" in self.w_axes else 1

    @property
    def columns(self) -> int:
        return self.halves * self.outputs

    @property
    def padded_tokens(self) -> int:
        """The tokens that the tensor cores see: 8 or a power of two above."""
        return max(8, 1 << (self.tokens - 1).bit_length())


@dataclass(frozen=True)
class Config:
    """A block of threads multiplies `tile_n` columns of the weight, gate and up together, `tile_d` rows at a time.

    `stages` such tiles are on their way at once. `split` blocks, one cluster, share the columns: each takes a part
    of D, and their partial sums meet in shared memory, or in device memory with `exchange="gmem"` (the interpreter
    knows no shared memory of another block).

    `early_weights` reads the first tiles of the weight before the previous kernel of the program has ended
    (programmatic dependent launch), and lets the next kernel do so. The weight must then be older than that
    kernel: never the result of another call with `early_weights`.
    """

    tile_n: int
    tile_d: int
    stages: int
    split: int = 1
    early_weights: bool = False
    exchange: str = "smem"

    def __post_init__(self):
        require(self.tile_n in range(64, 257, 64), "tile_n", self.tile_n, "64, 128, 192, 256")
        require(self.tile_d in range(64, 257, 64), "tile_d", self.tile_d, "64, 128, 192, 256")
        require(self.stages >= 1, "stages", self.stages, "at least 1")
        require(1 <= self.split <= 8, "split", self.split, "1 to 8, the blocks of a portable cluster")
        require(self.exchange in ("smem", "gmem"), "exchange", repr(self.exchange), "'smem', 'gmem'")

    def tiles(self, shape: Shape) -> int:
        return math.ceil(shape.columns / self.tile_n)

    def blocks(self, shape: Shape) -> int:
        return self.tiles(shape) * self.split

    def steps(self, shape: Shape) -> int:
        """Tiles of the weight that a block multiplies; past the end of D they are zeros that nobody reads."""
        return math.ceil(shape.hidden / (self.tile_d * self.split))

    def owners(self, shape: Shape) -> int:
        """Blocks of a cluster that add up partial sums: each those of its own 8, 16, 32 or 64 tokens."""
        return min(1 << (self.split.bit_length() - 1), shape.padded_tokens // 8)

    def check(self, shape: Shape) -> None:
        """Raises ValueError where the kernel cannot run so."""
        unit = 64 * shape.halves
        require(self.tile_n % unit == 0, "tile_n", self.tile_n, f"a multiple of {unit} for a weight {shape.w_axes}")
        steps = self.steps(shape)
        require(self.stages <= steps, "stages", self.stages, f"at most the {steps} tiles that a block multiplies")
        used = smem_bytes(self, shape)
        require(used <= SMEM_OF_BLOCK, "shared memory of the config", used, f"at most {SMEM_OF_BLOCK} bytes")


@dataclass(frozen=True)
class Buffer:
    shape: tuple[int, ...]
    dtype: jnp.dtype
    operand: bool = False  # of the tensor cores: tiled and swizzled

    @property
    def bytes(self) -> int:
        return math.ceil(math.prod(self.shape) * jnp.dtype(self.dtype).itemsize / ALIGNMENT) * ALIGNMENT


def buffers(config: Config, shape: Shape) -> dict[str, Buffer]:
    """The shared memory of a block by name: the launch allocates it, the search counts it."""
    tokens, owners, f32 = shape.padded_tokens, config.owners(shape), jnp.dtype(jnp.float32)
    stages, tile_n, tile_d = config.stages, config.tile_n, config.tile_d
    tile_out, owned = tile_n // shape.halves, tokens // owners
    tile = (tile_n, tile_d) if shape.w_axes == "ND" else (tile_d, tile_out)
    found = {
        "w": Buffer((stages, shape.halves, *tile), shape.dtype, operand=True),
        "x": Buffer((stages, tokens, tile_d), shape.dtype, operand=True),
        "out": Buffer((owned, tile_out), shape.out_dtype),
    }
    if shape.norm_dtype is not None:
        found["scale"] = Buffer((stages, tile_d), shape.norm_dtype)
        found["scaled_x"] = Buffer((tokens, tile_d), shape.dtype, operand=True)
    if shape.bias_dtype is not None:
        found["bias"] = Buffer((shape.halves, tile_out), shape.bias_dtype)
    if shape.residual_dtype is not None:
        found["residual"] = Buffer((owned, tile_out), shape.residual_dtype)
    if config.split > 1 and config.exchange == "smem":
        found["products"] = Buffer((config.split, tile_n, owned), f32)
        if shape.norm_dtype is not None:
            found["squares"] = Buffer((config.split, tile_d, owned), f32)
    return found


def smem_bytes(config: Config, shape: Shape) -> int:
    return SMEM_OVERHEAD + sum(buffer.bytes for buffer in buffers(config, shape).values())


def heuristic(shape: Shape) -> Config:
    """One wave of blocks that fills the card, with room on every multiprocessor for two of them.

    All blocks do the same work and are in flight together, so that the memory divides its rate among them evenly
    wherever they run; the second place is for the next kernel's blocks.
    """
    wide = shape.padded_tokens >= 32  # x is read once per tile: wider tiles read it less often
    tile_n = 256 if wide else 128
    while tile_n > 64 * shape.halves and tile_n >= 2 * shape.columns:
        tile_n //= 2
    tile_d = 64
    if shape.w_axes == "ND" and not wide:
        tile_n, tile_d = 64, 128  # a row of a tile is a piece of a row of D: longer pieces
    tiles, steps = math.ceil(shape.columns / tile_n), math.ceil(shape.hidden / tile_d)
    split = 1
    while split < 8 and 2 * split <= steps and tiles * split < 0.9 * SMS:
        split *= 2
    return deepest(Config(tile_n, tile_d, 1, split), shape, blocks_of_sm=1 if wide else 2)


def deepest(config: Config, shape: Shape, *, blocks_of_sm: int) -> Config:
    """The config with as many stages as leave room for `blocks_of_sm` blocks on a multiprocessor, at least one."""
    budget = min(SMEM_OF_BLOCK, SMEM_OF_SM // blocks_of_sm)
    for stages in range(config.steps(shape), 1, -1):
        deeper = replace(config, stages=stages)
        if smem_bytes(deeper, shape) <= budget:
            return deeper
    return replace(config, stages=1)


def candidates(shape: Shape) -> list[Config]:
    """What a search should time: all that fit, save what leaves part of the card idle."""
    return list(dict.fromkeys(_candidates(shape)))


def _candidates(shape: Shape) -> Iterator[Config]:
    for tile_n, tile_d, split in itertools.product((64, 128, 256), (64, 128, 256), (1, 2, 3, 4, 5, 6, 8)):
        config = Config(tile_n, tile_d, 1, split)
        if tile_n % (64 * shape.halves) or config.steps(shape) < 2 or config.blocks(shape) < 0.9 * SMS:
            continue
        if split > 1 and config.blocks(shape) > 4 * SMS:
            continue
        for blocks_of_sm, early_weights in itertools.product((1, 2, 3), (False, True)):
            deep = replace(deepest(config, shape, blocks_of_sm=blocks_of_sm), early_weights=early_weights)
            if deep.stages > 1 and smem_bytes(deep, shape) <= SMEM_OF_BLOCK:
                yield deep


@dataclass(frozen=True)
class Tuned:
    """What was measured of a shape: the largest M at which the kernel beats XLA, and configs by padded tokens."""

    crossover: int
    configs: dict[int, Config]


# (order of the weight's axes, D, N) -> what was measured on an H200; nothing yet.
TUNED: dict[tuple[str, int, int], Tuned] = {}
UNTUNED = Tuned(crossover=MAX_TOKENS, configs={})  # a guess


def config_for(shape: Shape) -> Config:
    """The fastest config where the shape has been measured, else the heuristic one."""
    return _tuned(shape).configs.get(shape.padded_tokens) or heuristic(shape)


def crossover(shape: Shape) -> int:
    return _tuned(shape).crossover


def _tuned(shape: Shape) -> Tuned:
    return TUNED.get((shape.w_axes, shape.hidden, shape.outputs), UNTUNED)
