"""A device in plain Python, for the engine: a key says which text it ends, so that whoever reads a wrong one is found.

A text is a number: `longer` makes that of a text and one more token, from 0, the empty one.

Programs run when they are dispatched, which is the order in which a device runs them.
"""

import functools
from concurrent import futures
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from unittest import mock

import numpy as np

from jaxinfer.cache import NULL_PAGE
from jaxinfer.decode.layout import Layout
from jaxinfer.decode.masks import WORD, no_masks
from jaxinfer.decode.sampling import Sampled
from jaxinfer.decode.sampling_params import SamplingParams
from jaxinfer.decode.step import StepOutput
from jaxinfer.engine import Engine, Options, Request, Update
from jaxinfer.engine.budget import Budget, Times
from jaxinfer.roofline import Attended

VOCABULARY = 50
WINDOWS = (None, 6, 13)
Told = dict[int, tuple[list[int], str | None]]  # by request: its tokens, and how it ended


class Sent(np.ndarray):
    """An array that is on the host already."""

    def copy_to_host_async(self):
        pass

    def is_ready(self):
        return True


def longer(text: int, token: int) -> int:
    return hash((text, token))


def next_token(text: int, seed: int, index: int) -> int:
    """The fake model: what follows a text, by the seed and the token's index."""
    return hash((text, seed, index)) % VOCABULARY


def expected_tokens(request: Request) -> list[int]:
    """The request's whole output, as nothing but the request decides it."""
    text, output = functools.reduce(longer, request.prompt_ids, 0), []
    constraint = Chain() if request.params.structured_outputs else None
    while len(output) < request.params.max_tokens and not (output and output[-1] in request.stop_ids):
        token = next_token(text, request.seed, len(output))
        if constraint is not None:
            token = first_allowed(token, constraint.mask())
            constraint.accept(token)
        output.append(token)
        text = longer(text, output[-1])
    return output


