"""Decoding: `flash_decoding` beside cuDNN and tokamax."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.kernels.op import OURS, SPECIFICATION, Arguments, Op, Run, Tuning, Unsupported
from benchmarks.kernels.ops import attention
from pallas_kernels import dispatch
from pallas_kernels.blockwise import Options, PagedKV
from pallas_kernels.flash_decoding import choice, flash_decoding, mosaic_gpu, plan
from pallas_kernels.flash_decoding.config import Config
from pallas_kernels.flash_decoding.problems import PROBLEMS, Problem
from pallas_kernels.flash_decoding.units import Shape

_DTYPE = jnp.dtype(jnp.bfloat16)
_PAGED = ("q_BQNH", "k_pages_PSKH", "v_pages_PSKH", "page_table_BJ")


def ours(name: str, problem: Problem) -> Run:
    """The schedule is part of the arguments: a step makes one for all of its layers."""

    def prepare(arguments: Arguments) -> Arguments:
        q, k, _, *rest = (arguments[argument] for argument in (*_PAGED, "lengths_B"))
        return arguments | {"schedule": plan(q, k, *rest, window=problem.heads.window, implementation=name)}

    call = lambda arguments: flash_decoding(**arguments, **problem.heads.options, implementation=name)  # noqa: E731
    return Run(call, prepare)


def configured(problem: Problem, config: Config) -> Run:
    """Its schedule is made beforehand too."""
    shape, options = shape_of(problem), Options(**problem.heads.options)

    def prepare(arguments: Arguments) -> Arguments:
        return arguments | {"schedule": mosaic_gpu.plan(arguments["lengths_B"], shape, options.window, config)}

    def call(arguments: Arguments) -> jax.Array:
        q_BQNH, k_PSKH, v_PSKH, table_BJ, lengths_B = (arguments[name] for name in (*_PAGED, "lengths_B"))
        kv = PagedKV(k_PSKH, v_PSKH, arguments.get("k_scales_PKS"), arguments.get("v_scales_PKS"))
        return mosaic_gpu.flash_decoding(
            q_BQNH, kv, table_BJ, lengths_B, arguments.get("sinks_N"), options, arguments.get("tree_mask_BQW"),
            schedule=arguments["schedule"], config=config,
        )[0]  # fmt: skip

    return Run(call, prepare)


def candidates(problem: Problem) -> list[Config]:
    size = shape_of(problem), dispatch.multiprocessors()
    return list(dict.fromkeys([choice.choose(*size), *choice.candidates(*size)]))


def shape_of(problem: Problem) -> Shape:
    arguments = jax.eval_shape(lambda key: problem.inputs(key, _DTYPE), jax.random.key(0))
    q_BQNH, k_PSKH, v_PSKH, table_BJ, _ = arguments
    return Shape.of(q_BQNH, PagedKV(k_PSKH, v_PSKH), table_BJ)


def cudnn(problem: Problem) -> Run:
    _refuse("cuDNN in JAX", problem, soft_cap=problem.heads.soft_cap)
    call = partial(attention.cudnn, **_mask(problem))
    return Run(call, lambda arguments: _paged(arguments).without_pages(problem.length))


def cudnn_paged(problem: Problem) -> Run:
    _refuse("cuDNN in JAX", problem, soft_cap=problem.heads.soft_cap)
    if problem.shortest is not None:
        raise Unsupported("cuDNN in JAX wants a pool of as many pages as the table has entries")
    if problem.queries > 1:
        raise Unsupported("cuDNN in JAX aligns the causal mask of paged keys with the first of them, not the last")
    call = partial(attention.cudnn_paged, heads=problem.heads, length=problem.length, causal=False)
    return Run(call, lambda arguments: _paged(arguments).for_cudnn())


def tokamax(problem: Problem) -> Run:
    _refuse("tokamax", problem)
    call = partial(attention.tokamax, **_mask(problem), logits_soft_cap=problem.heads.soft_cap)
    return Run(call, lambda arguments: _paged(arguments).without_pages(problem.length))


def _paged(arguments: Arguments) -> attention.Paged:
    return attention.Paged(*(arguments[name] for name in _PAGED))


def _refuse(who: str, problem: Problem, **options: object) -> None:
    attention.refuse(who, quantized_cache=problem.cache, sinks=problem.heads.sinks, tree=problem.tree, **options)
    window = problem.heads.window
    if window is not None and window < problem.length:
        raise Unsupported(f"{who} counts a window from the first key on, not from the last")


def _mask(problem: Problem) -> dict[str, Any]:
    """In the terms of `jax.nn.dot_product_attention`, which aligns causal queries with the first keys: a mask of our
    own aligns several with the last."""
    options: dict[str, Any] = {"scale": problem.heads.head_size**-0.5}
    if problem.queries > 1:
        key_1C, query_Q1 = jnp.arange(problem.length)[None], jnp.arange(problem.queries)[:, None]
        options["mask"] = (key_1C <= query_Q1 + problem.length - problem.queries)[None, None]
    if problem.shortest is not None:
        options["key_value_seq_lengths"] = jnp.array(problem.lengths, jnp.int32)
    return options


def _peers(problem: Problem) -> tuple[str, ...]:
    """A peer without pages has one figure for each shape, beside that of pages of 64; XLA gathers what it reads."""
    if problem.page_size != 64:
        return ("cudnn_paged",)
    return attention.installed("xla", "cudnn", "cudnn_paged", "tokamax")


_IMPLEMENTATIONS: dict[str, Callable[[Problem], Run]] = {
    **{name: partial(ours, name) for name in (SPECIFICATION, "xla", OURS)},
    "cudnn": cudnn,
    "cudnn_paged": cudnn_paged,
    "tokamax": tokamax,
}
OP = Op(
    name="flash_decoding",
    problems=PROBLEMS,
    arguments=lambda problem, key: problem.arguments(key, _DTYPE),
    implementations=_IMPLEMENTATIONS,
    peers=_peers,
    unit="TB/s",
    quick=("llama-3-8b 1x8192", "llama-3-8b 64x4096"),
    curve={
        1024: "llama-3-8b 1x1024",
        8192: "llama-3-8b 1x8192",
        32768: "llama-3-8b 1x32768",
        131072: "llama-3-8b 1x131072",
    },
    curve_label="keys of one sequence",
    tuning=Tuning(
        path=choice.TUNED,
        key=lambda problem: choice.tuning_key(shape_of(problem)),
        candidates=candidates,
        configured=configured,
    ),
)
