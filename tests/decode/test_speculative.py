"""What is proposed never changes what is drawn: verified tokens are those of plain decoding, one after the other."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxinfer.decode import sampling
from jaxinfer.decode.forward import Forward
from jaxinfer.decode.sampling_params import SamplingParams
from jaxinfer.decode.slots import Admission, SlotState, admit, advance, empty_slots
from jaxinfer.decode.speculative import PromptLookup, Proposal, verify
from jaxinfer.decode.speculative.lookup import propose
from jaxinfer.roofline import independent, tokens_per_step
from tests.decode.rows import stacked

VOCAB, DRAFTS, TEXT, START = 11, 4, 64, 3
EOS = 10
SLOTS = [
    SamplingParams(temperature=0.0, max_tokens=40),
    SamplingParams(temperature=1.0, max_tokens=40),
    SamplingParams(temperature=0.7, top_k=5, top_p=0.8, max_tokens=40),
    SamplingParams(temperature=1.3, min_p=0.05, presence_penalty=0.9, frequency_penalty=0.7, max_tokens=40),
    SamplingParams(temperature=0.0, repetition_penalty=1.8, frequency_penalty=0.5, logit_bias={2: 1.5}, max_tokens=40),
    SamplingParams(temperature=1.0, max_tokens=3),  # ends among the proposed tokens
    SamplingParams(temperature=2.0, min_tokens=4, stop_token_ids=[1, 2, 3], max_tokens=40),
    SamplingParams(temperature=1.0, stop_token_ids=[4, 5, 6, 7], max_tokens=40),
]
FORWARD = Forward(None, page_size=1, cache_dtype="", attention="")  # a lookup runs no model
IDLE = len(SLOTS)  # one more slot, of nobody
NEEDS = sampling.needs([*SLOTS, SamplingParams(logprobs=2)])


admitted = jax.jit(admit)


def new_state(seed: int) -> SlotState:
    """Every slot has a prompt of three tokens in the cache, and a first token of its output."""
    state = empty_slots(len(SLOTS) + 1, 1, 2, VOCAB, TEXT)
    rows = []
    for slot, params in enumerate(SLOTS):
        text_T = np.zeros(TEXT, np.int32)
        text_T[:START] = prompt = [slot % 4, 2, 3]
        row = Admission(
            (np.zeros(2, np.int32),), np.int32(0), np.int32(params.max_tokens),
            sampling.pack(params, [EOS], seed + slot), np.array(prompt, np.int32), np.full(1, -1, np.int32), text_T,
        )  # fmt: skip
        rows.append(row)
    return begun(admitted(state, np.arange(len(SLOTS), dtype=np.int32), stacked(rows)))


@jax.jit
def begun(state: SlotState) -> SlotState:
    first = sampling.sample(jnp.zeros((len(SLOTS) + 1, VOCAB)), state.sampling, state.index_B, NEEDS)
    begins_B = jnp.arange(IDLE + 1) < IDLE
    return advance(state, first, begins_B, jnp.full(IDLE + 1, START, jnp.int32))


def table(seed: int) -> jax.Array:
    """The model: logits by the token before."""
    return jnp.asarray(np.random.default_rng(seed).normal(scale=2, size=(VOCAB, VOCAB)).astype(np.float32))


@jax.jit
def plain_step(state: SlotState, logits_VV: jax.Array) -> tuple[SlotState, sampling.Sampled]:
    sampled = sampling.sample(logits_VV[state.token_B], state.sampling, state.index_B, NEEDS)
    return advance(state, sampled, state.active_B, state.length_B + 1), sampled


@jax.jit
def verified_step(state: SlotState, logits_VV: jax.Array, drafts_Bk: jax.Array):
    tokens_BQ = jnp.concatenate([state.token_B[:, None], drafts_Bk], axis=1)
    return verify(state, logits_VV[tokens_BQ.reshape(-1)], Proposal(drafts_Bk), NEEDS)[:3]


def assert_slot_equal(found: SlotState, expected: SlotState, slot: int) -> None:
    pick = partial(jax.tree.map, lambda x_B: x_B[slot])
    jax.tree.map(np.testing.assert_array_equal, pick(found), pick(expected))


@pytest.mark.parametrize("quality", [0.0, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("seed", [0, 100, 200])
def test_verified_steps_are_plain_steps(seed, quality):
    """Whether proposals are right, wrong or right for a while: after a step that brought n tokens to a slot, it is as
    n plain steps leave it. That is its tokens, its penalties, its text, and whether it has ended."""
    rng, logits_VV, state = np.random.default_rng(seed), table(seed), new_state(seed)
    plain, draws = [state], []
    for _ in range(30):
        after, sampled = plain_step(plain[-1], logits_VV)
        plain.append(after)
        draws.append(sampled)
    plain, draws = jax.device_get((plain, draws))
    tokens_nB = np.stack([draw.tokens_W for draw in draws])
    taken = np.zeros(len(SLOTS) + 1, int)  # plain steps that every slot has made
    for _ in range(5):
        right_Bk = tokens_nB[taken[:, None] + np.arange(DRAFTS), np.arange(len(taken))[:, None]]
        wrong_Bk = (right_Bk + rng.integers(1, VOCAB, right_Bk.shape)) % VOCAB
        drafts_Bk = np.where(rng.random(right_Bk.shape) < quality, right_Bk, wrong_Bk).astype(np.int32)
        agreed_B = np.cumprod(drafts_Bk == right_Bk, axis=1).sum(axis=1)
        was_active_B = np.asarray(state.active_B)
        state, *drawn = verified_step(state, logits_VV, jnp.asarray(drafts_Bk))
        after, sampled_QB, emits_QB = jax.device_get((state, *drawn))
        brought_B = emits_QB.sum(axis=0)
        for slot in range(len(SLOTS)):
            for step in range(brought_B[slot]):
                jax.tree.map(partial(_assert_draw, slot, step), sampled_QB, draws[taken[slot] + step])
            assert_slot_equal(after, plain[taken[slot] + brought_B[slot]], slot)
            ended = not after.active_B[slot]
            assert brought_B[slot] == 0 if not was_active_B[slot] else brought_B[slot] <= agreed_B[slot] + 1
            assert ended or brought_B[slot] == agreed_B[slot] + 1  # all that agreed, and one more
        assert brought_B[IDLE] == 0
        taken += brought_B
    assert (~after.active_B).sum() >= 2


def _assert_draw(slot: int, step: int, found_QB, expected_B) -> None:
    np.testing.assert_array_equal(found_QB[step, slot], expected_B[slot])


def test_proposals_enter_no_count_of_the_slots_themselves():
    state = new_state(0)
    after, _, emits_QB = verified_step(state, table(0), jnp.full((len(SLOTS) + 1, DRAFTS), 9, jnp.int32))
    counted = np.asarray(after.sampling.counts_BV.sum(axis=1) - state.sampling.counts_BV.sum(axis=1))
    np.testing.assert_array_equal(counted, np.asarray(emits_QB).sum(axis=0))


@pytest.mark.parametrize("acceptance", [0.0, 0.3, 0.6, 0.9, 1.0])
def test_acceptance_agrees_with_theory(acceptance):
    """Proposals each of which is right with the same probability: tokens of a step, and by position how often all so
    far were right, within 5 %."""
    slots, steps, rng, logits_VV = 64, 40, np.random.default_rng(0), table(0)
    state, drawn_nB = drawing(slots), plain_draws(drawing(slots), logits_VV, steps * (DRAFTS + 1))
    taken_B, right_Q = np.zeros(slots, int), np.zeros(DRAFTS + 1)
    for _ in range(steps):
        right_Bk = drawn_nB[taken_B[:, None] + np.arange(DRAFTS), np.arange(slots)[:, None]]
        wrong_Bk = (right_Bk + rng.integers(1, VOCAB, right_Bk.shape)) % VOCAB
        drafts_Bk = np.where(rng.random(right_Bk.shape) < acceptance, right_Bk, wrong_Bk).astype(np.int32)
        state, _, emits_QB = verified_step(state, logits_VV, jnp.asarray(drafts_Bk))
        taken_B += np.asarray(emits_QB).sum(axis=0)
        right_Q += np.asarray(emits_QB).sum(axis=1)
    expected = independent(acceptance, DRAFTS)
    assert taken_B.sum() / (slots * steps) == pytest.approx(tokens_per_step(expected), rel=0.05)
    assert right_Q / (slots * steps) == pytest.approx(np.array([1, *expected]), rel=0.05, abs=0.02)


def drawing(slots: int) -> SlotState:
    """Slots that draw without an end, each with a seed of its own."""
    state, forever = empty_slots(slots, 1, 2, VOCAB), SamplingParams(temperature=1.0, max_tokens=2**20)
    rows, none_T = [], np.full(1, -1, np.int32)
    for slot in range(slots):
        sampler = sampling.pack(forever, [], slot)
        rows.append(Admission((np.zeros(2, np.int32),), np.int32(0), np.int32(2**20), sampler, none_T, none_T))
    state = admitted(state, np.arange(slots, dtype=np.int32), stacked(rows))
    return replace(state, active_B=jnp.ones(slots, bool))


@partial(jax.jit, static_argnums=2)
def plain_draws(state: SlotState, logits_VV: jax.Array, count: int) -> jax.Array:
    """The tokens of so many plain steps, [n, B]."""

    def step(state: SlotState, _) -> tuple[SlotState, jax.Array]:
        state, sampled = plain_step(state, logits_VV)
        return state, sampled.tokens_W

    return jax.lax.scan(step, state, length=count)[1]


# --- prompt lookup


def continuation(text: list[int], count: int, longest: int) -> list[int]:
    """The specification, by hand: the longest earlier occurrence, of these the latest, and what followed it."""
    last = len(text) - 1

    def matched(place: int) -> int:
        back = 0
        while back < longest and back <= place and text[place - back] == text[last - back]:
            back += 1
        return back

    found = max(range(last), key=lambda place: (matched(place), place), default=-1)
    if found < 0 or matched(found) == 0:
        found = last - 1
    follows = text[found + 1 :]
    return [follows[step % len(follows)] for step in range(count)]


lookup = jax.jit(propose, static_argnums=(2, 3))


@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=24), min_size=3, max_size=3), st.integers(0, 2))
def test_a_lookup_finds_what_a_search_by_hand_finds(texts, rubbish):
    """Whatever stands behind the texts."""
    text_BT = np.full((3, 24), rubbish, np.int32)
    for row, text in zip(text_BT, texts, strict=True):
        row[: len(text)] = text
    last_B = jnp.array([len(text) - 1 for text in texts], jnp.int32)
    for longest in (1, 3):
        found_Bk = lookup(jnp.asarray(text_BT), last_B, 5, longest)
        assert found_Bk.tolist() == [continuation(text, 5, longest) for text in texts]


def test_a_continuation_goes_round():
    text_BT = jnp.array([[0, 1, 2, 0, 1, 9, 9, 9]], jnp.int32)
    assert lookup(text_BT, jnp.array([4], jnp.int32), 7, 2).tolist() == [[2, 0, 1, 2, 0, 1, 2]]


def test_the_method_reads_the_text_of_the_slots():
    state = replace(new_state(0), text_BT=jnp.asarray(np.tile([7, 8, 5, 7, 0, 0], (len(SLOTS) + 1, 1)), jnp.int32))
    proposal, _ = jax.jit(lambda state: PromptLookup(2, 3).propose(FORWARD, [], NEEDS, state, ()))(state)
    assert proposal.drafts_Bk[:IDLE].tolist() == [[8, 5]] * IDLE


@pytest.mark.parametrize("count", [0, -1, 128, 2.0, True, None])
def test_how_many_tokens_can_be_proposed(count):
    with pytest.raises(ValueError, match=r"num_speculative_tokens = .* must be an integer in 1\.\.127"):
        PromptLookup(count)


@pytest.mark.parametrize("longest", [0, 65, "3", False])
def test_how_many_tokens_can_be_looked_for(longest):
    with pytest.raises(ValueError, match=r"prompt_lookup_max = .* must be an integer in 1\.\.64"):
        PromptLookup(prompt_lookup_max=longest)
