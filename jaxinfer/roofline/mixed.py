"""Predicted times of programs that decode some sequences and prefill chunks of others, soon enough to be asked for
before every program.

All but attention depends on two numbers, tokens and rows of logits, of which an engine has few values: what either
takes is computed once. Attention adds up over the sequences.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

from jaxinfer.roofline.attention import Attended, Attention, AttentionModel
from jaxinfer.roofline.hardware import Hardware
from jaxinfer.roofline.mesh import ONE, Mesh, check_mesh, stage_of, ways_to_experts
from jaxinfer.roofline.pipeline import STEPS, circulating, draining, share_of
from jaxinfer.roofline.precision import BF16, Precision
from jaxinfer.roofline.step import APART, LOGITS, REST, decode_step, prefill

if TYPE_CHECKING:
    from jaxinfer.model.config import ModelConfig

_BEFORE = tuple(name for name in APART if name not in LOGITS)


class StepTimes:
    """Seconds that steps of one model are predicted to take on one machine, or on each device of a mesh of them.

    They are what `decode_step` and `prefill` predict of a step that is one of the two. The sampler and the host have
    no part in it.
    """

    def __init__(
        self, config: ModelConfig, hardware: Hardware, precision: Precision = BF16, mesh: Mesh = ONE,
        decode_attention: Attention = "flash", prefill_attention: Attention = "flash", circulates: bool = True,
        steps: int = STEPS,
    ):  # fmt: skip
        """
        Args:
            circulates: a pipe does not drain between decode steps of a single token.
            steps: of a program of decode steps, after which it does.

        Raises:
            ValueError: the device has no matmul of a dtype that the model needs, or the model does not spread over
                the mesh.
        """
        check_mesh(config, mesh)
        self._hardware, self._mesh, self._circulates, self._steps = hardware, mesh, circulates, steps
        stage = stage_of(config, mesh.pipe)
        shares = [share_of(config, mesh, experts) for experts in ways_to_experts(config, mesh)]
        self._decode = AttentionModel(stage, precision, mesh.tensor, decode_attention)
        self._prefill = AttentionModel(stage, precision, mesh.tensor, prefill_attention)

        @cache
        def parts(tokens: int, decodes: bool) -> tuple[float, float, float]:
            """Seconds of the layers, of what is outside of them but for logits, and to merge what decodes."""
            costs = [
                decode_step(stage, tokens, 1, precision, mesh.tensor, share=way)
                if decodes
                else prefill(stage, tokens, precision=precision, tensor_parallel=mesh.tensor, share=way)
                for way in shares
            ]
            layers = min(cost.without("attention", "merge", *REST, *APART).predict(hardware) for cost in costs)
            return layers, costs[0].only(*_BEFORE).predict(hardware), costs[0].only("merge").predict(hardware)

        @cache
        def head(rows: int) -> float:
            return decode_step(stage, rows, 1, precision, mesh.tensor, share=shares[0]).only(*LOGITS).predict(hardware)

        @cache
        def rest(rows: int) -> float:
            cost = prefill(stage, 1, rows, precision=precision, tensor_parallel=mesh.tensor, share=shares[0])
            return cost.only(*REST).predict(hardware)

        self._parts, self._head, self._rest = parts, head, rest
        self.decode(1, self.decoding([1]))  # tells now what is wrong

    def decode(self, slots: int, reading: Attended, queries: int = 1, rows: int | None = None) -> float:
        """Of a step in which so many slots decode, padding included, with so many tokens each.

        Args:
            reading: of `decoding`.
            rows: of logits; by default one for each token.
        """
        tokens, stages, rows = slots * queries, self._mesh.pipe, slots * queries if rows is None else rows
        circulates = self._circulates and queries == 1
        count = circulating(slots, stages) if circulates and stages > 1 else draining(tokens, slots, stages)
        layers, apart, merging = self._parts(tokens // count, True)
        tick = layers + merging + self._decode.work(reading.times(1 / count)).expected(self._hardware)
        if not circulates or stages == 1:
            return (count + stages - 1) * tick + self._parts(tokens, True)[1] + self.head(rows)
        ticks = (self._steps - 1) * max(count, stages) + count + stages - 1
        return ticks / self._steps * (tick + apart + self.head(rows // count))

    def mixed(self, tokens: int, slots: int, reading: Attended, chunks: Attended) -> float:
        """Of a step of so many rows, of prompts and of slots that decode beside them, and of logits for all slots.

        Args:
            reading: of `decoding`.
            chunks: of `chunk`, added up.
        """
        stages, count = self._mesh.pipe, draining(tokens, tokens, self._mesh.pipe)
        tick = self._parts(tokens // count, False)[0] + (self._parts(slots, True)[2] if reading.cache else 0.0)
        tick += self._prefill.work(chunks.times(1 / count)).expected(self._hardware)
        if reading.cache:
            tick += self._decode.work(reading.times(1 / count)).expected(self._hardware)
        ends = self.rest(min(slots, tokens)) + self.head(slots)
        return (count + stages - 1) * tick + self._parts(tokens, False)[1] + ends

    def rest(self, rows: int) -> float:
        """Of so many rows of prompts that leave the last layer's attention for the head. Nothing in a pipe, in which
        all rows leave it alike."""
        return self._rest(rows)

    def head(self, rows: int) -> float:
        """Of the logits of so many rows."""
        return self._head(rows)

    def kernels(self, count: int) -> float:
        """Of so many kernels that do next to nothing."""
        return count * self._hardware.overhead

    def decoding(self, contexts: list[int], queries: int = 1) -> Attended:
        """The attention of sequences that decode, each so many tokens long with the step's own `queries`."""
        if not contexts:
            return Attended()
        return self._decode.decoding(contexts, queries=queries).times(1 / self._mesh.context)

    def chunk(self, tokens: int, cached: int) -> Attended:
        """The attention of the next `tokens` of a prompt; that of several chunks adds up."""
        return self._prefill.on_a_rank(tokens, cached, self._mesh.context)
