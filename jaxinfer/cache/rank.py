"""What one rank of the axis `context` has of a step's attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from jaxinfer.cache.pages import NULL_PAGE, Pages, View
from jaxinfer.cache.quantized import numbers
from jaxinfer.parallel import CONTEXT
from pallas_kernels.parts import Part, merged_all
from pallas_kernels.stripe import Stripe


@dataclass(frozen=True)
class Rank:
    """One rank's part in the attention of a step: how it sees the tokens, and what the scores go through."""

    view: View
    scores: dict[str, Any]

    @property
    def stripe(self) -> Stripe:
        return Stripe(jax.lax.axis_index(CONTEXT), jax.lax.axis_size(CONTEXT))

    @property
    def window(self) -> int | None:
        return self.scores["window"]

    def table(self, table_BJ: jax.Array, pages: Pages) -> jax.Array:
        """The pages of the rank alone, by their numbers here."""
        ranks, here = self.stripe.ranks, pages.k_PSKH.shape[0]
        padded_BJ = jnp.pad(table_BJ, ((0, 0), (0, -table_BJ.shape[1] % ranks)), constant_values=NULL_PAGE)
        own_BJ = padded_BJ.reshape(len(table_BJ), -1, ranks)[:, :, self.stripe.rank]
        return own_BJ % here

    def places(self, write_T: jax.Array, pages: Pages) -> jax.Array:
        """Where tokens are written here: those of other ranks' pages go to the null page."""
        here, page_size = pages.k_PSKH.shape[:2]
        own_T = write_T - self.stripe.rank * here * page_size
        return jnp.where((own_T >= 0) & (own_T < here * page_size), own_T, NULL_PAGE * page_size)

    def attended(self, op: Any, q: jax.Array, pages: Pages, *arguments: jax.Array, anywhere: bool = False, **options):
        """A kernel's result as a part.

        Args:
            anywhere: whether the choice of a kernel is left to the input, since few take it.
        """
        implementation = self.view.implementation
        if anywhere and implementation != "reference":
            implementation = "auto"
        out, lse = op(
            q, numbers(pages.k_PSKH), numbers(pages.v_PSKH), *arguments, k_scales_PKS=pages.k_scales_PKS,
            v_scales_PKS=pages.v_scales_PKS, return_lse=True, implementation=implementation, **self.scores | options,
        )  # fmt: skip
        return Part(out.astype(jnp.float32), lse)


def over_ranks(own: Part) -> Part:
    """The parts of all ranks merged, in one message and in the same order on each: no two ever differ."""
    packed = jnp.concatenate([own.out, own.lse[..., None]], axis=-1)
    packed = jax.lax.all_gather(packed, CONTEXT)
    return merged_all(Part(packed[..., :-1], packed[..., -1]))
