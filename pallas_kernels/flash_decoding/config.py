"""How the decode kernel is laid out on the GPU: its sizes, and the inputs that it takes."""

from dataclasses import dataclass

TILE_KEYS = 64  # keys of a tile
ROWS = 64  # query rows of a CTA: the least that a warpgroup's matrix product takes
HEAD_SIZES = (64, 96, 128, 256)
DTYPES = ("bfloat16", "float16")
QUANTIZED_DTYPES = ("int8", "float8_e4m3fn")


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


def unsupported(dtype: str, kv_dtype: str, head_size: int, page_size: int) -> str | None:
    """Why the kernel cannot take an input that the public op allows; None if it can."""
    if dtype not in DTYPES:
        return f"q.dtype is {dtype}; allowed: {', '.join(DTYPES)}"
    if kv_dtype not in (dtype, *QUANTIZED_DTYPES):
        return f"k_pages.dtype is {kv_dtype}; allowed: {', '.join((dtype, *QUANTIZED_DTYPES))}"
    if head_size not in HEAD_SIZES:
        return f"the head size is {head_size}; allowed: {', '.join(map(str, HEAD_SIZES))}"
    if page_size % TILE_KEYS and (TILE_KEYS % page_size or page_size % 8):
        return f"pages hold {page_size} tokens; allowed: 8, 16, 32 and multiples of {TILE_KEYS}"
    return None
