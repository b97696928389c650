"""The classes of a step's kernels: read from the optimised HLO of the programs that they belong to."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

PROJECTIONS, ATTENTION, GLUE, HEAD, SAMPLING = "projection matmuls", "attention", "norms and glue", "head", "sampling"
OTHER, GAPS, STEP = "other", "gaps", "whole step"
CLASSES = (PROJECTIONS, ATTENTION, GLUE, HEAD, SAMPLING, OTHER, GAPS, STEP)
_MATMULS = ("projections", "mlp", "experts", "router")
PARTS = {  # of the cost model
    PROJECTIONS: (*_MATMULS, *(f"last {name}" for name in ("output", *_MATMULS[1:]))),
    ATTENTION: ("attention",),
    GLUE: ("embedding", "norms", "last layer's norms", "last norm"),
    HEAD: ("head",),
}
SCOPES = {"attention": ATTENTION, "head": HEAD, "sampling": SAMPLING}  # the model's named scopes
KERNELS = {"streaming_": PROJECTIONS, "flash_": ATTENTION}  # our own, by how their names begin
LIBRARY = re.compile(r"nvjet|gemm|gemv|cutlass|xmma", re.IGNORECASE)  # kernels of matmuls that XLA did not write
SAMPLER = "jit__traced_sample"  # the program of a single step that draws tokens
_COMPUTATION = re.compile(r"(?:ENTRY )?%?([\w.\-]+) .*\{$")
_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?([\w.\-]+) = .*? ([\w\-]+)\(")
_STATED = [re.compile(x) for x in (r'op_name="([^"]*)"', r"calls=%?([\w.\-]+)", r'custom_call_target="([^"]*)"')]
_MATMULS = ("dot_general", "ragged_dot_general")


@dataclass(frozen=True)
class Event:
    """One kernel or copy on the device. `op` and `module` are the instruction and the program it belongs to, where the
    profile says so."""

    name: str
    start: float  # ns
    duration: float
    op: str = ""
    module: str = ""


@dataclass
class Program:
    """What a compiled program's instructions are.

    Attributes:
        classes: of instructions, by the names that their kernels have.
        library: of the calls of a library's matmuls, in the order in which the program makes them.
    """

    classes: dict[str, str] = field(default_factory=dict)
    library: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Instruction:
    name: str
    opcode: str
    op_name: str
    calls: str
    target: str


def read_program(hlo: str) -> Program:
    """From the text of optimised HLO, as `compiled.as_text()` gives it."""
    bodies: dict[str, list[_Instruction]] = {}
    body: list[_Instruction] = []
    for line in hlo.splitlines():
        if found := _COMPUTATION.match(line):
            body = bodies.setdefault(found[1], [])
        elif found := _INSTRUCTION.match(line):
            stated = [pattern.search(line) for pattern in _STATED]
            body.append(_Instruction(found[1], found[2], *(x[1] if x else "" for x in stated)))
    fused = {x.calls for body in bodies.values() for x in body if x.opcode == "fusion"}
    program = Program()
    for name, body in bodies.items():
        for instruction in [] if name in fused else body:
            kind = _class(instruction, bodies)
            program.classes[_sanitized(instruction.name)] = kind
            if instruction.target.startswith("__cublas"):
                program.library.append(kind)
    return program


def _class(instruction: _Instruction, bodies: Mapping[str, list[_Instruction]]) -> str:
    """By the matmul in it, by its own name, or as most of what is fused into it."""
    inner = list(_inside(instruction, bodies))
    matmuls = [x.op_name for x in inner if x.opcode == "dot"]
    for op_name in (*matmuls, instruction.op_name):
        if "/" in op_name:
            return scope_class(op_name)
    votes = Counter(scope_class(x.op_name) for x in inner if "/" in x.op_name)
    return votes.most_common(1)[0][0] if votes else GLUE


def _inside(instruction: _Instruction, bodies: Mapping[str, list[_Instruction]]) -> Iterator[_Instruction]:
    for inner in bodies.get(instruction.calls, []):
        yield inner
        yield from _inside(inner, bodies)


def scope_class(op_name: str) -> str:
    """Of an operation by its path, such as `jit(_traced_loop)/while/body/head/WD,VD->WV/dot_general`."""
    path = op_name.split("/")
    for scope, kind in SCOPES.items():
        if scope in path:
            return kind
    is_matmul = path[-1] in _MATMULS or any("->" in part or part.startswith("streaming_") for part in path)
    return PROJECTIONS if is_matmul else GLUE


def classify(event: Event, programs: Mapping[str, Program]) -> str | None:
    """The class of an event, by programs by module; None is a library's matmul that the profile does not place."""
    if event.module.startswith(SAMPLER):
        return SAMPLING
    candidates = [programs[event.module]] if event.module in programs else list(programs.values())
    for name in (event.op.rpartition("/")[2], event.name):
        for program in candidates:
            if (kind := program.classes.get(_sanitized(name))) is not None:
                return kind
    for start, kind in KERNELS.items():
        if event.name.startswith(start):
            return kind
    return None if LIBRARY.search(event.name) else OTHER


def _sanitized(name: str) -> str:
    return re.sub(r"[.\-]", "_", name)


def divide(events: Iterable[Event], programs: Mapping[str, Program]) -> dict[tuple[str, str], float]:
    """Nanoseconds that the device was busy, by class and name of the event. Where two overlap, as a kernel that is
    launched early and waits does, the time is the earlier one's."""
    ordered = sorted(events, key=lambda event: event.start)
    kinds = [classify(event, programs) for event in ordered]
    # The programs run one after the other, and repeat: their calls of libraries come round in order.
    calls, unplaced = [kind for program in programs.values() for kind in program.library], kinds.count(None)
    placed = iter(calls * (unplaced // len(calls)) if calls and unplaced % len(calls) == 0 else [OTHER] * unplaced)
    busy, end = defaultdict[tuple[str, str], float](float), 0.0
    for event, kind in zip(ordered, kinds, strict=True):
        stop = event.start + event.duration
        busy[next(placed) if kind is None else kind, event.name] += max(0.0, stop - max(event.start, end))
        end = max(end, stop)
    return busy
