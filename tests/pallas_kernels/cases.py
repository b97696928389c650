"""Problems of paged attention with their exact answers, for the tests of every implementation.

Every slot and page that no query sees holds NaN, as do the padding rows of q.
"""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.blockwise import PagedKV

# Float32 sums of at most 100 terms of order 1: about sqrt(100) roundings of 6e-8, with room for the exponentials.
ATOL = 1e-5


@dataclass(frozen=True)
class Case:
    """Sequences of `lengths` keys whose last `queries` positions ask; g query heads for each KV head.

    With `tree` the queries, as many of every sequence, see the keys of the others by random masks. The page table has
    room for `room` keys at least: cases of equal shapes and options run in one program.
    """

    lengths: tuple[int, ...]
    queries: tuple[int, ...]
    g: int = 2
    page_size: int = 8
    window: int | None = None
    soft_cap: float | None = None
    sinks: bool = False
    head_size: int = 16
    padding: int = 3
    kv_heads: int = 2
    tree: bool = False
    room: int = 1

    @property
    def options(self) -> dict:
        return {"scale": self.head_size**-0.5, "window": self.window, "soft_cap": self.soft_cap}

    @property
    def columns(self) -> int:
        """Of the page table; the last one is unused."""
        return -(-max(*self.lengths, self.room) // self.page_size) + 1

    @property
    def tokens(self) -> int:
        """Rows of q, padding included."""
        return sum(self.queries) + self.padding

    @property
    def pool_shape(self) -> tuple[int, ...]:
        """Of the pages of keys, or of values: as many as the table has places, and page 0."""
        pages = 1 + len(self.lengths) * self.columns
        return pages, self.page_size, self.kv_heads, self.head_size


class Inputs:
    """Arrays of a case: the pool, and the same keys as one contiguous array per sequence."""

    def __init__(self, case: Case, seed: int = 0):
        rng = np.random.default_rng(seed)
        self.case, R, S, K, H = case, len(case.lengths), case.page_size, case.kv_heads, case.head_size
        pages = iter(1 + rng.permutation(R * case.columns))
        self.pool = np.full((2, *case.pool_shape), np.nan, np.float32)
        self.table = np.zeros((R, case.columns), np.int32)
        self.kv = [rng.normal(size=(2, length, K, H)).astype(np.float32) for length in case.lengths]
        self.seen_BQC = random_paths(rng, R, case.queries[0]) if case.tree else None
        for r, (length, n) in enumerate(zip(case.lengths, case.queries, strict=True)):
            shares_a_page = bool(r and self.table[0, 0] and min(length, case.lengths[0]) >= S)
            if shares_a_page:
                self.kv[r][:, :S] = self.kv[0][:, :S]
            if case.tree:
                hidden = set(range(max(S, length - n), length)).difference(*(self.visible(r, i) for i in range(n)))
                self.kv[r][:, sorted(hidden)] = np.nan
            first_seen = max(0, length - n - case.window + 1) if case.window else 0
            for j in range(first_seen // S, -(-length // S)):
                self.table[r, j] = self.table[0, 0] if shares_a_page and j == 0 else next(pages)
                page = self.kv[r][:, j * S : (j + 1) * S]
                self.pool[:, self.table[r, j], : page.shape[1]] = page
        self.cu_q = np.cumsum([0, *case.queries]).astype(np.int32)
        N = K * case.g
        self.q = rng.normal(size=(case.tokens, N, H)).astype(np.float32)
        self.q[self.cu_q[-1] :] = np.nan
        self.lengths = np.array(case.lengths, np.int32)
        self.sinks = rng.normal(size=N).astype(np.float32) if case.sinks else None

    def visible(self, r: int, i: int) -> np.ndarray:
        """The keys that query i of sequence r sees."""
        case, length, n = self.case, self.case.lengths[r], self.case.queries[r]
        key, first = np.arange(length), length - n
        path_QC = np.tri(n, dtype=bool) if self.seen_BQC is None else self.seen_BQC[r]
        depth_Q = np.maximum(path_QC.sum(1), 1) - 1
        nth = np.clip(key - first, 0, n - 1)
        position = np.where(key < first, key, first + depth_Q[nth])
        seen = (key < first) | path_QC[i, nth]
        if case.window:
            seen &= position > first + depth_Q[i] - case.window
        return np.flatnonzero(seen)

    @property
    def tree_mask(self) -> jax.Array | None:
        """The words of the masks, packed here by numpy."""
        if self.seen_BQC is None:
            return None
        padded = np.pad(self.seen_BQC, ((0, 0), (0, 0), (0, -self.seen_BQC.shape[2] % 32)))
        return jnp.asarray(np.packbits(padded, axis=2, bitorder="little").view(np.uint32))

    def arguments(self, dtype=jnp.float32) -> tuple[jax.Array, ...]:
        floats = (jnp.asarray(x.astype(dtype)) for x in (self.q, *self.pool))
        return *floats, *map(jnp.asarray, (self.table, self.cu_q, self.lengths))

    def round_to(self, dtype) -> None:
        """Makes the values what `arguments(dtype)` holds, so that the oracle sees the same numbers; sinks too."""
        self.q, *self.kv = (x.astype(dtype).astype(np.float32) for x in (self.q, *self.kv))
        self.sinks = None if self.sinks is None else self.sinks.astype(dtype)

    def quantize(self, dtype, seed: int = 0) -> tuple[jax.Array, jax.Array]:
        """The pool [2, P, S, K, H] as `dtype` and its scales [2, P, K, S]; the oracle's keys become what they mean.

        A NaN becomes an arbitrary integer, in fp8 it stays; the scales of what is never seen are NaN.
        """
        rng = np.random.default_rng(seed)
        scales = rng.uniform(0.01, 0.02, self.pool.shape[:-1]).astype(np.float32)
        values = (self.pool / scales[..., None]).clip(-127, 127)
        values = (np.nan_to_num(values) if dtype == "int8" else values).astype(jnp.dtype(dtype))
        scales[np.isnan(self.pool[..., 0])] = np.nan
        exact = np.asarray(values, np.float32) * scales[..., None]
        for r, length in enumerate(self.case.lengths):
            self.kv[r] = exact[:, self.table[r]].reshape(2, -1, *exact.shape[-2:])[:, :length]
        return jnp.asarray(values), jnp.asarray(scales.swapaxes(2, 3))

    @property
    def options(self) -> dict:
        return self.case.options | {"sinks_N": None if self.sinks is None else jnp.asarray(self.sinks)}


def quantized_pages(inputs: Inputs, dtype, kv_dtype) -> PagedKV:
    """The case's pages in 8 bits; the oracle sees the queries as `dtype`, and the keys that those bits mean."""
    inputs.q = inputs.q.astype(dtype).astype(np.float32)
    (k, v), (k_scales, v_scales) = inputs.quantize(kv_dtype)
    return PagedKV(k, v, k_scales, v_scales)


def with_value_scales(inputs: Inputs, kv: PagedKV, sizes_S: np.ndarray) -> PagedKV:
    """The same pages with the scales of values times one number for each slot of a page; so the oracle sees them."""
    for _, v in inputs.kv:
        v *= np.resize(sizes_S, len(v))[:, None, None]
    assert kv.v_scales_PKS is not None
    return replace(kv, v_scales_PKS=kv.v_scales_PKS * sizes_S[None, None])


def random_paths(rng: np.random.Generator, sequences: int, queries: int) -> np.ndarray:
    """What each query sees of the new keys, [B, Q, Q]: the path to it in a random forest with some nodes left out,
    and in every third sequence any keys at all."""
    seen_BQC = rng.random((sequences, queries, queries)) < 0.4
    for b in range(sequences):
        if b % 3 == 2:
            continue
        for i in range(queries):
            parent = int(rng.integers(max(-1, i - 4), i)) if i else -1
            seen_BQC[b, i] = seen_BQC[b, parent] if parent >= 0 else False
            seen_BQC[b, i, i] = True
        left_out = rng.random(queries) < 0.2
        seen_BQC[b, left_out] = False
        seen_BQC[b, :, left_out] = False
    return seen_BQC


def oracle(inputs: Inputs, rounded_to=None) -> tuple[np.ndarray, np.ndarray]:
    """Output and log-sum-exp: one query, one head, one list of visible keys at a time, in float64.

    `rounded_to` a 16-bit dtype, weights and output are rounded once each, as a product on tensor cores must: what
    remains is the error of the best 16-bit kernel.
    """
    round_ = (lambda x: x) if rounded_to is None else (lambda x: np.asarray(x).astype(rounded_to).astype(np.float64))
    case, (T, N, H) = inputs.case, inputs.q.shape
    out, lse = np.zeros((T, N, H)), np.full((T, N), -np.inf)
    for r, n in enumerate(case.queries):
        k, v = inputs.kv[r].astype(np.float64)
        for i in range(n):
            if not (seen := inputs.visible(r, i)).size:
                continue
            row = inputs.cu_q[r] + i
            for head in range(N):
                if head % case.g == 0:  # a copy that the heads of a group share
                    k_seen, v_seen = k[seen, head // case.g], v[seen, head // case.g]
                scores = k_seen @ inputs.q[row, head].astype(np.float64) * H**-0.5
                if case.soft_cap:
                    scores = case.soft_cap * np.tanh(scores / case.soft_cap)
                top = scores.max()
                weights = np.exp(scores - top)
                total = weights.sum() + (np.exp(float(inputs.sinks[head]) - top) if case.sinks else 0)
                out[row, head] = round_(round_(weights) @ v_seen / total)
                lse[row, head] = top + np.log(total)
    return out, lse


def assert_close(found, expected, atol=ATOL):
    for x, y in zip(found, expected, strict=True):
        np.testing.assert_allclose(np.asarray(x, np.float64), np.asarray(y, np.float64), rtol=0, atol=atol)


def two_roundings(inputs: Inputs, dtype) -> float:
    """How far an output can be off: products of 16-bit numbers are exact in float32, and quantized keys and values in
    16 bits; the weights and the output are rounded once each."""
    largest_value = max(np.nanmax(np.abs(kv[1]), initial=0) for kv in inputs.kv)  # what is never seen may be NaN
    return float(jnp.finfo(dtype).eps) * largest_value + ATOL
