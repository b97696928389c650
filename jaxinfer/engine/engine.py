"""The engine's loop: schedule, run, commit.

The host schedules and dispatches step n + 1 while the device runs step n: step n + 1 reads step n's tokens on the
device, and the host reads them late. What ran past the end of a sequence is discarded at commit. Where a constraint
says which tokens may be drawn, the host reads step n and asks it while the device computes the logits of step n + 1.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import jax
import numpy as np

from jaxinfer.decode import sampling
from jaxinfer.decode.masks import no_masks
from jaxinfer.decode.sampling import Needs
from jaxinfer.decode.sampling_params import SamplingParams
from jaxinfer.decode.step import SCORED, Layout, Programs, StepOutput
from jaxinfer.engine.commit import keep_prompt_logprobs, read_row
from jaxinfer.engine.constraints import Constrain, Constraints
from jaxinfer.engine.memory import check_pages, fitting_pages
from jaxinfer.engine.metrics import Counters, Metrics
from jaxinfer.engine.options import SMALLEST_BUCKET, Options
from jaxinfer.engine.prefill import lay_out, next_tokens
from jaxinfer.engine.request import Request, Update
from jaxinfer.engine.scheduler import Plan, Scheduler
from jaxinfer.engine.sequence import Sequence
from jaxinfer.model import Model, Params
from jaxinfer.roofline import most_pages

IN_FLIGHT = 2  # steps dispatched before the oldest is read
WARM = (sampling.GREEDY, sampling.EVERYTHING)


@dataclass(frozen=True)
class Work:
    """A dispatched program: its plan and output, and the sequences that rows of the output belong to."""

    plan: Plan
    output: StepOutput
    rows: list[tuple[int, Sequence]]


class Engine:
    """One model with one cache, serving many requests. Not thread-safe: one caller drives `step`."""

    def __init__(
        self, model: Model, params: Params, options: Options | None = None, constrain: Constrain | None = None
    ):
        """Args:
        constrain: makes the constraint of a request that has `structured_outputs`; None refuses them.
        """
        self.model, self.params = model, params
        self.options = options or Options()
        self.layout = _layout(model, self.options)
        self.counters = Counters()
        self.scheduler = self._new_scheduler()
        self.programs = Programs(model, self.layout)
        self._state, self._cache = self.programs.new_state()
        self._in_flight: deque[Work] = deque()
        self._constraints = Constraints(constrain)
        self._updates: list[Update] = []  # to be told; what was read outlasts a step that fails
        self._lost: list[Request] = []  # by a failed step, to be told
        self._warm: tuple[Needs, ...] = ()  # what `warm_up` compiled, the cheapest first

    def problems(self, request: Request) -> list[str]:
        """Why the engine could never run a request, in words; empty when it can."""
        if request.params.structured_outputs is not None and not self._constraints.possible:
            return ["structured_outputs has no use here: this engine makes no constraints"]
        return self.scheduler.problems(request)

    def add(self, request: Request) -> None:
        """Queues a request.

        Raises:
            ValueError: the cache could never hold it, or a request of that id has not ended.
        """
        if problems := self.problems(request):
            raise ValueError("; ".join(problems))
        if request.id in self.scheduler.sequences or request.id in self._constraints:
            raise ValueError(f"id = {request.id} is that of a request that has not ended; allowed: any other")
        if request.params.structured_outputs is not None:
            self._constraints.add(request)
        else:
            self.scheduler.add(request)

    def abort(self, request_id: int) -> None:
        """Drops a request wherever it is; one that ended already is left alone."""
        self._constraints.drop(request_id)
        if (slot := self.scheduler.drop(request_id)) is not None:
            self._state = self.programs.release(self._state, slot)

    @property
    def busy(self) -> bool:
        """Whether `step` has anything left to do or to tell."""
        return bool(self._updates or self._lost or self.scheduler.sequences or self._in_flight or self._constraints)

    @property
    def metrics(self) -> Metrics:
        scheduler = self.scheduler
        pools, running = scheduler.paging.pools, list(scheduler.running.values())
        return Metrics(
            counters=replace(self.counters),
            waiting=len(scheduler.waiting) + len(self._constraints),
            running=len(running),
            pages_total=sum(pool.usable for pool in pools),
            pages_used=sum(pool.used for pool in pools),
            pages_cached=sum(pool.cached for pool in pools),
            evictions=sum(pool.evictions for pool in pools),
            wasted_slots=scheduler.paging.waste(running),
            compilations=sum(self.programs.traces.values()),
        )

    def step(self) -> list[Update]:
        """Dispatches the next program, reads the oldest one, and returns what that brought.

        A step that fails, or is interrupted, may have consumed the cache. The engine then starts afresh before the
        exception goes on, and the next step ends every request that there was with the reason `abort`.
        """
        if self._lost:
            self._updates += [Update(request, (), (), None, "abort") for request in self._lost]
            self._lost = []
        else:
            try:
                self._step()
            except BaseException:
                self._start_afresh()
                raise
        updates, self._updates = self._updates, []
        return updates

    def _step(self) -> None:
        self._welcome()
        for sequence in self.scheduler.expired():
            self._updates.append(Update(sequence.request, (), (), None, "timeout"))
        if (work := self._dispatch(self.scheduler.schedule())) is not None:
            self._in_flight.append(work)
        if self._in_flight and (work is None or len(self._in_flight) >= IN_FLIGHT):
            self._commit(self._in_flight.popleft())

    def _welcome(self) -> None:
        """Queues the requests whose constraints are ready; those that cannot have one are told so."""
        idle = not self.scheduler.sequences and not self._in_flight
        for request, constraint in self._constraints.ready(wait=idle):
            if constraint is None:
                self._updates.append(Update(request, (), (), None, "abort"))
            else:
                self.scheduler.add(request, constraint)

    def _start_afresh(self) -> None:
        self._lost = [sequence.request for sequence in self.scheduler.sequences.values()]
        self._in_flight.clear()
        self.scheduler = self._new_scheduler()
        del self._state, self._cache  # before the new ones take their place
        self._state, self._cache = self.programs.new_state()

    def _new_scheduler(self) -> Scheduler:
        return Scheduler(self.layout, self.model.config.windows, self.options, self.counters)

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
        if self._constraints.possible:
            self._warm_up_masks()
        jax.block_until_ready(self._state)
        self._warm = WARM

    def _warm_up_masks(self) -> None:
        """The programs of steps that the host has a say in: without prompts, and masks of every number of rows."""
        masks = partial(no_masks, self.layout.slots, self.model.config.vocab_size)
        for decode in _powers(1, self.layout.slots):
            self._run_step(lay_out([], 0, 0), None, decode, WARM[0], masks)
        self._run_step(lay_out([], SMALLEST_BUCKET, self.layout.slots), None, self.layout.slots, WARM[0], masks)

    # --- run

    def _dispatch(self, plan: Plan) -> Work | None:
        """Prompts first, with one token for whoever decodes beside them; a loop of decode steps otherwise."""
        self._tell(plan)
        if not plan.decoding and not plan.chunks:
            return None
        needs = self._needs(plan)
        rows = [(sequence.slot, sequence) for sequence in plan.decoding if sequence.slot is not None]
        masks = self._masks_for(plan)
        if not plan.chunks:
            decode = _bucket(max(slot for slot, _ in rows) + 1, self.layout.slots, 1)
            if masks is None and plan.steps == self.options.steps_per_dispatch:
                return Work(plan, self._run_loop(decode, needs), rows)
            return Work(plan, self._run_step(lay_out([], 0, 0), None, decode, needs, masks), rows)
        decode = self.layout.slots if plan.decoding else 0
        tokens = _bucket(sum(chunk.tokens for chunk in plan.chunks), self.options.max_num_batched_tokens)
        wants = any(chunk.sequence.scores_prompt for chunk in plan.chunks)
        targets_T = next_tokens(plan.chunks, tokens) if wants else None
        output = self._run_step(lay_out(plan.chunks, tokens, self.layout.slots), targets_T, decode, needs, masks)
        rows += [(decode + index, chunk.sequence) for index, chunk in enumerate(plan.chunks) if chunk.last]
        return Work(plan, output, rows)

    def _tell(self, plan: Plan) -> None:
        """Brings the device's slots up to date."""
        for slot in plan.released:
            self._state = self.programs.release(self._state, slot)
        for sequence in plan.admitted:
            request = sequence.request
            row = self.programs.admission(
                request.params, sequence.pages, request.prompt_ids, request.eos_ids, request.seed, sequence.output_ids
            )
            assert sequence.slot is not None
            self._state = self.programs.admit(self._state, sequence.slot, row)
        self._state = self.programs.extend(self._state, plan.entries)

    def _needs(self, plan: Plan) -> Needs:
        """The least that serves all whose tokens are drawn; on a warm engine the least of what is compiled."""
        sequences = [*plan.decoding, *(chunk.sequence for chunk in plan.chunks)]
        exact = sampling.needs(sequence.request.params for sequence in sequences)
        return next((warm for warm in self._warm if warm.covers(exact)), exact)

    def _masks_for(self, plan: Plan) -> Callable[[], np.ndarray] | None:
        """What makes the masks of a step, when its forward pass is on its way; None where nobody needs one.

        All that is in flight is read before: a constraint knows what follows a token when it has the token.
        """
        drawing = [*plan.decoding, *(chunk.sequence for chunk in plan.chunks if chunk.last)]
        if all(sequence.constraint is None for sequence in drawing):
            return None

        def masks() -> np.ndarray:
            while self._in_flight:
                self._commit(self._in_flight.popleft())
            return self._constraints.masks(drawing, self.layout.slots, self.model.config.vocab_size)

        return masks

    def _run_step(
        self, prefill, targets_T, decode: int, needs: Needs, masks: Callable[[], np.ndarray] | None = None
    ) -> StepOutput:
        self._state, self._cache, output = self.programs.step(
            self.params, self._state, self._cache, prefill, targets_T, decode, needs, masks
        )
        return _send(output)

    def _run_loop(self, decode: int, needs: Needs) -> StepOutput:
        self._state, self._cache, output = self.programs.loop(
            self.params, self._state, self._cache, decode=decode, steps=self.options.steps_per_dispatch, needs=needs
        )
        return _send(output)

    # --- commit

    def _commit(self, work: Work) -> None:
        output = jax.tree.map(np.asarray, work.output)
        for sequence in (*work.plan.decoding, *(chunk.sequence for chunk in work.plan.chunks)):
            sequence.in_flight -= 1
        if output.prompt:
            keep_prompt_logprobs(work.plan.chunks, output.prompt)
        for index, sequence in work.rows:
            if not sequence.finished and (update := self._commit_row(output, index, sequence)) is not None:
                self._updates.append(update)

    def _commit_row(self, output: StepOutput, index: int, sequence: Sequence) -> Update | None:
        first = sequence.scores_prompt
        row = read_row(output, index, sequence)
        sequence.check()
        if not row.tokens:
            return None
        self.counters.output_tokens += len(row.tokens)
        self.scheduler.read(sequence)
        if row.reason:
            self.scheduler.finish(sequence)
        prompt = tuple(sequence.prompt_logprobs) if first else None
        return Update(sequence.request, row.tokens, row.logprobs, prompt, row.reason)


