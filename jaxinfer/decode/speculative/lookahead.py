"""Lookahead decoding: the model guesses many tokens ahead at once, in a window that its own draws keep correcting, and
what came of that is proposed where it fits (Fu et al. 2024, "Break the Sequential Dependency of LLM Inference Using
Lookahead Decoding", arXiv 2402.02057).

A window holds N - 1 levels of W tokens that may stand ahead of the newest one. Each level is what the model drew
after the level before, a step later than that one: so the tokens of a column, and what the model draws after the last
of them, are N tokens that it wrote one after the other, if not after this text. Such n-grams are kept in a pool, and
those that begin with the newest token are proposed.

Both are one tree: level 0 is a chain that begins with the newest token, a column hangs on each token of that chain,
and each n-gram of the pool is a chain of its own. One step draws after all of its tokens. What it draws after the last
level is the next one; and it verifies, also what the window holds: a token that is right there counts as any other.

It needs no weights, no cache of its own and no text that copies; it takes rows of the step instead.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer.decode.arguments import check_size
from jaxinfer.decode.forward import Cache, Forward
from jaxinfer.decode.sampling import Needs
from jaxinfer.decode.slots import SlotState
from jaxinfer.decode.speculative.method import Proposal, Speculation
from jaxinfer.decode.tree import MOST_DRAFTS, Tree
from jaxinfer.model import Model, Params


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Trajectories:
    """What is kept for every slot. All zeros are a slot that has none yet.

    Attributes:
        window_BLW: int32, the window: levels and columns. Level l of column w stands l + w tokens after the newest
            one, whose own place is the first.
        pool_BPN: int32, n-grams, no two of a slot alike, the latest first.
        known_B: int32, how many of these there are.
    """

    window_BLW: jax.Array
    pool_BPN: jax.Array
    known_B: jax.Array


@dataclass(frozen=True)
class Lookahead(Speculation):
    """Proposes what the model drew in the steps before, ahead of the text. A step has
    (window_size + max_verification_set_size) x (ngram_size - 1) rows for each sequence.

    Attributes:
        window_size: W, tokens of a level, at least 1; so many n-grams come of each step.
        ngram_size: N, at least 2.
        max_verification_set_size: G, n-grams that are proposed in one step, at least 1: the latest that begin with the
            newest token.
        pool_size: P, n-grams that are kept for each slot, at least 1.

    Raises:
        ValueError: one of them is out of range, or a step would have more than MOST_DRAFTS + 1 rows.
    """

    window_size: int = 7
    ngram_size: int = 5
    max_verification_set_size: int = 7
    pool_size: int = 1024
    reads_text = True

    def __post_init__(self):
        for name, least in (("window_size", 1), ("ngram_size", 2), ("max_verification_set_size", 1), ("pool_size", 1)):
            check_size(name, getattr(self, name), least)
        if self.num_speculative_tokens > MOST_DRAFTS:
            raise ValueError(
                f"window_size = {self.window_size} and max_verification_set_size = {self.max_verification_set_size} "
                f"with ngram_size = {self.ngram_size} make {self.num_speculative_tokens + 1} rows, "
                f"(W + G) x (N - 1); it must be at most {MOST_DRAFTS + 1}"
            )

    @classmethod
    def settings(cls) -> tuple[str, ...]:
        return (*super().settings(), "num_speculative_tokens")

    @classmethod
    def of(cls, *, num_speculative_tokens: int | None = None, **settings: Any) -> Self:
        """`num_speculative_tokens` takes the place of `window_size` and `max_verification_set_size`: half of the rows
        of a step are for the window, half for n-grams of the pool, with one column more than n-grams if they do not
        come out even."""
        if num_speculative_tokens is None:
            return super().of(**settings)
        for name in [name for name in ("window_size", "max_verification_set_size") if name in settings]:
            raise ValueError(f"{name} = {settings[name]!r} has no use beside num_speculative_tokens, which implies it")
        levels = cls(1, max_verification_set_size=1, **settings)._levels
        chains, rest = divmod(num_speculative_tokens + 1, levels)
        if rest or chains < 2 or num_speculative_tokens > MOST_DRAFTS:
            raise ValueError(
                f"num_speculative_tokens = {num_speculative_tokens!r} must be one less than a multiple of {levels} in "
                f"{2 * levels}..{MOST_DRAFTS + 1} where speculate = 'lookahead': it takes chains of {levels} tokens, "
                "of which the newest one is the first"
            )
        return super().of(window_size=chains - chains // 2, max_verification_set_size=chains // 2, **settings)

    @property
    def num_speculative_tokens(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Nodes of the tree: all rows of a step but that of the newest token, which is the first of the window."""
        return (self.window_size + self.max_verification_set_size) * (self.ngram_size - 1) - 1

    @property
    def tree(self) -> Tree:
        return self._tree

    @cached_property
    def _tree(self) -> Tree:
        """Rows are the window, level by level, then n-gram by n-gram what follows their first token."""
        chain = [row - 1 for row in range(self.window_size)]
        hanging = [row - self.window_size for row in range(self.window_size, self._ahead)]
        ngrams = [
            row - 1 if token else 0
            for first in range(self._ahead, self.num_speculative_tokens + 1, self._levels)
            for token, row in enumerate(range(first, first + self._levels))
        ]
        above = [*chain, *hanging, *ngrams]
        return Tree(tuple(row - 1 for row in above[1:]))

    @property
    def _levels(self) -> int:
        return self.ngram_size - 1

    @property
    def _ahead(self) -> int:
        """Rows of the window."""
        return self.window_size * self._levels

    def memory(self, model: Model, slots: int) -> Trajectories:
        zeros = lambda *shape: np.zeros((slots, *shape), np.int32)  # noqa: E731
        made: tuple = (zeros(self._levels, self.window_size), zeros(self.pool_size, self.ngram_size), zeros())
        return Trajectories(*made)

    def propose(
        self, target: Forward, params: Params, needs: Needs, state: SlotState, cache: Cache
    ) -> tuple[Proposal, Cache]:
        assert state.text_BT is not None
        kept, slots = state.memory, len(state.token_B)
        begun_B = kept.known_B > 0
        fresh_BLW = first_window(state.text_BT, state.length_B, self._levels, self.window_size)
        window_BLW = jnp.where(begun_B[:, None, None], kept.window_BLW, fresh_BLW)
        ngrams_BGn = followers(kept, state.token_B, self.max_verification_set_size)
        ahead_BA, behind_BA = window_BLW.reshape(slots, -1)[:, 1:], ngrams_BGn.reshape(slots, -1)
        return Proposal(jnp.concatenate([ahead_BA, behind_BA], axis=1)), cache

    def learn(
        self, memory: Trajectories, tokens_BQ: jax.Array, drawn_BQ: jax.Array, taken_B: jax.Array
    ) -> Trajectories:
        window_BLW = tokens_BQ[:, : self._ahead].reshape(-1, self._levels, self.window_size)
        drawn_BW = drawn_BQ[:, self._ahead - self.window_size : self._ahead]
        after = moved_on(memory, jnp.concatenate([window_BLW, drawn_BW[:, None]], axis=1), taken_B)
        took_B = taken_B > 0
        choose = lambda new, old: jnp.where(took_B.reshape(-1, *[1] * (new.ndim - 1)), new, old)  # noqa: E731
        return jax.tree.map(choose, after, memory)


