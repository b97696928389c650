"""However the tokens of a request are cut into programs, the same tokens and log-probabilities come out."""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.decode.batch import StepInput
from jaxinfer.decode.layout import Layout
from jaxinfer.decode.sampling import Needs
from jaxinfer.decode.sampling_params import SamplingParams
from jaxinfer.decode.speculative import PromptLookup
from jaxinfer.decode.step import Programs, StepOutput
from jaxinfer.model import Model, read_config
from jaxinfer.parallel import make_mesh
from tests.engine.tiny import CONFIG, CONTEXT
from tests.model.random_params import random_params

SLOTS, PAGE, ROWS, STEPS = 4, 4, 64, 3
PAGES = CONTEXT // PAGE
NEEDS = Needs("greedy", 20)
PROMPTS = [list(range(1, 30)), [7, 3, 50, 41], [90, 2] * 10]  # the first and third pass the window of 8
MAX_TOKENS = 5
# Log-probabilities of size 5 from float32 logits of size 1, summed in another order.
CLOSE = {"rtol": 0, "atol": 2e-5}


@dataclass
class Run:
    """An engine's device state, driven by hand."""

    programs: Programs
    params: list[jax.Array]

    def __post_init__(self):
        self.state, cache = self.programs.new_state()
        # What nobody wrote must not be read.
        self.cache = jax.tree.map(lambda array: jnp.full_like(array, jnp.nan), cache)
        pages = [np.random.default_rng(group).permutation(np.arange(1, SLOTS * PAGES + 1)) for group in (0, 1)]
        for slot in range(len(PROMPTS)):
            own = [group[slot * PAGES : (slot + 1) * PAGES] for group in pages]
            row = self.programs.admission(SamplingParams(temperature=0.0, max_tokens=MAX_TOKENS), own)
            self.state = self.programs.admit(self.state, {slot: row})

    def step(
        self,
        pieces: list[tuple[int, int, int]],
        decoding: list[int] | None = None,
        targets_T: np.ndarray | None = None,
    ) -> StepOutput:
        """Prefills (slot, start, end) pieces of the prompts, beside slots that decode or with a program for none."""
        first = len(decoding or ())
        ends = first + np.cumsum([0, *(end - start for _, start, end in pieces)])
        tokens = [0] * first + [token for slot, start, end in pieces for token in PROMPTS[slot][start:end]]

        def fill(values, rest: int, size: int = SLOTS) -> np.ndarray:
            return np.array([*values, *[rest] * (size - len(values))], np.int32)

        given = StepInput(
            tokens_T=fill(tokens, 0, ROWS),
            slots_B=fill(decoding or [], SLOTS, 0 if decoding is None else SLOTS),
            starts_R1=fill(ends, ends[-1], SLOTS + 1),
            slots_R=fill([slot for slot, _, _ in pieces], SLOTS),
            lengths_R=fill([end for _, _, end in pieces], 0),
            last_R=fill([end == len(PROMPTS[slot]) for slot, _, end in pieces], 0),
        )
        self.state, self.cache, output = self.programs.step(
            self.params, self.state, self.cache, given, targets_T, NEEDS
        )
        return jax.device_get(output)

    def loop(self, slots: tuple[int, ...] = tuple(range(SLOTS))) -> StepOutput:
        self.state, self.cache, output = self.programs.loop(
            self.params, self.state, self.cache, np.array(slots, np.int32), steps=STEPS, needs=NEEDS
        )
        return jax.device_get(output)


def compiler() -> Callable[[], Run]:
    model = Model(read_config(CONFIG), make_mesh(1))
    assert model.config.windows == (8, None)
    layout = Layout(SLOTS, PAGE, (SLOTS * PAGES + 1,) * 2, CONTEXT, "float32")
    programs, params = Programs(model, layout), random_params(model, 2)
    return lambda: Run(programs, params)


@pytest.fixture(scope="module")
def start():
    return compiler()


def whole(slot: int) -> tuple[int, int, int]:
    return slot, 0, len(PROMPTS[slot])


