"""What the attention ops demand of their arguments, checked before any device work.

Shapes and dtypes are always checked. Values (page indices, lengths) are checked where they are concrete:
under a trace there is nothing to look at.
"""

import math
import numbers
from collections.abc import Callable
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from pallas_kernels.blockwise import Options, PagedKV
from pallas_kernels.stripe import Stripe

COMPUTE_DTYPES = ("float32", "bfloat16", "float16")
QUANTIZED_DTYPES = ("int8", "float8_e4m3fn", "float8_e5m2")
MOST_WINDOW = 2**30  # positions less a window stay within 32 bits


def require(condition: bool, argument: str, found: object, allowed: str) -> None:
    if not condition:
        raise ValueError(f"{argument} is {found}; allowed: {allowed}")


def require_array(name: str, given: object) -> None:
    """Or what has a shape and a dtype as an array has."""
    require(hasattr(given, "shape") and hasattr(given, "dtype"), name, f"a {type(given).__name__}", "an array")


def require_numbers(**arrays: object) -> None:
    """Of arrays or None, by name: that none is a shape alone, with nothing in it to compute with."""
    for name, given in arrays.items():
        require(not isinstance(given, jax.ShapeDtypeStruct), name, f"a {type(given).__name__}", "an array")


def require_number(name: str, given: object, valid: Callable[[Any], bool], allowed: str) -> None:
    """Of Python or NumPy: an array would not be known when the program is traced."""
    number = isinstance(given, numbers.Real) and not isinstance(given, bool)
    found = f"an array of shape {given.shape}" if isinstance(given, jax.Array) else repr(given)
    require(number and valid(given), name, found, allowed)


def check_attention(
    q: jax.Array, kv: PagedKV, table_BJ: jax.Array, lengths_B: jax.Array, sinks_N: jax.Array | None,
    stripe: Stripe | None = None,
) -> None:  # fmt: skip
    """Checks what both ops share; `q` has any leading axes and ends in NH."""
    if stripe is not None:
        allowed = "None or a Stripe of at least 1 rank"
        require(isinstance(stripe, Stripe) and stripe.ranks >= 1, "stripe", stripe, allowed)
    check_layout(q, kv.k_PSKH, table_BJ, lengths_B, 1 if stripe is None else stripe.ranks)
    require_numbers(q=q, k_pages=kv.k_PSKH, v_pages=kv.v_PSKH, sinks=sinks_N)
    require_numbers(k_scales=kv.k_scales_PKS, v_scales=kv.v_scales_PKS, page_table=table_BJ)
    _require_values("page_table", table_BJ, 0, kv.k_PSKH.shape[0] - 1, "pages of the pool")
    _check_values(kv)
    if sinks_N is not None:
        require_array("sinks", sinks_N)
        heads = (q.shape[-2],)
        _require_dtype("sinks", sinks_N, COMPUTE_DTYPES)
        require(sinks_N.shape == heads, "sinks.shape", sinks_N.shape, f"{heads}, one per query head")


def check_layout(q: jax.Array, k_PSKH: jax.Array, table_BJ: jax.Array, lengths_B: jax.Array, ranks: int = 1) -> None:
    """Checks what says how many keys there are and of which queries; of the pages only shape and dtype matter."""
    for name, array in {"k_pages": k_PSKH, "page_table": table_BJ, "lengths": lengths_B}.items():
        require_array(name, array)
    _require_dtype("q", q, COMPUTE_DTYPES)
    _check_keys(k_PSKH, *q.shape[-2:])
    _require_rank("page_table", table_BJ, 2)
    _require_dtype("page_table", table_BJ, ("int32",))
    require(min(table_BJ.shape) >= 1, "page_table.shape", table_BJ.shape, "at least one row and one column")
    _require_dtype("lengths", lengths_B, ("int32",))
    rows = (table_BJ.shape[0],)
    require(lengths_B.shape == rows, "lengths.shape", lengths_B.shape, f"{rows}, one per row of page_table")
    most = ranks * table_BJ.shape[1] * k_PSKH.shape[1]
    require_numbers(lengths=lengths_B)
    _require_values("lengths", lengths_B, 0, most, "keys that a row of page_table holds")


