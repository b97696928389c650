"""What speculation is predicted to bring: tokens of a step, and how many times as fast decoding is.

A step that verifies k proposed tokens computes k + 1 rows of each sequence. It reads weights and cache once, as a
plain step does, and takes about as long while the memory bounds it; what it brings depends on how many proposed
tokens are right (Leviathan et al. 2022, "Fast Inference from Transformers via Speculative Decoding", arXiv 2211.17192,
sections 3.1 and 3.5).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from jaxinfer.roofline.attention import Attention
from jaxinfer.roofline.hardware import Hardware
from jaxinfer.roofline.precision import BF16, Precision
from jaxinfer.roofline.step import decode_step

if TYPE_CHECKING:
    from jaxinfer.model.config import ModelConfig


def independent(acceptance: float, drafts: int) -> list[float]:
    """How often the first of `drafts` proposed tokens is right, the first two, and so on, where each is with the
    probability `acceptance`, whatever the others are.

    Raises:
        ValueError: it is no probability, or the number is below 0.
    """
    if not 0 <= acceptance <= 1:
        raise ValueError(f"acceptance is {acceptance}; it must be in 0..1")
    if drafts < 0:
        raise ValueError(f"drafts is {drafts}; it must be at least 0")
    return [acceptance**place for place in range(1, drafts + 1)]


def tokens_per_step(accepted: Sequence[float]) -> float:
    """Tokens that a step brings to a sequence: the proposed ones that are right, and the model's own after them. Of
    `independent` ones these are (1 - a^(k+1)) / (1 - a), or k + 1 where a is 1.

    Args:
        accepted: how often the first proposed token is right, the first two, and so on.

    Raises:
        ValueError: one is no probability, or more than the one before.
    """
    if any(not 0 <= after <= before <= 1 for before, after in zip([1.0, *accepted], accepted, strict=False)):
        raise ValueError(f"accepted is {list(accepted)}; it must fall from at most 1 to at least 0")
    return 1 + sum(accepted)


@dataclass(frozen=True)
class Verification:
    """Predicted seconds of a plain decode step, and of one that proposes tokens and verifies them."""

    plain: float
    verifying: float

    @property
    def cost(self) -> float:
        """Plain steps that take as long as one that verifies. It must bring more tokens than that to pay."""
        return self.verifying / self.plain

    def speedup(self, tokens: float) -> float:
        """How many times as fast as plain decoding it is to get so many tokens of a step."""
        return tokens / self.cost


def verification(
    config: ModelConfig, hardware: Hardware, batch: int, context: int, drafts: int, precision: Precision = BF16,
    tensor_parallel: int = 1, attention: Attention = "flash", proposing: float = 0.0,
) -> Verification:  # fmt: skip
    """Of `batch` sequences, each `context` tokens long with the plain step's own.

    Args:
        drafts: k, proposed for each sequence.
        proposing: seconds that the method takes for the proposals of a step.

    Raises:
        ValueError: as `decode_step`.
    """
    plain, verifying = (
        decode_step(config, batch, context + queries - 1, precision, tensor_parallel, queries, attention)
        for queries in (1, drafts + 1)
    )
    return Verification(plain.predict(hardware), verifying.predict(hardware) + proposing)
