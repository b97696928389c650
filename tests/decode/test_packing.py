"""What is packed on the host is the same on the device, to the bit."""

import jax
import numpy as np

from jaxinfer.decode.packing import packed, unpacked


def test_every_bit_comes_back():
    tree = {
        "scalar": np.asarray(-7, np.int32),
        "floats": np.array([[1.5, -0.0, np.inf], [1e-45, 3.4e38, -2.0]], np.float32),
        "none": np.zeros(0, np.int32),
        "pair": (np.array([2**32 - 1, 5], np.uint32), np.arange(4, dtype=np.int32)),
    }
    bits_U, form = packed(tree)
    assert (bits_U.dtype, bits_U.shape) == (np.uint32, (1 + 6 + 2 + 4,))
    found = jax.jit(unpacked, static_argnums=1)(bits_U, form)
    assert jax.tree.structure(found) == jax.tree.structure(tree)
    for got, sent in zip(jax.tree.leaves(found), jax.tree.leaves(tree), strict=True):
        assert (got.dtype, got.shape) == (sent.dtype, sent.shape)
        assert np.asarray(got).tobytes() == sent.tobytes()
