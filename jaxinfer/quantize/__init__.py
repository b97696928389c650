"""The one seam between the model and the way its weights are stored."""

from jaxinfer.quantize.products import contract, einsum, gated_silu, project

__all__ = ["contract", "einsum", "gated_silu", "project"]