def first_window(text_BT: jax.Array, last_B: jax.Array, levels: int, width: int) -> jax.Array:
    """A window for a slot that has none: the text's last tokens, as though they were to come again; round and round of
    a shorter text. The paper begins with any tokens; these are likelier than others.

    Args:
        last_B: where the newest token of each text is, with all others before it.

    Returns:
        int32 [B, L, W].
    """
    ahead_LW = np.add.outer(np.arange(levels), np.arange(width)).astype(np.int32)
    back_A = jnp.asarray(ahead_LW.reshape(-1) - ahead_LW.max())
    place_BA = (last_B[:, None] + back_A[None]) % (last_B + 1)[:, None]
    return jnp.take_along_axis(text_BT, place_BA, axis=1).reshape(-1, levels, width)


def followers(kept: Trajectories, token_B: jax.Array, count: int) -> jax.Array:
    """What follows `token_B` in the latest `count` n-grams that begin with it; any tokens where there are fewer.

    Returns:
        int32 [B, G, N - 1].
    """
    size = kept.pool_BPN.shape[1]
    begins_BP = (kept.pool_BPN[:, :, 0] == token_B[:, None]) & _known(kept)
    # As many come before the first that begins with it, the second and so on.
    rank_BP, wanted_G = jnp.cumsum(begins_BP, axis=1, dtype=jnp.int32), jnp.arange(count, dtype=jnp.int32)
    place_BG = jnp.sum(rank_BP[:, None] <= wanted_G[None, :, None], axis=2, dtype=jnp.int32)
    found_BGN = jnp.take_along_axis(kept.pool_BPN, jnp.minimum(place_BG, size - 1)[:, :, None], axis=1)
    return found_BGN[:, :, 1:]


