"""Random weights without a compilation."""

import jax
import numpy as np

from jaxinfer.model import Model, Params
from jaxinfer.model.model import random_deviation


def random_params(model: Model, seed: int) -> Params:
    """Distributed as those of `Model.random_params`, but drawn on the host: nothing is compiled."""
    rng = np.random.default_rng(seed)

    def draw(name: str, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        deviation = random_deviation(name, leaf.shape)
        value = np.ones(leaf.shape) if deviation is None else deviation * rng.standard_normal(leaf.shape)
        return jax.device_put(value.astype(leaf.dtype), leaf.sharding)

    return [draw(name, leaf) for name, leaf in model.parameters.items()]
