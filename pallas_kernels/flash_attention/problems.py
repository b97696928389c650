"""Named shapes of prefill: `batch` prompts of `length` tokens, all queries, with real models' heads."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from pallas_kernels.models import MODELS, Heads, random_cache


@dataclass(frozen=True)
class Problem:
    """Prompts that are prefilled whole, each query seeing the keys up to its own.

    Attributes:
        batch, length: prompts, and tokens of each.
        shuffled: whether the pages lie anywhere in the pool, or in the order of the tokens.
    """

    heads: Heads
    batch: int
    length: int
    page_size: int = 64
    shuffled: bool = True

    def inputs(self, key: jax.Array, dtype: jnp.dtype) -> tuple[jax.Array, ...]:
        """Random positional arguments of `flash_attention`, in its order."""
        q_key, cache_key = jax.random.split(key)
        shape_TNH = (self.batch * self.length, self.heads.query_heads, self.heads.head_size)
        lengths = (self.length,) * self.batch
        pages = random_cache(cache_key, self.heads, lengths, self.page_size, dtype, self.shuffled)
        cu_q_R1 = self.length * jnp.arange(self.batch + 1, dtype=jnp.int32)
        return jax.random.normal(q_key, shape_TNH, dtype), *pages, cu_q_R1, jnp.array(lengths, jnp.int32)

    def arguments(self, key: jax.Array, dtype: jnp.dtype) -> dict[str, jax.Array]:
        """Random values of all arrays that `flash_attention` takes, by the names of its arguments."""
        names = ("q_TNH", "k_pages_PSKH", "v_pages_PSKH", "page_table_RJ", "cu_q_R1", "lengths_R")
        arguments: dict[str, jax.Array] = dict(zip(names, self.inputs(key, dtype), strict=True))
        if self.heads.sinks:
            arguments["sinks_N"] = jax.random.normal(key, (self.heads.query_heads,), dtype)
        return arguments

    @property
    def flops(self) -> float:
        """Of both products over the visible keys; a query counts half of its own key, as is usual."""
        unseen = 0 if self.heads.window is None else max(0, self.length - self.heads.window)
        visible = (self.length**2 - unseen**2) / 2
        return 4 * self.batch * visible * self.heads.query_heads * self.heads.head_size

    @property
    def bytes(self) -> float:
        """Of queries, keys, values and result in 16 bits, each once."""
        heads = 2 * self.heads.query_heads + 2 * self.heads.kv_heads
        return 2 * self.batch * self.length * heads * self.heads.head_size


_LLAMA_SHAPES = ((4, 2048), (2, 4096), (1, 8192), (1, 16384), (1, 32768))

# Keys and values in one piece are read as the largest pages there are, in order.
PROBLEMS = {
    **{f"llama-3-8b {B}x{C}": Problem(MODELS["llama-3-8b"], B, C, 128, False) for B, C in _LLAMA_SHAPES},
    **{f"llama-3-8b {B}x{C} shuffled": Problem(MODELS["llama-3-8b"], B, C) for B, C in _LLAMA_SHAPES},
    "mistral-7b 1x32768": Problem(MODELS["mistral-7b"], 1, 32768, 128, False),
    **{f"{name} 1x8192": Problem(MODELS[name], 1, 8192, 128, False) for name in MODELS if name != "llama-3-8b"},
}
