"""Prefill: `flash_attention` beside cuDNN and tokamax."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.kernels.op import OURS, SPECIFICATION, Arguments, Op, Run, Tuning, Unsupported
from benchmarks.kernels.ops import attention
from pallas_kernels.blockwise import Options, PagedKV
from pallas_kernels.flash_attention import config as configs
from pallas_kernels.flash_attention import flash_attention, mosaic_gpu
from pallas_kernels.flash_attention.problems import PROBLEMS, Problem

_DTYPE = jnp.dtype(jnp.bfloat16)
_PAGED = ("q_TNH", "k_pages_PSKH", "v_pages_PSKH", "page_table_RJ")


def ours(name: str, problem: Problem) -> Run:
    return Run(lambda arguments: flash_attention(**arguments, **problem.heads.options, implementation=name))


def configured(problem: Problem, config: configs.Config) -> Run:
    def call(arguments: Arguments) -> jax.Array:
        q_TNH, table_RJ = arguments["q_TNH"], arguments["page_table_RJ"]
        borders = arguments["cu_q_R1"], arguments["lengths_R"]
        options = Options(**problem.heads.options)
        kv, sinks_N = _paged_kv(arguments), arguments.get("sinks_N")
        return mosaic_gpu.flash_attention(q_TNH, kv, table_RJ, *borders, sinks_N, options, config=config)[0]

    return Run(call)


def candidates(problem: Problem) -> list[configs.Config]:
    arguments = jax.eval_shape(lambda key: problem.arguments(key, _DTYPE), jax.random.key(0))
    q_TNH, kv = arguments["q_TNH"], _paged_kv(arguments)
    return list(dict.fromkeys([configs.choose(q_TNH, kv), *configs.candidates(q_TNH, kv)]))


def _paged_kv(arguments: Arguments) -> PagedKV:
    k_PSKH, v_PSKH = arguments["k_pages_PSKH"], arguments["v_pages_PSKH"]
    return PagedKV(k_PSKH, v_PSKH, arguments.get("k_scales_PKS"), arguments.get("v_scales_PKS"))


def cudnn(problem: Problem) -> Run:
    _refuse("cuDNN in JAX", problem, soft_cap=problem.heads.soft_cap)
    call = partial(attention.cudnn, **_mask(problem))
    return Run(call, lambda arguments: _paged(problem, arguments).without_pages(problem.length))


def cudnn_paged(problem: Problem) -> Run:
    _refuse("cuDNN in JAX", problem, soft_cap=problem.heads.soft_cap)
    call = partial(attention.cudnn_paged, heads=problem.heads, length=problem.length, causal=True)
    return Run(call, lambda arguments: _paged(problem, arguments).for_cudnn())


def tokamax(problem: Problem) -> Run:
    _refuse("tokamax", problem)
    call = partial(attention.tokamax, **_mask(problem), logits_soft_cap=problem.heads.soft_cap)
    return Run(call, lambda arguments: _paged(problem, arguments).without_pages(problem.length))


def _refuse(who: str, problem: Problem, **options: object) -> None:
    attention.refuse(who, quantized_cache=problem.cache, sinks=problem.heads.sinks, **options)
    if problem.asking < problem.length:
        raise Unsupported(f"{who} aligns a causal mask with the first key, not the last")


def _paged(problem: Problem, arguments: Arguments) -> attention.Paged:
    q_TNH, k_PSKH, v_PSKH, table_RJ = (arguments[name] for name in _PAGED)
    q_BQNH = q_TNH.reshape(problem.batch, problem.asking, *q_TNH.shape[1:])
    return attention.Paged(q_BQNH, k_PSKH, v_PSKH, table_RJ)


def _mask(problem: Problem) -> dict[str, Any]:
    """In the terms of `jax.nn.dot_product_attention`, whose window counts the keys left of a query's own."""
    window = problem.heads.window
    return {
        "scale": problem.heads.head_size**-0.5,
        "is_causal": True,
        "local_window_size": None if window is None else (window - 1, 0),
    }


def _peers(problem: Problem) -> tuple[str, ...]:
    """A peer without pages has one figure for each shape, beside that of K and V in one piece. What no peer takes as
    it is, our own op by cuDNN does: in parts of the keys, gathered and dequantized within the call."""
    if problem.cache is not None or problem.asking < problem.length:
        return ("xla", "cudnn_in_parts")
    return ("cudnn_paged",) if problem.shuffled else attention.installed("xla", "cudnn", "tokamax")


def _tuning_key(problem: Problem) -> str:
    dtype = _DTYPE if problem.cache is None else jnp.dtype(problem.cache)
    return configs.tuning_key(problem.heads.head_size, dtype, problem.page_size)


_IMPLEMENTATIONS: dict[str, Callable[[Problem], Run]] = {
    **{name: partial(ours, name) for name in (SPECIFICATION, "xla", OURS)},
    "cudnn_in_parts": partial(ours, "cudnn"),
    "cudnn": cudnn,
    "cudnn_paged": cudnn_paged,
    "tokamax": tokamax,
}
OP = Op(
    name="flash_attention",
    problems=PROBLEMS,
    arguments=lambda problem, key: problem.arguments(key, _DTYPE),
    implementations=_IMPLEMENTATIONS,
    peers=_peers,
    unit="TFLOP/s",
    quick=("llama-3-8b 1x8192",),
    curve={
        2048: "llama-3-8b 4x2048",
        4096: "llama-3-8b 2x4096",
        8192: "llama-3-8b 1x8192",
        16384: "llama-3-8b 1x16384",
        32768: "llama-3-8b 1x32768",
    },
    curve_label="tokens of a prompt",
    tuning=Tuning(
        path=configs.TUNED,
        key=_tuning_key,
        candidates=candidates,
        configured=configured,
    ),
)
