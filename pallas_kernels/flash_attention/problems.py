"""Named shapes of prefill: `batch` prompts of `length` tokens, with real models' heads."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from pallas_kernels.models import MODELS, Heads, random_cache, random_scales


@dataclass(frozen=True)
class Problem:
    """Prompts, each query of which sees the keys up to its own.

    Attributes:
        batch, length: prompts, and tokens of each.
        shuffled: whether the pages lie anywhere in the pool, or in the order of the tokens.
        queries: the last so many tokens of each ask, as in the last chunk of a prompt; None for all of them.
        cache: dtype of quantized pages; None for that of the queries.
    """

    heads: Heads
    batch: int
    length: int
    page_size: int = 64
    shuffled: bool = True
    queries: int | None = None
    cache: str | None = None

    @property
    def asking(self) -> int:
        """Queries of each prompt."""
        return self.length if self.queries is None else self.queries

    def inputs(self, key: jax.Array, dtype: jnp.dtype) -> tuple[jax.Array, ...]:
        """Random positional arguments of `flash_attention`, in its order."""
        q_key, cache_key = jax.random.split(key)
        shape_TNH = (self.batch * self.asking, self.heads.query_heads, self.heads.head_size)
        lengths = (self.length,) * self.batch
        cache_dtype = dtype if self.cache is None else jnp.dtype(self.cache)
        pages = random_cache(cache_key, self.heads, lengths, self.page_size, cache_dtype, self.shuffled)
        cu_q_R1 = self.asking * jnp.arange(self.batch + 1, dtype=jnp.int32)
        return jax.random.normal(q_key, shape_TNH, dtype), *pages, cu_q_R1, jnp.array(lengths, jnp.int32)

    def arguments(self, key: jax.Array, dtype: jnp.dtype) -> dict[str, jax.Array]:
        """Random values of all arrays that `flash_attention` takes, by the names of its arguments."""
        names = ("q_TNH", "k_pages_PSKH", "v_pages_PSKH", "page_table_RJ", "cu_q_R1", "lengths_R")
        arguments: dict[str, jax.Array] = dict(zip(names, self.inputs(key, dtype), strict=True))
        if self.heads.sinks:
            arguments["sinks_N"] = jax.random.normal(key, (self.heads.query_heads,), dtype)
        if self.cache is not None:
            k_key, v_key = jax.random.split(jax.random.fold_in(key, 1))
            arguments["k_scales_PKS"] = random_scales(k_key, arguments["k_pages_PSKH"])
            arguments["v_scales_PKS"] = random_scales(v_key, arguments["v_pages_PSKH"])
        return arguments

    @property
    def flops(self) -> float:
        """Of both products over the visible keys; a query counts half of its own key, as is usual."""
        visible = self._visible(self.length) - self._visible(self.length - self.asking)
        return 4 * self.batch * visible * self.heads.query_heads * self.heads.head_size

    def _visible(self, queries: int) -> float:
        """Keys that the first so many tokens of a prompt see, all together."""
        unseen = 0 if self.heads.window is None else max(0, queries - self.heads.window)
        return (queries**2 - unseen**2) / 2

    @property
    def bytes(self) -> float:
        """Of queries, keys in sight, values and result, each once, and of scales; 16 bits a number where the cache is
        not quantized."""
        window = self.length if self.heads.window is None else self.heads.window + self.asking - 1
        keys, head_size = min(self.length, window), self.heads.head_size
        key_head = 2 * head_size if self.cache is None else head_size + 4
        queries = 2 * self.asking * self.heads.query_heads * 2 * head_size
        return self.batch * (queries + 2 * keys * self.heads.kv_heads * key_head)


_LLAMA_SHAPES = ((4, 2048), (2, 4096), (1, 8192), (1, 16384), (1, 32768))

# Keys and values in one piece are read as the largest pages there are, in order.
PROBLEMS = {
    **{f"llama-3-8b {B}x{C}": Problem(MODELS["llama-3-8b"], B, C, 128, False) for B, C in _LLAMA_SHAPES},
    **{f"llama-3-8b {B}x{C} shuffled": Problem(MODELS["llama-3-8b"], B, C) for B, C in _LLAMA_SHAPES},
    **{f"llama-3-8b 1x{C} pages of 16": Problem(MODELS["llama-3-8b"], 1, C, 16) for C in (8192, 32768)},
    "llama-3-8b 1x8192 int8": Problem(MODELS["llama-3-8b"], 1, 8192, cache="int8"),
    "llama-3-8b 1x8192 fp8": Problem(MODELS["llama-3-8b"], 1, 8192, cache="float8_e4m3fn"),
    # The last chunk of a long prompt.
    "llama-3-8b 2048 behind 30720": Problem(MODELS["llama-3-8b"], 1, 32768, queries=2048),
    "mistral-7b 1x32768": Problem(MODELS["mistral-7b"], 1, 32768, 128, False),
    **{f"{name} 1x8192": Problem(MODELS[name], 1, 8192, 128, False) for name in MODELS if name != "llama-3-8b"},
}
