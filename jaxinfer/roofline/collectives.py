"""What devices send each other in a step, and when all of them have it.

Sizes are of one device. The bytes that it sends are those of algorithms that no other undercuts, on links that send
and receive at once (Chan et al. 2007, "Collective communication: theory, practice, and experience"): of an array of S
bytes on each of n devices,

    reduce-scatter, all-gather   (n - 1) / n S each
    all-reduce                   2 (n - 1) / n S, for it is the one and then the other
    all-to-all                   (n - 1) / n S
    ring of n blocks of S / n    (n - 1) / n S (Liu et al. 2023, "Ring Attention", section 3)
    to the next stage            S
    from one stage to all p      log2(p) S, by doubling, as the engine does it: a tree that sends parts would need S

Every collective counts as one message, with a constant time: the same for all but all-reduces of few bytes.
"""

from __future__ import annotations

from math import ceil, log2

from jaxinfer.roofline.cost import Work


def all_reduces(count: int, array: float, devices: int, dtype: str) -> Work:
    """Sums over devices, such as those of the axis `tensor` (Shoeybi et al. 2019, "Megatron-LM", section 3): two a
    layer, and one of the embedding."""
    return Work(sent=count * 2 * _others(devices) * array, dtype=dtype, messages=count, summed=array)


def all_to_alls(layers: int, tokens: int, choices: int, hidden: float, devices: int, dtype: str) -> Work:
    """Tokens on their way to their experts and back (Lepikhin et al. 2020, "GShard", section 3), where each device
    holds an equal part of the tokens. The experts are taken to be chosen evenly.

    Args:
        tokens: of all devices together.
        choices: experts of a token, in all layers.
        hidden: bytes of a token.
    """
    array = -(-tokens // devices) * choices * hidden
    return Work(sent=2 * _others(devices) * array, dtype=dtype, messages=2 * layers)


def merges(layers: int, queries: int, heads: float, head_size: int, ranks: int, dtype: str) -> Work:
    """What decoding queries found in each part of their context, merged by its log-sum-exp (Dao et al. 2023,
    "Flash-Decoding"): an all-reduce of the float32 maxima, then of the sums of exponentials and of weighted values."""
    array = queries * heads * (head_size + 2) * 4
    return Work(sent=layers * 2 * _others(ranks) * array, dtype=dtype, messages=2 * layers)


def hand_over(tokens: int, hidden: float, dtype: str) -> Work:
    """The residual stream on its way to the next stage (Huang et al. 2019, "GPipe", section 2)."""
    return Work(sent=tokens * hidden, dtype=dtype, messages=1)


def _others(devices: int) -> float:
    return (devices - 1) / devices


def broadcast(tokens: int, hidden: float, stages: int, dtype: str) -> Work:
    """What leaves the last stage, for all of them to make logits of: each round doubles those that have it."""
    rounds = ceil(log2(stages))
    return Work(sent=rounds * tokens * hidden, dtype=dtype, messages=rounds)
