"""The products that a layer ends with, in one launch, beside a launch for each and beside XLA."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.kernels.op import OURS, SPECIFICATION, Arguments, Op, Run
from pallas_kernels.streaming_matmul import mosaic_gpu, streaming_mlp
from pallas_kernels.streaming_matmul.mlp import MLPArguments, compose
from pallas_kernels.streaming_matmul.problems import ROWS, Row


def ours(name: str, problem: Row) -> Run:
    del problem
    return Run(partial(_call, implementation=name))


def _call(arguments: Arguments, **options: Any) -> jax.Array:
    return streaming_mlp(**arguments, **options)


def apart(problem: Row) -> Run:
    """A launch for each product."""
    del problem

    def call(arguments: Arguments) -> jax.Array:
        given = MLPArguments(**arguments, norm_eps=1e-6)
        return compose(mosaic_gpu.streaming_matmul, given)

    return Run(call)


OP = Op(
    name="streaming_mlp",
    problems=ROWS,
    arguments=lambda problem, key: problem.inputs(key, jnp.dtype(jnp.bfloat16)),
    implementations={
        **{name: partial(ours, name) for name in (SPECIFICATION, "xla", OURS)},
        "streaming_matmul": apart,
    },
    peers=lambda problem: ("xla", "streaming_matmul"),
    unit="TB/s",
    quick=("llama-3-8b M=1",),
    curve={tokens: f"llama-3-8b M={tokens}" for tokens in (1, 8, 16, 32)},
    curve_label="tokens, times a layer of Llama-3-8B from the heads' outputs on",
)