def check_options(options: Options) -> None:
    require_number("scale", options.scale, math.isfinite, "a finite number")
    if options.window is not None:
        whole = lambda window: isinstance(window, int | np.integer) and window in range(1, MOST_WINDOW + 1)  # noqa: E731
        require_number("window", options.window, whole, f"None or a whole number from 1 to {MOST_WINDOW}")
    if options.soft_cap is not None:
        above_0 = lambda cap: 0 < cap < math.inf  # noqa: E731
        require_number("soft_cap", options.soft_cap, above_0, "None or a finite number above 0")


def check_queries(q: jax.Array, axes: str) -> None:
    require_array("q", q)
    _require_rank("q", q, len(axes))
    require(min(q.shape) >= 1, "q.shape", q.shape, f"every one of the axes {axes} at least 1")


def check_ragged(cu_q_R1: jax.Array, lengths_R: jax.Array, tokens: int) -> None:
    """Checks the borders of ragged queries: they start at 0, do not fall, and end within the tokens."""
    require_array("cu_q", cu_q_R1)
    _require_dtype("cu_q", cu_q_R1, ("int32",))
    require_array("lengths", lengths_R)
    _require_dtype("lengths", lengths_R, ("int32",))
    borders = (lengths_R.shape[0] + 1,)
    require(cu_q_R1.shape == borders, "cu_q.shape", cu_q_R1.shape, f"{borders}, one more than lengths")
    require_numbers(cu_q=cu_q_R1)
    if isinstance(cu_q_R1, jax.core.Tracer):
        return
    cu_q = np.asarray(cu_q_R1)
    require(cu_q[0] == 0 and bool((np.diff(cu_q) >= 0).all()), "cu_q", cu_q, "starts at 0 and never falls")
    require(cu_q[-1] <= tokens, "cu_q[-1]", cu_q[-1], f"at most the {tokens} rows of q")


def _check_keys(k: jax.Array, heads: int, head_size: int) -> None:
    _require_rank("k_pages", k, 4)
    require(min(k.shape) >= 1, "k_pages.shape", k.shape, "every one of the axes PSKH at least 1")
    require(k.shape[3] == head_size, "k_pages.shape", k.shape, f"head size {head_size}, as q")
    require(
        heads % k.shape[2] == 0,
        "k_pages.shape",
        k.shape,
        f"a number of KV heads that divides {heads} query heads",
    )
    _require_dtype("k_pages", k, (*COMPUTE_DTYPES, *QUANTIZED_DTYPES))


def _check_values(kv: PagedKV) -> None:
    """And the scales of both."""
    k, v = kv.k_PSKH, kv.v_PSKH
    require_array("v_pages", v)
    require(v.shape == k.shape, "v_pages.shape", v.shape, f"{k.shape}, as k_pages")
    require(v.dtype == k.dtype, "v_pages.dtype", v.dtype, f"{k.dtype}, as k_pages")
    quantized = k.dtype.name in QUANTIZED_DTYPES
    for name, scale in {"k_scales": kv.k_scales_PKS, "v_scales": kv.v_scales_PKS}.items():
        need = f"an array for pages of {k.dtype}" if quantized else f"None for pages of {k.dtype}"
        require((scale is not None) == quantized, name, "None" if scale is None else "an array", need)
        if scale is not None:
            require_array(name, scale)
            _require_dtype(name, scale, ("float32",))
            P, S, K, _ = k.shape
            require(scale.shape == (P, K, S), f"{name}.shape", scale.shape, f"{(P, K, S)}, the axes PKS of k_pages")


def _require_rank(name: str, array: jax.Array, rank: int) -> None:
    require(array.ndim == rank, f"{name}.shape", array.shape, f"{rank} axes")


def _require_dtype(name: str, array: jax.Array, allowed: tuple[str, ...]) -> None:
    require(jnp.dtype(array.dtype).name in allowed, f"{name}.dtype", array.dtype, ", ".join(allowed))


def _require_values(name: str, array: jax.Array, low: int, high: int, what: str) -> None:
    if isinstance(array, jax.core.Tracer):
        return
    values = np.asarray(array)
    outside = values[(values < low) | (values > high)]
    require(outside.size == 0, name, f"an array with {outside[:3]}", f"{low} to {high}, the {what}")
