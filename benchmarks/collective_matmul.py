"""Products of many tokens over the GPUs of this machine: collectives hidden under them, and before or after them.

    python -m benchmarks.collective_matmul [--tokens 8192 2048 512] [--sizes 4096 6144 14336] [--calls 8]
        [--products mlp up down qkv output] [--implementations ...] [--limit SECONDS] [--output DIR]

The products of Llama-3-8B, in bfloat16: `qkv` and `up` by columns, of tokens that are gathered first; `output` and
`down` by rows, whose sum leaves each device its part of the tokens; and `mlp`, which is `up`, its gate, and `down`.
The implementations:

- `matmul`: each device's products alone, of all tokens;
- `collectives`: with an all-gather before them and a reduce-scatter after them;
- `ring`: `jaxinfer.parallel.ring`, as XLA schedules it by default;
- `ring, scheduled`: the same with XLA's latency-hiding scheduler;
- `ring, copied`: with that, and messages that are copies between the GPUs' memories, which take no multiprocessors.

The calls of a program depend on each other, as those of a step do. `hidden` counts the messages of a program that are
on their way while a product runs, by the order in the compiled program. Some rows of every result are checked first.
Writes `collective_matmul.json` to the results of the device.
"""

from __future__ import annotations

import argparse
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks.all_reduce import keep, timed
from benchmarks.record import Record, arguments_of
from jaxinfer.parallel import TENSOR, make_mesh, ring

TOKENS, SIZES = (8192, 2048, 512), (4096, 6144, 14336)
QKV, OUTPUT, UP, DOWN, MLP = "qkv", "output", "up", "down", "mlp"
KINDS = MLP, UP, DOWN, QKV, OUTPUT
MATMUL, COLLECTIVES, RING, SCHEDULED, COPIED = "matmul", "collectives", "ring", "ring, scheduled", "ring, copied"
NAMES = MATMUL, COLLECTIVES, RING, SCHEDULED
OPTIONS: dict[str, dict[str, bool]] = {
    SCHEDULED: {"xla_gpu_enable_latency_hiding_scheduler": True},
    COPIED: {"xla_gpu_enable_latency_hiding_scheduler": True, "xla_gpu_use_memcpy_local_p2p": True},
}
TOLERANCE = 0.03  # of the size of a sum in bfloat16, each of whose terms is rounded
CHECKED = 8  # rows of a result, from all devices' parts


@dataclass(frozen=True)
class Case:
    """A product of `tokens` tokens: D is the hidden size, the columns of `qkv`, and F the inner size of the MLP."""

    kind: str
    tokens: int
    sizes: tuple[int, int, int]

    @property
    def name(self) -> str:
        return f"{self.kind} {self.tokens}"

    @property
    def gathers(self) -> bool:
        """Whether each device begins with its part of the tokens, or else with its part of every token."""
        return self.kind in (QKV, UP, MLP)

    @property
    def sums(self) -> bool:
        return self.kind in (OUTPUT, DOWN, MLP)

    @cached_property
    def shapes(self) -> list[tuple[int, ...]]:
        """Of the tokens and the weights."""
        hidden, columns, inner = self.sizes
        up, down = (hidden, 2, inner), (inner, hidden)
        weights = {QKV: [(hidden, columns)], OUTPUT: [(hidden, hidden)], UP: [up], DOWN: [down], MLP: [up, down]}[
            self.kind
        ]
        return [(self.tokens, weights[0][0]), *weights]

    @cached_property
    def specs(self) -> list[P]:
        spread = P(TENSOR) if self.gathers else P(None, TENSOR)
        weights = [P(*(None,) * (len(self.shapes[1]) - 1), TENSOR), P(TENSOR)]
        return [spread, *(weights if self.kind == MLP else weights[:1] if self.gathers else weights[1:])]

    def arguments(self, mesh: Mesh) -> list[jax.Array]:
        """Tokens and weights of numbers such that those of a product are as large."""
        made = []
        for nth, (shape, spec) in enumerate(zip(self.shapes, self.specs, strict=True)):
            scale = 1.0 if nth == 0 else shape[0] ** -0.5
            make = jax.jit(
                lambda key, shape=shape, scale=scale: (jax.random.normal(key, shape) * scale).astype(jnp.bfloat16),
                out_shardings=NamedSharding(mesh, spec),
            )
            made.append(make(jax.random.key(nth)))
        return made


def product(case: Case, x: jax.Array, weights: Sequence[jax.Array], implementation: str) -> jax.Array:
    """One call on a device. Of `matmul`, products that are to be summed are those of this device alone."""

    def first(x: jax.Array) -> jax.Array:
        y = jnp.tensordot(x, weights[0], 1)
        return jax.nn.silu(y[:, 0]) * y[:, 1] if case.kind == MLP else y

    def second(x: jax.Array) -> jax.Array:
        return x @ weights[-1]

    if implementation in (MATMUL, COLLECTIVES):
        plain = implementation == COLLECTIVES
        if case.gathers:
            x = first(lax.all_gather(x, TENSOR, tiled=True) if plain else x)
        if case.sums:
            x = second(x)
            x = lax.psum_scatter(x, TENSOR, tiled=True) if plain else x
        return x
    parts = ring.gather(first, x) if case.gathers else ring.parts_of(x)
    return ring.scatter(second, parts) if case.sums else ring.in_order(parts)


