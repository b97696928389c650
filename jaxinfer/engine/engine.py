"""The engine's loop: schedule, run, commit.

The host schedules and dispatches step n + 1 while the device runs step n: step n + 1 reads step n's tokens on the
device, and the host reads them late. What ran past the end of a sequence is discarded at commit.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import jax
import numpy as np

from jaxinfer.decode import sampling
from jaxinfer.decode.prompt_logprobs import PromptLogprobs
from jaxinfer.decode.sampling import Needs, Sampled
from jaxinfer.decode.sampling_params import SamplingParams
from jaxinfer.decode.slots import Admission
from jaxinfer.decode.step import SCORED, Layout, Programs, StepOutput
from jaxinfer.engine.memory import fitting_pages
from jaxinfer.engine.request import Request, Sequence, TokenLogprobs, Update
from jaxinfer.engine.scheduler import Chunk, Scheduler, lay_out, next_tokens
from jaxinfer.model import Model, Params

SMALLEST_BUCKET = SCORED  # the larger ones are whole multiples: one program scores all prompts
IN_FLIGHT = 2  # steps dispatched before the oldest is read
WARM = (sampling.GREEDY, sampling.EVERYTHING)


@dataclass(frozen=True)
class Options:
    """How an engine runs, in vLLM's names where it has them.

    Attributes:
        max_num_seqs: sequences that run at once; a power of two.
        max_num_batched_tokens: prompt tokens of one step; a power of two, at least 64.
        page_size: tokens per page of the cache.
        num_pages: pages of each cache group; None gives every slot its longest sequence, as far as memory goes.
        steps_per_dispatch: decode steps in one program.
        cache_dtype: of keys and values, float32, bfloat16 or float16; None takes the model's.
    """

    max_num_seqs: int = 8
    max_num_batched_tokens: int = 1024
    page_size: int = 16
    num_pages: int | None = None
    steps_per_dispatch: int = 8
    cache_dtype: str | None = None

    def __post_init__(self):
        powers = {"max_num_seqs": (self.max_num_seqs, 1), "page_size": (self.page_size, 1),
                  "max_num_batched_tokens": (self.max_num_batched_tokens, SMALLEST_BUCKET)}  # fmt: skip
        for name, (value, least) in powers.items():
            if not _is_integer(value) or value < least or value & (value - 1):
                raise ValueError(f"{name} = {value!r} must be an integer power of two, at least {least}")
        if not _is_integer(self.steps_per_dispatch) or self.steps_per_dispatch < 1:
            raise ValueError(f"steps_per_dispatch = {self.steps_per_dispatch!r} must be an integer, at least 1")
        if self.cache_dtype not in (None, "float32", "bfloat16", "float16"):
            raise ValueError(f"cache_dtype = {self.cache_dtype!r} must be float32, bfloat16 or float16")
        if self.num_pages is not None and (not _is_integer(self.num_pages) or self.num_pages < 2):
            raise ValueError(f"num_pages = {self.num_pages!r} must be an integer, at least 2, the null page included")


@dataclass(frozen=True)
class Work:
    """A dispatched program: its output, and the sequences that its rows belong to."""

    output: StepOutput
    rows: list[tuple[int, Sequence]]
    chunks: list[Chunk]


class Engine:
    """One model with one cache, serving many requests. Not thread-safe: one caller drives `step`."""

    def __init__(self, model: Model, params: Params, options: Options | None = None):
        self.model, self.params = model, params
        self.options = options or Options()
        self.layout = _layout(model, self.options)
        self.scheduler = Scheduler(self.layout)
        self.programs = Programs(model, self.layout)
        self._state, self._cache = self.programs.new_state()
        self._in_flight: deque[Work] = deque()
        self._lost: list[Request] = []  # by a failed step, to be told
        self._warm: tuple[Needs, ...] = ()  # what `warm_up` compiled, the cheapest first

    def problems(self, request: Request) -> list[str]:
        """Why the engine could never run a request, in words; empty when it can."""
        needed, usable = self.scheduler.pages_needed(request), min(pool.usable for pool in self.scheduler.pools)
        if needed <= usable:
            return []
        return [f"prompt and max_tokens need {needed} pages of {self.layout.page_size} tokens; the cache has {usable}"]

    def add(self, request: Request) -> None:
        """Queues a request.

        Raises:
            ValueError: the cache could never hold it.
        """
        if problems := self.problems(request):
            raise ValueError("; ".join(problems))
        self.scheduler.add(request)

    def abort(self, request_id: int) -> None:
        """Drops a request wherever it is; one that ended already is left alone."""
        if (sequence := self.scheduler.drop(request_id)) is not None:
            self._state = self.programs.release(self._state, sequence.slot)

    def step(self) -> list[Update]:
        """Dispatches the next program, reads the oldest one, and returns what that brought.

        A step that fails, or is interrupted, may have consumed the cache. The engine then starts afresh before the
        exception goes on, and the next step ends every request that there was with the reason `abort`.
        """
        if self._lost:
            lost, self._lost = self._lost, []
            return [Update(request, (), (), None, "abort") for request in lost]
        try:
            return self._step()
        except BaseException:
            self._start_afresh()
            raise

    def _step(self) -> list[Update]:
        self._admit()
        if (work := self._dispatch()) is not None:
            self._in_flight.append(work)
        if self._in_flight and (work is None or len(self._in_flight) >= IN_FLIGHT):
            return self._commit(self._in_flight.popleft())
        return []

    def _start_afresh(self) -> None:
        self._lost = self.scheduler.requests
        self._in_flight.clear()
        self.scheduler = Scheduler(self.layout)
        del self._state, self._cache  # before the new ones take their place
        self._state, self._cache = self.programs.new_state()

    def warm_up(self) -> None:
        """Compiles every program that requests can meet from then on, on an idle engine.

        Two kinds of sampling are compiled, greedy and all that there is; a batch takes the first that serves it.
        """
        assert not self.scheduler.running
        for penalty in (1.0, 2.0):  # whether the sampler reads the prompt makes two programs of an admission
            idle = SamplingParams(max_tokens=1, repetition_penalty=penalty)
            row = self.programs.admission(idle, [()] * len(self.layout.num_pages), prompt_ids=(0,))
            self._state = self.programs.admit(self._state, 0, row)
        self._state = self.programs.extend(self._state, [(0, self.layout.slots, 0, 0)])  # of no slot
        self._state = self.programs.release(self._state, 0)
        for decode in (0, self.layout.slots):
            for tokens in _powers(SMALLEST_BUCKET, self.options.max_num_batched_tokens):
                self._run_step(lay_out([], tokens, self.layout.slots), None, decode, WARM[0])
            prefill, targets_T = lay_out([], SCORED, self.layout.slots), next_tokens([], SCORED)
            for needs in WARM[1:]:
                self._run_step(prefill, targets_T, decode, needs)
        for decode in _powers(1, self.layout.slots):
            for needs in WARM:
                self._run_loop(decode, needs)
        jax.block_until_ready(self._state)
        self._warm = WARM

    # --- schedule

    def _admit(self) -> None:
        while (sequence := self.scheduler.admit()) is not None:
            self._state = self.programs.admit(self._state, sequence.slot, self._admission(sequence))

    def _admission(self, sequence: Sequence) -> Admission:
        request = sequence.request
        return self.programs.admission(
            request.params, sequence.pages, request.prompt_ids, request.eos_ids, request.seed
        )

    # --- run

    def _dispatch(self) -> Work | None:
        """Prompts first, with one token for whoever decodes beside them; a loop of decode steps otherwise."""
        decoding = self.scheduler.decoding()
        chunks = self.scheduler.chunks(self.options.max_num_batched_tokens)
        if not decoding and not chunks:
            return None
        needs = self._needs()
        rows = [(sequence.slot, sequence) for sequence in decoding]
        if not chunks:
            decode = _bucket(max(sequence.slot for sequence in decoding) + 1, self.layout.slots, 1)
            _schedule(decoding, self.options.steps_per_dispatch)
            return Work(self._run_loop(decode, needs), rows, [])
        decode = self.layout.slots if decoding else 0
        tokens = _bucket(sum(chunk.tokens for chunk in chunks), self.options.max_num_batched_tokens)
        wants = any(chunk.sequence.request.params.prompt_logprobs is not None for chunk in chunks)
        targets_T = next_tokens(chunks, tokens) if wants else None
        output = self._run_step(lay_out(chunks, tokens, self.layout.slots), targets_T, decode, needs)
        for index, chunk in enumerate(chunks):
            chunk.sequence.prefilled += chunk.tokens
            if chunk.sequence.prompt_left == 0:
                rows.append((decode + index, chunk.sequence))
        _schedule([sequence for _, sequence in rows], 1)
        return Work(output, rows, chunks)

    def _needs(self) -> Needs:
        """The least that serves all who run; on a warm engine the least of what is compiled."""
        exact = sampling.needs(sequence.request.params for sequence in self.scheduler.running.values())
        return next((warm for warm in self._warm if warm.covers(exact)), exact)

    def _run_step(self, prefill, targets_T, decode: int, needs: Needs) -> StepOutput:
        self._state, self._cache, output = self.programs.step(
            self.params, self._state, self._cache, prefill, targets_T, decode, needs
        )
        return _send(output)

    def _run_loop(self, decode: int, needs: Needs) -> StepOutput:
        self._state, self._cache, output = self.programs.loop(
            self.params, self._state, self._cache, decode=decode, steps=self.options.steps_per_dispatch, needs=needs
        )
        return _send(output)

    # --- commit

    def _commit(self, work: Work) -> list[Update]:
        output = jax.tree.map(np.asarray, work.output)
        if output.prompt:
            scored = jax.tree.map(lambda *tiles: np.concatenate(tiles), *output.prompt)
            _keep_prompt_logprobs(work.chunks, scored)
        updates = []
        for row, sequence in work.rows:
            if not sequence.finished:
                updates += self._commit_row(row, sequence, output)
        return updates

    def _commit_row(self, row: int, sequence: Sequence, output: StepOutput) -> list[Update]:
        """The tokens that one row of a program brought, up to the one that ends the sequence."""
        request, tokens, logprobs, reason = sequence.request, [], [], None
        first, stop_ids = sequence.outputs == 0, request.stop_ids
        for step in np.flatnonzero(output.emits_nW[:, row]).tolist():
            tokens.append(int(output.sampled.tokens_W[step, row]))
            if request.params.logprobs is not None:
                logprobs.append(_chosen(output.sampled, (step, row), request.params.logprobs))
            sequence.outputs += 1
            if tokens[-1] in stop_ids:
                reason = "stop"
            elif sequence.outputs == request.params.max_tokens:
                reason = "length"
            if reason:
                self.scheduler.finish(sequence)
                break
        sequence.check()
        if not tokens:
            return []
        prompt = request.params.prompt_logprobs is not None and first
        told = tuple(sequence.prompt_logprobs) if prompt else None
        return [Update(request, tuple(tokens), tuple(logprobs), told, reason)]


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _layout(model: Model, options: Options) -> Layout:
    dtype = options.cache_dtype or model.config.dtype
    wanted = options.max_num_seqs * -(-model.context // options.page_size) + 1
    pages = options.num_pages or min(wanted, fitting_pages(model, options.page_size, dtype))
    return Layout(
        slots=options.max_num_seqs,
        page_size=options.page_size,
        num_pages=(pages,) * len(model.config.windows),
        max_tokens=model.context,
        cache_dtype=dtype,
    )


def _powers(least: int, most: int) -> list[int]:
    """The powers of two from `least` to `most`, both powers of two themselves."""
    return [least << shift for shift in range((most // least).bit_length())]


def _bucket(count: int, most: int, least: int = SMALLEST_BUCKET) -> int:
    return next(size for size in _powers(least, most) if size >= count)


def _schedule(sequences: list[Sequence], steps: int) -> None:
    for sequence in sequences:
        sequence.scheduled += steps


def _send(output: StepOutput) -> StepOutput:
    """Starts the copy to the host, which the commit will wait for."""
    for array in jax.tree.leaves(output):
        array.copy_to_host_async()
    return output


def _chosen(sampled: Sampled, at: tuple[int, int], top: int) -> TokenLogprobs:
    likeliest = zip(sampled.top_ids_WL[at][:top].tolist(), sampled.top_logprobs_WL[at][:top].tolist(), strict=True)
    return TokenLogprobs(int(sampled.tokens_W[at]), float(sampled.logprobs_W[at]), tuple(likeliest))


def _keep_prompt_logprobs(chunks: list[Chunk], scored: PromptLogprobs) -> None:
    """Gives each chunk's sequence the log-probabilities of the prompt tokens that follow the chunk's own."""
    row = 0
    for chunk in chunks:
        request = chunk.sequence.request
        if (top := request.params.prompt_logprobs) is not None:
            for offset, token in enumerate(request.prompt_ids[chunk.start + 1 : chunk.start + chunk.tokens + 1]):
                ids, values = scored.top_ids_TL[row + offset], scored.top_logprobs_TL[row + offset]
                likeliest = tuple(zip(ids[:top].tolist(), values[:top].tolist(), strict=True))
                entry = TokenLogprobs(token, float(scored.logprob_T[row + offset]), likeliest)
                chunk.sequence.prompt_logprobs.append(entry)
        row += chunk.tokens
