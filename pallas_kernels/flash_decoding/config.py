"""How the decode kernel is laid out on the GPU: its sizes, and the inputs that it takes."""

from dataclasses import dataclass

import jax

from pallas_kernels.blockwise import PagedKV
from pallas_kernels.dispatch import Refusal
from pallas_kernels.hopper import DTYPES, HEAD_SIZES, QUANTIZED_DTYPES

TILE_KEYS = 64  # keys of a tile
ROWS = 64  # query rows of a CTA: the least that a warpgroup's matrix product takes


@dataclass(frozen=True)
class Config:
    """Sizes of one launch.

    Attributes:
        ctas: CTAs of the launch.
        stages: tiles of keys and values under way in a pipeline.
        q_buffers: units whose queries a pipeline holds; with two, those of the next unit come early.
        pipelines: of a CTA, 1 or 2: a warpgroup that loads and one that computes, with memory of their own. Each takes
            an equal share of all keys.
        interpretable: only what the interpreter can follow: the softmax's weights go to the second product through
            shared memory instead of registers, and parts are joined by a kernel of their own.
    """

    ctas: int
    stages: int
    q_buffers: int = 2
    pipelines: int = 2
    interpretable: bool = False

    def __post_init__(self):
        for name, least in (("ctas", 1), ("stages", 2), ("q_buffers", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; allowed: at least {least}")
        if self.pipelines not in (1, 2):
            raise ValueError(f"pipelines is {self.pipelines}; allowed: 1 or 2")

    @property
    def stretches(self) -> int:
        """Shares of all keys."""
        return self.ctas * self.pipelines


def unsupported(q_BQNH: jax.Array, kv: PagedKV) -> Refusal | None:
    """Why the kernel cannot take an input that the public op allows; None if it can."""
    dtype, kv_dtype, page_size = q_BQNH.dtype.name, kv.k_PSKH.dtype.name, kv.page_size
    if dtype not in DTYPES:
        return Refusal("q.dtype", dtype, ", ".join(DTYPES))
    if kv_dtype not in (dtype, *QUANTIZED_DTYPES):
        return Refusal("k_pages.dtype", kv_dtype, ", ".join((dtype, *QUANTIZED_DTYPES)))
    if q_BQNH.shape[-1] not in HEAD_SIZES:
        return Refusal("q.shape", q_BQNH.shape, f"head sizes {', '.join(map(str, HEAD_SIZES))}")
    if page_size % TILE_KEYS and (TILE_KEYS % page_size or page_size % 8):
        return Refusal("k_pages.shape", kv.k_PSKH.shape, f"slots of a page: 8, 16, 32 and multiples of {TILE_KEYS}")
    return None