def chain(mesh: Mesh, case: Case, implementation: str, calls: int) -> jax.stages.Wrapped:
    """A jitted program of so many calls: the tokens after them, and the last one's result."""

    def local(x, *weights):
        y = None
        for _ in range(calls):
            y = lax.optimization_barrier(product(case, x, weights, implementation))
            x = x.at[0, 0].set(y.reshape(-1)[0])  # the next call needs this one, and no time passes between the two
        return x, y

    alone = implementation == MATMUL
    tokens, *weights = case.specs
    given = P() if alone and case.gathers else tokens
    out = P(TENSOR) if case.sums else P(*(None,) * (len(case.shapes[-1]) - 1), TENSOR)
    mapped = jax.shard_map(local, mesh=mesh, in_specs=(given, *weights), out_specs=(given, out), check_vma=False)
    return jax.jit(mapped, compiler_options=OPTIONS.get(implementation) if jax.default_backend() == "gpu" else None)


@lru_cache(maxsize=1)
def inputs(mesh: Mesh, case: Case) -> tuple[list[jax.Array], np.ndarray]:
    """Arguments of a case, and the rows of its result that are checked, in float32."""
    arguments = case.arguments(mesh)
    x, *weights = (np.asarray(array) for array in arguments)
    expected = np.tensordot(x[rows(case)].astype(np.float32), weights[0].astype(np.float32), 1)
    if case.kind == MLP:
        gate, up = expected[:, 0], expected[:, 1]
        expected = gate / (1 + np.exp(-gate)) * up @ weights[1].astype(np.float32)
    return arguments, expected


def rows(case: Case) -> np.ndarray:
    return np.linspace(0, case.tokens - 1, CHECKED).astype(int)


def check(case: Case, result: np.ndarray, expected: np.ndarray, implementation: str) -> None:
    """Of one call. Raises ValueError where it is wrong."""
    if implementation == MATMUL and case.sums:  # what each device has, one after the other
        result = result.reshape(-1, case.tokens, result.shape[-1])[:, rows(case)].astype(np.float32).sum(axis=0)
    else:
        result = result[rows(case)].astype(np.float32)
    if not (worst := np.abs(result - expected).max()) <= TOLERANCE * np.abs(expected).max():
        raise ValueError(f"differs from the product in float32 by {worst:.3g}")


def measure(mesh: Mesh, case: Case, implementation: str, calls: int) -> Iterator[Record]:
    (x, *weights), expected = inputs(mesh, case)
    if implementation == MATMUL and case.gathers:
        x = jax.device_put(x, NamedSharding(mesh, P()))
    _, result = chain(mesh, case, implementation, 1)(x, *weights)
    check(case, np.asarray(result), expected, implementation)
    program = chain(mesh, case, implementation, calls).lower(x, *weights).compile()
    messages, hidden = overlaps(program.as_text() or "")
    if messages:
        yield Record(case.name, implementation, "hidden", hidden, f"of {messages}")
    yield timed(case.name, implementation, lambda *given: program(*given)[0], (x, *weights), calls)


def overlaps(text: str) -> tuple[int, int]:
    """Messages of a compiled and scheduled program that are sent apart from the wait for them; and those of them that
    are under way while a product runs."""
    under_way, all_of_them, hidden = set(), 0, set()
    for line in text.splitlines():
        if start := re.match(r"\s*%?([\w.-]+) = .* collective-permute-start\(", line):
            under_way.add(start[1])
            all_of_them += 1
        elif done := re.search(r" collective-permute-done\(.*?([\w.-]+)\)(?:,|$)", line):
            under_way.discard(done[1])
        elif re.search(r"__cublas|gemm| dot\(", line):
            hidden |= under_way
    return all_of_them, len(hidden)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    devices, deadline = jax.devices(), time.monotonic() + options.limit
    if len(devices) < 2:
        raise SystemExit(f"there is one device, {devices[0].device_kind}; a ring needs two")
    cases = [Case(kind, tokens, tuple(options.sizes)) for tokens in options.tokens for kind in options.products]
    tried, mesh = ((case, name) for case in cases for name in options.implementations), make_mesh(len(devices))
    keep("collective_matmul", tried, lambda case, by: measure(mesh, case, by, options.calls), deadline, options.output)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = arguments_of("benchmarks.collective_matmul", __doc__)
    parser.add_argument("--tokens", nargs="+", type=int, default=TOKENS)
    parser.add_argument(
        "--sizes", nargs=3, type=int, default=SIZES, metavar=("HIDDEN", "QKV", "INNER"),
        help="of a hidden state, of queries, keys and values together, and of the MLP",
    )  # fmt: skip
    parser.add_argument("--calls", type=int, default=8, help="in a program")
    parser.add_argument("--products", nargs="+", default=[*KINDS], choices=KINDS)
    parser.add_argument("--implementations", nargs="+", default=[*NAMES], choices=[*NAMES, COPIED])
    parser.add_argument("--limit", type=float, default=300.0, metavar="SECONDS", help="begin no case after them")
    parser.add_argument("--output", type=Path, help="folder of what is written")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
