"""A head on the model's features drafts, one layer that goes on from what it expects itself (Li et al. 2024, "EAGLE:
Speculative Sampling Requires Rethinking Feature Uncertainty", arXiv 2401.15077).

A feature is the model's last hidden state, which a token is drawn after. The head is given each token with the feature
that it was drawn after, and says the next feature; the model's output matrix says which tokens are likely then. Of
proposed tokens it is given its own features. So its likeliest tokens make a tree, grown level by level.

Its layer has pages of the same numbers as the model's. The features of the newest tokens are kept for each slot: the
first pass of a proposal writes their keys and values, in the place of what they were proposed with.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from jaxinfer.cache import Pages
from jaxinfer.decode.batch import Batch, make_drafted
from jaxinfer.decode.forward import Cache, Forward
from jaxinfer.decode.likeliest import likeliest
from jaxinfer.decode.sampling import Needs
from jaxinfer.decode.slots import SlotState
from jaxinfer.decode.speculative.medusa import sparse_tree
from jaxinfer.decode.speculative.method import (
    Loader,
    Observed,
    Pass,
    Pool,
    Proposal,
    Speculation,
    check_drafts,
    group_of,
)
from jaxinfer.decode.tree import MOST_DRAFTS, Tree
from jaxinfer.model import EagleHead, Model, Params

# How often the likeliest token is right is taken to be this at every depth: a rule of thumb, to choose a tree by.
RIGHT = 0.7


class Recent(NamedTuple):
    """What is kept of every slot.

    Attributes:
        hidden_BdD: the hidden states, before the final norm, of the newest tokens in the cache of the model, at the
            end those after which the newest token was drawn. One more than a step may accept.
        known_B: how many of them are known, the last ones; at least one in a slot that decodes.
    """

    hidden_BdD: jax.Array
    known_B: jax.Array


class Level(NamedTuple):
    """The nodes of one depth.

    Attributes:
        parent_n: of each, its place among those nodes of the level before that have children.
        rank_n: how many tokens are likelier there.
        inner_m: which of the nodes have children.
        tree: of all nodes with children up to this depth; None for a chain, and where the last level has none.
        rows: of the pass over these and the newest token.
    """

    parent_n: np.ndarray
    rank_n: np.ndarray
    inner_m: np.ndarray
    tree: Tree | None
    rows: int


@dataclass(frozen=True)
class Eagle(Speculation):
    """Proposes a tree of the tokens that a draft head says to be the likeliest.

    Attributes:
        checkpoint: a folder, or a Hugging Face id, with a `config.json` and a `model.safetensors` in the layout of the
            published heads of EAGLE-1 and 2: `fc.weight`, of embedding and feature, perhaps `fc.bias`, and a layer
            `layers.0` with Llama's names but no `input_layernorm`; `embed_tokens.weight`, or the model's own.
        num_speculative_tokens: nodes of the tree, 1..MOST_DRAFTS; see `sparse_tree`.
        depth: of the longest path; each token of it takes a pass of the head.
        branches: tokens that may follow the same one, at most; 1 proposes a chain.
        head, params: the head and its parameters, once they are loaded.

    Raises:
        ValueError: one of them is out of range.
    """

    checkpoint: str | Path
    num_speculative_tokens: int = 15
    depth: int = 5
    branches: int = 4
    head: EagleHead | None = field(default=None, repr=False, compare=False)
    params: Params | None = field(default=None, repr=False, compare=False)
    reads_text = True

    def __post_init__(self):
        check_drafts(self.num_speculative_tokens)
        for name in ("depth", "branches"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= MOST_DRAFTS:
                raise ValueError(f"{name} = {value!r} must be an integer in 1..{MOST_DRAFTS}")
        self.choices  # noqa: B018, a tree of so many nodes must be possible

    def loaded(self, loader: Loader) -> Self:
        head, params = loader.head(self.checkpoint)
        return replace(self, head=head, params=params)

    def check(self, model: Model) -> None:
        if self.head is None:
            raise ValueError(f"the head {self.checkpoint} is not loaded; `LLM` loads it")
        if group_of(None, model.config.windows) is None:
            raise ValueError(
                f"the head {self.checkpoint} attends to all tokens; the model keeps no more keys than those in its "
                f"windows, {model.config.windows}"
            )

    @cached_property
    def choices(self) -> tuple[tuple[int, ...], ...]:
        """The ranks on the path to each node, level by level."""
        paths = sparse_tree(
            self.depth, self.num_speculative_tokens, first=RIGHT, later=1.0, branches=self.branches
        )  # fmt: skip
        return tuple(sorted(paths, key=len))

    @property
    def tree(self) -> Tree:
        return self._tree

    @cached_property
    def _tree(self) -> Tree:
        return _tree_of(self.choices)

    @cached_property
    def levels(self) -> tuple[Level, ...]:
        with_children = {path[:-1] for path in self.choices}
        inner: list[tuple[int, ...]] = []
        before: list[tuple[int, ...]] = [()]
        levels = []
        for depth in range(1, self._tree.depth + 1):
            nodes = [path for path in self.choices if len(path) == depth]
            own = [place for place, path in enumerate(nodes) if path in with_children]
            inner += [nodes[place] for place in own]
            tree = _tree_of(tuple(inner)) if own else None
            levels.append(
                Level(
                    parent_n=np.array([before.index(path[:-1]) for path in nodes]),
                    rank_n=np.array([path[-1] for path in nodes]),
                    inner_m=np.array(own, np.int32),
                    tree=None if tree is None or tree.is_chain else tree,
                    rows=1 + len(inner),
                )
            )
            before = [nodes[place] for place in own]
        return tuple(levels)

    @property
    def weights(self) -> Params:
        assert self.params is not None
        return self.params

    def passes(self, model: Model) -> list[Pass]:
        assert self.head is not None
        config = self.head.config
        return [Pass(config, self.tree.depth + 1)] + [Pass(config, level.rows) for level in self.levels[:-1]]

    def pools(self, model: Model) -> list[Pool]:
        head = self.head
        assert head is not None
        return [Pool(self._group(model), head.kv_slots, head.kv_slots_per_device, head.config.head_size)]

    def memory(self, model: Model, slots: int) -> Recent:
        shape = slots, self.tree.depth + 1, model.config.hidden_size
        hidden: jax.Array | np.ndarray = np.zeros(shape, jnp.dtype(model.config.dtype))
        return Recent(hidden, np.zeros(slots, np.int32))  # pyright: ignore[reportArgumentType], on the host

    def remember(self, state: SlotState, hidden_TD: jax.Array, rows_Bd: jax.Array, taken_B: jax.Array) -> Recent:
        kept: Recent = state.memory
        count = kept.hidden_BdD.shape[1]
        joined_BnD = jnp.concatenate([kept.hidden_BdD, hidden_TD[rows_Bd]], axis=1)
        place_Bd = taken_B[:, None] + jnp.arange(count, dtype=jnp.int32)[None]
        # What a part of a prompt ends with does not follow what an earlier part did.
        follows_B = jnp.where(state.active_B | (taken_B == 0), kept.known_B, 0)
        return Recent(
            jnp.take_along_axis(joined_BnD, place_Bd[:, :, None], axis=1), jnp.minimum(follows_B + taken_B, count)
        )

    def propose(
        self, target: Forward, params: Params, needs: Needs, state: SlotState, cache: Cache
    ) -> tuple[Proposal, Cache]:
        """Lets the head catch up with the newest tokens, then grows the tree. A level's pass computes those nodes once
        more that come before it: they are few, and their keys and values end up as they were."""
        slots, pages, recent = len(state.token_B), cache[-1], state.memory
        batch, features_TD = self._catching_up(target, params, state)
        expected_TD, pages = self._run(target, params, batch, features_TD, pages)
        newest_B1 = jnp.maximum(recent.known_B - 1, 0)[:, None]
        outputs_BnD = jnp.take_along_axis(
            expected_TD.reshape(slots, -1, expected_TD.shape[1]), newest_B1[..., None], 1
        )
        features_BrD = self._features(target, params, recent.hidden_BdD[:, -1])[:, None]
        drafts, inner_Bm = [], jnp.zeros((slots, 0), jnp.int32)
        for level in self.levels:
            ranked_Bnr = _likeliest(target, params, outputs_BnD, int(level.rank_n.max()) + 1)
            tokens_Bn = ranked_Bnr[:, level.parent_n, level.rank_n]
            drafts.append(tokens_Bn)
            if not len(level.inner_m):
                break
            inner_Bm = jnp.concatenate([inner_Bm, tokens_Bn[:, level.inner_m]], axis=1)
            before_BmD = outputs_BnD[:, level.parent_n[level.inner_m]]
            features_BrD = jnp.concatenate([features_BrD, before_BmD], axis=1)
            batch = make_drafted(state, inner_Bm, target.page_size, level.tree)
            features_TD = features_BrD.reshape(-1, features_BrD.shape[2])
            expected_TD, pages = self._run(target, params, batch, features_TD, pages)
            outputs_BnD = expected_TD.reshape(features_BrD.shape)[:, -len(level.inner_m) :]
        return Proposal(jnp.concatenate(drafts, axis=1)), (*cache[:-1], pages)

    def observe(self, target: Forward, params: Params, state: SlotState, step: Observed, cache: Cache) -> Cache:
        """The feature before a slot's first row is the one that is kept, and nothing where there is none: at the
        beginning of a text, and behind pages that another sequence has computed."""
        recent: Recent = state.memory
        known_BD = self._features(target, params, recent.hidden_BdD[:, -1])
        known_BD = jnp.where((recent.known_B > 0)[:, None], known_BD, 0)
        before_TD = jnp.roll(self._features(target, params, step.hidden_TD), 1, axis=0)
        features_TD = before_TD.at[step.first_B].set(known_BD, mode="drop")
        return (*cache[:-1], self._run(target, params, step.batch, features_TD, cache[-1])[1])

    def _catching_up(self, target: Forward, params: Params, state: SlotState) -> tuple[Batch, jax.Array]:
        """The newest tokens of each slot, as many as the features before them are known, with these; rows behind them
        are of no use, and neither are the keys and values that they write behind the newest token's."""
        assert state.text_BT is not None
        hidden_BdD, known_B = state.memory
        count = hidden_BdD.shape[1]
        row_1d = jnp.arange(count, dtype=jnp.int32)[None]
        first_B = state.length_B + 1 - known_B
        place_Bd = jnp.minimum(first_B[:, None] + row_1d, state.text_BT.shape[1] - 1)
        tokens_Bd = jnp.take_along_axis(state.text_BT, place_Bd, axis=1)
        earlier = replace(state, token_B=tokens_Bd[:, 0], length_B=first_B)
        kept_Bd = jnp.minimum(count - known_B[:, None] + row_1d, count - 1)
        own_BdD = jnp.take_along_axis(hidden_BdD, kept_Bd[:, :, None], axis=1)
        features_TD = self._features(target, params, own_BdD.reshape(-1, own_BdD.shape[2]))
        return make_drafted(earlier, tokens_Bd[:, 1:], target.page_size), features_TD

    def _run(
        self, target: Forward, params: Params, batch: Batch, features_TD: jax.Array, pages: Pages
    ) -> tuple[jax.Array, Pages]:
        """The features that the head expects of a batch of the model's, and its pages."""
        assert self.head is not None
        batch = replace(batch, views=(batch.views[self._group(target.model)],))
        batch, weights = target.scheduled(batch, self.head), params[len(target.model.parameters) :]
        return self.head.forward(weights, target.model, target.own(params), batch, features_TD, pages)

    def _features(self, target: Forward, params: Params, hidden_TD: jax.Array) -> jax.Array:
        return target.model.head(target.own(params), hidden_TD)[0]

    def _group(self, model: Model) -> int:
        """The cache group of the model that keeps all keys."""
        group = group_of(None, model.config.windows)
        assert group is not None
        return group


def _likeliest(target: Forward, params: Params, features_BnD: jax.Array, count: int) -> jax.Array:
    """The likeliest tokens after each feature, int32 [B, n, count]."""
    slots, nodes, width = features_BnD.shape
    _, head_VD, _ = target.model.head(target.own(params), features_BnD[:0, 0])
    features_TD = features_BnD.reshape(-1, width)
    logits_TV = jnp.einsum("TD,VD->TV", features_TD, head_VD, preferred_element_type=jnp.float32)
    return likeliest(jax.sharding.reshard(logits_TV, P(None, None)), count)[1].reshape(slots, nodes, count)


def _tree_of(paths: tuple[tuple[int, ...], ...]) -> Tree:
    """Of paths that come after those that they go on from."""
    places = {path: place for place, path in enumerate(paths)} | {(): -1}
    return Tree(tuple(places[path[:-1]] for path in paths))
