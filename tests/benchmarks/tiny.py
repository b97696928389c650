"""Problems that a CPU runs in no time, and a machine to hold them against."""

import functools
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import jax
import jax.numpy as jnp

from benchmarks.kernels.measure import Bench
from benchmarks.kernels.op import Op
from benchmarks.kernels.ops import OPS
from benchmarks.kernels.timing import Effort
from jaxinfer.roofline import find_hardware
from pallas_kernels.flash_attention.problems import Problem as Prefill
from pallas_kernels.flash_decoding.problems import Problem as Decode
from pallas_kernels.models import Heads

HEADS, WINDOW = Heads(4, 2, 16), Heads(4, 2, 16, window=20)
PREFILL = {
    "small 2x32": Prefill(HEADS, 2, 32, 16, shuffled=False),
    "small 2x32 shuffled": Prefill(HEADS, 2, 32, 8),
    "small 1x48 window": Prefill(WINDOW, 1, 48, 16, shuffled=False),
    "small 2x16 in 8 bits": Prefill(HEADS, 2, 16, 8, cache="float8_e4m3fn"),
    "small 7 behind 41": Prefill(HEADS, 1, 48, 8, queries=7),
}
DECODE = {
    "small 2x32": Decode(HEADS, 2, 32, 16),
    "small 2x32 3 queries": Decode(HEADS, 2, 32, 16, queries=3),
    "small 5 from 4 to 60": Decode(HEADS, 5, 60, 8, shortest=4),
    "small 2x32 int8": Decode(HEADS, 2, 32, 16, cache="int8"),
    "small 2x32 fp8": Decode(HEADS, 2, 32, 16, cache="float8_e4m3fn"),
}


@functools.cache
def arguments(problem: Prefill | Decode) -> dict[str, jax.Array]:
    """Made once, whatever the key: random numbers take longer to compile than all else here."""

    def make() -> dict[str, jax.Array]:
        return jax.jit(lambda key: problem.arguments(key, jnp.dtype(jnp.bfloat16)))(jax.random.key(0))

    with ThreadPoolExecutor() as outside:  # of the trace that may ask for them
        return outside.submit(make).result()


def shrink(name: str, problems: dict, curve: dict[float, str]) -> Op:
    return replace(
        OPS[name],
        problems=problems,
        arguments=lambda problem, key: arguments(problem),
        quick=("small 2x32",),
        curve=curve,
    )


TINY = {
    "flash_attention": shrink("flash_attention", PREFILL, {32: "small 2x32", 48: "small 1x48 window"}),
    "flash_decoding": shrink("flash_decoding", DECODE, {32: "small 2x32"}),
}
MACHINE = replace(find_hardware("h200-measured"), device_kind="a small machine", l2=1000)
BENCH = Bench(MACHINE, MACHINE.l2, Effort(samples=3, seconds=0), ThreadPoolExecutor(2))
