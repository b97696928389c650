"""The window and the pool of lookahead decoding, beside a plain implementation of the paper's algorithm."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.decode.forward import Forward
from jaxinfer.decode.slots import SlotState
from jaxinfer.decode.speculative import Lookahead, by_name, depth_of, tree_of, verify
from jaxinfer.decode.speculative.lookahead import Trajectories
from tests.decode.test_speculative import IDLE, NEEDS, SLOTS, START, new_state, plain_step, table

FORWARD = Forward(None, page_size=1, cache_dtype="", attention="")  # it runs no model to propose
# Also with a pool that has no room for all n-grams of a step, of one column alone, and of one that makes a chain.
METHODS = [Lookahead(*sizes) for sizes in [(4, 4, 3, 40), (3, 3, 2, 7), (5, 2, 4, 3), (1, 4, 2, 9), (1, 2, 1, 9)]]


class ByHand:
    """One slot, in lists of lists."""

    def __init__(self, method: Lookahead, text: list[int]):
        self.W, self.L, self.G = method.window_size, method.ngram_size - 1, method.max_verification_set_size
        self.most = method.pool_size
        self.text, self.pool = text, []
        repeated = text * (self.W + self.L)
        self.window = [repeated[len(repeated) - self.W - self.L + 1 + level :][: self.W] for level in range(self.L)]

    def proposed(self) -> tuple[list[int], list[list[int]]]:
        """The window, which begins with the newest token, and what follows that in n-grams of the pool."""
        self.window[0][0] = self.text[-1]
        found = [ngram[1:] for ngram in self.pool if ngram[0] == self.text[-1]][: self.G]
        return [token for level in self.window for token in level], found

    def agreed(self, future: list[int]) -> int:
        """How many of the tokens that are to come are right on one of the paths that are proposed."""
        _, followers = self.proposed()
        columns = [[level[column] for level in self.window] for column in range(self.W)]
        paths = [self.window[0][1 : column + 1] + columns[column][1:] for column in range(self.W)] + followers
        return max(size for path in paths for size in range(len(path) + 1) if path[:size] == future[:size])

    def step(self, draws: list[int], brought: list[int]) -> None:
        """
        Args:
            draws: what was drawn after each token of the window.
            brought: tokens that the text got.
        """
        drawn = draws[-self.W :]
        for column in reversed(range(self.W)):
            ngram = [*(level[column] for level in self.window), drawn[column]]
            self.pool = [ngram, *(other for other in self.pool if other != ngram)]
        self.pool = self.pool[: self.most]
        self.text = self.text + brought
        passed = (len(brought) - 1) % self.W
        self.window = [level[passed:] + level[:passed] for level in [*self.window[1:], drawn]]


@partial(jax.jit, static_argnums=2)
def step(state: SlotState, logits_VV: jax.Array, method: Lookahead):
    proposal, _ = method.propose(FORWARD, [], NEEDS, state, ())
    tokens_BQ = jnp.concatenate([state.token_B[:, None], proposal.drafts_Bk], axis=1)
    tree = tree_of(method)
    ancestry = None if tree is None else tree.ancestry
    verified = verify(state, logits_VV[tokens_BQ.reshape(-1)], proposal, NEEDS, ancestry)
    taken_B = verified.emits_dB.sum(axis=0, dtype=jnp.int32)
    memory = method.learn(state.memory, tokens_BQ, verified.drawn_BQ, taken_B)
    return replace(verified.state, memory=memory), tokens_BQ, verified


def kept(memory: Trajectories, slot: int) -> tuple[list, list]:
    return memory.window_BLW[slot].tolist(), memory.pool_BPN[slot, : int(memory.known_B[slot])].tolist()


@pytest.mark.parametrize("method", METHODS, ids=lambda method: f"{method.window_size} x {method.ngram_size}")
def test_window_and_pool_are_those_by_hand(method):
    """Of greedy and sampled slots with penalties, some of which end; and the text is plain decoding's."""
    logits_VV, state = table(5), new_state(5)
    memory = jax.tree.map(jnp.asarray, method.memory(None, len(SLOTS) + 1))
    state, plain = replace(state, memory=memory), state
    slots = range(len(SLOTS))
    hands = [ByHand(method, state.text_BT[slot, : START + 1].tolist()) for slot in slots]
    width, found, brought = method.window_size * (method.ngram_size - 1), 0, set()
    for _ in range(9):
        before, (state, tokens_BQ, verified) = state, step(state, logits_VV, method)
        for slot, hand in enumerate(hands):
            emits = np.asarray(verified.emits_dB)[:, slot]
            if not emits.any():
                assert kept(state.memory, slot) == kept(before.memory, slot)
                continue
            window, followers = hand.proposed()
            rows, drawn = tokens_BQ[slot].tolist(), verified.drawn_BQ[slot].tolist()
            assert rows[:width] == window
            assert np.reshape(rows[width:], (-1, method.ngram_size - 1)).tolist()[: len(followers)] == followers
            hand.step(drawn[:width], np.asarray(verified.sampled.tokens_W)[emits, slot].tolist())
            assert kept(state.memory, slot) == (hand.window, hand.pool)
            found += len(followers)
            brought.add(int(emits.sum()))
        # A greedy slot without penalties: what was drawn is what the model says after each row.
        assert verified.drawn_BQ[0].tolist() == np.asarray(logits_VV)[tokens_BQ[0]].argmax(axis=1).tolist()
    assert kept(state.memory, IDLE) == ([[0] * method.window_size] * (method.ngram_size - 1), [])
    assert found > 5
    assert max(brought) > method.ngram_size - 1
    for _ in range(40):
        plain, _ = plain_step(plain, logits_VV)
    for slot, hand in enumerate(hands):
        assert hand.text == plain.text_BT[slot, : len(hand.text)].tolist()


