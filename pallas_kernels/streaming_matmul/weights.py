"""Tiles of the weight: how they come from device memory, and how the tensor cores take them.

Nothing else of the kernel knows how the weight is stored.
"""

from dataclasses import dataclass
from typing import Any

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

Ref = Any  # of an array in device or shared memory, or of a barrier


@dataclass(frozen=True)
class Tiles:
    """Tiles of a 16-bit weight: those of D, of N and, where the weight has two halves, of each of them."""

    w_axes: str
    tile_n: int
    tile_d: int

    @property
    def copies(self) -> int:
        """Arrivals on the barrier for one tile."""
        return 2 if "c" in self.w_axes else 1

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
        place = {"D": pl.ds(row, self.tile_d), "N": pl.ds(column, self.tile_n // self.copies), "E": expert}
        for half in range(self.copies):
            source = w_ref.at[tuple((place | {"c": half})[axis] for axis in self.w_axes)]
            plgpu.copy_gmem_to_smem(source, tile_ref.at[half], barrier)

    def multiply(self, product_NM: Ref, tile_ref: Ref, x_MD: Ref) -> None:
        """product_NM += w_tile^T x^T: the weight's columns are the many rows that tensor cores work on."""
        columns = self.tile_n // self.copies
        for half in range(self.copies):
            tile = tile_ref.at[half]
            w_ND = tile if self.w_axes.endswith("ND") else tile.T
            plgpu.wgmma(product_NM.at[half * columns : (half + 1) * columns], w_ND, x_MD.T)
