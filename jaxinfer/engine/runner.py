"""What an engine has on the device: its programs, the cache, and the state of its slots."""

from __future__ import annotations

import atexit
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.stages import Lowered

from jaxinfer.decode.batch import StepInput
from jaxinfer.decode.layout import Layout
from jaxinfer.decode.sampling import Needs
from jaxinfer.decode.sampling_params import SamplingParams
from jaxinfer.decode.slots import Admission
from jaxinfer.decode.step import Part, Programs, StepOutput
from jaxinfer.model import Model, Params

Masks = Callable[[], np.ndarray]  # asked for the tokens that each slot may draw, as late as may be
CheckedMasks = Callable[[np.ndarray, np.ndarray], np.ndarray]  # the same, given what is proposed: `Programs.verify`
THREAD_ENDS = 0.2  # seconds


class Runner:
    """Runs programs one after the other, each on what the one before left.

    Attributes:
        steps: decode steps of a loop.
    """

    def __init__(self, model: Model, params: Params, layout: Layout, steps: int):
        self.params, self.layout, self.steps = params, layout, steps
        self.programs = Programs(model, layout)
        self.state, self.cache = self.programs.new_state()

    def clear(self) -> None:
        """Forgets all requests and the cache, which a failed program may have consumed."""
        del self.state, self.cache  # before the new ones take their place
        self.state, self.cache = self.programs.new_state()

    def draft_with(self, weights: Params) -> None:
        """Gives the method of speculation other weights, for all programs from now on."""
        self.params = [*self.params[: -len(weights)], *weights]

    def wait(self) -> None:
        """Until the device has nothing to do. What a failed program consumed is not waited for."""
        held = [array for array in jax.tree.leaves(self.state) if not array.is_deleted()]
        jax.block_until_ready(held)

    def admit(self, rows: Mapping[int, Admission]) -> None:
        """Gives slots to requests, whose rows are given by slot."""
        self.state = self.programs.admit(self.state, rows)

    def extend(self, entries: list[tuple[int, int, int, int]]) -> None:
        """Writes entries of page tables; see `Programs.extend`."""
        self.state = self.programs.extend(self.state, entries)

    def release(self, slots: Sequence[int]) -> None:
        """Stops slots."""
        self.state = self.programs.release(self.state, slots)

    def step(
        self, given: StepInput, needs: Needs, targets_T: np.ndarray | None = None, masks: Masks | None = None
    ) -> StepOutput:
        """One step; see `Programs.step`."""
        self.state, self.cache, output = self.programs.step(
            self.params, self.state, self.cache, given, targets_T, needs, masks
        )
        return _send(output)

    def loop(self, slots_B: np.ndarray, needs: Needs, drafts: int = 0) -> StepOutput:
        """A program of decode steps of these slots; see `Programs.loop`."""
        self.state, self.cache, output = self.programs.loop(
            self.params, self.state, self.cache, slots_B, steps=self.steps, needs=needs, drafts=drafts
        )
        return _send(output)

    def verify(self, slots_B: np.ndarray, needs: Needs, masks: CheckedMasks) -> StepOutput:
        """A decode step of these slots that verifies proposals; see `Programs.verify`."""
        self.state, self.cache, output = self.programs.verify(
            self.params, self.state, self.cache, slots_B, needs, masks
        )
        return _send(output)

    def lower_step(self, given: StepInput) -> Lowered:
        """The model's part of a step, to be compiled ahead."""
        return self.programs.lower_step(self.params, self.state, self.cache, given)

    def lower_finish(self, given: StepInput) -> Lowered:
        """The part of a step that finishes all its rows, to be scored, to be compiled ahead."""
        return self.programs.lower_finish(self.params, self.state, self.cache, given)

    def lower_loop(self, slots_B: np.ndarray, needs: Needs, drafts: int = 0) -> Lowered:
        """A program of decode steps, to be compiled ahead."""
        return self.programs.lower_loop(
            self.params, self.state, self.cache, slots_B, steps=self.steps, needs=needs, drafts=drafts
        )

    def lower_verify(self, part: Part, slots_B: np.ndarray, needs: Needs) -> Lowered:
        """A part of `verify`, to be compiled ahead."""
        return self.programs.lower_verify(part, self.params, self.state, self.cache, slots_B, needs)

    def update_all(self) -> None:
        """Runs each of the small programs that bring the slots up to date, to the effect of none."""
        for penalty in (1.0, 2.0):  # whether the sampler reads the prompt makes two programs of an admission
            idle = SamplingParams(max_tokens=1, repetition_penalty=penalty)
            row = self.programs.admission(idle, [()] * len(self.layout.num_pages), prompt_ids=(0,))
            self.admit({0: row})
        self.extend([(0, self.layout.slots, 0, 0)])  # of no slot
        self.release([0])


def outlast(owner: Any, runner: Runner) -> None:
    """Sees that whoever drops the owner of a runner, or ends the process, waits for what is in flight: a process that
    ended during a program would abort on a CPU."""
    ended = weakref.finalize(owner, runner.wait)
    ended.atexit = False  # the registry's own hook may be older than JAX's, and then comes after it
    atexit.register(_at_exit, ended)


def _at_exit(ended: weakref.finalize) -> None:
    """Waits, and on a CPU then for the thread that ran the last program, of which nothing tells that it has ended:
    without it, one process of eight aborted on a busy machine."""
    if ended.alive:
        ended()
        if jax.default_backend() == "cpu":
            time.sleep(THREAD_ENDS)


def _send(output: StepOutput) -> StepOutput:
    """Starts the copy to the host, which waits for it when it reads."""
    for array in jax.tree.leaves(output):
        if array.size:  # without log-probabilities half of them are empty
            array.copy_to_host_async()
    return output