@pytest.mark.parametrize("method", METHODS, ids=lambda method: f"{method.window_size} x {method.ngram_size}")
def test_rows_see_what_they_see_in_the_paper(method):
    """A token sees level 0 up to its column, and its column above it; n-grams see the newest token and
    themselves. Positions count from the newest token."""
    W, L, G = method.window_size, method.ngram_size - 1, method.max_verification_set_size
    window = {(level, column): level * W + column for level in range(L) for column in range(W)}
    ngram = {(which, place): W * L + which * L + place for which in range(G) for place in range(L)}
    seen_QQ = np.zeros((method.num_speculative_tokens + 1,) * 2, bool)
    for (level, column), row in window.items():
        seen_QQ[row, [window[0, before] for before in range(column + 1)]] = True
        seen_QQ[row, [window[above, column] for above in range(level + 1)]] = True
        assert method.tree.depth_Q[row] == level + column
    for (which, place), row in ngram.items():
        seen_QQ[row, [0, *(ngram[which, before] for before in range(place + 1))]] = True
        assert method.tree.depth_Q[row] == place + 1
    np.testing.assert_array_equal(method.tree.seen_QQ, seen_QQ)
    assert depth_of(method) == max(W + L - 2, L)


def test_the_papers_sizes_fit():
    assert len(Lookahead(15, 5, 15).tree.paths) == 120
    assert by_name("lookahead") == Lookahead()
    for count in (7, 11, 55, 127):
        method = by_name("lookahead", num_speculative_tokens=count)
        assert method.num_speculative_tokens == count == len(method.tree.parents)
    assert by_name("lookahead", num_speculative_tokens=55) == Lookahead()


@pytest.mark.parametrize("count", [1, 3, 8, 128, 131, 0, -1])
def test_sizes_that_no_tree_has_are_refused(count):
    message = rf"num_speculative_tokens = {count} must be one less than a multiple of 4 in 8\.\.128 where speculate"
    with pytest.raises(ValueError, match=message):
        by_name("lookahead", num_speculative_tokens=count)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"window_size": 0}, "window_size = 0 must be an integer, at least 1"),
        ({"ngram_size": 1}, "ngram_size = 1 must be an integer, at least 2"),
        ({"max_verification_set_size": 2.0}, r"max_verification_set_size = 2\.0 must be an integer, at least 1"),
        ({"pool_size": True}, "pool_size = True must be an integer, at least 1"),
        ({"window_size": 26}, r"window_size = 26 and .*_size = 7 with ngram_size = 5 make 132 rows.* at most 128"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Lookahead(**settings)
