"""How the decode kernel is laid out on the GPU: its sizes, the shared memory they need, and the choice among them."""

import itertools
from dataclasses import dataclass, replace
from pathlib import Path

from pallas_kernels import tuned

TILE_KEYS = 64  # keys of a tile
ROWS = 64  # query rows of a CTA: the least that a warpgroup's matrix product takes
SHARED_MEMORY = 227 * 1024  # bytes that one CTA can have on Hopper
REST = 2048  # bytes set aside for barriers, alignment and the rows under way when parts are joined
HEAD_SIZES = (64, 128, 256)
DTYPES = ("bfloat16", "float16")


@dataclass(frozen=True)
class Config:
    """Sizes of one launch.

    Attributes:
        ctas: CTAs of the launch; each takes an equal share of all keys.
        stages: tiles of keys and values under way to a CTA.
        consumers: warpgroups that compute, 1 or 2.
        q_buffers: units whose queries a CTA holds; with two, those of the next unit come early.
        interpretable: only what the interpreter can follow: the softmax's weights go to the second product through
            shared memory instead of registers, and parts are joined by a kernel of their own.
    """

    ctas: int
    stages: int
    q_buffers: int = 2
    consumers: int = 2
    interpretable: bool = False

    def __post_init__(self):
        for name, least in (("ctas", 1), ("stages", 2), ("q_buffers", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; allowed: at least {least}")
        if self.consumers not in (1, 2):
            raise ValueError(f"consumers is {self.consumers}; allowed: 1 or 2")
        # A warpgroup counts the phases of the barriers that it waits for: a buffer must always be the same one's.
        if self.stages % self.consumers:
            raise ValueError(f"stages is {self.stages}; allowed: multiples of the {self.consumers} consumers")


def shared_memory(config: Config, head_size: int) -> int:
    """Bytes of shared memory of one CTA, for 16-bit keys and values."""
    tiles = config.stages * 2 * TILE_KEYS * head_size * 2
    queries = config.q_buffers * ROWS * head_size * 2
    results = ROWS * head_size * 4 + 2 * ROWS * 4
    weights = config.consumers * ROWS * TILE_KEYS * 2 if config.interpretable else 0
    return tiles + queries + results + weights + REST


TUNED = Path(__file__).with_name("tuned.json")


def tuning_key(head_size: int, bits: int = 16) -> str:
    return f"H={head_size} of {bits} bits"


def candidates(head_size: int, multiprocessors: int) -> list[Config]:
    """What a search should time: all that fit."""
    sizes = itertools.product((2, 4, 6, 8), (1, 2), (1, 2))
    found = (Config(multiprocessors, stages, buffers, consumers) for stages, buffers, consumers in sizes)
    return [config for config in found if shared_memory(config, head_size) <= SHARED_MEMORY]


def choose(head_size: int, multiprocessors: int) -> Config:
    """One CTA on every multiprocessor; the fastest sizes where some were measured, else as many stages as fit.

    There may be no more CTAs than can run at once: some wait for others.
    """
    found = tuned.find(TUNED, tuning_key(head_size))
    if isinstance(found, dict):
        return replace(Config(**found), ctas=multiprocessors)
    wanted = (Config(multiprocessors, stages, buffers) for buffers in (2, 1) for stages in (6, 4, 2))
    return next(config for config in wanted if shared_memory(config, head_size) <= SHARED_MEMORY)


def unsupported(dtype: str, kv_dtype: str, head_size: int, page_size: int) -> str | None:
    """Why the kernel cannot take an input that the public op allows; None if it can."""
    if dtype not in DTYPES:
        return f"q.dtype is {dtype}; allowed: {', '.join(DTYPES)}"
    if kv_dtype != dtype:
        return f"k_pages.dtype is {kv_dtype}; allowed: {dtype}, as q"
    if head_size not in HEAD_SIZES:
        return f"the head size is {head_size}; allowed: {', '.join(map(str, HEAD_SIZES))}"
    if page_size % TILE_KEYS and (TILE_KEYS % page_size or page_size % 8):
        return f"pages hold {page_size} tokens; allowed: 8, 16, 32 and multiples of {TILE_KEYS}"
    return None
