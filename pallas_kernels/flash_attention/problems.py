"""Named shapes of prefill: `batch` prompts of `length` tokens, all queries, with real models' heads."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from pallas_kernels.models import MODELS, Heads, random_cache


@dataclass(frozen=True)
class Problem:
    heads: Heads
    batch: int
    length: int
    page_size: int = 64

    def inputs(self, key: jax.Array, dtype: jnp.dtype) -> tuple[jax.Array, ...]:
        """Random arguments of `flash_attention`, in its order."""
        q_key, cache_key = jax.random.split(key)
        shape_TNH = (self.batch * self.length, self.heads.query_heads, self.heads.head_size)
        pages = random_cache(cache_key, self.heads, self.batch, self.length, self.page_size, dtype)
        cu_q_R1 = self.length * jnp.arange(self.batch + 1, dtype=jnp.int32)
        lengths_R = jnp.full((self.batch,), self.length, jnp.int32)
        return jax.random.normal(q_key, shape_TNH, dtype), *pages, cu_q_R1, lengths_R


_LLAMA_SHAPES = ((4, 2048), (2, 4096), (1, 8192), (1, 16384), (1, 32768))

PROBLEMS = {
    **{f"llama-3-8b {B}x{C}": Problem(MODELS["llama-3-8b"], B, C) for B, C in _LLAMA_SHAPES},
    **{f"{name} 1x8192": Problem(MODELS[name], 1, 8192) for name in MODELS if name != "llama-3-8b"},
}
