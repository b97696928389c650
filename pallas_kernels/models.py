"""Heads of real models, and random caches of their shape: what the ops are tested and timed on."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp


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
    "gemma-2-9b": Heads(16, 8, 256, window=4096, soft_cap=50.0),
    "qwen3-30b-a3b": Heads(32, 4, 128),
    "gpt-oss-20b": Heads(64, 8, 64, window=128, sinks=True),
    "falcon-7b": Heads(71, 1, 64),
}


def random_cache(
    key: jax.Array, heads: Heads, batch: int, length: int, page_size: int, dtype: jnp.dtype
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """A pool of random normal pages and a shuffled table: k_pages_PSKH, v_pages_PSKH, page_table_BJ.

    The pool holds just the pages of `batch` sequences of `length` tokens, and page 0, which none of them names.
    """
    columns = -(-length // page_size)
    k_key, v_key, table_key = jax.random.split(key, 3)
    shape_PSKH = (1 + batch * columns, page_size, heads.kv_heads, heads.head_size)
    pages = 1 + jax.random.permutation(table_key, batch * columns).astype(jnp.int32)
    return (
        jax.random.normal(k_key, shape_PSKH, dtype),
        jax.random.normal(v_key, shape_PSKH, dtype),
        pages.reshape(batch, columns),
    )
