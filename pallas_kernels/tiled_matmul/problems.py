"""Named shapes: the products of a prompt's step of real models, at several numbers of tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.streaming_matmul import problems


@dataclass(frozen=True)
class Problem(problems.Problem):
    residual: bool = False

    @property
    def bytes(self) -> float:
        """Of x, the weight, the result and the residual, in 16 bits."""
        results = self.tokens * self.outputs * (2 if self.residual else 1)
        return 2 * (self.tokens * self.hidden + self.w_elements + results)

    def arguments(self, key: jax.Array, dtype: jnp.dtype) -> dict[str, Any]:
        """Random arguments of `tiled_matmul`; the product has unit variance."""
        key, residual_key = jax.random.split(key)
        x_MD, w = self.inputs(key, dtype)
        residual_MN = jax.random.normal(residual_key, (self.tokens, self.outputs), dtype) if self.residual else None
        return {"x_MD": x_MD, "w": w, "residual_MN": residual_MN}


PROBLEMS = {
    f"llama-3-8b {name} M={tokens}": Problem(tokens, *problems.LLAMA_3_8B[name], residual=name in ("o", "down"))
    for name, every in {
        "up": (128, 192, 256, 512, 1024, 2048, 4096, 8192),
        "down": (128, 192, 256, 512, 1024, 2048, 8192),
        "o": (128, 192, 256, 512, 2048, 8192),
        "qkv": (128, 192, 256, 512, 2048, 8192),
    }.items()
    for tokens in every
}
