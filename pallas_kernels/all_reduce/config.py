"""What the kernel takes, and up to which size it is the faster one."""

from __future__ import annotations

import jax.numpy as jnp

from pallas_kernels.all_reduce.arguments import Arguments
from pallas_kernels.hopper import WARPGROUP

MAX_HIDDEN = 8192  # one warpgroup holds a row in its registers: 64 numbers a thread, of each array
VECTOR_BYTES = 16  # of one access to memory
# The largest message, in bytes from each device to every other, for which one launch that sends all at once is known
# to take less time than XLA's psum in a step of a model. Larger ones take longer in a program of nothing else.
LARGEST_MESSAGE = 2**17


def slower(arguments: Arguments) -> str | None:
    """Why XLA is the better choice, although the kernel could run; None if it is not."""
    if arguments.message_bytes <= LARGEST_MESSAGE:
        return None
    return f"XLA is faster with messages of more than {LARGEST_MESSAGE} bytes"


def most_rows(hidden: int, dtype: jnp.dtype) -> int:
    """Of the largest message that is the kernel's."""
    return LARGEST_MESSAGE // (hidden * jnp.dtype(dtype).itemsize)


def vector_size(hidden: int, dtype: jnp.dtype) -> int:
    """How many numbers a thread reads or writes at once: as many as 16 bytes hold, if they divide a row evenly."""
    size = VECTOR_BYTES // jnp.dtype(dtype).itemsize
    while hidden % (WARPGROUP * size):
        size //= 2
    return size
