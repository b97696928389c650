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

    def load(self, w_ref: Ref, tile_ref: Ref, barrier: Ref, n: jax.Array | int, d: jax.Array | int) -> None:
        """Starts the copy of the tile at column n and row d; past the end of an axis it is filled with zeros."""
        columns, rows = pl.ds(n, self.tile_n // self.copies), pl.ds(d, self.tile_d)
        match self.w_axes:
            case "DN":
                sources = [w_ref.at[rows, columns]]
            case "ND":
                sources = [w_ref.at[columns, rows]]
            case _:
                sources = [w_ref.at[rows, half, columns] for half in range(2)]
        for half, source in enumerate(sources):
            plgpu.copy_gmem_to_smem(source, tile_ref.at[half], barrier)

    def multiply(self, product_NM: Ref, tile_ref: Ref, x_MD: Ref) -> None:
        """product_NM += w_tile^T x^T: the weight's columns are the many rows that tensor cores work on."""
        columns = self.tile_n // self.copies
        for half in range(self.copies):
            tile = tile_ref.at[half]
            w_ND = tile if self.w_axes == "ND" else tile.T
            plgpu.wgmma(product_NM.at[half * columns : (half + 1) * columns], w_ND, x_MD.T)
