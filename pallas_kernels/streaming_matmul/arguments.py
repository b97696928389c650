"""What `streaming_matmul` is asked: its arrays and static options as one pytree, and their checks."""

import math
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp

from pallas_kernels.checks import COMPUTE_DTYPES, require

# The product that each order of the weight's axes stands for; c holds a gate and its up projection.
PRODUCTS = {"DN": "MD,DN->MN", "ND": "MD,ND->MN", "DcN": "MD,DcN->McN"}


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Arguments:
    x_MD: jax.Array
    w: jax.Array
    norm_scale_D: jax.Array | None
    bias: jax.Array | None
    residual_MN: jax.Array | None
    w_axes: str = field(metadata={"static": True})
    norm_eps: float = field(metadata={"static": True})
    out_dtype: jnp.dtype = field(metadata={"static": True})

    @property
    def gated(self) -> bool:
        return "c" in self.w_axes

    @property
    def outputs(self) -> int:
        """N, the columns of the result."""
        return self.w.shape[self.w_axes.index("N")]


def check(arguments: Arguments) -> None:
    """Raises ValueError for what no implementation takes."""
    x, w, w_axes, eps = arguments.x_MD, arguments.w, arguments.w_axes, arguments.norm_eps
    require(w_axes in PRODUCTS, "w_axes", repr(w_axes), ", ".join(PRODUCTS))
    for name, array in (("x", x), ("w", w)):
        axes = "MD" if name == "x" else w_axes
        require(array.ndim == len(axes), f"{name}.shape", array.shape, f"the axes {axes}")
        require(min(array.shape) >= 1, f"{name}.shape", array.shape, f"every one of the axes {axes} at least 1")
        _require_dtype(name, array.dtype, COMPUTE_DTYPES)
    require(w.dtype == x.dtype, "w.dtype", w.dtype, f"{x.dtype}, as x")
    hidden = w.shape[w_axes.index("D")]
    require(x.shape[1] == hidden, "x.shape", x.shape, f"D = {hidden}, as w")
    if arguments.gated:
        require(w.shape[1] == 2, "w.shape", w.shape, "c = 2: the gate and the up projection")
    M, N = x.shape[0], arguments.outputs
    expected = {
        "norm_scale": (arguments.norm_scale_D, (hidden,)),
        "bias": (arguments.bias, (2, N) if arguments.gated else (N,)),
        "residual": (arguments.residual_MN, (M, N)),
    }
    for name, (array, shape) in expected.items():
        if array is not None:
            require(array.shape == shape, f"{name}.shape", array.shape, f"{shape}")
            _require_dtype(name, array.dtype, COMPUTE_DTYPES)
    require(0 <= eps < math.inf, "norm_eps", eps, "a finite number, at least 0")
    _require_dtype("out", arguments.out_dtype, COMPUTE_DTYPES)


def _require_dtype(name: str, dtype: jnp.dtype, allowed: tuple[str, ...]) -> None:
    require(jnp.dtype(dtype).name in allowed, f"{name}.dtype", dtype, ", ".join(allowed))
