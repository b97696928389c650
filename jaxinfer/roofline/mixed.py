"""Predicted times of programs that decode some sequences and prefill chunks of others, soon enough to be asked for
before every program.

All but attention depends on two numbers, tokens and rows of logits, of which an engine has few values: each pair is
computed once. Attention adds up over the sequences.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

from jaxinfer.roofline.attention import Attended, Attention, AttentionModel
from jaxinfer.roofline.hardware import Hardware
from jaxinfer.roofline.precision import BF16, Precision
from jaxinfer.roofline.step import decode_step, prefill

if TYPE_CHECKING:
    from jaxinfer.model.config import ModelConfig


class StepTimes:
    """Seconds that steps of one model are predicted to take on one machine.

    The sum of a program's parts is what `decode_step` and `prefill` predict where it is one of the two. The sampler
    and the host have no part in it.
    """

    def __init__(
        self, config: ModelConfig, hardware: Hardware, precision: Precision = BF16, tensor_parallel: int = 1,
        decode_attention: Attention = "flash", prefill_attention: Attention = "flash",
    ):  # fmt: skip
        """
        Raises:
            ValueError: the device has no matmul of a dtype that the model needs, or the model does not spread over
                the devices.
        """
        self._hardware = hardware
        self._decode = AttentionModel(config, precision, tensor_parallel, decode_attention)
        self._prefill = AttentionModel(config, precision, tensor_parallel, prefill_attention)

        @cache
        def head(rows: int) -> float:
            step = decode_step(config, rows, context=1, precision=precision, tensor_parallel=tensor_parallel)
            return step.parts["head"].expected(hardware)

        @cache
        def rest(tokens: int, rows: int) -> float:
            step = prefill(config, tokens, precision=precision, tensor_parallel=tensor_parallel)
            parts = (part for name, part in step.parts.items() if name not in ("attention", "head"))
            return sum(part.expected(hardware) for part in parts) + head(rows)

        self._head, self._rest = head, rest
        self.rest(1, 1)  # tells now what is wrong
        self.decoding([1])

    def rest(self, tokens: int, rows: int) -> float:
        """Of all but attention, for a program of so many tokens and rows of logits, padding included."""
        return self._rest(tokens, rows)

    def head(self, rows: int) -> float:
        """Of the logits of so many rows."""
        return self._head(rows)

    def decoding(self, contexts: list[int], queries: int = 1) -> float:
        """Of the attention of sequences that decode, each so many tokens long with the step's own `queries`."""
        if not contexts:
            return 0.0
        return self._decode.work(self._decode.decoding(contexts, queries=queries)).expected(self._hardware)

    def kernels(self, count: int) -> float:
        """Of so many kernels that do next to nothing."""
        return count * self._hardware.overhead

    def chunk(self, tokens: int, cached: int) -> Attended:
        """The attention of the next `tokens` of a prompt; that of several chunks adds up."""
        return self._prefill.sequence(tokens, cached)

    def prefilling(self, chunks: Attended) -> float:
        """Of the attention of all chunks together."""
        return self._prefill.work(chunks).expected(self._hardware)
