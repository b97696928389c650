"""What each step of the prefill kernel is worth: the kernel with one of them taken out, beside the whole one.

    python -m benchmarks.kernels.steps [--case 1x8192 ...] [--rounds 20] [--output DIR]

The steps are those of pallas_kernels/flash_attention/README.md. One is taken out by putting something simpler in the
place of the function that makes it, here alone: the kernel has no switches for what nobody would choose. The variants
take turns, round after round, since a card under load changes its clock: a figure is the median over the rounds of a
variant's time over that of the whole kernel in the same round. Writes `steps.json` to the results of the device.
"""

from __future__ import annotations

import inspect
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import jax
from jax import lax

from benchmarks.kernels.measure import DEFAULT_L2, PLAIN, Agreement, Bench
from benchmarks.kernels.op import OURS, Arguments, Run
from benchmarks.kernels.ops import flash_attention as op
from benchmarks.kernels.timing import Effort, compiled, make_copies, start, time_call
from benchmarks.record import Record, arguments_of, environment, update
from jaxinfer.machine import measure_machine
from pallas_kernels import hopper
from pallas_kernels.blockwise import Options
from pallas_kernels.flash_attention import consumer, mosaic_gpu, schedule, shared

WHOLE = "whole"
Patch = Callable[[], AbstractContextManager[Any]]


class _NoTurns:
    """Both consumers issue their products whenever they like."""

    def send(self, slot: Any = 0) -> None: ...

    def wait(self, slot: Any = 0) -> None: ...


def _without_turns(make: Callable, config: Any, smem: dict) -> shared.Signals:
    return make(config, smem)._replace(turn=_NoTurns())


def _one_after_the_other(self: consumer.Products, softmax: consumer.Softmax, p_QC, k, v, issued, row_softmax) -> Any:
    """The scores, their softmax, and only then the values of the block before."""
    results = row_softmax(self.scores(k, issued), softmax.max_Q, softmax.sum_Q8)
    return self.values(softmax.values_QH, p_QC, v), *results


def _exchanged(row_softmax: Callable, options: Options, distance, masked, scores_QC, max_Q, sum_Q8, *scales) -> Any:
    """Threads add up a row's weights at every block; each part of the sum gets an even share."""
    max_Q, _, decay_Q, p_QC = row_softmax(options, distance, masked, scores_QC, max_Q, sum_Q8, *scales)
    share_Q = p_QC.sum(axis=1) * (1 / consumer.PARTIAL_SUMS)
    of_row = partial(lax.broadcast_in_dim, shape=sum_Q8.shape, broadcast_dimensions=[0])
    return max_Q, sum_Q8 * of_row(decay_Q) + of_row(share_Q), decay_Q, p_QC


def _masked_everywhere(key_blocks: Callable, *arguments: Any) -> schedule.Blocks:
    blocks = key_blocks(*arguments)
    return blocks._replace(clean_low=blocks.low, clean_high=blocks.low)


def _all_heads(_, tiles: jax.Array, query_heads: int, *others: Any) -> int:
    return query_heads


def _dealt(make: Callable, *fields: Any) -> shared.Items:
    """Block i takes items i, i + blocks, and so on, whatever they cost."""
    return make(*fields[:-1], True)


def _instead(owner: Any, name: str, other: Callable) -> Patch:
    """`other`, which is given what it stands for, in the place of a function."""
    return lambda: mock.patch.object(owner, name, partial(other, getattr(owner, name)))


STEPS: Mapping[str, Patch] = {
    "ping-pong": _instead(shared.Signals, "of", _without_turns),
    "overlap within a warpgroup": partial(mock.patch.object, consumer.Products, "_overlapped", _one_after_the_other),
    "holding the assembler": partial(mock.patch.object, hopper, "complete", lambda *_: None),
    "falling order": _instead(schedule, "_in_falling_order", lambda _, tiles, key: tiles),
    "whoever is free": _instead(mosaic_gpu, "Items", _dealt),
    "a KV head at a time": _instead(schedule, "heads_at_once", _all_heads),
    "clean loops": _instead(schedule, "key_blocks", _masked_everywhere),
    "sums in parts": _instead(consumer, "_row_softmax", _exchanged),
}
VARIANTS: Mapping[str, Sequence[str]] = {
    WHOLE: (), **{f"without {step}": (step,) for step in STEPS}, "without any": tuple(STEPS)
}  # fmt: skip


def without(problem: op.Problem, steps: Sequence[str]) -> Run:
    """The kernel without these steps, traced anew."""
    run = op.configured(problem, op.candidates(problem)[0])

    def call(arguments: Arguments) -> jax.Array:
        with ExitStack() as stack:
            for step in steps:
                stack.enter_context(STEPS[step]())
            # No trace and no kernel of another variant comes in.
            stack.enter_context(mock.patch.object(mosaic_gpu, "once", lambda kernel, key, *given: kernel(*given)))
            traced = inspect.unwrap(mosaic_gpu.flash_attention)
            stack.enter_context(mock.patch.object(mosaic_gpu, "flash_attention", traced))
            return run.call(arguments)

    return Run(call)


def measure(name: str, bench: Bench, rounds: int) -> Iterator[Record]:
    """The records of each variant on a problem of the op: its time, and that over the time of the whole kernel."""
    problem = op.PROBLEMS[name]
    generate = partial(op.OP.arguments, problem)
    shapes = jax.eval_shape(generate, jax.random.key(0))
    started = {variant: start(without(problem, steps), shapes, bench.pool) for variant, steps in VARIANTS.items()}
    plain = compiled(op.OP.implementations[PLAIN](problem).call, shapes, bench.pool)
    copies, agreement = make_copies(started[WHOLE], generate, bench.l2), Agreement()
    agreement.check(PLAIN, plain.result()(copies[0]))
    times: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    for _ in range(rounds):
        for variant, run in started.items():
            check = partial(agreement.check, variant)
            timing = time_call(run.program.result(), run.compile_single, copies, bench.effort, check)
            times[variant].append(timing.median)
    for variant, seconds in times.items():
        ratios = sorted(mine / whole for mine, whole in zip(seconds, times[WHOLE], strict=True))
        case, spread = f"{op.OP.case(name)} {variant}", (min(seconds) * 1e6, max(seconds) * 1e6, rounds)
        yield Record(case, OURS, "time", statistics.median(seconds) * 1e6, "us", None, *spread)
        yield Record(case, OURS, "over the whole", statistics.median(ratios), "x", None, ratios[0], ratios[-1], rounds)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = arguments_of("benchmarks.kernels.steps", __doc__)
    parser.add_argument("--case", nargs="+", default=["llama-3-8b 4x2048", "llama-3-8b 1x8192"], choices=op.PROBLEMS)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--output", type=Path, help="folder of what is written")
    options = parser.parse_args(arguments)
    made_in, machine = environment(), measure_machine()
    bench = Bench(machine, machine.l2 or DEFAULT_L2, Effort(samples=3, seconds=0.005))
    for name in options.case:
        records = [*measure(name, bench, options.rounds)]
        print(*records, sep="\n", flush=True)
        print("written to", update("steps", made_in, records, [], options.output))


if __name__ == "__main__":
    main()
