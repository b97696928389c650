"""Named shapes of decoding: a query in each of `batch` sequences of `length` keys, with real models' heads."""

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
        """Random arguments of `flash_decoding`, in its order."""
        q_key, cache_key = jax.random.split(key)
        shape_BQNH = (self.batch, 1, self.heads.query_heads, self.heads.head_size)
        pages = random_cache(cache_key, self.heads, self.batch, self.length, self.page_size, dtype)
        lengths_B = jnp.full((self.batch,), self.length, jnp.int32)
        return jax.random.normal(q_key, shape_BQNH, dtype), *pages, lengths_B


_LLAMA_SHAPES = ((1, 8192), (1, 131072), (16, 8192), (64, 4096), (128, 2048))

PROBLEMS = {
    **{f"llama-3-8b {B}x{C}": Problem(MODELS["llama-3-8b"], B, C) for B, C in _LLAMA_SHAPES},
    **{f"{name} 64x4096": Problem(MODELS[name], 64, 4096) for name in MODELS if name != "llama-3-8b"},
}
