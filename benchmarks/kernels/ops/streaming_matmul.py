"""A few tokens times a weight: `streaming_matmul` beside XLA's own matmul."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.kernels.op import OURS, SPECIFICATION, Arguments, Op, Run, Tuning
from pallas_kernels import dispatch
from pallas_kernels.streaming_matmul import arguments as asked
from pallas_kernels.streaming_matmul import config as configs
from pallas_kernels.streaming_matmul import mosaic_gpu, streaming_matmul
from pallas_kernels.streaming_matmul.problems import PROBLEMS, Problem


def arguments(problem: Problem, key: jax.Array) -> Arguments:
    x_MD, w = problem.inputs(key, jnp.dtype(jnp.bfloat16))
    return {"x": x_MD, "w": w}


def ours(name: str, problem: Problem) -> Run:
    return Run(partial(_call, w_axes=problem.w_axes, implementation=name))


def _call(arguments: Arguments, **options: Any) -> jax.Array:
    return streaming_matmul(**arguments, **options)


def configured(problem: Problem, config: configs.Config | str) -> Run:
    if isinstance(config, str):
        return ours(config, problem)
    return Run(lambda arguments: mosaic_gpu.streaming_matmul(_asked(problem, **arguments), config=config))


def candidates(problem: Problem) -> list[configs.Config | str]:
    """XLA is one of them: where it is the fastest, `auto` takes it."""
    shape = shape_of(problem)
    return list(dict.fromkeys([configs.config_for(shape), dispatch.FALLBACK, *configs.candidates(shape)]))


def shape_of(problem: Problem) -> configs.Shape:
    given = jax.eval_shape(partial(arguments, problem), jax.random.key(0))
    return configs.Shape.of(_asked(problem, **given))


def _asked(problem: Problem, x: jax.Array, w: jax.Array) -> asked.Arguments:
    return asked.Arguments(x, w, None, None, None, None, problem.w_axes, 0.0, jnp.dtype(x.dtype))


_IMPLEMENTATIONS: dict[str, Callable[[Problem], Run]] = {
    name: partial(ours, name) for name in (SPECIFICATION, "xla", OURS)
}
OP = Op(
    name="streaming_matmul",
    problems=PROBLEMS,
    arguments=arguments,
    implementations=_IMPLEMENTATIONS,
    peers=lambda problem: ("xla",),
    unit="TB/s",
    quick=("llama-3-8b qkv M=1", "llama-3-8b up M=16"),
    curve={tokens: f"llama-3-8b up M={tokens}" for tokens in (1, 2, 4, 8, 16, 32, 64)},
    curve_label="tokens, times the gate and up projection of Llama-3-8B",
    tuning=Tuning(
        path=configs.TUNED,
        key=lambda problem: configs.tuning_key(shape_of(problem)),
        candidates=candidates,
        configured=configured,
    ),
)
