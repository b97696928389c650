"""The least time of a whole workload: requests that are all there at once.

All prompts are prefilled together, then every decode step takes all sequences that still go on, each with the context
that it has by then. So the weights are read once for all prompts and once a step, whatever slots or memory an engine
has. It is no strict bound: a program that prefills beside sequences that decode reads the weights once for both.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING

from jaxinfer.roofline.attention import Attended, AttentionModel
from jaxinfer.roofline.hardware import Hardware
from jaxinfer.roofline.precision import BF16, Precision
from jaxinfer.roofline.step import LOGITS, REST, prefill

if TYPE_CHECKING:
    from jaxinfer.model.config import ModelConfig


def workload_limit(
    config: ModelConfig, hardware: Hardware, sizes: Sequence[tuple[int, int]], shared: int = 0,
    precision: Precision = BF16, tensor_parallel: int = 1,
) -> float:  # fmt: skip
    """Seconds at the least until every request has its tokens.

    Args:
        sizes: tokens in and out of each request. The first one out comes of the prefill, each other of a decode step.
        shared: tokens that all prompts begin with, which are prefilled once, and which a step need read only once.

    Raises:
        ValueError: there are no requests, one has no tokens in or out, or a prompt has no token of its own.
    """
    if not sizes or min(min(size) for size in sizes) < 1:
        raise ValueError(f"sizes = {list(sizes)!r} must be requests of at least one token in and one out")
    shortest = min(prompt for prompt, _ in sizes)
    if not 0 <= shared < shortest:
        raise ValueError(f"shared = {shared} must be in 0..{shortest - 1}: each prompt has a token of its own")
    attention = AttentionModel(config, precision, tensor_parallel, "flash")

    @cache
    def ends(rows: int) -> tuple[float, float]:
        """Seconds of a device, and of its links."""
        cost = prefill(config, 1, rows, precision=precision, tensor_parallel=tensor_parallel).only(*REST, *LOGITS)
        return cost.own_limit(hardware), cost.times(hardware)["interconnect"]

    @cache
    def before(tokens: int) -> tuple[float, float]:
        cost = prefill(config, tokens, precision=precision, tensor_parallel=tensor_parallel)
        cost = cost.without("attention", *REST, *LOGITS)
        return cost.own_limit(hardware), cost.times(hardware)["interconnect"]

    def step(tokens: int, rows: int, attended: Attended) -> float:
        own, links = map(sum, zip(before(tokens), ends(rows), strict=True))
        return max(own + attention.work(attended).limit(hardware), links)

    own = [prompt - shared for prompt, _ in sizes]
    prompts = attention.sequence(shared, 0) if shared else Attended()
    for tokens in own:
        alone = attention.sequence(tokens, 0)  # its own keys; those that are shared are read with the first prompt
        prompts = prompts.plus(attention.sequence(tokens, shared)._replace(cache=alone.cache))
    seconds = step(shared + sum(own), len(sizes), prompts)
    active = list(sizes)
    for done in range(1, max(output for _, output in sizes)):
        active = [(prompt, output) for prompt, output in active if output > done]
        attended = attention.decoding([prompt + done for prompt, _ in active], shared)
        seconds += step(len(active), len(active), attended)
    return seconds
