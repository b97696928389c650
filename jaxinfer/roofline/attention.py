"""What attention costs, by the keys that its queries see and how it is computed."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

from jaxinfer.roofline.cost import Work
from jaxinfer.roofline.precision import Precision
from jaxinfer.roofline.shapes import kv_heads

if TYPE_CHECKING:
    from jaxinfer.model.config import ModelConfig

Counting = Literal["causal", "full"]
Attention = Literal["flash", "materialized"]
"""How attention is computed. "flash" reads keys and values once and keeps scores on the chip (Dao et al. 2022).
"materialized" is what XLA makes of it: keys and values are gathered from their pages first, and the scores lie in
memory between the operations on them."""
# Of materialized attention: keys and values are read from the pages, written in order and read again; a float32 score
# is written by the first product, masked, reduced to its maximum, exponentiated, summed, and read by the second.
_GATHER_PASSES = 3
_SCORE_BYTES = 32
_SCORE_QUERIES = 2048  # queries whose blocks of keys end together, at the last one's position
# Of flash attention: the queries of a tile, whose rows are computed whether there are queries for all of them or not;
# and the fraction of the matmul rate that tiles reach, since a softmax keeps the arithmetic units busy for nearly as
# long as its products do the tensor cores. On an H100, prompts of 8,192 to 32,768 tokens are at 0.74 to 0.78.
_TILE = 128
_TILE_RATE = 0.75
# Flash: rotate and write the new keys and values, attend by parts of the context, combine the parts.
_KERNELS = {"flash": 3, "materialized": 10}


class Attended(NamedTuple):
    """What all layers compute and move for some queries: FLOPs, bytes of keys and values, and bytes of scores; the
    FLOPs that they could have computed meanwhile; and bytes that go around a ring, in messages that all queries of a
    step share."""

    flops: float = 0
    cache: float = 0
    scores: float = 0
    wasted: float = 0
    sent: float = 0
    messages: int = 0

    def plus(self, other: Attended) -> Attended:
        amounts = (own + others for own, others in zip(self[:-1], other[:-1], strict=True))
        return Attended(*amounts, messages=max(self.messages, other.messages))

    def times(self, count: float) -> Attended:
        if count == 1:
            return self
        return Attended(*(count * own for own in self[:-1]), messages=self.messages)


@dataclass(frozen=True)
class _Layers:
    """The layers of one window together. `window` None sees all keys."""

    window: int | None
    count: int
    flops_per_pair: float  # of a query and a key
    bytes_per_key: float  # of the cache: a key and its value in every layer and head
    score_bytes_per_pair: float  # of materialized attention


class AttentionModel:
    """The attention of one model on one of `devices`, in one precision.

    Attributes:
        kernels: that one attention of all layers launches.
    """

    def __init__(self, config: ModelConfig, precision: Precision, devices: int, attention: Attention):
        self.materialized = attention == "materialized"
        self.kernels = _KERNELS[attention] * config.num_layers
        self._dtype = precision.residual
        vector = 2 * kv_heads(config, devices) * precision.cache_vector_bytes(config.head_size)
        # A query, what it found in float32, and the logarithm of its sum.
        visiting = config.head_size * (precision.residual_bytes + 4) + 4
        self._visitor = config.num_layers * config.num_heads / devices * visiting
        self._layers = [
            _Layers(
                window,
                count,
                flops_per_pair=count * 4 * config.num_heads * config.head_size / devices,
                bytes_per_key=count * vector,
                score_bytes_per_pair=count * config.num_heads * _SCORE_BYTES / devices,
            )
            for window, count in Counter(layer.window for layer in config.layers).items()
        ]

    def sequence(self, tokens: int, cached: int, counting: Counting = "causal", decodes: bool = False) -> Attended:
        """Of the next `tokens` queries of one sequence, after `cached` tokens.

        Args:
            decodes: by flash decoding, which the memory bounds, instead of tiles of flash attention.
        """
        flops = cache = scores = 0.0
        seen, tiles = cached + tokens, -(-tokens // _TILE)
        for layers in self._layers:
            read = min(seen, layers.window + tokens - 1) if layers.window else seen
            if self.materialized:
                pairs = _materialized_pairs(tokens, cached, read)
                scores += pairs * layers.score_bytes_per_pair
                read *= _GATHER_PASSES
            else:
                pairs = tokens * seen if counting == "full" else query_key_pairs(tokens, cached, layers.window)
            flops += pairs * layers.flops_per_pair
            cache += (read + tokens) * layers.bytes_per_key
        busy = 1.0 if self.materialized or decodes else tiles * _TILE / tokens / _TILE_RATE
        return Attended(flops, cache, scores, wasted=(busy - 1) * flops)

    def decoding(self, contexts: list[int], shared: int = 0, queries: int = 1) -> Attended:
        """Of the last `queries` of each sequence's `context` tokens. As the sum of `sequence` over them, but soon done
        for many.

        Args:
            shared: tokens that all sequences begin with, in the same pages. Flash attention can do with reading them
                once.
        """
        if self.materialized:
            total = Attended()
            for context, count in Counter(contexts).items():
                total = total.plus(self.sequence(queries, context - queries).times(count))
            return total
        flops = cache = 0.0
        total, sequences = sum(contexts), len(contexts)
        for layers in self._layers:
            if layers.window is None:  # what each sequence adds is linear in its context
                pairs = query_key_pairs(queries, -queries, None) * sequences + queries * total
                keys = total - shared * (sequences - 1)
            else:
                read = layers.window + queries - 1
                own = [min(context - shared, read) for context in contexts]
                pairs = sum(query_key_pairs(queries, context - queries, layers.window) for context in contexts)
                keys = sum(own) + min(shared, read - min(own))
            flops += pairs * layers.flops_per_pair
            cache += (keys + queries * sequences) * layers.bytes_per_key
        return Attended(flops, cache)

    def on_a_rank(self, tokens: int, cached: int, ranks: int, counting: Counting = "causal") -> Attended:
        """What one of `ranks` has to do with the next `tokens` of a prompt, of which each has an equal part, as of its
        keys. Around the ring go keys and values of these tokens, but for the rank's last; and, where keys are
        `cached`, the rank's queries with what they found, which go where those lie and come home."""
        own = self.sequence(tokens, cached, counting).times(1 / ranks)
        if ranks == 1:
            return own
        layers = sum(own.count for own in self._layers)
        keys = tokens * sum(own.bytes_per_key for own in self._layers) * (ranks - 1) / ranks
        visits = tokens * self._visitor if cached else 0.0
        return own._replace(sent=keys + visits, messages=(ranks - 1 + bool(cached) * ranks) * layers)

    def work(self, attended: Attended, sequences: int = 1) -> Work:
        """Of `sequences` that attend alike."""
        attended = attended.times(sequences)
        return Work(
            flops=attended.flops,
            wasted=attended.wasted,
            cache=attended.cache,
            activations=attended.scores,
            sent=attended.sent,
            dtype=self._dtype,
            kernels=self.kernels,
            messages=attended.messages,
        )


def query_key_pairs(tokens: int, cached: int, window: int | None) -> int:
    """Scores of causal attention: the query at position p (from 1) sees min(p, window) keys."""
    pairs = tokens * cached + tokens * (tokens + 1) // 2
    if window is None:
        return pairs
    beyond = max(0, cached + tokens - window)  # keys that the last query no longer sees
    cut = min(tokens, beyond)  # queries that the window cuts; each before the last loses one key less
    return pairs - (cut * beyond - cut * (cut - 1) // 2)


def _materialized_pairs(tokens: int, cached: int, read: int) -> int:
    """Scores that are computed, masked or not: groups of queries against all keys up to the group's last query."""
    ends = [min(start + _SCORE_QUERIES, tokens) for start in range(0, tokens, _SCORE_QUERIES)]
    starts = [0, *ends[:-1]]
    return sum((end - start) * min(cached + end, read) for start, end in zip(starts, ends, strict=True))
