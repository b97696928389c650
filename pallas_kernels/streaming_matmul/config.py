"""How the kernel cuts a problem: its config, the shared memory that takes, and which config a problem gets."""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import jax.numpy as jnp

from pallas_kernels import tuned
from pallas_kernels.checks import require
from pallas_kernels.dispatch import FALLBACK, MULTIPROCESSORS, Refusal
from pallas_kernels.hopper import SHARED_BYTES, buffer_bytes
from pallas_kernels.streaming_matmul.arguments import Arguments
from pallas_kernels.streaming_matmul.weights import Tiles

MAX_TOKENS = 64
MAX_TOKENS_OF_ROW = 32  # that leave room for a ring of tiles beside x
ROWS = 64  # of D, the least that a tile has; the norm works on so many at once
SMEM_OF_SM = 228 * 1024  # shared memory of a multiprocessor; a block has SHARED_BYTES of it
# What a block takes besides its buffers: the system's 1 KB, barriers, and the scratch of a sum across warps.
SMEM_OVERHEAD = 1024 + 1024 + 2048


@dataclass(frozen=True)
class Shape:
    """All that a config depends on, known when the program is traced."""

    tokens: int
    hidden: int
    outputs: int
    w_axes: str
    dtype: jnp.dtype
    out_dtype: jnp.dtype
    groups: int = 1  # of tokens, each of which has an expert
    norm_dtype: jnp.dtype | None = None
    bias_dtype: jnp.dtype | None = None
    residual_dtype: jnp.dtype | None = None

    @classmethod
    def of(cls, arguments: Arguments) -> "Shape":
        def dtype(array: jax.Array | None) -> jnp.dtype | None:
            return None if array is None else jnp.dtype(array.dtype)

        return cls(
            tokens=arguments.tokens,
            hidden=arguments.hidden,
            outputs=arguments.outputs,
            w_axes=arguments.w_axes,
            dtype=jnp.dtype(arguments.x.dtype),
            out_dtype=jnp.dtype(arguments.out_dtype),
            groups=arguments.x.shape[0] if arguments.of_experts else 1,
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

    `stages` such tiles are on their way at once. A block takes up to `rounds` tiles of columns one after another,
    and the tiles of the next are on their way before it has finished with one. `split` blocks, one cluster, share
    the columns: each takes a part of D, and their partial sums meet in shared memory, or in device memory with
    `exchange="gmem"` (the interpreter knows no shared memory of another block). A tile comes in `pieces` copies along
    D: products in one launch share the buffers, and those without halves so get as many copies as those with.
    """

    tile_n: int
    tile_d: int
    stages: int
    split: int = 1
    rounds: int = 1
    exchange: str = "smem"
    pieces: int = 1

    def __post_init__(self):
        require(self.tile_n in range(64, 257, 64), "tile_n", self.tile_n, "64, 128, 192, 256")
        require(self.tile_d in range(64, 257, 64), "tile_d", self.tile_d, "64, 128, 192, 256")
        require(self.stages >= 2, "stages", self.stages, "at least 2")
        require(1 <= self.split <= 8, "split", self.split, "1 to 8, the blocks of a portable cluster")
        require(self.rounds >= 1, "rounds", self.rounds, "at least 1")
        require(self.split == 1 or self.rounds == 1, "rounds", self.rounds, "1 where blocks share columns")
        divides = self.pieces >= 1 and self.tile_d % (64 * self.pieces) == 0
        require(divides, "pieces", self.pieces, f"divisors of tile_d / 64 = {self.tile_d // 64}")
        require(self.exchange in ("smem", "gmem"), "exchange", repr(self.exchange), "'smem', 'gmem'")

    def tiles(self, shape: Shape) -> int:
        """Tiles of columns, of one group."""
        return math.ceil(shape.columns / self.tile_n)

    def clusters(self, shape: Shape) -> int:
        return math.ceil(shape.groups * self.tiles(shape) / self.rounds)

    def blocks(self, shape: Shape) -> int:
        return self.clusters(shape) * self.split

    def steps(self, shape: Shape) -> int:
        """Tiles of the weight that a block multiplies; past the end of D they are zeros that nobody reads."""
        return math.ceil(shape.hidden / (self.tile_d * self.split))

    def busy(self, shape: Shape) -> float:
        """The part of all blocks' time that they work, if each took the same time for a tile."""
        return shape.groups * self.tiles(shape) / (self.clusters(shape) * self.rounds)

    def owners(self, shape: Shape) -> int:
        """Blocks of a cluster that add up partial sums: each those of its own 8, 16, 32 or 64 tokens."""
        return min(1 << (self.split.bit_length() - 1), shape.padded_tokens // 8)

    def check(self, shape: Shape) -> None:
        """Raises ValueError where the kernel cannot run so."""
        unit = 64 * shape.halves
        require(self.tile_n % unit == 0, "tile_n", self.tile_n, f"a multiple of {unit} for a weight {shape.w_axes}")
        steps = self.steps(shape)
        require(self.stages <= steps, "stages", self.stages, f"at most the {steps} tiles that a block multiplies")
        used = smem_bytes((self, shape))
        require(used <= SHARED_BYTES, "shared memory of the config", used, f"at most {SHARED_BYTES} bytes")


@dataclass(frozen=True)
class Buffer:
    shape: tuple[int, ...]
    dtype: jnp.dtype
    operand: bool = False  # of the tensor cores: tiled and swizzled

    @property
    def bytes(self) -> int:
        return buffer_bytes(self.shape, self.dtype)


def buffers(config: Config, shape: Shape) -> dict[str, Buffer]:
    """The shared memory of a block by name: the launch allocates it, the search counts it."""
    tokens, owners, f32 = shape.padded_tokens, config.owners(shape), jnp.dtype(jnp.float32)
    stages, tile_n, tile_d = config.stages, config.tile_n, config.tile_d
    tile_out, owned = tile_n // shape.halves, tokens // owners
    pieces = config.pieces
    found = {
        "w": Buffer((stages, *Tiles.of(shape.w_axes, config).shape), shape.dtype, operand=True),
        "x": Buffer((stages, pieces, tokens, tile_d // pieces), shape.dtype, operand=True),
        "out": Buffer((owned, tile_out), shape.out_dtype),
    }
    if shape.norm_dtype is not None:
        found["scale"] = Buffer((config.steps(shape) * tile_d // ROWS, ROWS), shape.norm_dtype)
    if shape.bias_dtype is not None:
        found["bias"] = Buffer((shape.halves, tile_out), shape.bias_dtype)
    if shape.residual_dtype is not None:
        found["residual"] = Buffer((owned, tile_out), shape.residual_dtype)
    if config.split > 1 and config.exchange == "smem":
        found["products"] = Buffer((config.split, tile_n, owned), f32)
        if shape.norm_dtype is not None:
            found["squares"] = Buffer((config.split, ROWS, owned), f32)
    return found


def smem_bytes(*problems: tuple[Config, Shape]) -> int:
    """Of a block that works on products in a row: the ring of tiles is common, the rest where it is the same."""
    every = [buffers(*problem) for problem in problems]
    rest = {(name, buffer) for found in every for name, buffer in found.items() if name != "w"}
    return SMEM_OVERHEAD + max(found["w"].bytes for found in every) + sum(buffer.bytes for _, buffer in rest)


CLUSTER = 2  # blocks of one, in a launch of a row of products
MOST_CLUSTERS = MULTIPROCESSORS // CLUSTER


@dataclass(frozen=True)
class MLPConfig:
    """How one launch runs a row of products: all with the same ring of buffers, on the same clusters of two blocks.

    A tile of a weight is 128 x 128 numbers in two copies: 64 rows and 128 columns of a gate and of its up projection,
    or 64 columns and twice 128 rows of a weight without halves, whose columns two blocks share. All blocks must fit
    the card at once, since they wait for each other.
    """

    stages: int
    clusters: int
    exchange: str = "smem"

    def __post_init__(self):
        require(self.stages >= 2, "stages", self.stages, "at least 2")
        fits = 1 <= self.clusters <= MOST_CLUSTERS
        require(fits, "clusters", self.clusters, f"1 to {MOST_CLUSTERS}, which are on the card at once")

    def of(self, shapes: Sequence[Shape]) -> list[Config]:
        """The config of each product."""
        return [
            Config(256, 64, self.stages, exchange=self.exchange)
            if shape.halves == 2
            else Config(64, 256, self.stages, split=CLUSTER, exchange=self.exchange, pieces=2)
            for shape in shapes
        ]

    def check(self, shapes: Sequence[Shape]) -> None:
        """Raises ValueError where the kernel cannot run so."""
        problems = list(zip(self.of(shapes), shapes, strict=True))
        for config, shape in problems:
            config.check(shape)
        used = smem_bytes(*problems)
        require(used <= SHARED_BYTES, "shared memory of the config", used, f"at most {SHARED_BYTES} bytes")

    def steps(self, shapes: Sequence[Shape]) -> int:
        """Tiles that the busiest block multiplies."""
        return sum(self._steps(config, shape) for config, shape in zip(self.of(shapes), shapes, strict=True))

    def _steps(self, config: Config, shape: Shape) -> int:
        return math.ceil(config.tiles(shape) * config.split / (CLUSTER * self.clusters)) * config.steps(shape)


def row_refusal(row: Sequence[Arguments], weights: Mapping[str, str]) -> Refusal | None:
    """Why products that each can be a launch cannot be one together; None if they can. `weights` are the names of
    their weights, and of the axis along which each is multiplied."""
    shapes, shallow = [Shape.of(product) for product in row], MLPConfig(2, MOST_CLUSTERS)
    for (name, axis), product, shape, config in zip(weights.items(), row, shapes, shallow.of(shapes), strict=True):
        least = shallow.stages * config.split * config.tile_d
        if shape.hidden < least:
            blocks = "a block" if config.split == 1 else f"each of {config.split} blocks"
            allowed = f"{axis} at least {least}, {shallow.stages} tiles for {blocks}"
            return Refusal(f"{name}.shape", product.w.shape, allowed)
    if not _fits(shallow, shapes):
        allowed = f"a D that leaves shared memory for {shallow.stages} tiles of a weight beside the norm's scale"
        return Refusal("up.shape", row[-2].w.shape, allowed)
    return None


def mlp_config_for(shapes: Sequence[Shape]) -> MLPConfig:
    """As many stages as fit; the fewest clusters whose busiest block has least to do."""
    deepest = next(config for n in range(6, 1, -1) if _fits(config := MLPConfig(n, MOST_CLUSTERS), shapes))
    options = [replace(deepest, clusters=clusters) for clusters in range(FEWEST_BLOCKS // CLUSTER, MOST_CLUSTERS + 1)]
    return min(options, key=lambda config: (config.steps(shapes), config.clusters))


def _fits(config: MLPConfig, shapes: Sequence[Shape]) -> bool:
    problems = list(zip(config.of(shapes), shapes, strict=True))
    deep = all(config.stages <= each.steps(shape) for each, shape in problems)
    return deep and smem_bytes(*problems) <= SHARED_BYTES


# Blocks that keep the memory busy, and how far the tiles may fall short of dividing among them evenly.
FEWEST_BLOCKS = 88
LEAST_BUSY = 0.97
# Bytes of the weight on their way to one multiprocessor: more than the memory's latency times its rate asks for.
STREAMED_BYTES = 128 * 1024


def heuristic(shape: Shape) -> Config:
    """All blocks do the same work and are in flight together, one on a multiprocessor.

    The memory then divides its rate among them evenly, and two thirds of the multiprocessors are enough to take all
    of it: equal work is worth more than work for each of them. Splitting D costs an exchange, but it allows wider
    tiles, which read x less often: with many tokens x is as much to read as the weight.
    """
    few = [(1, 256), (1, 128), (1, 64), (2, 128), (2, 64), (4, 64)]
    many = [(1, 256), (1, 128), (2, 128), (3, 128), (1, 64), (2, 64), (4, 64)]
    for split, tile_n in many if shape.padded_tokens >= 32 else few:
        if tile_n % (64 * shape.halves) == 0 and (config := _even(shape, tile_n, split)):
            return config
    return deepest(Config(64 * shape.halves, 64, 2), shape)


def _even(shape: Shape, tile_n: int, split: int) -> Config | None:
    """The config of such tiles, where they divide evenly among enough blocks."""
    tile_d = 128 if tile_n == 64 else 64
    rounds = math.ceil(shape.groups * math.ceil(shape.columns / tile_n) * split / MULTIPROCESSORS)
    if (split > 1 and rounds > 1) or shape.hidden < 2 * split * tile_d:
        return None
    config = Config(tile_n, tile_d, 2, split, rounds)
    if config.blocks(shape) < FEWEST_BLOCKS or config.busy(shape) < LEAST_BUSY:
        return None
    config = deepest(config, shape)
    return config if smem_bytes((config, shape)) <= SHARED_BYTES else None


def deepest(config: Config, shape: Shape, *, blocks_of_sm: int = 1, streamed: int = STREAMED_BYTES) -> Config:
    """The config with as many stages as the shared memory takes and as are worth it, at least two."""
    budget = min(SHARED_BYTES, SMEM_OF_SM // blocks_of_sm)
    tile_bytes = config.tile_n * config.tile_d * shape.dtype.itemsize
    for stages in range(min(config.steps(shape), streamed // tile_bytes), 2, -1):
        deeper = replace(config, stages=stages)
        if smem_bytes((deeper, shape)) <= budget:
            return deeper
    return replace(config, stages=2)


def candidates(shape: Shape) -> list[Config]:
    """What a search should time: all that fit, save what leaves much of the card idle."""
    return list(dict.fromkeys(_candidates(shape)))


def _candidates(shape: Shape) -> Iterator[Config]:
    for tile_n, tile_d, split in itertools.product((64, 128, 192, 256), (64, 128, 256), (1, 2, 3, 4)):
        if tile_n % (64 * shape.halves) or shape.hidden < 2 * split * tile_d:
            continue
        tiles = shape.groups * math.ceil(shape.columns / tile_n)
        for blocks_of_sm, streamed in itertools.product((1, 2), (64 * 1024, STREAMED_BYTES, 192 * 1024)):
            rounds = math.ceil(tiles * split / (MULTIPROCESSORS * blocks_of_sm))
            if split > 1 and rounds > 1:
                continue
            config = Config(tile_n, tile_d, 2, split, rounds)
            config = deepest(config, shape, blocks_of_sm=blocks_of_sm, streamed=streamed)
            fits = smem_bytes((config, shape)) <= SMEM_OF_SM // blocks_of_sm - 1024
            if fits and config.blocks(shape) >= MULTIPROCESSORS // 3:
                yield config


TUNED = Path(__file__).with_name("tuned.json")


def tuning_key(shape: Shape) -> str:
    """A weight, and up to how many tokens."""
    tokens = 1 if shape.tokens == 1 else shape.padded_tokens
    return f"{shape.w_axes} {shape.hidden}x{shape.outputs}, M={tokens}"


def config_for(shape: Shape) -> Config:
    """The fastest config where some were measured, with as many of its stages as fit, else the heuristic one."""
    found = tuned.find(TUNED, tuning_key(shape))
    return _fitting(Config(**found), shape) if isinstance(found, dict) else heuristic(shape)


def _fitting(config: Config, shape: Shape) -> Config:
    """What a norm or a residual takes of the shared memory is not there for stages."""
    while config.stages > 2 and smem_bytes((config, shape)) > SHARED_BYTES:
        config = replace(config, stages=config.stages - 1)
    return config


def slower(shape: Shape) -> str | None:
    """Why XLA is the better choice, although the kernel could run; None if it is not."""
    if tuned.find(TUNED, tuning_key(shape)) != FALLBACK:
        return None
    return "XLA is faster at such sizes, as measured"
