"""A method that proposes what is hardest for an exact one: of any shape, from any distribution, or with knowledge of
the draws to come."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer.decode.speculative import Proposal, Speculation, Tree
from jaxinfer.decode.tree import GrownTree


@dataclass(frozen=True)
class Adversary(Speculation):
    """Behind the model's parameters it has a table, the logits of a proposed token by the one that it follows, and
    whether it knows what plain decoding draws: then this is the text of the slots, and every node proposes it.

    Attributes:
        shapes: parents of the nodes, of as many each. The slots have them by turns.
    """

    shapes: tuple[tuple[int, ...], ...]
    reads_text = True

    @property
    def num_speculative_tokens(self):  # pyright: ignore[reportIncompatibleVariableOverride]
        return len(self.shapes[0])

    @property
    def tree(self):
        trees = [Tree(parents) for parents in self.shapes]
        return trees[0] if len(trees) == 1 else GrownTree(trees[0].nodes, max(tree.depth for tree in trees))

    def propose(self, target, params, needs, state, cache):
        (table_VV, knows), slots, nodes = target.others(params), len(state.token_B), self.num_speculative_tokens
        parents_Bk = np.resize(np.array(self.shapes, np.int32), (slots, nodes))
        depth_Bk = np.resize([Tree(parents).depth_Q[1:] for parents in self.shapes], (slots, nodes))
        key = jax.random.fold_in(jax.random.key(state.sampling.seed_B[0]), state.length_B.sum())
        noise_kBV = jax.random.gumbel(key, (nodes, slots, len(table_VV)), jnp.float32)
        rows_BQ, text_BT = state.token_B[:, None], state.text_BT
        assert text_BT is not None
        for node in range(nodes):
            before_B1 = jnp.take_along_axis(rows_BQ, jnp.asarray(parents_Bk[:, [node]] + 1), axis=1)
            token_B = jax.lax.argmax(table_VV[before_B1[:, 0]] + noise_kBV[node], 1, jnp.int32)
            rows_BQ = jnp.concatenate([rows_BQ, token_B[:, None]], axis=1)
        known_Bk = jnp.take_along_axis(text_BT, state.length_B[:, None] + depth_Bk, axis=1)
        drafts_Bk = jnp.where(knows, known_Bk, rows_BQ[:, 1:])
        return Proposal(drafts_Bk, parents_Bk=jnp.asarray(parents_Bk) if len(self.shapes) > 1 else None), cache
