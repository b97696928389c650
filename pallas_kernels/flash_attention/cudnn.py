"""`flash_attention` by cuDNN, for GPUs that the kernel is not written for: one tile of a sequence at a time.

cuDNN wants queries in a rectangle. A tile of few sequences, each padded to the longest, would take many times the
memory of the queries; a loop over tiles takes that of one, and the work that cuDNN skips is the padding.
"""

from functools import partial

import jax

from pallas_kernels import cudnn
from pallas_kernels.cudnn import unsupported as unsupported
from pallas_kernels.flash_attention import xla

FEWEST_QUERIES = 512  # a guess, not measured: with fewer, a loop of one sequence at a time waits for itself

flash_attention = partial(
    xla.flash_attention, attend=cudnn.attend, tile_queries=4096, tiles_at_once=1, block_keys=16384
)


def slower(q_TNH: jax.Array) -> str | None:
    """Why XLA is the better choice, although cuDNN could run; None if it is not."""
    if len(q_TNH) < FEWEST_QUERIES:
        return f"XLA is preferred below {FEWEST_QUERIES} queries"
    return None