@dataclass
class Chain:
    """A constraint: which half of the tokens may come next depends on all that came before."""

    failed: str | None = None
    seen: int = 0

    def mask(self):
        words_U = np.zeros_like(no_masks(1, VOCABULARY)[0])
        for token in range(hash(self.seen) % 2, VOCABULARY, 2):
            words_U[token // WORD] |= np.uint32(1 << token % WORD)
        return words_U

    def accept(self, token):
        self.seen = longer(self.seen, token)

    def copy(self):
        return replace(self)


def first_allowed(token: int, words_U: np.ndarray) -> int:
    """The token, or the next one in order that its mask allows."""
    return next(one for one in (*range(token, VOCABULARY), *range(token)) if words_U[one // WORD] >> one % WORD & 1)


class AtOnce(futures.Executor):
    """Calls when it is told to: threads would make tests depend on their times."""

    def submit(self, call, /, *arguments, **named):
        future = futures.Future()
        future.set_result(call(*arguments, **named))
        return future


@dataclass
class Slot:
    tables: list[np.ndarray]
    request: tuple[SamplingParams, tuple[int, ...], int] | None = None
    token: int = 0
    length: int = 0
    index: int = 0
    active: bool = False

    def is_deleted(self):
        return False


@dataclass
class FakePrograms:
    """`jaxinfer.decode.step.Programs` without a model. A page's slot holds a token, and the text before it."""

    model: SimpleNamespace
    layout: Layout
    traces: dict = field(default_factory=dict)

    def new_state(self):
        layout, groups = self.layout, range(len(self.layout.num_pages))
        state = [Slot([np.zeros(layout.pages_per_row, int) for _ in groups]) for _ in range(layout.slots)]
        return state, [[[None] * layout.page_size for _ in range(count)] for count in layout.num_pages]

    def admission(self, params, pages, prompt_ids, eos_ids, seed, output_ids):
        return [list(group) for group in pages], (params, tuple(eos_ids), seed), len(output_ids)

    def admit(self, state, rows):
        for slot, (pages, request, index) in rows.items():
            assert not state[slot].active
            state[slot] = Slot(state[slot].tables, request, index=index)
            for table, group in zip(state[slot].tables, pages, strict=True):
                table[: len(group)] = group
        return state

    def extend(self, state, entries):
        for group, slot, column, page in entries:
            state[slot].tables[group][column] = page
        return state

    def release(self, state, stopped):
        for slot in stopped:
            state[slot].active = False
        return state

    def step(self, params, state, cache, given, targets_T, needs, masks=None):
        words_BU = no_masks(len(state), VOCABULARY) if masks is None else masks()
        decoding = given.slots_B[given.slots_B < len(state)].tolist()
        assert given.starts_R1[0] == len(decoding)
        tokens_W, emits_W = self._decode(state, cache, decoding, words_BU)
        for chunk, number in enumerate(given.slots_R):
            begin, end = given.starts_R1[chunk : chunk + 2]
            if number < len(state):
                slot, start = state[number], given.lengths_R[chunk] - (end - begin)
                for position, token in enumerate(given.tokens_T[begin:end].tolist(), int(start)):
                    text = self._run(slot, cache, position, token)
                slot.length = int(given.lengths_R[chunk])
                if given.last_R[chunk]:
                    tokens_W[number], emits_W[number] = self._draw(slot, text, words_BU[number]), True
        return state, cache, _output([tokens_W], [emits_W])

    def loop(self, params, state, cache, slots_B, *, steps, needs, drafts):
        assert not drafts
        some = len(slots_B) < len(state)
        numbers = [number for number in slots_B.tolist() if number < len(state)] if some else range(len(state))
        assert not any(state[number].active and state[number].request[0].structured_outputs for number in numbers)
        words_BU = no_masks(len(state), VOCABULARY)
        ran = [self._decode(state, cache, numbers, words_BU) for _ in range(steps)]
        by_row = [np.array(each)[:, [*numbers]] for each in zip(*ran, strict=True)]
        return state, cache, _output(*by_row)

    def _decode(self, state, cache, numbers, words_BU):
        """By slot: what each of these that is active draws, and whether it is."""
        tokens_B, emits_B = [0] * len(state), [False] * len(state)
        for number in numbers:
            slot = state[number]
            if slot.active:
                text = self._run(slot, cache, slot.length, slot.token)
                slot.length += 1
                tokens_B[number], emits_B[number] = self._draw(slot, text, words_BU[number]), True
        return tokens_B, emits_B

    def _run(self, slot, cache, position, token):
        """Writes a token's key, then reads all that it sees, back to the first: each must begin the one after it."""
        size = self.layout.page_size
        column, place = divmod(position, size)
        before = longer(*self._read(cache[0], slot.tables[0], position - 1)) if position else 0
        for table, pages, window in zip(slot.tables, cache, self.model.config.windows, strict=True):
            assert table[column] != NULL_PAGE
            assert table[column] // (len(pages) // self.layout.ranks) == column % self.layout.ranks
            pages[table[column]][place] = before, token
            expected = before
            for key in range(position - 1, max(position - window, -1) if window else -1, -1):
                seen = self._read(pages, table, key)
                assert longer(*seen) == expected
                expected, _ = seen
            assert window or expected == 0
        return longer(before, token)

    def _read(self, pages, table, key):
        column, place = divmod(key, self.layout.page_size)
        return pages[table[column]][place]

    def _draw(self, slot, text, words_U):
        params, eos_ids, seed = slot.request
        slot.token = first_allowed(next_token(text, seed, slot.index), words_U)
        slot.index += 1
        stops = {*(params.stop_token_ids or ()), *(() if params.ignore_eos else eos_ids)}
        slot.active = slot.token not in stops and slot.index < params.max_tokens
        return slot.token


def _output(tokens_nW, emits_nW):
    nothing = np.zeros(0).view(Sent)
    tokens = np.array(tokens_nW, np.int32).view(Sent)
    return StepOutput(Sampled(tokens, nothing, nothing, nothing), np.array(emits_nW, bool).view(Sent), ())


@dataclass(frozen=True)
class FakeTimes:
    """A step's predicted seconds: so many for the weights, a token, and a key that a token sees."""

    weights: float
    token: float
    key: float

    def decode(self, slots, reading, queries=1, rows=None):
        return self.mixed(slots * queries, slots * queries if rows is None else rows, reading, Attended())

    def mixed(self, tokens, slots, reading, chunks):
        return self.weights + self.token * (tokens + slots) + self.key * (reading.flops + chunks.flops)

    def rest(self, rows):
        return 0.0

    def head(self, rows):
        return self.token * rows

    def decoding(self, contexts, queries=1):
        return Attended(queries * sum(contexts))

    def kernels(self, count):
        return 0.0

    def chunk(self, tokens, cached):
        return Attended(tokens * cached + tokens * (tokens + 1) // 2)


def fake_engine(
    options: Options, context: int, windows: tuple[int | None, ...] = WINDOWS, times: Times | None = None,
    ranks: int = 1,
) -> Engine:  # fmt: skip
    """An engine without a device. The first window is None, since that group tells the whole text."""
    config = SimpleNamespace(windows=windows, dtype="float32", vocab_size=VOCABULARY)
    fits_always = mock.patch("jaxinfer.engine.memory.check_pages")
    budget = mock.patch("jaxinfer.engine.engine.predicted_budget", lambda _, *sizes: Budget(*sizes, times))
    threads = mock.patch("jaxinfer.engine.constraints.futures.ThreadPoolExecutor", return_value=AtOnce())
    with mock.patch("jaxinfer.engine.runner.Programs", FakePrograms), fits_always, budget, threads:
        model = SimpleNamespace(config=config, context=context, ranks=ranks, stages=1)
        return Engine(model, [], options, lambda asked: Chain())


def run(engine: Engine, told: Told, most: int = 10_000) -> None:
    """Steps until all is told."""
    for _ in range(most):
        if not engine.busy:
            return
        gather(told, engine.step())
    raise AssertionError(f"requests that never end: {engine.scheduler.sequences}")


def gather(told: Told, updates: list[Update]) -> None:
    for update in updates:
        tokens, ended = told.setdefault(update.request.id, ([], None))
        assert ended is None
        told[update.request.id] = (tokens + list(update.tokens), update.finish_reason)
