"""How the decode kernel is laid out on the GPU: its sizes, the shared memory they need, and the choice among them."""

from dataclasses import dataclass

TILE_KEYS = 64  # keys of a tile
ROWS = 64  # query rows of a CTA: the least that a warpgroup's matrix product takes
SHARED_MEMORY = 227 * 1024  # bytes that one CTA can have on Hopper
SHARED_MEMORY_OF_SM = 228 * 1024  # what the CTAs of a multiprocessor share; each costs 1 KB more than it asks for
REST = 2048  # bytes set aside for barriers, alignment and the rows under way when parts are joined
MULTIPROCESSORS = 132  # of an H100 or H200


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


def fits(config: Config, head_size: int) -> bool:
    """Whether the CTAs of the launch can all run at once, one or more on every multiprocessor."""
    per_multiprocessor = -(-config.ctas // MULTIPROCESSORS)
    room = min(SHARED_MEMORY, SHARED_MEMORY_OF_SM // per_multiprocessor - 1024)
    return shared_memory(config, head_size) <= room


def choose(head_size: int) -> Config:
    """One CTA on every multiprocessor, with the queries of the next unit and as many stages as fit."""
    wanted = (Config(MULTIPROCESSORS, stages, buffers) for buffers in (2, 1) for stages in (6, 4, 2))
    return next(config for config in wanted if fits(config, head_size))
