"""A head on the model's features drafts, one layer that goes on from what it expects itself (Li et al. 2024, "EAGLE:
Speculative Sampling Requires Rethinking Feature Uncertainty", arXiv 2401.15077).

A feature is the model's last hidden state, which a token is drawn after. The head is given each token with the feature
that it was drawn after, and says the next feature; the model's output matrix says which tokens are likely then. Of
proposed tokens it is given its own features. So its likeliest tokens make a tree, grown level by level; by default one
whose shape depends on how likely the head says they are (Li et al. 2024, "EAGLE-2: Faster Inference of Language Models
with Dynamic Draft Trees", arXiv 2406.16858).

Its layer has pages of the same numbers as the model's, and sees no more tokens than the widest of the model's windows.
The features of the newest tokens are kept for each slot: the first pass of a proposal writes their keys and values, in
the place of what they were proposed with.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from jaxinfer.cache import Pages
from jaxinfer.decode.arguments import check_size
from jaxinfer.decode.batch import Batch, make_drafted
from jaxinfer.decode.forward import Cache, Forward
from jaxinfer.decode.likeliest import likeliest
from jaxinfer.decode.sampling import Needs
from jaxinfer.decode.slots import SlotState
from jaxinfer.decode.speculative.medusa import sparse_tree
from jaxinfer.decode.speculative.method import (
    OWN,
    Loader,
    Observed,
    Pass,
    Pool,
    Proposal,
    Speculation,
    check_drafts,
    group_of,
)
from jaxinfer.decode.tree import MOST_DRAFTS, Ancestry, GrownTree, Tree
from jaxinfer.model import EagleHead, Model, Params

# How often the likeliest token is right is taken to be this at every depth: a rule of thumb, to choose a tree by.
RIGHT = 0.7


class Recent(NamedTuple):
    """What is kept of every slot.

    Attributes:
        shown_BdE: what features are made of, of the newest tokens in the cache of the model, at the end of that after
            which the newest token was drawn. One more than a step may accept.
        known_B: how many of them are known, the last ones; at least one in a slot that decodes.
    """

    shown_BdE: jax.Array
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
        checkpoint: a folder, or a Hugging Face id; None is the head that ships for the demo model. It has a
            `config.json` and a `model.safetensors` in the layout of the published heads of EAGLE-1 and 2, or in that
            of EAGLE-3; see `jaxinfer.model.eagle`.
        num_speculative_tokens: nodes of the tree, 1..MOST_DRAFTS.
        depth: of the longest path; each token of it takes a pass of the head.
        branches: tokens that may follow one, at most, and of a dynamic tree the nodes of a level that the next
            level goes on from; 1 proposes a chain.
        dynamic: proposes those nodes whose paths the head takes for the likeliest, others for each slot and step.
            Otherwise the tree is always the same, by a rule of thumb; see `sparse_tree`.
        head, params: the head and its parameters, once they are loaded.

    Raises:
        ValueError: one of them is out of range.
    """

    checkpoint: str | Path | None = None
    num_speculative_tokens: int = 15
    depth: int = 5
    branches: int = 4
    dynamic: bool = True
    head: EagleHead | None = field(default=None, repr=False, compare=False)
    params: Params | None = field(default=None, repr=False, compare=False)
    reads_text = True
    observes = True

    def __post_init__(self):
        check_drafts(self.num_speculative_tokens)
        for name in ("depth", "branches"):
            check_size(name, getattr(self, name), 1, MOST_DRAFTS)
        most = self.branches + (self.depth - 1) * self.branches**2
        if self._grows and self.num_speculative_tokens > most:
            raise ValueError(
                f"num_speculative_tokens = {self.num_speculative_tokens} must be at most {most}, the nodes that are "
                f"tried to a depth of {self.depth} with {self.branches} branches"
            )
        self.tree  # noqa: B018, a tree of so many nodes must be possible

    def read(self, loader: Loader) -> Self:
        return replace(self, head=loader.head(self.checkpoint))

    def shapes(self, model: Model) -> Iterable[Any]:
        assert self.head is not None
        return self.head.parameters.values()

    def placed(self, loader: Loader) -> Self:
        assert self.head is not None
        return replace(self, params=loader.head_params(self.checkpoint, self.head))

    def check(self, model: Model) -> None:
        if self.head is None:
            raise ValueError(f"the head {self.checkpoint or OWN} is not loaded; `LLM` loads it")
        (window,) = self.head.config.windows
        if window is not None and self.tree.depth >= window:  # what it writes again when it catches up must be there
            raise ValueError(f"depth = {self.depth} must be less than {window}, the tokens that the model keeps")
        own = self.head.parameters.get("head_VD")
        tokens = model.config.vocab_size if own is None else own.shape[0]
        if self.branches > tokens:
            raise ValueError(f"branches = {self.branches} must be at most {tokens}, the tokens that may be proposed")

    @cached_property
    def choices(self) -> tuple[tuple[int, ...], ...]:
        """Of a tree that is always the same the ranks on the path to each node, level by level."""
        settings = {"first": RIGHT, "later": 1.0, "branches": self.branches}
        paths = sparse_tree(self.depth, self.num_speculative_tokens, **settings)
        return tuple(sorted(paths, key=len))

    @property
    def tree(self) -> Tree | GrownTree:
        return self._tree

    @property
    def _grows(self) -> bool:
        return self.dynamic and self.branches > 1 and self.depth > 1

    @cached_property
    def _tree(self) -> Tree | GrownTree:
        if self._grows:
            return GrownTree(self.num_speculative_tokens, min(self.depth, self.num_speculative_tokens))
        return _tree_of(self.choices)

    @cached_property
    def levels(self) -> tuple[Level, ...]:
        """Of a tree that is always the same."""
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
        rows = [1 + self.branches * level for level in range(1, self.tree.depth)]
        if not self._grows:
            rows = [level.rows for level in self.levels[:-1]]
        return [Pass(config, queries) for queries in (self.tree.depth + 1, *rows)]

    def pools(self, model: Model) -> list[Pool]:
        head = self.head
        assert head is not None
        return [Pool(self._group(model), head.kv_slots, head.kv_slots_per_device, head.config.head_size)]

    def taps(self, model: Model) -> tuple[int, ...]:
        assert self.head is not None
        return self.head.taps(model)

    def memory(self, model: Model, slots: int) -> Recent:
        shape = slots, self.tree.depth + 1, max(len(self.taps(model)), 1) * model.config.hidden_size
        hidden: jax.Array | np.ndarray = np.zeros(shape, jnp.dtype(model.config.dtype))
        return Recent(hidden, np.zeros(slots, np.int32))  # pyright: ignore[reportArgumentType], on the host

    def remember(self, state: SlotState, shown_TE: jax.Array, rows_Bd: jax.Array, taken_B: jax.Array) -> Recent:
        kept: Recent = state.memory
        count = kept.shown_BdE.shape[1]
        joined_BnE = jnp.concatenate([kept.shown_BdE, shown_TE[rows_Bd]], axis=1)
        place_Bd = taken_B[:, None] + jnp.arange(count, dtype=jnp.int32)[None]
        # What a part of a prompt ends with does not follow what an earlier part did.
        follows_B = jnp.where(state.active_B | (taken_B == 0), kept.known_B, 0)
        return Recent(
            jnp.take_along_axis(joined_BnE, place_Bd[:, :, None], axis=1), jnp.minimum(follows_B + taken_B, count)
        )

    def propose(
        self, target: Forward, params: Params, needs: Needs, state: SlotState, cache: Cache
    ) -> tuple[Proposal, Cache]:
        """Lets the head catch up with the newest tokens, then grows the tree."""
        slots, recent = len(state.token_B), state.memory
        batch, features_TD = self._catching_up(target, params, state)
        expected_TD, pages = self._run(target, params, batch, features_TD, cache[-1])
        expected_BdD = expected_TD.reshape(slots, -1, expected_TD.shape[1])
        newest_B11 = jnp.maximum(recent.known_B - 1, 0)[:, None, None]
        outputs_B1D = jnp.take_along_axis(expected_BdD, newest_B11, axis=1)
        before_B1D = self._features(target, params, recent.shown_BdE[:, -1])[:, None]
        growth = _Growth(self, target, params, state, pages, jnp.zeros((slots, 0), jnp.int32), before_B1D)
        proposal = (self._grown if self._grows else self._sparse)(growth, outputs_B1D)
        return proposal, (*cache[:-1], growth.pages)

    def _sparse(self, growth: _Growth, outputs_BnD: jax.Array) -> Proposal:
        """A tree that is always the same."""
        drafts = []
        for level in self.levels:
            _, ranked_Bnr = growth.likeliest(outputs_BnD, int(level.rank_n.max()) + 1)
            tokens_Bn = ranked_Bnr[:, level.parent_n, level.rank_n]
            drafts.append(tokens_Bn)
            if len(level.inner_m):
                before_BmD = outputs_BnD[:, level.parent_n[level.inner_m]]
                tree = None if level.tree is None else level.tree.ancestry
                outputs_BnD = growth.deepen(tokens_Bn[:, level.inner_m], before_BmD, tree)
        return Proposal(jnp.concatenate(drafts, axis=1))

    def _grown(self, growth: _Growth, outputs_BnD: jax.Array) -> Proposal:
        """Each level goes on from the likeliest nodes of the one before; of all nodes that were tried, the likeliest
        are proposed. A node is no likelier than the one that it follows, which so is proposed with it."""
        slots, each, take = len(outputs_BnD), self.branches, partial(jnp.take_along_axis, axis=1)
        value_Bn, none_Bn = jnp.zeros((slots, 1)), jnp.full((slots, 1), -1, jnp.int32)
        node_Bn = inner_Bn = none_Bn  # of the rows that a level goes on from: among all nodes, and those with children
        above_Bm, tried, first = none_Bn[:, :0], [], 0
        for depth in range(1, self.tree.depth + 1):
            logprobs_Bnr, ranked_Bnr = growth.likeliest(outputs_BnD, each)
            values_Bc = (value_Bn[..., None] + logprobs_Bnr).reshape(slots, -1)
            tokens_Bc = ranked_Bnr.reshape(slots, -1)
            tried.append((values_Bc, tokens_Bc, jnp.repeat(node_Bn, each, axis=1)))
            if depth < self.tree.depth:
                value_Bn, place_Bn = jax.lax.top_k(values_Bc, each)
                row_Bn, before = place_Bn // each, above_Bm.shape[1]
                above_Bm = jnp.concatenate([above_Bm, take(inner_Bn, row_Bn)], axis=1)
                tree = GrownTree(before + each, depth).ancestry(above_Bm)
                before_BnD = take(outputs_BnD, row_Bn[..., None])
                outputs_BnD = growth.deepen(take(tokens_Bc, place_Bn), before_BnD, tree)
                node_Bn, first = first + place_Bn, first + values_Bc.shape[1]
                inner_Bn = jnp.broadcast_to(before + jnp.arange(each, dtype=jnp.int32)[None], row_Bn.shape)
        values_Bc, tokens_Bc, parents_Bc = (jnp.concatenate(parts, axis=1) for parts in zip(*tried, strict=True))
        chosen_Bk = jnp.sort(jax.lax.top_k(values_Bc, self.num_speculative_tokens)[1], axis=1)
        parents_Bk = take(parents_Bc, chosen_Bk)
        places_Bk = (chosen_Bk[:, None] < parents_Bk[..., None]).sum(axis=2, dtype=jnp.int32)
        return Proposal(take(tokens_Bc, chosen_Bk), parents_Bk=jnp.where(parents_Bk < 0, -1, places_Bk))

    def observe(self, target: Forward, params: Params, state: SlotState, step: Observed, cache: Cache) -> Cache:
        """The feature before a slot's first row is the one that is kept, and nothing where there is none: at the
        beginning of a text, and behind pages that another sequence has computed."""
        assert step.shown_TE is not None
        recent: Recent = state.memory
        known_BD = self._features(target, params, recent.shown_BdE[:, -1])
        known_BD = jnp.where((recent.known_B > 0)[:, None], known_BD, 0)
        before_TD = jnp.roll(self._features(target, params, step.shown_TE), 1, axis=0)
        features_TD = before_TD.at[step.first_B].set(known_BD, mode="drop")
        return (*cache[:-1], self._run(target, params, step.batch, features_TD, cache[-1])[1])

    def _catching_up(self, target: Forward, params: Params, state: SlotState) -> tuple[Batch, jax.Array]:
        """The newest tokens of each slot, as many as the features before them are known, with these; rows behind them
        are of no use, and neither are the keys and values that they write behind the newest token's."""
        assert state.text_BT is not None
        shown_BdE, known_B = state.memory
        count = shown_BdE.shape[1]
        row_1d = jnp.arange(count, dtype=jnp.int32)[None]
        first_B = state.length_B + 1 - known_B
        place_Bd = jnp.minimum(first_B[:, None] + row_1d, state.text_BT.shape[1] - 1)
        tokens_Bd = jnp.take_along_axis(state.text_BT, place_Bd, axis=1)
        earlier = replace(state, token_B=tokens_Bd[:, 0], length_B=first_B)
        kept_Bd = jnp.minimum(count - known_B[:, None] + row_1d, count - 1)
        own_BdE = jnp.take_along_axis(shown_BdE, kept_Bd[:, :, None], axis=1)
        features_TD = self._features(target, params, own_BdE.reshape(-1, own_BdE.shape[2]))
        return make_drafted(earlier, tokens_Bd[:, 1:], target.page_size), features_TD

    def _run(
        self, target: Forward, params: Params, batch: Batch, features_TD: jax.Array, pages: Pages
    ) -> tuple[jax.Array, Pages]:
        """The features that the head expects of a batch of the model's, and its pages."""
        assert self.head is not None
        batch = replace(batch, views=(batch.views[self._group(target.model)],))
        batch, weights = target.scheduled(batch, self.head), target.others(params)
        return self.head.forward(weights, target.model, target.own(params), batch, features_TD, pages)

    def _features(self, target: Forward, params: Params, shown_TE: jax.Array) -> jax.Array:
        assert self.head is not None
        return self.head.features(target.others(params), target.model, target.own(params), shown_TE)

    def _group(self, model: Model) -> int:
        """The cache group of the model that keeps all keys which the head sees."""
        assert self.head is not None
        (window,) = self.head.config.windows
        group = group_of(window, model.config.windows)
        assert group is not None
        return group


