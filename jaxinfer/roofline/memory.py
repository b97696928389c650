"""What lies in a device's memory while a model is served, and how many sequences that leaves room for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from jaxinfer.roofline.hardware import Hardware
from jaxinfer.roofline.mesh import Mesh, check_mesh, stage_of, vocabulary_parts
from jaxinfer.roofline.precision import BF16, Precision
from jaxinfer.roofline.shapes import embedding_size, kv_heads, layer_shapes, norm_size

if TYPE_CHECKING:
    from jaxinfer.model.config import ModelConfig

CHUNK = 1024  # tokens of prompts in a step: the engine's `max_num_batched_tokens`
_LOGITS_COPIES = 2  # float32 logits, and what the sampler sorts


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes on one device. `context` tokens in each of `batch` sequences were asked for."""

    memory: float  # the device's own
    reserved: float  # left to the runtime and to fragmentation
    weights: float
    activations: float
    per_token: float  # cache of one token
    per_sequence: int  # cache of one sequence of `context` tokens, in whole pages
    batch: int
    context: int

    @property
    def cache(self) -> float:
        """What is left for keys and values; below zero where the weights alone do not fit."""
        return self.memory - self.reserved - self.weights - self.activations

    @property
    def sequences(self) -> int:
        """Sequences of `context` tokens that fit at once."""
        return max(0, int(self.cache // self.per_sequence))

    @property
    def fits(self) -> bool:
        return self.sequences >= self.batch


def plan_memory(
    config: ModelConfig,
    hardware: Hardware,
    batch: int,
    context: int,
    precision: Precision = BF16,
    tensor_parallel: int = 1,
    page_size: int = 16,
    chunk: int = CHUNK,
    memory_fraction: float = 0.9,
    pipeline_parallel: int = 1,
    context_parallel: int = 1,
) -> MemoryPlan:
    """Lays out the memory of one device, of any stage: all hold equally many layers, which are alike, and their part
    of embedding and head. Page j of a sequence lies on rank j mod `context_parallel`.

    Args:
        page_size: tokens in a page of the cache; by default the engine's.
        chunk: tokens that one step prefills at most, over all prompts; by default the engine's
            `max_num_batched_tokens`.
        memory_fraction: how much of the device's memory weights, activations and cache may take together.

    Raises:
        ValueError: a size is out of its range, or the model does not spread over the devices.
    """
    sizes = {"batch": batch, "context": context, "page_size": page_size, "chunk": chunk}
    for name, value in sizes.items():
        if value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1")
    if not 0 < memory_fraction <= 1:
        raise ValueError(f"memory_fraction is {memory_fraction}; it must be above 0 and at most 1")
    mesh = Mesh(pipeline_parallel, tensor_parallel, context_parallel)
    check_mesh(config, mesh)
    stage, vocabulary = stage_of(config, pipeline_parallel), vocabulary_parts(config, mesh)
    pages = sequence_pages(stage, context, page_size, chunk, context_parallel)
    one_token = sum(page_bytes(stage, window, 1, precision, tensor_parallel) for window in stage.windows)
    own_tokens = -(-chunk // context_parallel)
    return MemoryPlan(
        memory=hardware.memory,
        reserved=hardware.memory * (1 - memory_fraction),
        weights=weight_memory(stage, precision, tensor_parallel, vocabulary),
        activations=activation_memory(stage, batch, own_tokens, precision, tensor_parallel, vocabulary),
        per_token=one_token / context_parallel,
        per_sequence=_pages_bytes(stage, pages, page_size, precision, tensor_parallel),
        batch=batch,
        context=context,
    )


def weight_memory(
    config: ModelConfig, precision: Precision, tensor_parallel: int = 1, vocabulary: int | None = None
) -> float:
    """Bytes of the weights on one device; `vocabulary` devices have a part of that, by default those that have a part
    of every layer."""
    shapes = [layer_shapes(config, layer, tensor_parallel) for layer in config.layers]
    tables = embedding_size(config, vocabulary or tensor_parallel) * (1 if config.tied_embeddings else 2)
    unquantized = sum(shape.router + shape.norms for shape in shapes) + tables + norm_size(config)
    matmuls = sum(shape.matmuls for shape in shapes)
    return matmuls * precision.weight_bytes + unquantized * precision.unquantized_bytes


def activation_memory(
    config: ModelConfig, rows: int, tokens: int, precision: Precision, tensor_parallel: int = 1,
    vocabulary: int | None = None,
) -> float:  # fmt: skip
    """Bytes alive at once, at the most, in a step of `tokens` tokens that asks for logits of `rows`.

    The residual stream and its normed copy stay while the wider of two blocks runs: q, k, v and attention's output,
    or the MLP's up projections and their product. Experts take a copy of their input for each choice of a token.
    """
    query = config.num_heads / tensor_parallel
    attention = (2 * query + 2 * kv_heads(config, tensor_parallel)) * config.head_size
    ups = 2 if config.gated_mlp else 1
    dense = (ups + 1) * config.intermediate_size / tensor_parallel
    moes = {layer.moe for layer in config.layers if layer.moe}
    sparse = [
        moe.experts_per_token * (config.hidden_size + (ups + 1) * moe.intermediate_size / tensor_parallel)
        for moe in moes
    ]
    widest = max(attention, dense, *sparse)
    stream = tokens * (2 * config.hidden_size + widest) * precision.residual_bytes
    logits = _LOGITS_COPIES * rows * config.vocab_size / (vocabulary or tensor_parallel) * 4
    return stream + logits


def page_bytes(
    config: ModelConfig,
    window: int | None,
    page_size: int,
    precision: Precision,
    tensor_parallel: int = 1,
) -> int:
    """Bytes of one page, keys and values with their scales, in all layers that share `window`."""
    layers = sum(layer.window == window for layer in config.layers)
    vectors = 2 * page_size * kv_heads(config, tensor_parallel)
    return layers * vectors * precision.cache_vector_bytes(config.head_size)


def sequence_bytes(
    config: ModelConfig,
    context: int,
    page_size: int,
    chunk: int,
    precision: Precision,
    tensor_parallel: int = 1,
) -> int:
    """Bytes of cache that one sequence of `context` tokens holds on one device, at the most at once.

    Window layers give pages back as the window moves on, by `chunk` tokens at most in one step.
    """
    pages = sequence_pages(config, context, page_size, chunk)
    return _pages_bytes(config, pages, page_size, precision, tensor_parallel)


def sequence_pages(config: ModelConfig, context: int, page_size: int, chunk: int, ranks: int = 1) -> list[int]:
    """Pages of each cache group on the rank that has most of one sequence."""
    return [-(-most_pages(context, page_size, window, chunk) // ranks) for window in config.windows]


def _pages_bytes(
    config: ModelConfig, pages: list[int], page_size: int, precision: Precision, tensor_parallel: int
) -> int:
    sizes = (page_bytes(config, window, page_size, precision, tensor_parallel) for window in config.windows)
    return sum(count * size for count, size in zip(pages, sizes, strict=True))


def most_pages(tokens: int, page_size: int, window: int | None, ahead: int) -> int:
    """Pages that a sequence of `tokens` tokens has at once, of which it computes `ahead` at a time."""
    columns = -(-tokens // page_size)
    if window is None:
        return columns
    span = window - 1 + ahead  # tokens, of which the first may be the last of its page
    return min(columns, (span - 2) // page_size + 2)