def assert_same(found: StepOutput, slot: int, expected: StepOutput, expected_slot: int, step: int = 0):
    """One slot of one step against the first step of another program."""
    assert found.emits_nW[step, slot]
    assert expected.emits_nW[0, expected_slot]
    ours, theirs = (
        jax.tree.map(lambda array, at=at: array[at], output.sampled)
        for output, at in ((found, (step, slot)), (expected, (0, expected_slot)))
    )
    assert ours.tokens_W == theirs.tokens_W
    np.testing.assert_allclose(ours.logprobs_W, theirs.logprobs_W, **CLOSE)
    np.testing.assert_allclose(ours.top_logprobs_WL, theirs.top_logprobs_WL, **CLOSE)


def test_prefill_in_chunks_equals_prefill_at_once(start):
    at_once = start().step([whole(0), whole(1), whole(2)])
    assert at_once.emits_nW[0].tolist() == [True, True, True, False]
    run = start()
    first = run.step([(0, 0, 7), (2, 0, 3)])
    assert not first.emits_nW.any()
    second = run.step([(2, 3, 20), (0, 7, 8), whole(1)])
    third = run.step([(0, 8, 29)])
    assert_same(third, 0, at_once, 0)
    assert_same(second, 1, at_once, 1)
    assert_same(second, 2, at_once, 2)


def test_a_mixed_step_equals_separate_ones(start):
    apart, mixed = start(), start()
    for run in (apart, mixed):
        run.step([whole(0), whole(1)])
    prefilled, decoded = apart.step([whole(2)]), apart.step([], [0, 1, 2])
    both = mixed.step([whole(2)], [1, 0])  # in whatever order
    assert both.emits_nW[0].tolist() == [True, True, True, False]
    assert_same(both, 2, prefilled, 2)
    for slot in (0, 1):
        assert_same(both, slot, decoded, slot)
    # Then the slot that was prefilled beside the others decodes as theirs does.
    after = mixed.step([], [2, 0, 1])
    assert_same(after, 2, decoded, 2)


def test_a_loop_equals_single_steps_and_ends_where_they_do(start):
    looped, stepped = start(), start()
    firsts = [run.step([whole(0), whole(1)]) for run in (looped, stepped)]
    np.testing.assert_array_equal(firsts[0].sampled.tokens_W, firsts[1].sampled.tokens_W)
    emitted = np.ones(2, int)
    for _ in range(2):
        loop = looped.loop()
        for step in range(STEPS):
            single = stepped.step([], [0, 1])
            np.testing.assert_array_equal(loop.emits_nW[step], single.emits_nW[0])
            for slot in np.flatnonzero(loop.emits_nW[step]):
                assert_same(loop, slot, single, slot, step)
            emitted += loop.emits_nW[step, :2]
    assert emitted.tolist() == [MAX_TOKENS] * 2
    assert not np.asarray(looped.state.active_B).any()
    np.testing.assert_array_equal(looped.state.length_B, [len(PROMPTS[0]) + 4, len(PROMPTS[1]) + 4, 0, 0])


def test_a_loop_of_some_slots_is_theirs_alone_and_in_their_order(start):
    every, some = start(), start()
    for run in (every, some):
        run.step([whole(0), whole(1), whole(2)])
    expected, found = every.loop(), some.loop((2, 0, SLOTS))
    assert found.emits_nW.tolist() == [[True, True, False]] * STEPS
    for step in range(STEPS):
        for row, slot in enumerate((2, 0)):
            np.testing.assert_array_equal(found.sampled.tokens_W[step, row], expected.sampled.tokens_W[step, slot])
    np.testing.assert_array_equal(some.state.index_B, [4, 1, 4, 0])
    np.testing.assert_array_equal(some.state.sampling.counts_BV.sum(axis=1), [4, 1, 4, 0])
    late = some.loop((1,))
    np.testing.assert_array_equal(late.sampled.tokens_W[:, 0], expected.sampled.tokens_W[:, 1])
    np.testing.assert_array_equal(some.state.token_B, every.state.token_B)


