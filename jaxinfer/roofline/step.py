"""Prefill and decode steps of a model as costs.

Counted are the bytes that no implementation avoids: every weight once (of the embedding the rows of the tokens, of
the experts those that some token chose), keys and values of the true context once, the new ones written, and the
residual stream around each norm. Other activations stay on the chip or pass behind a matmul's arithmetic. Counted as
FLOPs are matmuls, the two products of attention, and the norms.

Of a prompt few tokens have logits. What follows the attention of the last layer is of each token for itself, and
counted of these alone; but a pipe computes it of all.

The stages of a pipe have a part of the layers each, which run one micro-batch after the other. Embedding, last norm
and head are outside the pipe: what leaves the last stage is told to all devices, each with a part of the vocabulary.

Context parallelism gives each rank an equal part of every sequence. Of a prompt it computes that part's tokens, chosen
so that all ranks have equally many scores (Brandon et al. 2023, "Striped Attention"), while the blocks of keys and
values go around the ring: the exchange is a part of attention, which may hide it. In a decode step each rank reads its
part of the cache, and all ranks compute everything else alike.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from jaxinfer.roofline.attention import Attention, AttentionModel, Counting
from jaxinfer.roofline.collectives import all_reduces, all_to_alls, broadcast, hand_over, merges
from jaxinfer.roofline.cost import Cost, Work
from jaxinfer.roofline.hardware import Hardware
from jaxinfer.roofline.mesh import ALL, Share
from jaxinfer.roofline.precision import BF16, Precision
from jaxinfer.roofline.shapes import (
    check_tensor_parallel,
    embedding_size,
    layer_shapes,
    norm_size,
    norms_per_layer,
    output_size,
)

if TYPE_CHECKING:
    from jaxinfer.model.config import LayerConfig, ModelConfig, MoEConfig

# Parts of a step by the rows of logits, not by tokens: of a prompt also what follows the last attention.
REST = ("last output", "last layer's norms", "last mlp", "last experts", "last router", "last all-reduce")
LOGITS = ("last norm", "head")
APART = ("embedding", "look-up", "broadcast", *LOGITS)  # parts that no layer has
_NORM_FLOPS = 4  # per number: square, sum, normalize, weigh
_LARGEST_BATCH = 2**20


@dataclass(frozen=True)
class _Step:
    """`sequences` that each bring `tokens` to the `cached` ones, and ask for logits of `rows` tokens in all."""

    config: ModelConfig
    precision: Precision
    devices: int
    share: Share
    sequences: int
    tokens: int
    cached: int
    rows: int
    counting: Counting
    attention: Attention
    decodes: bool

    @property
    def all_tokens(self) -> int:
        return self.sequences * self.tokens

    @property
    def own_tokens(self) -> int:
        """Tokens that a device computes: of a prompt those of its rank, of a decode step all."""
        return self.sequences * (self.tokens if self.decodes else -(-self.tokens // self.share.ranks))

    @property
    def finished(self) -> tuple[LayerConfig, ...]:
        """Layers that all tokens leave; the last one may be left by the rows of logits alone."""
        layers = self.config.layers
        return layers if self.decodes or self.share.stages > 1 else layers[:-1]

    @property
    def picked(self) -> tuple[LayerConfig, ...]:
        """The other layer, or none."""
        return self.config.layers[len(self.finished) :]

    @property
    def hidden(self) -> int:
        """Bytes of a token in the residual stream."""
        return self.config.hidden_size * self.precision.residual_bytes


def decode_step(
    config: ModelConfig,
    batch: int,
    context: int,
    precision: Precision = BF16,
    tensor_parallel: int = 1,
    queries: int = 1,
    attention: Attention = "flash",
    share: Share = ALL,
) -> Cost:
    """One decode step of `batch` sequences, each `context` tokens long with the step's own `queries` (1, or more
    when drafted tokens are verified). Materialized attention gathers a sequence's whole row of pages: `context` is
    then what the row can hold.

    Returns:
        The cost on each of `tensor_parallel` devices; `tokens` counts batch x queries.

    Raises:
        ValueError: a count is out of its range, or the model does not spread over the devices.
    """
    _check_at_least("batch", batch, 1)
    _check_at_least("queries", queries, 1)
    _check_at_least("context", context, queries)
    _check_at_least("context_parallel", share.ranks, 1)
    check_tensor_parallel(config, tensor_parallel)
    return _cost(
        _Step(
            config,
            precision,
            tensor_parallel,
            share,
            sequences=batch,
            tokens=queries,
            cached=context - queries,
            rows=batch * queries,
            counting="causal",
            attention=attention,
            decodes=True,
        )
    )


def prefill(
    config: ModelConfig,
    tokens: int,
    sequences: int = 1,
    cached: int = 0,
    precision: Precision = BF16,
    tensor_parallel: int = 1,
    counting: Counting = "causal",
    attention: Attention = "flash",
    share: Share = ALL,
) -> Cost:
    """A prefill of `sequences` prompts of `tokens` each, after `cached` tokens that the cache holds already.

    Args:
        counting: "causal" counts the scores that a query may see, "full" those of a dense masked product.

    Returns:
        The cost on each of `tensor_parallel` devices, with logits for the last token of each prompt alone;
        `tokens` counts sequences x tokens.

    Raises:
        ValueError: a count is out of its range, or the model does not spread over the devices.
    """
    _check_at_least("tokens", tokens, 1)
    _check_at_least("sequences", sequences, 1)
    _check_at_least("cached", cached, 0)
    _check_at_least("context_parallel", share.ranks, 1)
    check_tensor_parallel(config, tensor_parallel)
    return _cost(
        _Step(
            config,
            precision,
            tensor_parallel,
            share,
            sequences=sequences,
            tokens=tokens,
            cached=cached,
            rows=sequences,
            counting=counting,
            attention=attention,
            decodes=False,
        )
    )


def compute_bound_batch(
    config: ModelConfig,
    context: int,
    hardware: Hardware,
    precision: Precision = BF16,
    tensor_parallel: int = 1,
    attention: Attention = "flash",
    share: Share = ALL,
) -> int | None:
    """The smallest batch whose decode step keeps arithmetic busy for longer than memory.

    None where no batch does: weights are shared by the batch but each sequence brings a cache of its own, so a long
    context stays bound by memory however many share the weights.
    """

    def is_compute_bound(batch: int) -> bool:
        step = decode_step(config, batch, context, precision, tensor_parallel, 1, attention, share)
        times = step.times(hardware)
        return times["compute"] >= times["memory"]

    if not is_compute_bound(_LARGEST_BATCH):
        return None
    low, high = 0, _LARGEST_BATCH  # the bytes per sequence only fall as the batch grows, so bisection finds it
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if is_compute_bound(middle) else (middle, high)
    return high


def experts_touched(moe: MoEConfig, tokens: int) -> float:
    """Expected number of distinct experts that `tokens` tokens choose, if the router spreads them evenly.

    A token leaves one expert out with probability 1 - X / E, and all tokens do with its power.
    """
    left_out = (1 - moe.experts_per_token / moe.num_experts) ** tokens
    return moe.num_experts * (1 - left_out)


def _cost(step: _Step) -> Cost:
    behind = norms_per_layer(step.config) - step.config.pre_norm  # of a layer's norms, those that attention precedes
    layers = step.config.num_layers * norms_per_layer(step.config)
    parts = {
        "embedding": _embedding(step),
        "norms": _norms(step, layers - len(step.picked) * behind, step.own_tokens),
        "projections": _projections(step),
        "attention": _attention(step),
        **_mlp_parts(step, step.finished, step.own_tokens),
        **(_rest(step, behind) if step.picked else {}),
        "last norm": _norms(step, 1, step.rows),
        "head": _head(step),
        **_collectives(step),
    }
    return Cost(parts, step.all_tokens)


def _rest(step: _Step, norms: int) -> dict[str, Work]:
    """What follows the attention of the last layer, with so many norms."""
    output = output_size(step.config, step.devices)
    parts = {"last output": _matmul(step, step.rows, output, output, kernels=1)}
    if norms:
        parts["last layer's norms"] = _norms(step, norms, step.rows)
    parts |= {f"last {name}": work for name, work in _mlp_parts(step, step.picked, step.rows).items()}
    if step.devices > 1:
        array = step.rows * step.hidden
        parts["last all-reduce"] = all_reduces(2, array, step.devices, step.precision.residual)
    return parts


def _embedding(step: _Step) -> Work:
    rows = step.own_tokens * step.config.hidden_size
    return Work(weights=rows * step.precision.unquantized_bytes, dtype=step.precision.residual, kernels=1)


def _norms(step: _Step, count: int, tokens: int) -> Work:
    numbers = count * tokens * step.config.hidden_size
    return Work(
        flops=_NORM_FLOPS * numbers,
        weights=count * norm_size(step.config) * step.precision.unquantized_bytes,
        activations=2 * numbers * step.precision.residual_bytes,
        dtype=step.precision.residual,
        kernels=count,
    )


def _projections(step: _Step) -> Work:
    numbers = sum(layer_shapes(step.config, layer, step.devices).projections for layer in step.config.layers)
    numbers -= len(step.picked) * output_size(step.config, step.devices)
    kernels = step.config.num_layers + len(step.finished)
    return _matmul(step, step.own_tokens, numbers, numbers, kernels)


def _attention(step: _Step) -> Work:
    """A rank's part of it; in a prefill, with what the rank sends around the ring meanwhile."""
    model, ranks = AttentionModel(step.config, step.precision, step.devices, step.attention), step.share.ranks
    if step.decodes:
        own = model.sequence(step.tokens, step.cached, decodes=True).times(1 / ranks)
    else:
        own = model.on_a_rank(step.tokens, step.cached, ranks, step.counting)
    return model.work(own, step.sequences)


