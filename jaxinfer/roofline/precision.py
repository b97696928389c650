"""The number formats of a deployment and what they cost in bytes."""

from __future__ import annotations

from dataclasses import dataclass

BITS = {"fp32": 32, "bf16": 16, "fp16": 16, "fp8": 8, "int8": 8, "int4": 4}
ARRAY_DTYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
CACHE_DTYPES = ARRAY_DTYPES | {"int8": "int8", "float8_e4m3fn": "fp8"}  # by the names that an engine takes
INT4_GROUP = 128  # int4 weights that share one 16-bit scale
CACHE_SCALE_BYTES = 4  # one float32 scale per key or value vector when the cache is narrower than 16 bits


@dataclass(frozen=True)
class Precision:
    """What weights, cache and matmul operands are stored in: names of `BITS`.

    Quantization applies to the matmuls of the layers. Embedding, head, router and norms stay in 16 bits or more, and
    so do the residual stream and the products of attention.

    Raises:
        ValueError: a name is unknown.
    """

    weights: str = "bf16"
    cache: str = "bf16"
    activations: str = "bf16"  # operands of the layers' matmuls: they set the rate at which these run

    def __post_init__(self):
        for name in ("weights", "cache", "activations"):
            value = getattr(self, name)
            if value not in BITS:
                raise ValueError(f"{name} is {value!r}; expected one of {', '.join(BITS)}")

    @classmethod
    def all_in(cls, dtype: str, cache_dtype: str | None = None) -> Precision:
        """A deployment without quantized weights, by the dtypes of its arrays, such as a config's "bfloat16".

        Args:
            cache_dtype: of keys and values, as an engine takes it; None is `dtype`.

        Raises:
            ValueError: it is no dtype of a model's arrays, or of a cache's.
        """
        if dtype not in ARRAY_DTYPES:
            raise ValueError(f"dtype is {dtype!r}; expected one of {', '.join(ARRAY_DTYPES)}")
        if cache_dtype not in (None, *CACHE_DTYPES):
            raise ValueError(f"cache_dtype is {cache_dtype!r}; expected one of {', '.join(CACHE_DTYPES)}")
        name = ARRAY_DTYPES[dtype]
        return cls(weights=name, cache=CACHE_DTYPES[cache_dtype or dtype], activations=name)

    @property
    def residual(self) -> str:
        """Dtype of the residual stream and of attention's products: the first that quantization leaves alone."""
        wide = (name for name in (self.activations, self.weights, self.cache) if BITS[name] >= 16)
        return next(wide, "bf16")

    @property
    def unquantized(self) -> str:
        """Dtype of the weights that quantization leaves alone."""
        return self.weights if BITS[self.weights] >= 16 else self.residual

    @property
    def weight_bytes(self) -> float:
        """Bytes of one matmul weight, its share of a group's scale included.

        int8 and fp8 have one scale per output channel, below a thousandth of the weight, which is left out.
        """
        scale_bits = 16 / INT4_GROUP if self.weights == "int4" else 0
        return (BITS[self.weights] + scale_bits) / 8

    @property
    def unquantized_bytes(self) -> int:
        return BITS[self.unquantized] // 8

    @property
    def residual_bytes(self) -> int:
        return BITS[self.residual] // 8

    def cache_vector_bytes(self, head_size: int) -> int:
        """Bytes of one cached key, or one cached value, of one head: `head_size` numbers and their scale."""
        scale = CACHE_SCALE_BYTES if BITS[self.cache] < 16 else 0
        return head_size * BITS[self.cache] // 8 + scale


BF16 = Precision()
