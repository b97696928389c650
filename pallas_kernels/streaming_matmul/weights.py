"""Tiles of the weight: how they come from device memory, and how the tensor cores take them.

Nothing else of the kernel knows how the weight is stored.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

if TYPE_CHECKING:
    from pallas_kernels.streaming_matmul.config import Config

Ref = Any  # of an array in device or shared memory, or of a barrier


@dataclass(frozen=True)
class Tiles:
    """Tiles of a 16-bit weight: those of D, of N and, where the weight has two halves, of each of them.

    A tile comes in `halves` x `pieces` copies of `rows` rows of D and `columns` columns of N, in this order.
    """

    w_axes: str
    halves: int
    pieces: int
    rows: int
    columns: int

    @classmethod
    def of(cls, w_axes: str, config: Config) -> Tiles:
        halves = 2 if "c" in w_axes else 1
        return cls(w_axes, halves, config.pieces, config.tile_d // config.pieces, config.tile_n // halves)

    @property
    def copies(self) -> int:
        """Arrivals on the barrier for one tile."""
        return self.halves * self.pieces

    @property
    def shape(self) -> tuple[int, ...]:
        """Of a tile in shared memory."""
        by_rows = self.w_axes.endswith("ND")
        return (self.copies, *((self.columns, self.rows) if by_rows else (self.rows, self.columns)))

    def load(
        self,
        w_ref: Ref,
        tile_ref: Ref,
        barrier: Ref,
        *,
        expert: jax.Array | None,
        column: jax.Array | int,
        row: jax.Array | int,
    ) -> None:
        """Starts the copy of the tile at this column of N and row of D; past the end of an axis it is zeros."""
        for half, piece in itertools.product(range(self.halves), range(self.pieces)):
            rows = pl.ds(row + piece * self.rows, self.rows)
            place = {"D": rows, "N": pl.ds(column, self.columns), "E": expert, "c": half}
            source = w_ref.at[tuple(place[axis] for axis in self.w_axes)]
            plgpu.copy_gmem_to_smem(source, tile_ref.at[half * self.pieces + piece], barrier)

    def multiply(self, product_NM: Ref, tile_ref: Ref, x_ref: Ref) -> None:
        """product_NM += w_tile^T x^T: the weight's columns are the many rows that tensor cores work on.

        x_ref holds the x of each piece, [pieces, M, rows].
        """
        for half, piece in itertools.product(range(self.halves), range(self.pieces)):
            tile = tile_ref.at[half * self.pieces + piece]
            w_ND = tile if self.w_axes.endswith("ND") else tile.T
            plgpu.wgmma(product_NM.at[half * self.columns : (half + 1) * self.columns], w_ND, x_ref.at[piece].T)
