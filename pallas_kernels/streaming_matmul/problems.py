"""Named shapes: the products of a decode step of real models, at several numbers of tokens."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp


@dataclass(frozen=True)
class _Products:
    """Tokens times weights of `w_elements` numbers, each used once for every token."""

    tokens: int

    @property
    def w_elements(self) -> int:
        raise NotImplementedError

    @property
    def flops(self) -> float:
        """Of the products; of what follows them there is little."""
        return 2 * self.tokens * self.w_elements

    @property
    def bytes(self) -> float:
        """Of the weights, in 16 bits, read once."""
        return 2 * self.w_elements


@dataclass(frozen=True)
class Problem(_Products):
    hidden: int
    outputs: int
    w_axes: str = "DN"

    @property
    def w_shape(self) -> tuple[int, ...]:
        sizes = {"D": self.hidden, "c": 2, "N": self.outputs}
        return tuple(sizes[axis] for axis in self.w_axes)

    @property
    def w_elements(self) -> int:
        return self.hidden * self.outputs * (2 if "c" in self.w_axes else 1)

    def inputs(self, key: jax.Array, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
        """Random x_MD and w; the product has unit variance."""
        x_key, w_key = jax.random.split(key)
        w = jax.random.normal(w_key, self.w_shape, dtype) * jnp.asarray(self.hidden**-0.5, dtype)
        return jax.random.normal(x_key, (self.tokens, self.hidden), dtype), w


# D, N and the order of the weight's axes, as the model stores them.
LLAMA_3_8B = {
    "qkv": (4096, 6144, "DN"),
    "o": (4096, 4096, "DN"),
    "up": (4096, 14336, "DcN"),
    "down": (14336, 4096, "DN"),
    "head": (4096, 128256, "ND"),
}

PROBLEMS = {
    f"llama-3-8b {name} M={tokens}": Problem(tokens, D, N, w_axes)
    for name, (D, N, w_axes) in LLAMA_3_8B.items()
    for tokens in (1, 2, 4, 8, 16, 32, 64)
}


@dataclass(frozen=True)
class Row(_Products):
    """What a layer multiplies after attention: E heads' outputs, and the F of a gated MLP."""

    hidden: int
    inner: int
    heads: int

    @property
    def w_elements(self) -> int:
        return self.hidden * (self.heads + 3 * self.inner)

    def inputs(self, key: jax.Array, dtype: jnp.dtype) -> dict[str, jax.Array]:
        """Random arguments of `streaming_mlp`; each product has about unit variance."""
        M, D, F, E = self.tokens, self.hidden, self.inner, self.heads
        shapes = {
            "x_MD": (M, D),
            "up_DcF": (D, 2, F),
            "down_FD": (F, D),
            "norm_scale_D": (D,),
            "attended_ME": (M, E),
            "o_ED": (E, D),
        }
        depth = {"up_DcF": D, "down_FD": F, "o_ED": E}
        keys = dict(zip(shapes, jax.random.split(key, len(shapes)), strict=True))
        return {
            name: jax.random.normal(keys[name], shape, dtype) * jnp.asarray(depth.get(name, 1) ** -0.5, dtype)
            for name, shape in shapes.items()
        }


ROWS = {
    f"{model} M={tokens}": Row(tokens, D, F, E)
    for model, (D, F, E) in {"llama-3-8b": (4096, 14336, 4096), "llama-3-70b": (8192, 28672, 8192)}.items()
    for tokens in (1, 8, 16, 32)
}
