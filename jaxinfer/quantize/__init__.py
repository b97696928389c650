"""The one seam between the model and the way its weights are stored."""

from jaxinfer.quantize.products import (
    contract,
    einsum,
    gated_silu,
    mlp_ring,
    output_and_gated_mlp,
    project,
    reduce_einsum,
)

__all__ = ["contract", "einsum", "gated_silu", "mlp_ring", "output_and_gated_mlp", "project", "reduce_einsum"]
