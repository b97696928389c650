"""What both attention ops need of their peers: K and V as those want them, their calls, and what they refuse."""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.kernels.op import Arguments, Unsupported
from pallas_kernels.models import Heads


@dataclass(frozen=True)
class Paged:
    """Queries of equal number in each sequence, and their paged keys and values."""

    q_BQNH: jax.Array
    k_PSKH: jax.Array
    v_PSKH: jax.Array
    table_BJ: jax.Array

    def without_pages(self, length: int) -> Arguments:
        """q, and k and v as BCKH: those of every sequence in one piece, up to the end of the longest."""

        def gather(pages_PSKH: jax.Array) -> jax.Array:
            B, J = self.table_BJ.shape
            _, S, K, H = pages_PSKH.shape
            return pages_PSKH[self.table_BJ].reshape(B, J * S, K, H)[:, :length]

        return {"q": self.q_BQNH, "k": gather(self.k_PSKH), "v": gather(self.v_PSKH)}

    def for_cudnn(self) -> Arguments:
        """cuDNN wants just the pages of the table in the pool: ours without page 0."""
        table_B1J1 = (self.table_BJ - 1)[:, None, :, None]
        return {"q": self.q_BQNH, "k": self.k_PSKH[1:], "v": self.v_PSKH[1:], "table": table_B1J1}


def refuse(who: str, **options: object) -> None:
    """Raises Unsupported with the first of the options that is asked for."""
    for option, value in options.items():
        if value:
            raise Unsupported(f"{who} takes no {option.replace('_', ' ')}")


def cudnn(arguments: Arguments, **options: Any) -> jax.Array:
    """cuDNN's attention of K and V in one piece; options as `jax.nn.dot_product_attention` takes them."""
    return jax.nn.dot_product_attention(*_qkv(arguments), implementation="cudnn", **options)


def cudnn_paged(arguments: Arguments, heads: Heads, length: int, *, causal: bool) -> jax.Array:
    """JAX's paged form of cuDNN's attention, which has no public name yet; all sequences have `length` keys."""
    try:
        from jax._src.cudnn.fused_attention_stablehlo import MaskType, paged_attention
    except ImportError as error:
        raise Unsupported(f"this JAX has no paged attention of cuDNN: {error}") from error
    B, Q, *_ = arguments["q"].shape
    lengths = jnp.full((B,), Q, jnp.int32), jnp.full((B,), length, jnp.int32)
    return paged_attention(
        *_qkv(arguments), *lengths, arguments["table"], arguments["table"],
        scale=heads.head_size**-0.5,
        mask_type=MaskType.PADDING_CAUSAL if causal else MaskType.PADDING,
        sliding_window_length=heads.window if causal else None,
    )  # fmt: skip


def installed(*peers: str) -> tuple[str, ...]:
    """Those of the peers that are here; tokamax is not a dependency."""
    return tuple(peer for peer in peers if peer != "tokamax" or importlib.util.find_spec("tokamax"))


def tokamax(arguments: Arguments, **options: Any) -> jax.Array:
    """tokamax's attention with its Mosaic GPU kernels; its options are those of `jax.nn.dot_product_attention`."""
    try:
        module = importlib.import_module("tokamax")
    except ImportError as error:
        raise Unsupported(f"{error}: pip install tokamax") from error
    return module.dot_product_attention(*_qkv(arguments), implementation="mosaic", **options)


def _qkv(arguments: Arguments) -> tuple[jax.Array, jax.Array, jax.Array]:
    return arguments["q"], arguments["k"], arguments["v"]
