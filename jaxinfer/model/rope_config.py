"""Reads the rotary embedding of a `config.json`: `rope_theta` with `rope_scaling`, or `rope_parameters`.

A field is mandatory where transformers requires it: a guess would run and answer wrongly.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from jaxinfer.model import rope as rotary
from jaxinfer.model.reader import ConfigReader
from jaxinfer.model.rope import Rope

LEAST_THETA = 2.0  # at a base of 1 all components turn alike, and YaRN divides by its logarithm


def read_rope(read: ConfigReader, head_size: int, context: int, theta: float) -> Rope:
    """The rope of the layers that see everything; `theta` where no base is stated."""
    theta = read.number("rope_theta", theta, least=LEAST_THETA)
    within = "rope_parameters" if read.object("rope_parameters") else "rope_scaling"
    parameters = read.object(within)
    share = read.number("partial_rotary_factor", 1.0)
    if "full_attention" in parameters:  # one set per kind of layer
        parameters = ConfigReader(parameters, within).object("full_attention")
        within = f"{within}.full_attention"
    return rope_from(ConfigReader(parameters, within, read.fields), theta, share, head_size, context, read)


def rope_from(inner: ConfigReader, theta: float, share: float, head_size: int, context: int,
              read: ConfigReader) -> Rope:  # fmt: skip
    """A rope from one `rope_scaling` or `rope_parameters` object, whose own base and share go before those given.

    Raises:
        ValueError: a field is missing, malformed or unread, or the fields do not make finite frequencies.
    """
    theta = inner.number("rope_theta", theta, least=LEAST_THETA)
    dim = _rotating(inner, head_size, share)
    newer, older = inner.get("rope_type"), inner.get("type")  # many files hold both names
    kind = newer or older or "default"
    if not isinstance(kind, str) or kind not in _SCALINGS:
        path = inner.path("rope_type" if newer else "type")
        raise ValueError(f"config.json: {path} is {kind!r}; expected one of {sorted(_SCALINGS)}")
    outer = read.integer("original_max_position_embeddings", context)
    original = inner.integer("original_max_position_embeddings", outer)
    rope = Rope(theta, dim, _SCALINGS[kind](inner, original, context, dim))
    inner.refuse_unread(f"rotary embeddings of type {kind}")
    _check_frequencies(rope, context, inner.fields)
    return rope


def _rotating(read: ConfigReader, head_size: int, share: float) -> int:
    share = read.number("partial_rotary_factor", share)
    dim = int(head_size * share)
    if dim % 2 or not 2 <= dim <= head_size:
        raise ValueError(
            f"config.json: {read.path('partial_rotary_factor')} {share:g} of head_dim {head_size} rotates {dim:g} "
            f"components; expected an even number of at least 2 and at most {head_size}"
        )
    return dim


def _check_frequencies(rope: Rope, context: int, parameters: dict[str, Any]) -> None:
    """Raises what only a combination of fields shows."""
    with np.errstate(all="ignore"):
        inverse, factor = rope.frequencies(context)
        values = np.append(inverse, np.float32(factor))
    if not (np.isfinite(values).all() and values.min() > 0):
        raise ValueError(
            f"config.json: rope_theta {rope.theta:g} with {parameters} gives frequencies from {values.min():g} "
            f"to {values.max():g}; expected positive float32 numbers"
        )


def _dynamic(read: ConfigReader, original: int, context: int, dim: int) -> rotary.Dynamic:
    return rotary.Dynamic(read.number("factor", least=1.0), original)


def _linear(read: ConfigReader, original: int, context: int, dim: int) -> rotary.Linear:
    return rotary.Linear(read.number("factor", least=1.0))


def _llama3(read: ConfigReader, original: int, context: int, dim: int) -> rotary.Llama3:
    low, high = read.number("low_freq_factor"), read.number("high_freq_factor")
    if low >= high:
        raise ValueError(
            f"config.json: {read.path('low_freq_factor')} is {low}; expected less than high_freq_factor {high}"
        )
    return rotary.Llama3(
        factor=read.number("factor", least=1.0),
        low_freq_factor=low,
        high_freq_factor=high,
        original_context=read.integer("original_max_position_embeddings"),
    )


def _yarn(read: ConfigReader, original: int, context: int, dim: int) -> rotary.Yarn:
    fast, slow = read.optional("beta_fast") or 32.0, read.optional("beta_slow") or 1.0
    if fast < slow:
        raise ValueError(f"config.json: {read.path('beta_fast')} is {fast}; expected at least beta_slow {slow}")
    return rotary.Yarn(
        factor=read.number("factor", least=1.0),
        original_context=original,
        beta_fast=fast,
        beta_slow=slow,
        attention_factor=read.optional("attention_factor"),
        mscale=read.optional("mscale"),
        mscale_all_dim=read.optional("mscale_all_dim"),
        truncate=read.flag("truncate", True),
    )


def _longrope(read: ConfigReader, original: int, context: int, dim: int) -> rotary.LongRope:
    return rotary.LongRope(
        # One factor for each pair of components that rotates.
        short_factor=read.numbers("short_factor", dim // 2),
        long_factor=read.numbers("long_factor", dim // 2),
        # The factor of cos and sin divides by its logarithm.
        original_context=read.integer("original_max_position_embeddings", original, least=2),
        factor=read.optional("factor", least=1.0) or context / original,
        attention_factor=read.optional("attention_factor"),
    )


_SCALINGS: dict[str, Callable[[ConfigReader, int, int, int], rotary.Scaling | None]] = {
    "default": lambda read, original, context, dim: None,
    "linear": _linear,
    "dynamic": _dynamic,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
    "su": _longrope,  # the name in Phi-3's first configs
}