def test_prompts_scored_in_tiles_equal_prompts_scored_at_once(start, monkeypatch):
    """The pieces end within tiles."""
    pieces, targets_T = [whole(1), whole(2), whole(0)], np.full(ROWS, -1, np.int32)
    following = [token for slot, _, _ in pieces for token in [*PROMPTS[slot][1:], -1]]
    targets_T[: len(following)] = following
    (expected,) = start().step(pieces, targets_T=targets_T).prompt
    assert np.isfinite(expected.logprob_T[targets_T >= 0]).all()
    monkeypatch.setattr("jaxinfer.decode.step.SCORED", ROWS // 4)
    tiles = compiler()().step(pieces, targets_T=targets_T).prompt
    assert [len(tile.logprob_T) for tile in tiles] == [ROWS // 4] * 4
    scored = jax.tree.map(lambda *parts: np.concatenate(parts), *tiles)
    np.testing.assert_allclose(scored.logprob_T, expected.logprob_T, **CLOSE)
    np.testing.assert_allclose(scored.top_logprobs_TL, expected.top_logprobs_TL, **CLOSE)


def test_a_released_slot_stops_and_leaves_its_neighbour_alone(start):
    run, other = start(), start()
    for each in (run, other):
        each.step([whole(0), whole(1)])
    run.state = run.programs.release(run.state, [0])
    released, kept = run.step([], [0, 1]), other.step([], [0, 1])
    assert released.emits_nW[0, :2].tolist() == [False, True]
    assert_same(released, 1, kept, 1)
    np.testing.assert_array_equal(run.state.length_B[:1], [len(PROMPTS[0])])


@pytest.mark.parametrize(
    ("words", "expected"), [(2**16, [8, 8, 8, 8]), (1, [1] * 20)], ids=["light rows", "heavy rows"]
)
def test_requests_that_are_admitted_together_stand_as_one_after_the_other(monkeypatch, words, expected):
    """Also more of them than one program takes, and of two kinds; nobody else's slot changes."""
    monkeypatch.setattr("jaxinfer.decode.slots.ADMITTED", 8)
    monkeypatch.setattr("jaxinfer.decode.slots.ADMITTED_WORDS", words)
    programs = Programs(
        Model(read_config(CONFIG), make_mesh(1)), Layout(24, 1, (400,) * 2, 100, "float32", speculation=PromptLookup())
    )
    random = np.random.default_rng(0)

    def row(slot: int, kind: int):
        """Of kind 1 the sampler reads the prompt, and of kind 2 an output that goes on."""
        params = SamplingParams(
            temperature=0.5 + slot, max_tokens=slot + 1, repetition_penalty=1 + kind % 2, presence_penalty=kind
        )
        pages, prompt, output = (random.integers(1, 60, size).tolist() for size in (slot, 9, 5))
        return programs.admission(params, [pages, pages[::-1]], prompt, (2,), slot, output if kind == 2 else ())

    before = {slot: row(slot, slot % 3) for slot in range(24)}
    rows = {slot: row(slot, int(slot < 3)) for slot in random.permutation(24)[:20].tolist()}
    sizes, admit = [], programs._admit
    monkeypatch.setattr(programs, "_admit", lambda state, *some: sizes.append(len(some[0])) or admit(state, *some))
    states = []
    for parts in ([rows], [{slot: one} for slot, one in rows.items()]):
        state = programs.admit(programs.new_state()[0], before)
        stood = jax.device_get(state)
        sizes.clear()
        for part in parts:
            state = programs.admit(state, part)
        states.append((jax.device_get(state), [*sizes]))
    (together, few), (apart, _) = states
    assert few == expected
    jax.tree.map(np.testing.assert_array_equal, together, apart)
    others = [slot for slot in range(24) if slot not in rows]
    jax.tree.map(lambda new, old: np.testing.assert_array_equal(new[others], old[others]), together, stood)
    for slot, one in rows.items():
        np.testing.assert_array_equal(together.text_BT[slot], one.text_T)
        np.testing.assert_array_equal([table_BJ[slot] for table_BJ in together.tables], one.tables)


@pytest.mark.parametrize("devices", [1, 2])
def test_entries_of_page_tables_go_where_they_belong(devices):
    """Also more of them than one program takes."""
    model = Model(read_config(CONFIG), make_mesh(devices))
    programs = Programs(model, Layout(SLOTS, 1, (400,) * 2, 100, "float32"))
    state, _ = programs.new_state()
    random = np.random.default_rng(0)
    expected = np.zeros((2, SLOTS, 100), np.int32)
    places = random.permutation(expected.size)[:300]
    entries = [(*map(int, np.unravel_index(place, expected.shape)), page) for page, place in enumerate(places, 1)]
    for group, slot, column, page in entries:
        expected[group, slot, column] = page
    state = programs.extend(state, entries)
    np.testing.assert_array_equal(np.stack(jax.device_get(state.tables)), expected)
    assert programs.traces == {"extend": 1}
