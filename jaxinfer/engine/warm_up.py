"""All programs that requests can meet, made ready ahead.

The large ones are traced and lowered one after the other, which is Python, and compiled in as many threads as there
are processors, or read from the persistent compilation cache. No program runs before all are compiled: the compiler
times kernels on the device.
"""

from __future__ import annotations

import logging
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import product

import numpy as np
from jax.stages import Lowered
from jaxlib.mlir import ir

from jaxinfer.decode import sampling
from jaxinfer.decode.batch import StepInput
from jaxinfer.decode.masks import no_masks
from jaxinfer.decode.sampling import Needs
from jaxinfer.decode.speculative import Speculation
from jaxinfer.decode.step import Part, StepOutput
from jaxinfer.engine.buckets import few, powers, rectangles
from jaxinfer.engine.clock import DeviceClock
from jaxinfer.engine.costs import ENOUGH
from jaxinfer.engine.gate import Gate
from jaxinfer.engine.metrics import Warmed, WarmUp
from jaxinfer.engine.options import SMALLEST_BUCKET
from jaxinfer.engine.runner import Runner
from jaxinfer.engine.step_input import lay_out, next_tokens, padded
from jaxinfer.machine import count_compiled

Progress = Callable[[Warmed, int], None]  # what was made ready just now, and how many there are in all
WARM = (sampling.GREEDY, sampling.UNFILTERED, sampling.EVERYTHING)  # kinds of sampling, the cheapest first
PARTS: dict[Part, str] = {"propose": "checked proposals", "drafted": "verification", "verify": "checked draws"}
KERNEL = "mosaic_gpu_v2"  # the custom call that holds one

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Program:
    """What requests can meet.

    Attributes:
        name: what it does, and its size.
        run: to be called once.
        lower: where its compilation takes long: what gives the part that does.
    """

    name: str
    run: Callable[[], object]
    lower: Callable[[], Lowered] | None = None


def warm_programs(runner: Runner, largest_step: int, masked: bool) -> Iterator[Program]:
    """All there are.

    Args:
        largest_step: rows.
        masked: whether the host may have a say in what is drawn.
    """
    slots = runner.layout.slots
    yield Program("slots and page tables", runner.update_all)
    for beside, tokens in product((False, True), powers(SMALLEST_BUCKET, largest_step)):
        yield prompt_program(runner, tokens, beside)
    for tokens in powers(SMALLEST_BUCKET, largest_step):
        yield _scored(runner, tokens)
    yield from loop_programs(runner, WARM)
    given = lay_out([], SMALLEST_BUCKET, slots)
    for needs in WARM[1:]:
        yield Program(f"{needs.level} sampling of prompts", partial(runner.step, given, needs))
    if masked:
        masks = partial(no_masks, slots, runner.programs.model.config.vocab_size)
        rows = few(runner.layout.ranks)
        yield _step(runner, f"{rows} rows without prompts", lay_out([], rows, slots, []))
        given = lay_out([], SMALLEST_BUCKET, slots, [])
        yield Program("masks", partial(runner.step, given, WARM[0], masks=masks))
    if masked and (method := runner.layout.speculation) is not None:
        yield from _checked(runner, method)


def _checked(runner: Runner, method: Speculation) -> Iterator[Program]:
    """Of steps whose proposals the host checks."""
    slots, vocab = runner.layout.slots, runner.programs.model.config.vocab_size

    def masks(drafts_Bk: np.ndarray, parents_Bk: np.ndarray) -> np.ndarray:
        return no_masks(drafts_Bk.shape[0] * (1 + drafts_Bk.shape[1]), vocab)

    once, every = WARM[:1], WARM
    kinds: dict[Part, tuple[Needs, ...]] = {
        "propose": every if method.draws else once, "drafted": once, "verify": every
    }  # fmt: skip
    for decode, (part, needs) in product(rectangles(slots), kinds.items()):
        for kind in needs:
            name = f"{PARTS[part]} of {decode} slots" + (f", {kind.level}" if needs == every else "")
            step = padded([], decode, slots), kind
            yield Program(name, partial(runner.verify, *step, masks), partial(runner.lower_verify, part, *step))


def loop_programs(runner: Runner, kinds: Sequence[Needs]) -> Iterator[Program]:
    """Those of decode steps alone, with these kinds of sampling: plain, and with every number of proposed tokens."""
    for decode, needs, drafts in product(rectangles(runner.layout.slots), kinds, (0, *runner.layout.choices)):
        yield loop_program(runner, decode, needs, drafts)


def loop_program(runner: Runner, decode: int, needs: Needs, drafts: int) -> Program:
    """That of decode steps of so many slots, in which so many proposed tokens may be right."""
    loop = padded([], decode, runner.layout.slots), needs, drafts
    name = f"decoding {decode} slots, {needs.level}" + (f", with proposals of depth {drafts}" if drafts else "")
    return Program(name, partial(runner.loop, *loop), partial(runner.lower_loop, *loop))


