"""State of slots that is made by hand."""

import jax


def placed(state):
    """Sharded as a program gives it back, so that one compilation serves the first step and all later ones."""
    return jax.tree.map(lambda array: jax.device_put(array, jax.P(*[None] * array.ndim)), state)
