"""Named shapes of decoding: few queries in each of `batch` sequences, with real models' heads."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.flash_decoding.tree import pack_tree_mask
from pallas_kernels.models import MODELS, Heads, random_cache, random_scales


@dataclass(frozen=True)
class Problem:
    """The last `queries` positions of sequences in shuffled pages.

    Attributes:
        batch, length: sequences, and keys of each.
        shortest: lengths are log-uniform from `shortest` to `length` instead, always the same ones.
        cache: dtype of quantized pages; None for that of the queries.
        tree: the queries are a binary tree, in the order of a heap, and each sees its own path; else all before it.
    """

    heads: Heads
    batch: int
    length: int
    page_size: int = 64
    queries: int = 1
    shortest: int | None = None
    cache: str | None = None
    tree: bool = False

    @property
    def lengths(self) -> tuple[int, ...]:
        if self.shortest is None:
            return (self.length,) * self.batch
        logarithms = np.random.default_rng(0).uniform(np.log(self.shortest), np.log(self.length), self.batch)
        return tuple(np.exp(logarithms).astype(int).tolist())

    @property
    def paths_QQ(self) -> np.ndarray:
        """Which of the new keys each query sees."""
        if not self.tree:
            return np.tri(self.queries, dtype=bool)
        seen_QQ = np.eye(self.queries, dtype=bool)
        for i in range(1, self.queries):
            seen_QQ[i] |= seen_QQ[(i - 1) // 2]
        return seen_QQ

    def inputs(self, key: jax.Array, dtype: jnp.dtype) -> tuple[jax.Array, ...]:
        """Random positional arguments of `flash_decoding`, in its order."""
        q_key, cache_key = jax.random.split(key)
        shape_BQNH = (self.batch, self.queries, self.heads.query_heads, self.heads.head_size)
        cache_dtype = dtype if self.cache is None else jnp.dtype(self.cache)
        pages = random_cache(cache_key, self.heads, self.lengths, self.page_size, cache_dtype)
        return jax.random.normal(q_key, shape_BQNH, dtype), *pages, jnp.array(self.lengths, jnp.int32)

    def arguments(self, key: jax.Array, dtype: jnp.dtype) -> dict[str, jax.Array]:
        """Random values of all arrays that `flash_decoding` takes, by the names of its arguments."""
        names = ("q_BQNH", "k_pages_PSKH", "v_pages_PSKH", "page_table_BJ", "lengths_B")
        arguments: dict[str, jax.Array] = dict(zip(names, self.inputs(key, dtype), strict=True))
        sinks_key, k_key, v_key = jax.random.split(key, 3)
        if self.heads.sinks:
            arguments["sinks_N"] = jax.random.normal(sinks_key, (self.heads.query_heads,), dtype)
        if self.tree:
            seen_BQQ = jnp.asarray(np.tile(self.paths_QQ, (self.batch, 1, 1)))
            arguments["tree_mask_BQW"] = pack_tree_mask(seen_BQQ)
        if self.cache is not None:
            arguments["k_scales_PKS"] = random_scales(k_key, arguments["k_pages_PSKH"])
            arguments["v_scales_PKS"] = random_scales(v_key, arguments["v_pages_PSKH"])
        return arguments

    @property
    def flops(self) -> float:
        """Of both products over the visible keys."""
        seen_Q = self.paths_QQ.sum(1)
        visible = sum(
            min(length - self.queries + int(seen), self.heads.window or length)
            for length in self.lengths
            for seen in seen_Q
        )
        return 4 * visible * self.heads.query_heads * self.heads.head_size

    @property
    def bytes(self) -> float:
        """Of the visible keys and values, each once, and of their scales; 16 bits a number where the cache is not
        quantized. A kernel may have to read them for each of several blocks of query rows."""
        last = self.length if self.heads.window is None else self.heads.window + self.queries - 1
        keys = sum(min(length, last) for length in self.lengths)
        key_head = 2 * self.heads.head_size if self.cache is None else self.heads.head_size + 4
        return 2 * keys * self.heads.kv_heads * key_head


_LLAMA = MODELS["llama-3-8b"]
_SHAPES = ((1, 8192), (1, 131072), (16, 8192), (64, 4096), (128, 2048))
_SHORT = ((1, 256), (16, 256), (256, 256))  # units are whole in the first two
_FULL = ("llama-3-70b", "mixtral-8x7b", "qwen3-30b-a3b", "falcon-7b")
_WINDOW = ("mistral-7b", "gemma-2-9b", "gpt-oss-20b")  # their windows are shorter than 8192

PROBLEMS = {
    **{f"llama-3-8b {B}x{C}": Problem(_LLAMA, B, C) for B, C in (*_SHORT, (1, 1024), (1, 32768), *_SHAPES)},
    **{f"llama-3-8b {B}x{C} pages of 16": Problem(_LLAMA, B, C, 16) for B, C in _SHAPES},
    "llama-3-8b 64x4096 8 queries": Problem(_LLAMA, 64, 4096, queries=8),
    "llama-3-8b 64x4096 64 queries": Problem(_LLAMA, 64, 4096, queries=64),
    "llama-3-8b 64x4096 tree of 64": Problem(_LLAMA, 64, 4096, queries=64, tree=True),
    # Of lookahead, for all sequences of a batch and for one.
    "llama-3-8b 64x4096 120 queries": Problem(_LLAMA, 64, 4096, queries=120),
    "llama-3-8b 1x8192 120 queries": Problem(_LLAMA, 1, 8192, queries=120),
    "llama-3-8b 64 from 128 to 32768": Problem(_LLAMA, 64, 32768, shortest=128),
    "llama-3-8b 64x4096 int8": Problem(_LLAMA, 64, 4096, cache="int8"),
    "llama-3-8b 64x4096 fp8": Problem(_LLAMA, 64, 4096, cache="float8_e4m3fn"),
    **{f"{name} 64x4096": Problem(MODELS[name], 64, 4096) for name in _FULL},
    **{f"{name} 64x8192": Problem(MODELS[name], 64, 8192) for name in _WINDOW},
}