def prompt_program(runner: Runner, tokens: int, beside: bool) -> Program:
    """That of a step of so many rows with prompts in it, and of sequences that decode beside them or not."""
    name = f"{tokens} rows of prompts" + (" beside others" if beside else "")
    return _step(runner, name, lay_out([], tokens, runner.layout.slots, [] if beside else None))


def _step(runner: Runner, name: str, given: StepInput) -> Program:
    return Program(name, partial(runner.step, given, WARM[0]), partial(runner.lower_step, given))


def _scored(runner: Runner, tokens: int) -> Program:
    """That which finishes all of so many rows of prompts, to be scored."""
    given, targets_T = lay_out([], tokens, runner.layout.slots), next_tokens([], tokens)
    run = partial(runner.step, given, WARM[0], targets_T)
    return Program(f"{tokens} rows to be scored", run, partial(runner.lower_finish, given))


def make_ready(programs: Iterable[Program], progress: Progress | None, wait: Callable[[], None]) -> WarmUp:
    """Compiles all programs and runs each once; logs a line.

    Args:
        progress: is told each program.
        wait: returns when the device is done.
    """
    start, programs, warmed = time.perf_counter(), list(programs), []

    def tell(done: Warmed) -> None:
        warmed.append(done)
        logger.debug("%s", done)
        if progress is not None:
            progress(done, len(programs))

    kernels = _compile_all({program.name: program.lower for program in programs if program.lower is not None}, tell)
    for program in programs:
        if program.lower is None:
            tell(_run(program, wait))
    for program in programs:
        if program.lower is not None:
            program.run()
    wait()
    done = WarmUp(tuple(warmed), time.perf_counter() - start, kernels)
    logger.info("%s", done)
    return done


def time_loops(runner: Runner, needs: Needs, gate: Gate, most: int | None = None) -> None:
    """Tells a gate what the programs take between which it chooses, while no slot has a request: that corrects its
    first predictions. Only of programs that are ready, those of `most` slots at the most, or all.

    All rows then hold the same token, of which a mixture of experts reads few; programs with requests soon tell more.
    Each kind runs as often as corrects its prediction. The next is on its way before one is waited for, so that the
    device never pauses, and only the first of all needs a run before it.
    """
    clock, sent = DeviceClock(), deque[tuple[int, int, StepOutput]]()

    def read() -> None:
        decode, drafts, output = sent.popleft()
        if (seconds := clock.wait(output)) is not None:
            gate.time([1] * decode, drafts, seconds / runner.steps)

    sizes = [size for size in rectangles(runner.layout.slots) if most is None or size <= most]
    for decode, drafts in product(sizes, gate.weighed):
        slots_B = padded([], decode, runner.layout.slots)
        for _ in range(ENOUGH if sent else 1 + ENOUGH):
            sent.append((decode, drafts, runner.loop(slots_B, needs, drafts)))
        while len(sent) > ENOUGH:
            read()
    while sent:
        read()


def _compile_all(lower: dict[str, Callable[[], Lowered]], tell: Callable[[Warmed], None]) -> int:
    """Compiles the large programs, by their names, and tells each; returns how many kernels they have."""
    kernels, pending = 0, deque[Future[Warmed]]()
    threads = ThreadPoolExecutor(os.cpu_count())
    try:
        for name, lowers in lower.items():
            begun = time.perf_counter()
            lowered = lowers()
            kernels += kernels_of(lowered)
            pending.append(threads.submit(_compile, name, lowered, time.perf_counter() - begun))
            while pending and pending[0].done():
                tell(pending.popleft().result())
        for future in pending:
            tell(future.result())
    finally:  # whoever is told may end it all: what is queued then is not compiled any more
        threads.shutdown(cancel_futures=True)
    return kernels


def _compile(name: str, lowered: Lowered, lowering: float) -> Warmed:
    start = time.perf_counter()
    with count_compiled(everywhere=False) as counted:
        lowered.compile()
    return Warmed(name, lowering, time.perf_counter() - start, counted.programs, counted.found)


def _run(program: Program, wait: Callable[[], None]) -> Warmed:
    start = time.perf_counter()
    with count_compiled(everywhere=False) as counted:
        program.run()
        wait()
    return Warmed(program.name, 0.0, time.perf_counter() - start, counted.programs, counted.found)


def kernels_of(lowered: Lowered) -> int:
    """How many different Pallas kernels a program has. Their names in it make those of two programs different."""
    found = set[str]()

    def look(op: ir.Operation) -> ir.WalkResult:
        if op.name == "stablehlo.custom_call" and KERNEL in str(op.attributes["call_target_name"]):
            found.add(str(ir.DictAttr(op.attributes["mhlo.backend_config"])["kernel_hash"]))
        return ir.WalkResult.ADVANCE

    module = lowered.compiler_ir()
    assert module is not None
    module.operation.walk(look)
    return len(found)
