"""A block of threads at work on a product: what it multiplies, in which rounds, and where everything lies."""

import math
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.streaming_matmul.config import Config, Shape
from pallas_kernels.streaming_matmul.weights import Tiles

WGMMA = plgpu.Layout.WGMMA
BY_COLUMN = WGMMA.reduce(1)


class Work(NamedTuple):
    """What a block multiplies in one round: a tile of columns, for one group of tokens."""

    exists: jax.Array | bool
    group: jax.Array | int
    tile: jax.Array
    expert: jax.Array | None


@dataclass(frozen=True)
class Block:
    """A block of threads at work on a product: its problem, and its view of device and shared memory.

    A team, of the `split` blocks that share columns, takes the tiles of columns that follow its number, in as many
    rounds as it needs. It is a cluster, or in a launch of several products a single block of one.

    Attributes:
        clusters, blocks: of the launch.
    """

    shape: Shape
    config: Config
    norm_eps: float
    clusters: int
    blocks: int
    gmem: SimpleNamespace
    smem: SimpleNamespace

    @property
    def tiles(self) -> Tiles:
        return Tiles.of(self.shape.w_axes, self.config)

    @property
    def owned_tokens(self) -> int:
        return self.shape.padded_tokens // self.config.owners(self.shape)

    @property
    def steps(self) -> int:
        return self.config.steps(self.shape)

    @property
    def items(self) -> int:
        """Tiles of columns of all groups."""
        return self.shape.groups * self.config.tiles(self.shape)

    @property
    def teams(self) -> int:
        return self.blocks // self.config.split

    @property
    def team(self) -> jax.Array:
        cluster = lax.axis_index("cluster")
        if self.teams == self.clusters:
            return cluster
        return cluster * (self.blocks // self.clusters) + lax.axis_index("part")

    @property
    def rounds(self) -> int:
        return math.ceil(self.items / self.teams)

    @property
    def reuses_inbox(self) -> bool:
        """Whether partial sums come to the same place more than once in this launch."""
        return hasattr(self.smem, "inbox_free")

    @property
    def part(self) -> jax.Array:
        """Which part of D; the blocks with the lowest numbers also own tokens of the result."""
        return lax.axis_index("part") if self.config.split > 1 else lax.axis_index("part") * 0

    def work(self, round_: jax.Array | int) -> Work:
        """In a round, neighbouring blocks have neighbouring columns."""
        tiles = self.config.tiles(self.shape)
        item = self.team + round_ * self.teams
        exists = True if self.items == self.teams else item < self.items
        group, tile = (0, item) if self.shape.groups == 1 else (lax.div(item, tiles), lax.rem(item, tiles))
        if self.gmem.expert is None:
            return Work(exists, group, tile, None)
        return Work(exists, group, tile, self.gmem.expert[lax.min(group, self.shape.groups - 1)])

    def result(self, work: Work) -> tuple[jax.Array | int, pl.Slice, pl.Slice]:
        """The group, tokens and columns of the result that an owner writes."""
        columns = self.config.tile_n // self.shape.halves
        owned = self.owned_tokens
        return work.group, pl.ds(self.part * owned, owned), pl.ds(work.tile * columns, columns)


def when(condition: jax.Array | bool) -> Any:
    """`pl.when`, but nothing of it where the condition is known."""
    if isinstance(condition, bool):
        return (lambda body: body()) if condition else (lambda body: None)
    return pl.when(condition)