@dataclass
class _Growth:
    """A tree that grows level by level, while a program is traced.

    A level's pass computes the nodes before it once more: they are few, and their keys and values end up as they were.

    Attributes:
        pages: of the head.
        inner_Bm: tokens of the nodes so far that have children.
        features_BrD: the features before the newest token and before each of these.
    """

    eagle: Eagle
    target: Forward
    params: Params
    state: SlotState
    pages: Pages
    inner_Bm: jax.Array
    features_BrD: jax.Array

    def likeliest(self, features_BnD: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
        """The likeliest tokens after each feature, int32 [B, n, count], and before them their log-probabilities."""
        slots, nodes, width = features_BnD.shape
        head, model, own = self.eagle.head, self.target.model, self.target.own(self.params)
        assert head is not None
        weights = self.target.others(self.params)
        logits_TV = head.logits(weights, model, own, features_BnD.reshape(-1, width))
        logits_TV = jax.sharding.reshard(logits_TV, P(None, None))
        top_Tr, ids_Tr = likeliest(logits_TV, count)
        ids_Tr = head.tokens(weights, ids_Tr)
        top_Tr -= jax.nn.logsumexp(logits_TV, axis=1, keepdims=True)
        return top_Tr.reshape(slots, nodes, count), ids_Tr.reshape(slots, nodes, count)

    def deepen(self, tokens_Bn: jax.Array, before_BnD: jax.Array, tree: Ancestry | None) -> jax.Array:
        """What the head expects after more nodes, [B, n, D].

        Args:
            before_BnD: the features that their tokens were found after.
            tree: of all nodes with children so far and these; None where each follows the one before.
        """
        self.inner_Bm = jnp.concatenate([self.inner_Bm, tokens_Bn], axis=1)
        self.features_BrD = jnp.concatenate([self.features_BrD, before_BnD], axis=1)
        batch = make_drafted(self.state, self.inner_Bm, self.target.page_size, tree)
        features_TD = self.features_BrD.reshape(-1, self.features_BrD.shape[2])
        expected_TD, self.pages = self.eagle._run(self.target, self.params, batch, features_TD, self.pages)
        return expected_TD.reshape(self.features_BrD.shape)[:, -tokens_Bn.shape[1] :]


def _tree_of(paths: tuple[tuple[int, ...], ...]) -> Tree:
    """Of paths that come after those that they go on from."""
    places = {path: place for place, path in enumerate(paths)} | {(): -1}
    return Tree(tuple(places[path[:-1]] for path in paths))
