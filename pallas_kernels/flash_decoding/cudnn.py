"""`flash_decoding` by cuDNN, for GPUs that the kernel is not written for."""

from functools import partial

import jax

from pallas_kernels import cudnn
from pallas_kernels.blockwise import Options
from pallas_kernels.dispatch import Refusal
from pallas_kernels.flash_decoding import xla

KEYS_FOR_XLA = 8192  # of one sequence, up to which it was faster on one of two cards

flash_decoding = partial(xla.flash_decoding, attend=cudnn.attend)


def unsupported(q_BQNH: jax.Array, options: Options, tree: bool) -> Refusal | str | None:
    """Why cuDNN cannot take an input that the public op allows; None if it can."""
    if tree:
        return Refusal("tree_mask", "an array", "None, the causal mask")
    queries = q_BQNH.shape[1]
    if options.window is not None and queries > 1:  # its rows before the first query would be most of the work
        return Refusal("window", f"{options.window} with {queries} queries in a slot", "None, or one query")
    return cudnn.unsupported(q_BQNH, options)


def slower(q_BQNH: jax.Array, keys: int) -> str | None:
    """Why XLA is the better choice, although cuDNN could run; None if it is not. A slot has up to `keys` in sight.

    Of one sequence, with the heads of Llama-3-8B and the keys in one piece, XLA and cuDNN took, in us:

        keys      H200        H100
        1024                  27 and 28
        8192      42 and 65   40 and 19
        32768                 276 and 52
        131072    167 and 147 964 and 186

    Sixteen of 8192 keys took 459 and 135 us on the H200.
    """
    if len(q_BQNH) == 1 and keys <= KEYS_FOR_XLA:
        return f"XLA is preferred for one sequence of up to {KEYS_FOR_XLA} keys"
    return None
