"""Outputs have the model's distribution by every method that is exact, of three tokens together, whatever it proposes:
from a uniform distribution, from one of tokens that the model never draws, from the model's own, always the same, and
with knowledge of the noise that the model will draw with.

Where a proposal counts if the model's own draw is that token, outputs are those of plain decoding token for token, as
other tests say of whole engines. Here such methods stand beside those that accept by another rule: what all of them
leave in the slots is compared with what the model says.
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from itertools import count, islice
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.decode import sampling, speculative
from jaxinfer.decode.sampling_params import SamplingParams
from jaxinfer.decode.slots import SlotState
from jaxinfer.decode.speculative import Lookahead, Medusa, PromptLookup, Speculation, Typical
from jaxinfer.parallel import make_mesh
from tests.decode.adversary import Adversary
from tests.decode.enumerated import (
    DRAFT_MODELS,
    HALVES_VV,
    MODEL_VV,
    TEXT,
    VOCAB,
    assert_uniform,
    joint,
    needs,
    outputs,
    probability,
    start,
)
from tests.decode.tabled import METHODS, begun, stepping, weights

# Every three tokens that may come do so five times in as many slots, and a token is less likely to come again.
PARAMS = SamplingParams(
    temperature=1.3, top_k=3, top_p=0.9, presence_penalty=1.5, frequency_penalty=-0.5, max_tokens=40
)
SLOTS, SEEDS, PROMPT = 512, 3, 8
NEEDS = needs(PARAMS)
Case = tuple[str, np.ndarray, list[np.ndarray], SlotState]


@pytest.fixture(autouse=True)
def one_device():
    with jax.set_mesh(make_mesh(1)):
        yield


def cases(name: str) -> Iterator[Case]:
    """What is proposed, the model's logits, the method's own parameters, and slots with seeds that no other case has.

    Some methods propose by the logits of a draft, and some what stands in the text after the same token."""
    method, numbers = METHODS[name], count(1000 * list(METHODS).index(name))
    copies = isinstance(method, PromptLookup | Lookahead)
    kinds = [kind for kind in DRAFT_MODELS if kind != "random" or not copies]
    for kind in [*kinds, "known"] if copies or isinstance(method, Adversary) else kinds:
        model_VV, table_VV = DRAFT_MODELS["identical" if kind == "known" else kind]
        own = [] if copies else weights(method, table_VV, kind == "known")
        for number in islice(numbers, SEEDS):
            state = start(PARAMS, number, SLOTS)
            text_BT = np.pad(follows(kind, state, number), ((0, 0), (1, TEXT - PROMPT - 1))).astype(np.int32)
            yield kind, model_VV, own, begun(method, state, text_BT, PROMPT + 1 if copies else 0)


def follows(kind: str, state: SlotState, seed: int) -> np.ndarray:
    """What of a kind may follow token 0 in each slot, [B, PROMPT]."""
    if kind in ("known", "identical"):
        elsewhere = replace(state, sampling=replace(state.sampling, seed_B=~state.sampling.seed_B))
        return np.asarray(plain(state if kind == "known" else elsewhere))
    first, end = {"disjoint": (VOCAB // 2, VOCAB), "deterministic": (1, 2)}.get(kind, (0, VOCAB))
    return np.random.default_rng(seed).integers(first, end, (SLOTS, PROMPT))


@jax.jit
def plain(state: SlotState) -> jax.Array:
    """The first tokens of plain decoding, [B, PROMPT]."""

    def step(state: SlotState, _) -> tuple[SlotState, jax.Array]:
        logits_BV = jnp.asarray(MODEL_VV)[state.token_B]
        token_B = sampling.sample(logits_BV, state.sampling, state.index_B, NEEDS).tokens_W
        counted = sampling.count(state.sampling, token_B, state.active_B)
        return replace(state, token_B=token_B, index_B=state.index_B + 1, sampling=counted), token_B

    return jax.lax.scan(step, state, length=PROMPT)[1].T


@cache
def expected(halves: bool) -> np.ndarray:
    return joint(HALVES_VV if halves else MODEL_VV, PARAMS)


def found(method: Speculation, given: Iterator[Case]) -> tuple[list[float], dict[str, list[float]]]:
    """The probabilities of chi-squares; and how many of the proposals were right, by what is proposed."""
    step, probabilities, right = stepping(method, NEEDS), [], {}
    for kind, model_VV, own, state in given:
        params = [jnp.asarray(array) for array in (model_VV, *own)]
        tokens_BT, rate = outputs(state, lambda state, params=params: step(state, params))
        probabilities.append(probability(tokens_BT, expected(kind == "disjoint")))
        right.setdefault(kind, []).append(rate)
    return probabilities, right


def test_all_methods_are_here():
    assert {type(method) for method in METHODS.values()} == {*speculative.METHODS.values(), Adversary}


@pytest.mark.parametrize("name", METHODS)
def test_outputs_have_the_distribution_of_the_model(name):
    """The probabilities of chi-squares are uniform over what is proposed and seeds. What shares no token with the
    model's draws is never right, and what is known always is, so far as a slot's tree goes."""
    probabilities, right = found(METHODS[name], cases(name))
    assert_uniform(probabilities)
    assert len(right) >= 5
    if isinstance(METHODS[name], Adversary):
        assert max(right["disjoint"]) == 0
        assert min(right["known"]) == 1 or name == "any tree"


def test_a_rule_that_is_not_exact_is_found():
    """The test above can fail."""
    method = replace(cast(Medusa, METHODS["medusa"]), typical=Typical(1e-9, 1e-9))
    probabilities, _ = found(method, islice(cases("medusa"), 4))
    assert max(probabilities) < 1e-6
