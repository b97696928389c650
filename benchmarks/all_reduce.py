"""All-reduces of small messages over the GPUs of this machine: our kernel beside XLA's psum.

    python -m benchmarks.all_reduce [--tokens 1 2 4 ...] [--hidden 4096] [--calls 64] [--limit SECONDS] [--output DIR]

A call adds up what the GPUs hold, adds the residual, as a layer does twice, and norms the result, which the model
leaves to the product that follows; `sum` of the names leaves out residual and norm. The calls of a program depend on
each other, as those of a step do: a time is that of the program divided by its calls, with all launches and gaps
between them. The implementations:

- `mosaic_gpu`: one launch, with a workspace that the program makes first, as a step does;
- `mosaic_gpu lasting`: with one that outlives the program;
- `mosaic_gpu each`: without one, so that memory is made and all devices meet before every launch;
- `xla`: psum, and a fusion for residual and norm.

Every result is held to a sum in float64 first. Writes `all_reduce.json` to the results of the device.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks.record import Failure, Record, arguments_of, environment, update
from jaxinfer.parallel import TENSOR, make_mesh
from pallas_kernels.all_reduce import Reduced, all_reduce, fresh_workspace, new_workspace

TOKENS = (1, 2, 4, 8, 16, 32, 64, 128)
OURS, LASTING, EACH, XLA = "mosaic_gpu", "mosaic_gpu lasting", "mosaic_gpu each", "xla"
NAMES = OURS, XLA, LASTING, EACH
SAMPLES, SECONDS = 9, 0.02  # of programs one after the other, for each sample
TOLERANCE = 0.02  # of the size of a sum in bfloat16, each of whose terms is rounded


@dataclass(frozen=True)
class Case:
    """Messages of `tokens` times `hidden` numbers in bfloat16, with residual and norm or without."""

    tokens: int
    hidden: int
    finished: bool

    @property
    def name(self) -> str:
        size = 2 * self.tokens * self.hidden
        return f"{'' if self.finished else 'sum '}{f'{size // 1024} KB' if size >= 1024 else f'{size} B'}"

    def arguments(self, mesh: Mesh) -> tuple[jax.Array, ...]:
        """Partial sums of every device, residual and scale."""
        shapes = (mesh.shape[TENSOR], self.tokens, self.hidden), (self.tokens, self.hidden), (self.hidden,)
        keys, specs = jax.random.split(jax.random.key(self.tokens), 3), (P(TENSOR), P(), P())
        return tuple(
            jax.device_put(jax.random.normal(key, shape, jnp.bfloat16), NamedSharding(mesh, spec))
            for key, shape, spec in zip(keys, shapes, specs, strict=True)
        )


def chain(mesh: Mesh, case: Case, implementation: str, calls: int) -> Callable[..., jax.Array]:
    """A program of so many calls, each of which is given what the one before gave; the last one's result."""
    size = case.tokens, case.hidden, jnp.bfloat16
    lasting = new_workspace(mesh, TENSOR, *size) if implementation == LASTING else None

    def local(partial_1TD, residual_TD, scale_D, space):
        y_TD = partial_1TD[0]
        if implementation == OURS:
            space = fresh_workspace(TENSOR, *size)
        for i in range(calls):
            first = implementation == OURS and i == 0
            y_TD = _last(call(case, implementation, y_TD, residual_TD, scale_D, space, first))
        return y_TD[None]

    specs = P(TENSOR), P(), P(), P(TENSOR)
    program = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=P(TENSOR), check_vma=False))
    return lambda *arguments: program(*arguments, lasting)


def call(case: Case, implementation: str, y_TD, residual_TD, scale_D, space, first: bool) -> Reduced:
    extras = {"residual_TD": residual_TD, "norm_scale_D": scale_D} if case.finished else {}
    name = XLA if implementation == XLA else OURS
    return all_reduce(y_TD, TENSOR, **extras, workspace=space, first=first, implementation=name)


def _last(reduced: Reduced) -> jax.Array:
    return reduced.out_TD if reduced.normed_TD is None else reduced.normed_TD


