"""Cases of the attention kernels as a GPU runs them, and how exact the results must be."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.blockwise import PagedKV
from tests.pallas_kernels.cases import Case, Inputs, assert_close, oracle, quantized_pages, two_roundings

Result = tuple[jax.Array, jax.Array]  # output and log-sum-exp of every row of q
DTYPES = (jnp.bfloat16, jnp.float16)
LSE_ATOL = 1e-3  # tanh.approx: 2^-11 of scores up to soft_cap


class Launch(NamedTuple):
    """A case in a dtype; `kv_dtype` is that of quantized pages."""

    case: Case
    dtype: Any
    kv_dtype: str | None = None

    def arrays(self) -> tuple[Inputs, PagedKV | None]:
        """Such that the oracle sees the numbers that the kernel gets."""
        inputs = Inputs(self.case)
        if self.kv_dtype is not None:
            return inputs, quantized_pages(inputs, self.dtype, self.kv_dtype)
        inputs.round_to(self.dtype)
        return inputs, None


def launches(cases: Mapping[str, Case], kv_dtypes: Sequence[str | None] = (None,)) -> dict[str, Launch]:
    """Each case with all dtypes of pages, in bfloat16 and float16 by turns."""
    return {
        f"{name}, {kv_dtype}" if kv_dtype else name: Launch(case, DTYPES[i % 2], kv_dtype)
        for i, (name, case) in enumerate(cases.items())
        for kv_dtype in kv_dtypes
    }


def untuned(implementation: Callable) -> Callable:
    """The same, compiled without the search for fast matmuls, which would take longer than all else in a test."""
    return jax.jit(implementation, static_argnames="options", compiler_options={"xla_gpu_autotune_level": 0})


def assert_exact(
    launch: Launch,
    run: Callable[..., Result],
    kernel: Callable,
    peer: Callable,
    *,
    lse_atol: float = LSE_ATOL,
    beside_rounding: bool = False,
) -> None:
    """As exact as another implementation in the same dtype, and the same twice.

    With `beside_rounding` also as exact as a float64 loop whose weights and output are rounded: the peer rounds the
    values of quantized pages too, and so is a loose bound.
    """
    inputs, kv = launch.arrays()
    out, lse = run(kernel, inputs, launch.dtype, kv)
    exact_out, exact_lse = oracle(inputs)
    bounds = [run(peer, inputs, launch.dtype, kv)[0], *([oracle(inputs, launch.dtype)[0]] if beside_rounding else [])]
    for bound in bounds:
        assert rms(out, exact_out) <= 1.1 * rms(bound, exact_out)
    if launch.case.soft_cap is None:
        assert_close([out], [exact_out], two_roundings(inputs, launch.dtype))
    assert_close([lse], [exact_lse], lse_atol)
    np.testing.assert_array_equal(out[inputs.cu_q[-1] :], 0)
    assert_the_same((out, lse), run(kernel, inputs, launch.dtype, kv))


def rms(x, exact) -> float:
    return float(np.sqrt(np.mean((np.asarray(x, np.float64) - exact) ** 2)))


def assert_the_same(found, expected) -> None:
    """Bit for bit."""
    for x, y in zip(found, expected, strict=True):
        np.testing.assert_array_equal(x, y)


class Shapes:
    """What `Inputs` gives, but zeros: in a trace they are shapes alone."""

    def __init__(self, case: Case):
        self.case = case

    def arguments(self, dtype) -> tuple[jax.Array, ...]:
        case, sequences = self.case, len(self.case.lengths)
        q_shape = case.tokens, case.kv_heads * case.g, case.head_size
        indices = ((sequences, case.columns), (sequences + 1,), (sequences,))
        pages = jnp.zeros(case.pool_shape, dtype)
        return jnp.zeros(q_shape, dtype), pages, pages, *(jnp.zeros(shape, jnp.int32) for shape in indices)

    def quantized(self, kv_dtype: str) -> PagedKV:
        P, S, K, H = self.case.pool_shape
        pages, scales = jnp.zeros((P, S, K, H), kv_dtype), jnp.zeros((P, K, S), jnp.float32)
        return PagedKV(pages, pages, scales, scales)

    @property
    def tree_mask(self) -> jax.Array | None:
        queries = self.case.queries[0]
        shape = len(self.case.queries), queries, -(-queries // 32)
        return jnp.zeros(shape, jnp.uint32) if self.case.tree else None

    @property
    def options(self) -> dict:
        heads = self.case.kv_heads * self.case.g
        return self.case.options | {"sinks_N": jnp.zeros(heads, jnp.float32) if self.case.sinks else None}
