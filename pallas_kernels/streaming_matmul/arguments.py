"""What `streaming_matmul` is asked: its arrays and static options as one pytree, and their checks."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from pallas_kernels.checks import COMPUTE_DTYPES, require, require_array, require_number

# Orders of the weight's axes: c holds a gate and its up projection, E one weight for each expert.
W_AXES = ("DN", "ND", "DcN", "EDN", "END", "EDcN")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Arguments:
    """`x` is x_MD, or x_AMD if the weight is of experts: A groups of tokens, and the expert of each."""

    x: jax.Array
    w: jax.Array
    expert_A: jax.Array | None
    norm_scale_D: jax.Array | None
    bias: jax.Array | None
    residual_MN: jax.Array | None
    w_axes: str = field(metadata={"static": True})
    norm_eps: float = field(metadata={"static": True})
    out_dtype: jnp.dtype = field(metadata={"static": True})

    @property
    def tokens(self) -> int:
        """M; of one group, if there are groups."""
        return self.x.shape[-2]

    @property
    def gated(self) -> bool:
        return "c" in self.w_axes

    @property
    def of_experts(self) -> bool:
        return "E" in self.w_axes

    @property
    def hidden(self) -> int:
        """D."""
        return self.w.shape[self.w_axes.index("D")]

    @property
    def outputs(self) -> int:
        """N, the columns of the result."""
        return self.w.shape[self.w_axes.index("N")]

    @property
    def product(self) -> str:
        """The einsum of x and the weights: for experts, of each group's expert."""
        group, w_axes = ("A" if self.of_experts else ""), self.w_axes.replace("E", "A")
        return f"{group}MD,{w_axes}->{group}M{'c' if self.gated else ''}N"

    def padded(self, tokens: int) -> Arguments:
        """With so many tokens more, all zeros."""
        return replace(self, x=pad(self.x, tokens), residual_MN=pad(self.residual_MN, tokens))


def pad[Given: (jax.Array, jax.Array | None)](given: Given, tokens: int) -> Given:
    """With so many rows of zeros at the end of the second to last axis, if it is an array."""
    return jax.tree.map(lambda x: jnp.pad(x, (*((0, 0),) * (x.ndim - 2), (0, tokens), (0, 0))), given)


def result_dtype(x: jax.Array, out_dtype: Any) -> jnp.dtype:
    """`out_dtype`, or that of x if it is None. Raises ValueError for what is none."""
    require_array("x", x)
    if out_dtype is None:
        return jnp.dtype(x.dtype)
    try:
        return jnp.dtype(out_dtype)
    except TypeError:
        raise ValueError(f"out_dtype is {out_dtype!r}; allowed: {', '.join(COMPUTE_DTYPES)}") from None


def check(arguments: Arguments) -> None:
    """Raises ValueError for what no implementation takes."""
    x, w, w_axes, eps = arguments.x, arguments.w, arguments.w_axes, arguments.norm_eps
    require(w_axes in W_AXES, "w_axes", repr(w_axes), ", ".join(W_AXES))
    for name, array, axes in (("x", x, "AMD" if arguments.of_experts else "MD"), ("w", w, w_axes)):
        require_array(name, array)
        require(array.ndim == len(axes), f"{name}.shape", array.shape, f"the axes {axes}")
        require(min(array.shape) >= 1, f"{name}.shape", array.shape, f"every one of the axes {axes} at least 1")
        _require_dtype(name, array.dtype, COMPUTE_DTYPES)
    require(w.dtype == x.dtype, "w.dtype", w.dtype, f"{x.dtype}, as x")
    require(x.shape[-1] == arguments.hidden, "x.shape", x.shape, f"D = {arguments.hidden}, as w")
    if arguments.gated:
        require(w.shape[-2] == 2, "w.shape", w.shape, "c = 2: the gate and the up projection")
    _check_experts(arguments)
    _check_extras(arguments)
    require_number("norm_eps", eps, lambda eps: 0 <= eps < math.inf, "a finite number, at least 0")
    require(arguments.out_dtype.name in COMPUTE_DTYPES, "out_dtype", arguments.out_dtype, ", ".join(COMPUTE_DTYPES))


def _check_experts(arguments: Arguments) -> None:
    expert_A, x, w_axes = arguments.expert_A, arguments.x, arguments.w_axes
    found = "None" if expert_A is None else "an array"
    need = f"{'an array' if arguments.of_experts else 'None'} for a weight {w_axes}"
    require((expert_A is not None) == arguments.of_experts, "expert", found, need)
    if expert_A is None:
        return
    require_array("expert", expert_A)
    require(expert_A.shape == x.shape[:1], "expert.shape", expert_A.shape, f"{x.shape[:1]}, one for each group of x")
    _require_dtype("expert", expert_A.dtype, ("int32",))
    if not isinstance(expert_A, jax.core.Tracer | jax.ShapeDtypeStruct):
        experts, values = arguments.w.shape[0], np.asarray(expert_A)
        outside = values[(values < 0) | (values >= experts)]
        require(outside.size == 0, "expert", f"an array with {outside[:3]}", f"0 to {experts - 1}, the experts of w")


def _check_extras(arguments: Arguments) -> None:
    M, N = arguments.tokens, arguments.outputs
    experts = arguments.w.shape[:1] if arguments.of_experts else ()
    expected = {
        "norm_scale": (arguments.norm_scale_D, (arguments.hidden,)),
        "bias": (arguments.bias, (*experts, 2, N) if arguments.gated else (*experts, N)),
        "residual": (arguments.residual_MN, (M, N)),
    }
    for name, (array, shape) in expected.items():
        if array is not None:
            require_array(name, array)
            require(array.shape == shape, f"{name}.shape", array.shape, f"{shape}")
            _require_dtype(name, array.dtype, COMPUTE_DTYPES)
    if arguments.of_experts:
        require(arguments.residual_MN is None, "residual", "an array", "None for a weight of experts")


def _require_dtype(name: str, dtype: jnp.dtype, allowed: tuple[str, ...]) -> None:
    require(jnp.dtype(dtype).name in allowed, f"{name}.dtype", dtype, ", ".join(allowed))
