"""Many tokens times a weight: `tiled_matmul` beside XLA's own matmul."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.kernels.op import OURS, SPECIFICATION, Arguments, Op, Run
from pallas_kernels.tiled_matmul import tiled_matmul
from pallas_kernels.tiled_matmul.problems import PROBLEMS, Problem


def run(name: str, problem: Problem) -> Run:
    return Run(partial(_call, w_axes=problem.w_axes, implementation=name))


def _call(arguments: Arguments, **options: Any) -> jax.Array:
    return tiled_matmul(**arguments, **options)


OP = Op(
    name="tiled_matmul",
    problems=PROBLEMS,
    arguments=lambda problem, key: problem.arguments(key, jnp.dtype(jnp.bfloat16)),
    implementations={name: partial(run, name) for name in (SPECIFICATION, "xla", OURS)},
    peers=lambda problem: ("xla",),
    unit="TFLOP/s",
    quick=("llama-3-8b up M=2048",),
    curve={tokens: f"llama-3-8b up M={tokens}" for tokens in (128, 256, 512, 1024, 2048, 4096, 8192)},
    curve_label="tokens, times the gate and up projection of Llama-3-8B",
)
