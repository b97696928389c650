"""A decode step that verifies what a method proposes, in its three parts.

In a loop of steps they are one program. Where the host has a say in what is drawn, each is a program of its own: the
host checks what was proposed while the forward pass runs.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from jaxinfer.cache import move
from jaxinfer.decode.batch import accepted_moves, make_drafted
from jaxinfer.decode.forward import Cache, Forward
from jaxinfer.decode.sampling import Needs, Sampled
from jaxinfer.decode.slots import SlotState
from jaxinfer.decode.speculative.method import Pool, Proposal, Speculation, tree_of
from jaxinfer.decode.speculative.verify import verify
from jaxinfer.decode.tree import Ancestry, GrownTree, Tree
from jaxinfer.model import Params


@dataclass(frozen=True)
class SpeculativeStep:
    """One token for each slot that is active, and those before it that were right.

    Attributes:
        forward: the model.
        pools: layers of the cache.
    """

    forward: Forward
    method: Speculation
    pools: tuple[Pool, ...]

    @cached_property
    def tree(self) -> Tree | GrownTree | None:
        return tree_of(self.method)

    @jax.named_scope("speculation")
    def propose(self, params: Params, needs: Needs, state: SlotState, cache: Cache) -> tuple[Proposal, Cache]:
        return self.method.propose(self.forward, params, needs, state, cache)

    def run(
        self, params: Params, state: SlotState, cache: Cache, proposal: Proposal
    ) -> tuple[Cache, jax.Array, jax.Array]:
        """The cache with the keys and values of the newest token of each slot and those that are proposed, the logits
        after each [B x (k + 1), V], and what of each the method is shown."""
        batch = make_drafted(state, proposal.drafts_Bk, self.forward.page_size, self._ancestry(proposal))
        row_W = jnp.arange(len(batch.tokens_T), dtype=jnp.int32)
        ran = self.forward(params, cache, batch, row_W)
        assert ran.shown_TE is not None
        return ran.cache, ran.logits_WV, ran.shown_TE

    def take(
        self, needs: Needs, state: SlotState, cache: Cache, proposal: Proposal, logits_WV: jax.Array,
        shown_TE: jax.Array,
    ) -> tuple[SlotState, Cache, Sampled, jax.Array]:  # fmt: skip
        """Draws after each row, and takes what counts.

        Returns:
            state and cache after that, the draws along the path that was taken with leading axes d and B, and which of
            them count, bool [d, B].
        """
        tree = self._ancestry(proposal)
        with jax.named_scope("sampling"):
            logits_WV = jax.sharding.reshard(logits_WV, P(None, None))
            verified = verify(state, logits_WV, proposal, needs, tree, self.method.typical)
        after, sampled, emits_dB, rows_Bd, drawn_BQ = verified
        taken_B = emits_dB.sum(axis=0, dtype=jnp.int32)
        if tree is not None:
            cache = self._in_place(state, cache, rows_Bd, taken_B)
        row_W = jnp.arange(len(logits_WV), dtype=jnp.int32)
        flat_Bd = row_W.reshape(len(taken_B), -1)[:, :1] + rows_Bd
        after = remembering(self.method, state, after, shown_TE, flat_Bd, taken_B)
        if after.memory is not None:
            with jax.named_scope("speculation"):
                tokens_BQ = jnp.concatenate([state.token_B[:, None], proposal.drafts_Bk], axis=1)
                after = replace(after, memory=self.method.learn(after.memory, tokens_BQ, drawn_BQ, taken_B))
        return after, cache, sampled, emits_dB

    def on_host(self, proposal: Proposal) -> tuple[np.ndarray, np.ndarray]:
        """The proposed tokens of each slot, and which of them each follows, as `Tree.parents`, [B, k]."""
        drafts_Bk = np.asarray(proposal.drafts_Bk)
        if proposal.parents_Bk is not None:
            return drafts_Bk, np.asarray(proposal.parents_Bk)
        parents_k = self.tree.parents if isinstance(self.tree, Tree) else range(-1, drafts_Bk.shape[1] - 1)
        return drafts_Bk, np.broadcast_to(np.array(parents_k, np.int32), drafts_Bk.shape)

    def _ancestry(self, proposal: Proposal) -> Ancestry | None:
        """Which of the proposed tokens follow which; None where each follows the one before."""
        if isinstance(self.tree, GrownTree):
            assert proposal.parents_Bk is not None
            return self.tree.ancestry(proposal.parents_Bk)
        return None if self.tree is None else self.tree.ancestry

    @jax.named_scope("accepted")
    def _in_place(self, state: SlotState, cache: Cache, rows_Bd: jax.Array, taken_B: jax.Array) -> Cache:
        """The cache with the keys and values of the path that was taken through a tree one after the other."""
        moves = accepted_moves(state, rows_Bd, taken_B, self.forward.page_size)
        return tuple(move(pages, *moves[pool.group]) for pages, pool in zip(cache, self.pools, strict=True))


def remembering(
    method: Speculation | None, before: SlotState, after: SlotState, shown_TE: jax.Array | None, rows_Bd: jax.Array,
    taken_B: jax.Array,
) -> SlotState:  # fmt: skip
    """The state after a step with what a method keeps of it, if it does; see `Speculation.remember`."""
    if before.memory is None:
        return after
    assert method is not None
    assert shown_TE is not None
    return replace(after, memory=method.remember(before, shown_TE, rows_Bd, taken_B))
