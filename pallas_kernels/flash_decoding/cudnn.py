"""`flash_decoding` by cuDNN, for GPUs that the kernel is not written for."""

from functools import partial

import jax

from pallas_kernels import cudnn
from pallas_kernels.blockwise import Options
from pallas_kernels.dispatch import Refusal
from pallas_kernels.flash_decoding import xla

flash_decoding = partial(xla.flash_decoding, attend=cudnn.attend)


def unsupported(q_BQNH: jax.Array, options: Options, tree: bool) -> Refusal | str | None:
    """Why cuDNN cannot take an input that the public op allows; None if it can."""
    if tree:
        return Refusal("tree_mask", "an array", "None, the causal mask")
    queries = q_BQNH.shape[1]
    if options.window is not None and queries > 1:  # its rows before the first query would be most of the work
        return Refusal("window", f"{options.window} with {queries} queries in a slot", "None, or one query")
    return cudnn.unsupported(q_BQNH, options)


def slower(q_BQNH: jax.Array) -> str | None:
    """Why XLA is the better choice, although cuDNN could run; None if it is not.

    One sequence of 8192 keys took 42 us in XLA and 65 us in cuDNN, 16 of them 459 and 135 us (one H200, Llama-3-8B
    heads, keys in one piece).
    """
    return "XLA was faster on one sequence" if len(q_BQNH) == 1 else None
