"""A method that proposes trees which are right along one path, for a while."""

from dataclasses import dataclass

import jax.numpy as jnp

from jaxinfer.decode.speculative import Proposal, Speculation, Tree
from jaxinfer.decode.speculative.autoregressive import draft

# Leaves of several depths, and children far from their parents.
PARENTS = (-1, -1, 0, 1, 1, 3, -1, 5, 2)


@dataclass(frozen=True)
class Branching(Speculation):
    """Asks the model itself what comes, puts that on a path to one row or another, and other tokens everywhere else.
    Of every third index of the output the second token is wrong too."""

    parents: tuple[int, ...] = PARENTS
    draws = True

    @property
    def num_speculative_tokens(self):  # pyright: ignore[reportIncompatibleVariableOverride]
        return len(self.parents)

    @property
    def tree(self):
        return Tree(self.parents)

    def propose(self, target, params, needs, state, cache):
        chain, cache = draft(target, params, cache, state, needs, self.tree.depth, catch_up=False, coupled=True)
        depth_k, node_k = self.tree.depth_Q[1:], jnp.arange(len(self.parents), dtype=jnp.int32)
        right_Bk = chain.drafts_Bk[:, depth_k - 1]
        end_B = state.index_B * 7 % (len(self.parents) + 1)
        wrong_Bk = (state.index_B % 3 == 2)[:, None] & (depth_k == 2)[None]
        kept_Bk = jnp.asarray(self.tree.seen_QQ)[end_B, 1:] & ~wrong_Bk
        other_Bk = (right_Bk + 1 + node_k[None]) % target.model.config.vocab_size
        return Proposal(jnp.where(kept_Bk, right_Bk, other_Bk)), cache
