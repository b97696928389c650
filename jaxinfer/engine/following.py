"""One engine over several processes: the leader's runner tells the others each call, and they make it too.

A call is its name and small host arguments: a step's packed input, the rows of requests, the slots of a loop. What the
device computes stays there: weights, cache and slots are arrays over all processes, and every program has the shards
of each. The leader alone schedules, and reads what was drawn.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
from jax.stages import Compiled, Lowered

from jaxinfer.decode.batch import StepInput
from jaxinfer.decode.layout import Layout
from jaxinfer.decode.sampling import Needs
from jaxinfer.decode.slots import Admission
from jaxinfer.decode.step import Part, StepOutput
from jaxinfer.engine.runner import CheckedMasks, Masks, Runner
from jaxinfer.model import Model, Params
from jaxinfer.parallel import Group

_MASKS = "masks"


class LeadingRunner(Runner):
    """A runner whose calls all other processes make, too."""

    def __init__(self, model: Model, params: Params, layout: Layout, steps: int, group: Group):
        self._group, self._asking = group, False
        super().__init__(model, params, layout, steps)

    @contextmanager
    def _told(self, name: str, *arguments: Any) -> Iterator[None]:
        """For a call, after the others are told. Where it fails here they run what this process does not, and nothing
        that follows would end: the group is given up, unless it was masks that could not be made."""
        self._group.call(name, *arguments)
        try:
            yield
        except BaseException as error:
            if not self._asking:
                self._group.fail(f"process 0 failed in {name}: {type(error).__name__}: {error}")
            self._asking = False
            raise

    def _asked(self, masks: Any, *proposed: np.ndarray) -> np.ndarray:
        """Masks, which the others are told."""
        self._asking = True
        words_WU = masks(*proposed)
        self._asking = False
        self._group.call(_MASKS, words_WU)
        return words_WU

    def clear(self) -> None:
        with self._told("clear"):
            super().clear()

    def draft_with(self, weights: Params) -> None:
        raise ValueError("a draft model that learns has no use where several processes share the model")

    def admit(self, rows: Mapping[int, Admission]) -> None:
        with self._told("admit", rows):
            super().admit(rows)

    def extend(self, entries: list[tuple[int, int, int, int]]) -> None:
        with self._told("extend", entries):
            super().extend(entries)

    def release(self, slots: Sequence[int]) -> None:
        with self._told("release", slots):
            super().release(slots)

    def step(
        self, given: StepInput, needs: Needs, targets_T: np.ndarray | None = None, masks: Masks | None = None
    ) -> StepOutput:
        with self._told("step", given, needs, targets_T, masks is not None):
            return super().step(given, needs, targets_T, None if masks is None else partial(self._asked, masks))

    def loop(self, slots_B: np.ndarray, needs: Needs, drafts: int = 0) -> StepOutput:
        with self._told("loop", slots_B, needs, drafts):
            return super().loop(slots_B, needs, drafts)

    def verify(self, slots_B: np.ndarray, needs: Needs, masks: CheckedMasks) -> StepOutput:
        with self._told("verify", slots_B, needs):
            return super().verify(slots_B, needs, partial(self._asked, masks))

    def lower_step(self, given: StepInput) -> Lowered:
        with self._told("lower_step", given):
            return super().lower_step(given)

    def lower_finish(self, given: StepInput) -> Lowered:
        with self._told("lower_finish", given):
            return super().lower_finish(given)

    def lower_loop(self, slots_B: np.ndarray, needs: Needs, drafts: int = 0) -> Lowered:
        with self._told("lower_loop", slots_B, needs, drafts):
            return super().lower_loop(slots_B, needs, drafts)

    def lower_verify(self, part: Part, slots_B: np.ndarray, needs: Needs) -> Lowered:
        with self._told("lower_verify", part, slots_B, needs):
            return super().lower_verify(part, slots_B, needs)


class _AbandonedError(Exception):
    """The leader has no masks for the step; holds what it calls instead."""

    def __init__(self, call: tuple[Any, ...] | None):
        super().__init__()
        self.call = call


def follow(runner: Runner, group: Group) -> None:
    """Makes the calls of the leader's runner, until it ends in order."""
    compiling: list[Future[Compiled]] = []
    threads = ThreadPoolExecutor(os.cpu_count())
    try:
        call = group.next_call()
        while call is not None:
            name, *arguments = call
            if name.startswith("lower_"):
                lowered: Lowered = getattr(runner, name)(*arguments)
                compiling.append(threads.submit(lowered.compile))
            else:
                for future in compiling:  # no program runs before all are compiled, as with the leader
                    future.result()
                compiling.clear()
                try:
                    _make(runner, group, name, arguments)
                except _AbandonedError as abandoned:
                    call = abandoned.call
                    continue
            call = group.next_call()
    finally:  # what is queued when the leader ends is not compiled any more
        threads.shutdown(cancel_futures=True)


def _make(runner: Runner, group: Group, name: str, arguments: list[Any]) -> None:
    """One call."""

    def masks(*_: np.ndarray) -> np.ndarray:
        told = group.next_call()
        if told is None or told[0] != _MASKS:
            raise _AbandonedError(told)
        return told[1]

    if name == "step":
        given, needs, targets_T, masked = arguments
        runner.step(given, needs, targets_T, masks if masked else None)
    elif name == "verify":
        slots_B, needs = arguments
        runner.verify(slots_B, needs, masks)
    else:
        getattr(runner, name)(*arguments)
