"""The engine's loop: schedule, run, commit.

The host schedules and dispatches step n + 1 while the device runs step n: step n + 1 reads step n's tokens on the
device, and the host reads them late. What ran past the end of a sequence is discarded at commit. Where a constraint
says which tokens may be drawn, the host reads step n and asks it while the device computes the logits of step n + 1.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import jax
import numpy as np

from jaxinfer.decode import sampling
from jaxinfer.decode.masks import no_masks
from jaxinfer.decode.sampling import Needs
from jaxinfer.decode.sampling_params import SamplingParams
from jaxinfer.decode.step import SCORED, Programs, StepOutput
from jaxinfer.engine.buckets import bucket, powers, rectangle
from jaxinfer.engine.budget import predicted_budget
from jaxinfer.engine.commit import join_tiles, keep_prompt_logprobs, read_row
from jaxinfer.engine.constraints import Constrain, Constraints
from jaxinfer.engine.memory import make_layout
from jaxinfer.engine.metrics import Counters, Metrics, WarmUp
from jaxinfer.engine.options import SMALLEST_BUCKET, Options
from jaxinfer.engine.prefill import lay_out, next_tokens
from jaxinfer.engine.request import Request, Update
from jaxinfer.engine.scheduler import Plan, Scheduler
from jaxinfer.engine.sequence import Sequence
from jaxinfer.engine.warm_up import Progress, make_ready
from jaxinfer.model import Model, Params

logger = logging.getLogger(__name__)
IN_FLIGHT = 2  # steps dispatched before the oldest is read
WARM = (sampling.GREEDY, sampling.UNFILTERED, sampling.EVERYTHING)  # the cheapest first


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
        self.layout = make_layout(model, self.options)
        self.counters = Counters()
        self.budget = predicted_budget(model, self.layout, self.options)
        self.scheduler = self._new_scheduler()
        self.programs = Programs(model, self.layout)
        self._state, self._cache = self.programs.new_state()
        self._in_flight: deque[Work] = deque()
        self._constraints = Constraints(constrain)
        self._updates: list[Update] = []  # to be told; what was read outlasts a step that fails
        self._lost: list[Request] = []  # by a failed step, to be told
        self._failed_slots: list[int] = []  # of requests that failed alone, to be released
        self._warm: tuple[Needs, ...] = ()  # what `warm_up` compiled, the cheapest first

    def problems(self, request: Request) -> list[str]:
        """Why the engine could never run a request, in words; empty when it can."""
        if request.params.structured_outputs is not None and not self._constraints.possible:
            return ["structured_outputs has no use here: this engine makes no constraints"]
        return self.scheduler.problems(request)

    def add(self, request: Request) -> None:
        """Queues a request. What the host makes of it for the device is tried now, so that it fails here if it does.

        Raises:
            ValueError: the cache could never hold it, a request of that id has not ended, or it has too many
                end-of-sequence tokens.
            OverflowError: one of its numbers is too large for the device.
        """
        if problems := self.problems(request):
            raise ValueError("; ".join(problems))
        if request.id in self.scheduler.sequences or request.id in self._constraints:
            raise ValueError(f"id = {request.id} is that of a request that has not ended; allowed: any other")
        no_pages = [()] * len(self.layout.num_pages)
        self.programs.admission(request.params, no_pages, request.prompt_ids, request.eos_ids, request.seed, ())
        np.asarray(request.prompt_ids, np.int32)
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
        exception goes on, and the next step ends every request that was queued with the reason `abort`. Those whose
        constraint is still being made are not queued yet, and go on.
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
                self._updates.append(Update(request, (), (), None, "error"))
            else:
                self.scheduler.add(request, constraint)

    def _start_afresh(self) -> None:
        self._lost = [sequence.request for sequence in self.scheduler.sequences.values()]
        self._in_flight.clear()
        self._failed_slots.clear()
        self.scheduler = self._new_scheduler()
        del self._state, self._cache  # before the new ones take their place
        self._state, self._cache = self.programs.new_state()

    def _new_scheduler(self) -> Scheduler:
        return Scheduler(self.layout, self.model.config.windows, self.options, self.counters, self.budget)

    def warm_up(self, progress: Progress | None = None) -> WarmUp:
        """Compiles every program that requests can meet from then on, on an idle engine.

        Three kinds of sampling are compiled: greedy, all but what sorts the vocabulary (filters, and the likeliest
        tokens beside the chosen one), and all that there is. A batch takes the first that serves it.

        Args:
            progress: is told of each program that is ready, and how many there are.

        Returns:
            the programs with their times, and how many the persistent compilation cache had.
        """
        assert not self.scheduler.running

        def waited(run: Callable[[], object]) -> Callable[[], None]:
            def run_and_wait() -> None:
                run()
                jax.block_until_ready(self._state)

            return run_and_wait

        done = make_ready([(name, waited(run)) for name, run in self._all_programs()], progress)
        self._warm = WARM
        return done

    def _all_programs(self) -> Iterator[tuple[str, Callable[[], object]]]:
        """What to call once for every program there can be."""
        slots, largest = self.layout.slots, self.options.max_num_batched_tokens
        yield "slots and page tables", self._run_small_programs
        for decode in (0, slots):
            beside = f" beside {decode} slots" if decode else ""
            for tokens in powers(SMALLEST_BUCKET, largest):
                step = partial(self._run_step, lay_out([], tokens, slots), None, decode, WARM[0])
                yield f"{tokens} prompt tokens{beside}", step
            prefill, targets_T = lay_out([], SCORED, slots), next_tokens([], SCORED)
            for needs in WARM[1:]:
                yield (
                    f"{needs.level} sampling of prompts{beside}",
                    partial(self._run_step, prefill, targets_T, decode, needs),
                )
        for decode in powers(1, slots):
            for needs in WARM:
                yield f"decoding {decode} slots, {needs.level}", partial(self._run_loop, decode, needs)
        if self._constraints.possible:
            yield from self._masked_programs()

    def _masked_programs(self) -> Iterator[tuple[str, Callable[[], object]]]:
        """Of steps that the host has a say in: without prompts, their sampling, and masks of every number of rows."""
        slots = self.layout.slots
        masks = partial(no_masks, slots, self.model.config.vocab_size)
        for decode in powers(1, slots):
            yield f"a step of {decode} slots", partial(self._run_step, lay_out([], 0, 0), None, decode, WARM[0], masks)
        prefill = lay_out([], SMALLEST_BUCKET, slots)
        yield "masks beside prompts", partial(self._run_step, prefill, None, slots, WARM[0], masks)

    def _run_small_programs(self) -> None:
        """Those that bring the device's slots up to date."""
        for penalty in (1.0, 2.0):  # whether the sampler reads the prompt makes two programs of an admission
            idle = SamplingParams(max_tokens=1, repetition_penalty=penalty)
            row = self.programs.admission(idle, [()] * len(self.layout.num_pages), prompt_ids=(0,))
            self._state = self.programs.admit(self._state, 0, row)
        self._state = self.programs.extend(self._state, [(0, self.layout.slots, 0, 0)])  # of no slot
        self._state = self.programs.release(self._state, 0)

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
            decode = rectangle([slot for slot, _ in rows])
            if masks is None and plan.steps == self.options.steps_per_dispatch:
                return Work(plan, self._run_loop(decode, needs), rows)
            return Work(plan, self._run_step(lay_out([], 0, 0), None, decode, needs, masks), rows)
        decode = self.layout.slots if plan.decoding else 0
        tokens = bucket(sum(chunk.tokens for chunk in plan.chunks))
        wants = any(chunk.sequence.scores_prompt for chunk in plan.chunks)
        targets_T = next_tokens(plan.chunks, tokens) if wants else None
        output = self._run_step(lay_out(plan.chunks, tokens, self.layout.slots), targets_T, decode, needs, masks)
        rows += [(decode + index, chunk.sequence) for index, chunk in enumerate(plan.chunks) if chunk.last]
        return Work(plan, output, rows)

    def _tell(self, plan: Plan) -> None:
        """Brings the device's slots up to date."""
        released, self._failed_slots = [*self._failed_slots, *plan.released], []
        for slot in released:
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
        """Reads a program. An exception at one request's part of it ends that request alone."""
        output = jax.tree.map(np.asarray, work.output)
        for sequence in (*work.plan.decoding, *(chunk.sequence for chunk in work.plan.chunks)):
            sequence.in_flight -= 1
        if output.prompt:
            scored, first = join_tiles(output.prompt), 0
            for chunk in work.plan.chunks:
                with self._alone(chunk.sequence):
                    keep_prompt_logprobs(chunk, first, scored)
                first += chunk.tokens
        for index, sequence in work.rows:
            if not sequence.finished and (update := self._commit_row(output, index, sequence)) is not None:
                self._updates.append(update)

    @contextmanager
    def _alone(self, sequence: Sequence) -> Iterator[None]:
        """For what concerns one sequence alone: it ends where that fails, and is told so.

        Its slot is released before the next program, not here: a step may be between its forward pass and its sampler.
        """
        try:
            yield
        except Exception:
            logger.exception("request %d failed; the others go on", sequence.request.id)
            if (slot := self.scheduler.drop(sequence.request.id)) is not None:
                self._failed_slots.append(slot)
            self._updates.append(Update(sequence.request, (), (), None, "error"))

    def _commit_row(self, output: StepOutput, index: int, sequence: Sequence) -> Update | None:
        first, row = sequence.scores_prompt, None
        with self._alone(sequence):
            row = read_row(output, index, sequence)
            sequence.check()
        if row is None or sequence.finished or not row.tokens:
            return None
        self.counters.output_tokens += len(row.tokens)
        self.scheduler.read(sequence)
        if row.reason:
            self.scheduler.finish(sequence)
        prompt = tuple(sequence.prompt_logprobs) if first else None
        return Update(sequence.request, row.tokens, row.logprobs, prompt, row.reason)


def _send(output: StepOutput) -> StepOutput:
    """Starts the copy to the host, which the commit will wait for."""
    for array in jax.tree.leaves(output):
        array.copy_to_host_async()
    return output
