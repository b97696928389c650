"""Heads of real models, and random caches of their shape: what the ops are tested and timed on."""

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np


@dataclass(frozen=True)
class Heads:
    """The attention of a model, as its `config.json` on Hugging Face gives it."""

    query_heads: int
    kv_heads: int
    head_size: int
    window: int | None = None
    soft_cap: float | None = None
    sinks: bool = False

    @property
    def options(self) -> dict:
        """The static options of both ops; every model here scales by head_size ** -0.5."""
        return {"scale": self.head_size**-0.5, "window": self.window, "soft_cap": self.soft_cap}


MODELS = {
    "llama-3-8b": Heads(32, 8, 128),
    "llama-3-70b": Heads(64, 8, 128),
    "mixtral-8x7b": Heads(32, 8, 128),
    "mistral-7b": Heads(32, 8, 128, window=4096),
    "gemma-2-9b": Heads(16, 8, 256, window=4096, soft_cap=50.0),
    "qwen3-30b-a3b": Heads(32, 4, 128),
    "gpt-oss-20b": Heads(64, 8, 64, window=128, sinks=True),
    "falcon-7b": Heads(71, 1, 64),
}


def random_cache(
    key: jax.Array,
    heads: Heads,
    lengths: Sequence[int],
    page_size: int,
    dtype: jnp.dtype,
    shuffled: bool = True,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """A pool of random normal pages and its table: k_pages_PSKH, v_pages_PSKH, page_table_BJ.

    The pool holds just the pages of sequences of `lengths` tokens, and page 0, which stands in the columns past a
    sequence's end. Pages that are not shuffled lie in the order of the tokens. int8 pages hold random bytes.
    """
    columns_B = np.array([-(-length // page_size) for length in lengths])
    first_B1 = np.cumsum(columns_B)[:, None] - columns_B[:, None]
    column_1J = np.arange(columns_B.max())[None]
    k_key, v_key, table_key = jax.random.split(key, 3)
    pages = 1 + jnp.arange(columns_B.sum(), dtype=jnp.int32)
    if shuffled:
        pages = jax.random.permutation(table_key, pages)
    nth_BJ = np.minimum(first_B1 + column_1J, len(pages) - 1)
    table_BJ = jnp.where(column_1J < columns_B[:, None], pages[nth_BJ], 0)
    shape_PSKH = (1 + len(pages), page_size, heads.kv_heads, heads.head_size)
    return _random_pages(k_key, shape_PSKH, dtype), _random_pages(v_key, shape_PSKH, dtype), table_BJ


def _random_pages(key: jax.Array, shape_PSKH: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
    if dtype == jnp.int8:
        return jax.random.randint(key, shape_PSKH, -127, 128, jnp.int8)
    compute_dtype = jnp.bfloat16 if jnp.finfo(dtype).bits == 8 else dtype
    return jax.random.normal(key, shape_PSKH, compute_dtype).astype(dtype)


def random_scales(key: jax.Array, pages_PSKH: jax.Array) -> jax.Array:
    """scales_PKS with which quantized pages of `random_cache` have values of order 1."""
    unit = 1 / 64 if pages_PSKH.dtype == jnp.int8 else 1.0
    P, S, K, _ = pages_PSKH.shape
    return jax.random.uniform(key, (P, K, S), jnp.float32, 0.5 * unit, 1.5 * unit)