def _layout(model: Model, options: Options) -> Layout:
    dtype, windows = options.cache_dtype or model.config.dtype, model.config.windows
    if options.num_pages is not None:
        check_pages(model, options.page_size, dtype, options.num_pages)
        num_pages = (options.num_pages,) * len(windows)
    else:
        ahead = max(options.max_num_batched_tokens, options.steps_per_dispatch)
        longest = [most_pages(model.context, options.page_size, window, ahead) for window in windows]
        wanted = tuple(options.max_num_seqs * pages + 1 for pages in longest)
        num_pages = fitting_pages(model, options.page_size, dtype, wanted)
    return Layout(
        slots=options.max_num_seqs,
        page_size=options.page_size,
        num_pages=num_pages,
        max_tokens=model.context,
        cache_dtype=dtype,
    )


def _powers(least: int, most: int) -> list[int]:
    """The powers of two from `least` to `most`, both powers of two themselves."""
    return [least << shift for shift in range((most // least).bit_length())]


def _bucket(count: int, most: int, least: int = SMALLEST_BUCKET) -> int:
    return next(size for size in _powers(least, most) if size >= count)


def _send(output: StepOutput) -> StepOutput:
    """Starts the copy to the host, which the commit will wait for."""
    for array in jax.tree.leaves(output):
        array.copy_to_host_async()
    return output