def _mlp_parts(step: _Step, layers: tuple[LayerConfig, ...], tokens: int) -> dict[str, Work]:
    """Dense MLPs and experts of these layers, of so many tokens on a device; a model may have both kinds of layer."""
    dense = experts_read = experts_used = router = 0.0
    sparse = [layer for layer in layers if layer.moe]
    for layer in layers:
        shapes = layer_shapes(step.config, layer, step.devices)
        dense += shapes.dense
        if layer.moe:
            touched = experts_touched(layer.moe, tokens)
            experts_read += touched / step.devices * shapes.expert
            experts_used += layer.moe.experts_per_token / step.devices * shapes.expert
            router += shapes.router
    parts = {}
    if dense:
        parts["mlp"] = _matmul(step, tokens, dense, dense, kernels=3 * (len(layers) - len(sparse)))
    if sparse:
        parts["experts"] = _matmul(step, tokens, experts_used, experts_read, kernels=3 * len(sparse))
        parts["router"] = _unquantized_matmul(step, router, tokens, kernels=2 * len(sparse))
    return parts


def _head(step: _Step) -> Work:
    parts = step.share.vocabulary or step.devices
    return _unquantized_matmul(step, embedding_size(step.config, parts), step.rows, kernels=2)


def _collectives(step: _Step) -> dict[str, Work]:
    """Two all-reduces a layer that all tokens leave; the exchange of experts; the merge of parts of a context; one
    all-reduce of the embedding; what goes to the next stage, and from the last to all."""
    config, dtype, works = step.config, step.precision.residual, {}
    if step.devices > 1:
        choices = [layer.moe.experts_per_token for layer in step.finished if layer.moe]
        exchanging = len(choices) if step.share.experts == "all-to-all" else 0
        count = 2 * len(step.finished) - exchanging
        sums = all_reduces(count, step.own_tokens * step.hidden, step.devices, dtype)
        if exchanging:  # it stands between the two halves of a sum
            sums = replace(sums, messages=count + exchanging, summed=None)
        works["all-reduce"] = sums
        if exchanging:
            works["all-to-all"] = all_to_alls(
                exchanging, step.own_tokens, sum(choices), step.hidden, step.devices, dtype
            )
    if step.share.ranks > 1 and step.decodes:
        heads = config.num_heads / step.devices
        works["merge"] = merges(config.num_layers, step.own_tokens, heads, config.head_size, step.share.ranks, dtype)
    if (parts := step.share.vocabulary or step.devices) > 1:
        works["look-up"] = all_reduces(1, step.own_tokens * step.hidden, parts, dtype)
    if step.share.stages > 1:
        works["hand-over"] = hand_over(step.own_tokens, step.hidden, dtype)
        works["broadcast"] = broadcast(step.own_tokens, step.hidden, step.share.stages, dtype)
    return works


def _matmul(step: _Step, tokens: int, used: float, read: float, kernels: int) -> Work:
    """Each of so many tokens multiplies with `used` weights; the device reads `read` of them."""
    precision = step.precision
    return Work(
        flops=2 * tokens * used,
        weights=read * precision.weight_bytes,
        dtype=precision.activations,
        kernels=kernels,
    )


def _unquantized_matmul(step: _Step, numbers: float, rows: int, kernels: int) -> Work:
    precision = step.precision
    return Work(
        flops=2 * rows * numbers,
        weights=numbers * precision.unquantized_bytes,
        dtype=precision.residual,
        kernels=kernels,
    )


def _check_at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise ValueError(f"{name} is {value}; it must be at least {least}")
