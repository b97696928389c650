"""The row of products that a layer ends with, as one op: output projection, norm, gated MLP, two residual sums."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import jax

from pallas_kernels.checks import require, require_array
from pallas_kernels.streaming_matmul.arguments import Arguments, check, pad


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class MLPArguments:
    """What `streaming_mlp` is asked; `attended_ME` and `o_ED` both or neither."""

    x_MD: jax.Array
    up_DcF: jax.Array
    down_FD: jax.Array
    norm_scale_D: jax.Array
    attended_ME: jax.Array | None
    o_ED: jax.Array | None
    norm_eps: float = field(metadata={"static": True})

    @property
    def tokens(self) -> int:
        """M."""
        return len(self.x_MD)

    def padded(self, tokens: int) -> MLPArguments:
        """With so many tokens more, all zeros."""
        return replace(self, x_MD=pad(self.x_MD, tokens), attended_ME=pad(self.attended_ME, tokens))


@dataclass(frozen=True)
class Result:
    """Stands for the result of product `index` of a row, before it is computed."""

    index: int
    shape: tuple[int, ...]
    dtype: Any

    @property
    def ndim(self) -> int:
        return len(self.shape)


def compose(multiply: Callable[[Arguments], Any], arguments: MLPArguments) -> Any:
    """The op as products, each computed by `multiply`."""
    x_MD, dtype, eps = arguments.x_MD, arguments.x_MD.dtype, arguments.norm_eps
    if arguments.attended_ME is not None and arguments.o_ED is not None:
        x_MD = multiply(Arguments(arguments.attended_ME, arguments.o_ED, None, None, None, x_MD, "DN", eps, dtype))
    scale_D = arguments.norm_scale_D
    inner_MF = multiply(Arguments(x_MD, arguments.up_DcF, None, scale_D, None, None, "DcN", eps, dtype))
    return multiply(Arguments(inner_MF, arguments.down_FD, None, None, None, x_MD, "DN", eps, dtype))


def products(arguments: MLPArguments) -> list[Arguments]:
    """The products, with `Result` where one takes what another gives."""
    found: list[Arguments] = []

    def note(product: Arguments) -> Result:
        found.append(product)
        return Result(len(found) - 1, (product.x.shape[0], product.outputs), product.out_dtype)

    compose(note, arguments)
    return found


def check_mlp(arguments: MLPArguments) -> None:
    """Raises ValueError for what no implementation takes; errors name the op's own arguments."""
    x, up, down = arguments.x_MD, arguments.up_DcF, arguments.down_FD
    attended, o = arguments.attended_ME, arguments.o_ED
    found = "None" if attended is None else "an array"
    require((attended is None) == (o is None), "attended", found, "an array with o, None without")
    given: dict[str, tuple[Any, str]] = {"x": (x, "MD"), "up": (up, "DcF"), "down": (down, "FD")}
    if attended is not None:
        given |= {"attended": (attended, "ME"), "o": (o, "ED")}
    for name, (array, axes) in given.items():
        require_array(name, array)
        require(array.ndim == len(axes), f"{name}.shape", array.shape, f"the axes {axes}")
        require(min(array.shape) >= 1, f"{name}.shape", array.shape, f"every one of the axes {axes} at least 1")
    require_array("norm_scale", arguments.norm_scale_D)
    expected = {"up": (up, (x.shape[1], 2, up.shape[2])), "down": (down, (up.shape[2], x.shape[1]))}
    if attended is not None and o is not None:
        expected |= {"attended": (attended, (x.shape[0], o.shape[0])), "o": (o, (o.shape[0], x.shape[1]))}
    for name, (array, shape) in expected.items():
        require(array.shape == shape, f"{name}.shape", array.shape, f"{shape}")
        require(array.dtype == x.dtype, f"{name}.dtype", array.dtype, f"{x.dtype}, as x")
    for product in products(arguments):
        check(product)
