"""The engine's loop: schedule, run, commit.

The host schedules and dispatches step n + 1 while the device runs step n: step n + 1 reads step n's tokens on the
device, and the host reads them late. What ran past the end of a sequence is discarded at commit. Where a constraint
says which tokens may be drawn, the host reads step n and asks it while the device computes the logits of step n + 1,
and has it check what step n + 1 proposes.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import jax
import numpy as np

from jaxinfer.decode import sampling
from jaxinfer.decode.sampling import Needs
from jaxinfer.decode.sampling_params import SamplingParams
from jaxinfer.decode.speculative import check_ranks
from jaxinfer.decode.step import StepOutput
from jaxinfer.engine.buckets import rectangle, step_size
from jaxinfer.engine.budget import predicted_budget
from jaxinfer.engine.clock import DeviceClock
from jaxinfer.engine.commit import corrections, join_tiles, keep_prompt_logprobs, read_row
from jaxinfer.engine.constraints import Constrain, Constraints
from jaxinfer.engine.following import LeadingRunner, follow
from jaxinfer.engine.gate import predicted_gate
from jaxinfer.engine.memory import make_layout
from jaxinfer.engine.metrics import Counters, Metrics, WarmUp
from jaxinfer.engine.options import IN_FLIGHT, Options
from jaxinfer.engine.pipe import Ticks, ticks_of_loop, ticks_of_step
from jaxinfer.engine.request import Request, Update
from jaxinfer.engine.runner import Runner, outlast
from jaxinfer.engine.scheduler import Plan, Scheduler
from jaxinfer.engine.sequence import Sequence, constrained
from jaxinfer.engine.step_input import lay_out, next_tokens, padded
from jaxinfer.engine.warm_up import WARM, Progress, loop_programs, make_ready, time_loops, warm_programs
from jaxinfer.model import Model, Params
from jaxinfer.parallel import Group

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Work:
    """A dispatched program: its plan and output, and the sequences that may draw in it, by their rows; whether it is
    one of decode steps alone, a loop, and whether the host has a say in what is drawn."""

    plan: Plan
    drawing: list[tuple[int, Sequence]]
    output: StepOutput
    loop: bool = False
    checked: bool = False


class Engine:
    """One model with one cache, serving many requests. Not thread-safe: one caller drives `step`."""

    def __init__(
        self, model: Model, params: Params, options: Options | None = None, constrain: Constrain | None = None,
        group: Group | None = None,
    ):  # fmt: skip
        """Args:
        constrain: makes the constraint of a request that has `structured_outputs`; None refuses them.
        group: of the processes that share the model; each has an engine, and all but the leader's only `follow`.
        """
        self.model = model
        self.options = options or Options()
        if (method := self.options.speculation) is not None:
            method.check(model)
            check_ranks(method, model)
            params = [*params, *method.weights]
        self.layout = make_layout(model, self.options)
        self.counters = Counters()
        self.budget = predicted_budget(model, self.layout, self.options)
        self.gate = predicted_gate(model, self.layout, self.options)
        self.scheduler = self._new_scheduler()
        sizes = self.layout, self.options.steps_per_dispatch
        if group is not None and group.leads:
            self.runner: Runner = LeadingRunner(model, params, *sizes, group)
        else:
            self.runner = Runner(model, params, *sizes)
        self._group = group
        self._in_flight: deque[Work] = deque()
        self._clock = DeviceClock()
        self._constraints = Constraints(constrain)
        self._updates: list[Update] = []  # to be told; what was read outlasts a step that fails
        self._lost: list[Request] = []  # by a failed step, to be told
        self._failed_slots: list[int] = []  # of requests that failed alone, to be released
        self._warm: tuple[Needs, ...] = ()  # what `warm_up` compiled, the cheapest first
        outlast(self, self.runner)

    def problems(self, request: Request) -> list[str]:
        """Why the engine could never run a request, in words; empty when it can."""
        if request.params.structured_outputs is not None and not self._constraints.possible:
            return ["structured_outputs has no use here: this engine makes no constraints"]
        if request.capacity > (most := self.layout.max_tokens):
            return [f"prompt and max_tokens need a context of {request.capacity} tokens; the engine has {most}"]
        told = sampling.problems(request.eos_ids, request.seed, request.prompt_ids)
        return told or self.scheduler.problems(request)

    def add(self, request: Request) -> None:
        """Queues a request, of which the host can then make what the device must know.

        Raises:
            ValueError: it has `problems`, or a request of that id has not ended.
        """
        if problems := self.problems(request):
            raise ValueError("; ".join(problems))
        if request.id in self.scheduler.sequences or request.id in self._constraints:
            raise ValueError(f"id = {request.id} is that of a request that has not ended; allowed: any other")
        if request.params.structured_outputs is not None:
            self._constraints.add(request)
        else:
            self.scheduler.add(request)

    def abort(self, *request_ids: int) -> None:
        """Drops requests wherever they are; those that ended already are left alone. Where that fails, all ends that a
        step that fails ends."""
        try:
            for request_id in request_ids:
                self._constraints.drop(request_id)
            dropped = [self.scheduler.drop(request_id) for request_id in request_ids]
            if slots := [slot for slot in dropped if slot is not None]:
                self.runner.release(slots)
        except BaseException:
            self._start_afresh()
            raise

    def draft_with(self, weights: Params) -> None:
        """Gives the method of speculation other weights, such as it has learned, for all programs from now on."""
        self.runner.draft_with(weights)
        self.counters.draft_updates += 1

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
            compilations=sum(self.runner.programs.traces.values()),
        )

    def step(self) -> list[Update]:
        """Dispatches the next program, reads the oldest one, and returns what that brought. Where nothing is to be run
        until a constraint is made, it waits for one, but briefly, so that its caller can add and abort meanwhile.

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
        if not self._in_flight:
            self._clock.idle()
        self._welcome()
        self._expire()
        if (work := self._dispatch(self.scheduler.schedule())) is not None:
            self._in_flight.append(work)
        if self._in_flight and (work is None or len(self._in_flight) >= IN_FLIGHT):
            self._commit(self._in_flight.popleft())

    def _welcome(self) -> None:
        """Queues the requests whose constraints are ready; those that cannot have one are told so."""
        idle = not self.scheduler.sequences and not self._in_flight
        for request, made in self._constraints.ready(wait=idle):
            if isinstance(made, Update):
                self._updates.append(made)
            else:
                self.scheduler.add(request, made)

    def _expire(self) -> None:
        """Ends the requests that have waited too long, be it for their constraint."""
        late = self._constraints.drop_if(self.scheduler.late)
        late += [sequence.request for sequence in self.scheduler.expired()]
        self.counters.timeouts += len(late)
        self._updates += [Update(request, (), (), None, "timeout") for request in late]

    def _start_afresh(self) -> None:
        self._lost = [sequence.request for sequence in self.scheduler.sequences.values()]
        self._in_flight.clear()
        self._failed_slots.clear()
        self.scheduler = self._new_scheduler()
        self.runner.clear()

    def _new_scheduler(self) -> Scheduler:
        return Scheduler(self.layout, self.model.config.windows, self.options, self.counters, self.budget, self.gate)

    def warm_up(self, progress: Progress | None = None) -> WarmUp:
        """Compiles every program that requests can meet from then on, on an idle engine, and times those between which
        the gate chooses.

        Three kinds of sampling are compiled: greedy without log-probabilities, all but filters, for which the
        vocabulary is sorted, and all that there is. A batch takes the first that serves it.

        Args:
            progress: is told of each program that is ready, and how many there are.

        Returns:
            the programs with their times, and how many the persistent compilation cache had.
        """
        assert not self.scheduler.running
        programs = warm_programs(self.runner, self.options.max_num_batched_tokens, self._constraints.possible)
        done = make_ready(programs, progress, self.runner.wait)
        time_loops(self.runner, WARM[0], self.gate)
        self._warm = WARM
        return done

    def compile_loops(self, params: SamplingParams) -> WarmUp:
        """Compiles the programs of decode steps that requests with these parameters meet, on an idle engine, and times
        them: a small part of what `warm_up` does."""
        assert not self.scheduler.running
        done = make_ready(loop_programs(self.runner, [sampling.needs([params])]), None, self.runner.wait)
        time_loops(self.runner, sampling.needs([params]), self.gate)
        return done

    def follow(self) -> None:
        """Runs what the leader of the group runs, until that ends in order."""
        assert self._group is not None
        assert not self._group.leads
        follow(self.runner, self._group)

    # --- run

    def _dispatch(self, plan: Plan) -> Work | None:
        """Prompts first, with one token for whoever decodes beside them; a loop of decode steps otherwise."""
        self._tell(plan)
        if not plan.decoding and not plan.chunks:
            return None
        drawing = [*plan.decoding, *(chunk.sequence for chunk in plan.chunks if chunk.last)]
        by_slot = [(sequence.slot, sequence) for sequence in drawing if sequence.slot is not None]
        needs, slots = self._needs(plan), self.layout.slots
        occupied = [slot for slot, _ in by_slot[: len(plan.decoding)]]
        checked = constrained(drawing)
        loops = not plan.chunks and not checked and plan.steps == self.options.steps_per_dispatch
        if loops or plan.drafts:
            size = rectangle(len(occupied), slots)
            rows = by_slot if size == slots else list(enumerate(plan.decoding))
            slots_B = padded(occupied, size, slots)
            self._count_ticks(ticks_of_loop(self.runner.programs, size, plan.steps, plan.drafts))
            if loops:
                return Work(plan, rows, self.runner.loop(slots_B, needs, plan.drafts), loop=True)
            assert plan.drafts == self.layout.depth, "there are pages for fewer tokens than are proposed"
            output = self.runner.verify(slots_B, needs, partial(self._masks, rows))
            return Work(plan, rows, output, checked=True)
        rows = len(occupied) + sum(chunk.tokens for chunk in plan.chunks)
        tokens = step_size(rows, bool(plan.chunks), self.layout.ranks)
        self._count_ticks(ticks_of_step(self.runner.programs, tokens))
        given = lay_out(plan.chunks, tokens, slots, occupied or None)
        wants = any(chunk.sequence.scores_prompt for chunk in plan.chunks)
        targets_T = next_tokens(plan.chunks, tokens, len(occupied)) if wants else None
        masks = partial(self._masks, by_slot, *[np.zeros((slots, 0), np.int32)] * 2) if checked else None
        return Work(plan, by_slot, self.runner.step(given, needs, targets_T, masks), checked=checked)

    def _count_ticks(self, ticks: Ticks) -> None:
        self.counters.pipe_ticks += ticks.total
        self.counters.pipe_filled += ticks.filled

    def _tell(self, plan: Plan) -> None:
        """Brings the device's slots up to date."""
        released, self._failed_slots = [*self._failed_slots, *plan.released], []
        if released:
            self.runner.release(released)
        rows = {}
        for sequence in plan.admitted:
            request = sequence.request
            assert sequence.slot is not None
            rows[sequence.slot] = self.runner.programs.admission(
                request.params, sequence.pages, request.prompt_ids, request.eos_ids, request.seed, sequence.output_ids
            )
        if rows:
            self.runner.admit(rows)
        if plan.entries:
            self.runner.extend(plan.entries)

    def _needs(self, plan: Plan) -> Needs:
        """The least that serves all whose tokens are drawn; on a warm engine the least of what is compiled."""
        sequences = [*plan.decoding, *(chunk.sequence for chunk in plan.chunks)]
        exact = sampling.needs(sequence.request.params for sequence in sequences)
        return next((warm for warm in self._warm if warm.covers(exact)), exact)

    def _masks(self, drawing: list[tuple[int, Sequence]], drafts_Bk: np.ndarray, parents_Bk: np.ndarray) -> np.ndarray:
        """The masks of a step, when its forward pass is on its way; see `Constraints.masks`.

        All that is in flight is read before: a constraint knows what follows a token when it has the token.
        """
        while self._in_flight:
            self._commit(self._in_flight.popleft())
        words_WU, failed = self._constraints.masks(drawing, self.model.config.vocab_size, drafts_Bk, parents_Bk)
        for sequence, error in failed:
            self._give_up(sequence, error)
        return words_WU

    # --- commit

    def _commit(self, work: Work) -> None:
        """Reads a program. An exception at one request's part of it ends that request alone."""
        seconds = self._clock.wait(work.output, work.checked)
        if seconds is not None and (work.loop or (work.checked and not work.plan.chunks)):
            contexts = [len(sequence.tokens) for sequence in work.plan.decoding]
            self.gate.time(contexts, work.plan.drafts, seconds / work.plan.steps, work.checked)
        output = jax.tree.map(np.asarray, work.output)
        for sequence in (*work.plan.decoding, *(chunk.sequence for chunk in work.plan.chunks)):
            sequence.in_flight -= 1
        for sequence in work.plan.decoding:
            sequence.proposed -= work.plan.steps * work.plan.drafts
        if output.prompt:
            scored, first = join_tiles(output.prompt), len(work.plan.decoding)
            for chunk in work.plan.chunks:
                if not chunk.sequence.finished:
                    with self._alone(chunk.sequence):
                        keep_prompt_logprobs(chunk, first, scored)
                first += chunk.tokens
        for row, sequence in work.drawing:
            if not sequence.finished and (update := self._commit_row(work.plan, output, row, sequence)) is not None:
                self._updates.append(update)

    @contextmanager
    def _alone(self, sequence: Sequence) -> Iterator[None]:
        """For what concerns one sequence alone: it ends where that fails, and is told so."""
        try:
            yield
        except Exception as error:
            self._give_up(sequence, error)

    def _give_up(self, sequence: Sequence, error: BaseException) -> None:
        """Ends a sequence that failed alone, and tells so.

        Its slot is released before the next program, not here: a step may be between its forward pass and its sampler.
        """
        logger.error("request %d failed; the others go on", sequence.request.id, exc_info=error)
        if (slot := self.scheduler.drop(sequence.request.id)) is not None:
            self._failed_slots.append(slot)
        self._updates.append(Update(sequence.request, (), (), None, "error"))

    def _commit_row(self, plan: Plan, output: StepOutput, row: int, sequence: Sequence) -> Update | None:
        first, scored, drawn, corrected = sequence.outputs == 0, sequence.scores_prompt, None, ()
        with self._alone(sequence):
            drawn = read_row(output, row, sequence)
            sequence.scheduled += max(len(drawn.tokens) - plan.steps, 0)
            if plan.drafts:
                emits_nQ = np.asarray(output.emits_nW)[:, row].reshape(plan.steps, -1)
                corrected = corrections(emits_nQ, len(drawn.tokens) - bool(drawn.reason))  # the end may be as proposed
                self.counters.count_drafts(brought_Q := emits_nQ.sum(axis=0))
                self.gate.learn(brought_Q)
        sequence.check()
        if drawn is None or sequence.finished or not drawn.tokens:
            return None
        self.counters.output_tokens += len(drawn.tokens)
        self.scheduler.read(sequence)
        if drawn.reason:
            self.scheduler.finish(sequence)
        prompt = tuple(sequence.prompt_logprobs) if scored else None
        queued = sequence.queued if first else None
        problem = None
        if drawn.reason == "constraint" and sequence.constraint is not None:
            problem = sequence.constraint.failed
            logger.warning("the output of request %d cannot go on: %s", sequence.request.id, problem)
        return Update(sequence.request, drawn.tokens, drawn.logprobs, prompt, drawn.reason, queued, corrected, problem)