def check(case: Case, result: jax.Array | np.ndarray, arguments: Sequence[jax.Array]) -> None:
    """Of one call. Raises ValueError where it is wrong, or not the same on all devices."""
    partials, residual, scale = (np.asarray(array, np.float64) for array in arguments)
    expected = partials.sum(axis=0)
    if case.finished:
        expected += residual
        expected = expected / np.sqrt((expected**2).mean(axis=-1, keepdims=True) + 1e-6) * scale
    found = np.asarray(result, np.float64)
    if (worst := np.abs(found - expected).max()) > TOLERANCE * np.abs(expected).max():
        raise ValueError(f"differs from the sum in float64 by {worst:.3g}")
    if not (found == found[0]).all():
        raise ValueError("is not the same on all devices")


def measure(mesh: Mesh, case: Case, implementation: str, calls: int) -> Record:
    arguments = case.arguments(mesh)
    check(case, chain(mesh, case, implementation, 1)(*arguments), arguments)
    return timed(case.name, implementation, chain(mesh, case, implementation, calls), arguments, calls)


def timed(
    case: str, implementation: str, program: Callable[..., jax.Array], arguments: Sequence[jax.Array], calls: int
) -> Record:
    """The time of a call, of so many in a program, which gives the next one its first argument."""

    def sample(programs: int) -> float:
        first, *others = arguments
        start = time.perf_counter()
        for _ in range(programs):
            first = program(first, *others)
            if jax.default_backend() == "cpu":  # whose virtual devices have too few threads for programs that wait
                jax.block_until_ready(first)
        jax.block_until_ready(first)
        return (time.perf_counter() - start) / (programs * calls)

    sample(1)  # compiles
    programs = max(1, round(SECONDS / (calls * sample(3))))
    seconds = [1e6 * sample(programs) for _ in range(SAMPLES)]
    spread = min(seconds), max(seconds), SAMPLES
    return Record(case, implementation, "time", statistics.median(seconds), "us", None, *spread)


def cases(tokens: Sequence[int], hidden: int) -> Iterator[Case]:
    """Half a row first: 4 KB where a row is 8 KB."""
    yield Case(1, hidden // 2, True)
    for count in tokens:
        yield Case(count, hidden, True)
    for count in tokens:
        yield Case(count, hidden, False)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    devices, deadline = jax.devices(), time.monotonic() + options.limit
    if len(devices) < 2:
        raise SystemExit(f"there is one device, {devices[0].device_kind}; an all-reduce needs two")
    mesh, every = make_mesh(len(devices)), cases(options.tokens, options.hidden)
    tried = ((case, name) for case in every for name in options.implementations)
    keep("all_reduce", tried, lambda case, by: [measure(mesh, case, by, options.calls)], deadline, options.output)


class Named(Protocol):
    @property
    def name(self) -> str: ...


def keep[Case: Named](
    file: str, tried: Iterable[tuple[Case, str]], measure: Callable[[Case, str], Iterable[Record]], deadline: float,
    folder: Path | None,
) -> None:  # fmt: skip
    """Measures case after case, each by an implementation, and writes after each what there is so far.

    Args:
        deadline: of `time.monotonic`, after which none begins.
    """
    made_in, records, failures = environment(), list[Record](), list[Failure]()
    for case, implementation in tried:
        if time.monotonic() > deadline:
            print("the time is up")
            return
        try:
            for record in measure(case, implementation):
                records.append(record)
                print(record, flush=True)
        except (ValueError, RuntimeError) as error:
            failures.append(Failure(case.name, implementation, str(error)))
            print(f"{case.name:24} {implementation:16} failed: {error}", flush=True)
        update(file, made_in, records, failures, folder)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = arguments_of("benchmarks.all_reduce", __doc__)
    parser.add_argument("--tokens", nargs="+", type=int, default=TOKENS, help="rows of a message")
    parser.add_argument("--hidden", type=int, default=4096, help="numbers of a row")
    parser.add_argument("--calls", type=int, default=64, help="in a program: 64 are those of a step of Llama-3-8B")
    parser.add_argument("--implementations", nargs="+", default=[*NAMES], choices=NAMES)
    parser.add_argument("--limit", type=float, default=300.0, metavar="SECONDS", help="begin no case after them")
    parser.add_argument("--output", type=Path, help="folder of what is written")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