def moved_on(kept: Trajectories, written_BNW: jax.Array, taken_B: jax.Array) -> Trajectories:
    """After a step: levels move up by one, the new one is the last. With its one token the text has come as far. For
    each more that was taken, a column lies behind the newest token: it begins again at the other end.

    Args:
        written_BNW: the levels of the window in the step, and what was drawn after the last of them.
        taken_B: tokens that each slot took, at least 1.
    """
    width = written_BNW.shape[2]
    column_BW = (jnp.arange(width, dtype=jnp.int32)[None] + taken_B[:, None] - 1) % width
    window_BLW = jnp.take_along_axis(written_BNW[:, 1:], column_BW[:, None], axis=2)
    return _added(replace(kept, window_BLW=window_BLW), jnp.swapaxes(written_BNW, 1, 2))


def _added(kept: Trajectories, new_BWN: jax.Array) -> Trajectories:
    """With more n-grams, those of the first columns first; what was known already becomes as late as they are, and the
    oldest make room."""
    pool_BPN, (slots, size, _) = kept.pool_BPN, kept.pool_BPN.shape
    before_WW = np.tri(new_BWN.shape[1], k=-1, dtype=bool)
    again_BW = ((new_BWN[:, :, None] == new_BWN[:, None]).all(axis=3) & before_WW[None]).any(axis=2)
    again_BP = (pool_BPN[:, :, None] == new_BWN[:, None]).all(axis=3).any(axis=2)
    stays_BM = jnp.concatenate([~again_BW, _known(kept) & ~again_BP], axis=1)
    count_BM = jnp.cumsum(stays_BM, axis=1, dtype=jnp.int32)
    place_BM = jnp.where(stays_BM, count_BM - 1, size)
    slot_BM = jnp.broadcast_to(jnp.arange(slots, dtype=jnp.int32)[:, None], place_BM.shape)
    both_BMN = jnp.concatenate([new_BWN, pool_BPN], axis=1)
    pool_BPN = jnp.zeros_like(pool_BPN).at[slot_BM, place_BM].set(both_BMN, mode="drop")
    return replace(kept, pool_BPN=pool_BPN, known_B=jnp.minimum(count_BM[:, -1], size))


def _known(kept: Trajectories) -> jax.Array:
    """Places of the pool that hold an n-gram, bool [B, P]."""
    return jnp.arange(kept.pool_BPN.shape[1], dtype=jnp.int32)[None] < kept.known_B[:, None]
