"""Typical acceptance: of what is proposed the longest path of tokens that are likely enough counts."""

import math
from dataclasses import replace
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.decode import sampling
from jaxinfer.decode.sampling_params import SamplingParams
from jaxinfer.decode.speculative import Medusa, Tree, Typical
from jaxinfer.decode.speculative.verify import chain, likely_or_drawn
from tests.decode.branching import PARENTS
from tests.decode.enumerated import packed

VOCAB, SLOTS, GREEDY = 7, 40, 4
TREE, CHAIN = Tree(PARENTS), Tree(tuple(range(-1, 4)))
taken = jax.jit(likely_or_drawn, static_argnums=5)


def probabilities(logits_V: np.ndarray, temperature: float) -> np.ndarray:
    shifted = np.exp((logits_V - logits_V.max()).astype(np.float64) / temperature)
    return shifted / shifted.sum()


def longest(tree: Tree, likely: list[bool]) -> tuple[int, ...]:
    """The rows of the longest path whose nodes are likely enough, of several the first to end."""
    return max((path for path in tree.paths if all(likely[row - 1] for row in path[1:])), key=len)


@pytest.mark.parametrize("typical", [Typical(), Typical(1.0, 0.5), Typical(1e-9, 1e-9)], ids=str)
@pytest.mark.parametrize("tree", [TREE, CHAIN], ids=["tree", "chain"])
def test_the_longest_likely_path_is_taken_and_then_a_token_is_drawn(tree, typical):
    rng, rows, temperature = np.random.default_rng(3), tree.nodes + 1, 0.8
    logits_BQV = 2 * rng.standard_normal((SLOTS, rows, VOCAB)).astype(np.float32)
    drafts_Bk = rng.integers(0, VOCAB, (SLOTS, tree.nodes)).astype(np.int32)
    state = sampling.empty(SLOTS * rows, VOCAB)
    temperature_W = np.full(SLOTS * rows, temperature, np.float32)
    temperature_W[: GREEDY * rows] = 0.0
    state = replace(state, **packed(SamplingParams(), SLOTS * rows) | {"temperature_B": jnp.asarray(temperature_W)})
    kept_WV = jnp.asarray(logits_BQV.reshape(-1, VOCAB) / np.where(temperature_W > 0, temperature_W, 1.0)[:, None])
    index_W = jnp.arange(SLOTS * rows, dtype=jnp.int32)
    drawn_BQ = np.asarray(sampling.draw(kept_WV, state, index_W)).reshape(SLOTS, rows)
    found_W = taken(kept_WV, state, index_W, jnp.asarray(drafts_Bk), tree.ancestry, typical)
    found_BQ = np.asarray(found_W).reshape(SLOTS, rows)
    for slot, found_Q in enumerate(found_BQ):
        likely = []
        for node, parent in enumerate(tree.parents):
            token, p_V = drafts_Bk[slot, node], probabilities(logits_BQV[slot, parent + 1], temperature)
            least = min(typical.epsilon, typical.delta * math.exp((p_V * np.log(p_V)).sum()))
            likely.append(bool(token == drawn_BQ[slot, parent + 1] if slot < GREEDY else p_V[token] > least))
        expected_Q = drawn_BQ[slot].copy()
        for row, following in pairwise(longest(tree, likely)):
            expected_Q[row] = drafts_Bk[slot, following - 1]
        assert found_Q.tolist() == expected_Q.tolist()


def test_a_chain_is_a_tree():
    assert chain(5).rows_BQd.tolist() == CHAIN.ancestry.rows_BQd.tolist()


@pytest.mark.parametrize(
    ("typical", "message"),
    [
        (Typical(0.0), r"typical.epsilon = 0.0 must be a number above 0, at most 1"),
        (Typical(delta=2), r"typical.delta = 2 must be a number above 0, at most 1"),
        (Typical("a"), r"typical.epsilon = 'a' must be a number"),  # pyright: ignore[reportArgumentType]
    ],
)
def test_thresholds_out_of_range_are_refused(typical, message):
    with pytest.raises(ValueError, match=message):
        Medusa("heads", typical=typical)
