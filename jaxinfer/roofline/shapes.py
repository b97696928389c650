"""How many numbers a model's arrays hold, whole or on one device of a tensor-parallel group."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jaxinfer.model.config import LayerConfig, ModelConfig


@dataclass(frozen=True)
class LayerShapes:
    """Numbers in one layer's arrays on one device. Of dense MLP and experts one is zero."""

    projections: float  # q, k, v and output, with biases
    dense: float  # gate, up and down
    expert: float  # one expert
    experts: float  # experts on this device
    router: float
    norms: float  # with q and k norms and attention sinks

    @property
    def matmuls(self) -> float:
        """Those that quantization applies to."""
        return self.projections + self.dense + self.expert * self.experts


def check_tensor_parallel(config: ModelConfig, devices: int) -> None:
    """Raises ValueError, with the sizes to blame, where the model does not spread evenly over the devices.

    The sizes are those that the model checks before it is built.
    """
    if devices < 1:
        raise ValueError(f"tensor_parallel is {devices}; it must be at least 1")
    sizes = [("vocab_size", config.vocab_size), ("num_heads", config.num_heads)]
    if any(layer.moe is None for layer in config.layers):
        sizes.append(("intermediate_size", config.intermediate_size))
    experts = {layer.moe.num_experts for layer in config.layers if layer.moe}
    sizes += [("num_experts", count) for count in sorted(experts)]
    rules = [f"divide {name} {size}" for name, size in sizes if size % devices]
    if config.num_kv_heads % devices and devices % config.num_kv_heads:  # a head is on one device, or on several whole
        rules.append(f"divide num_kv_heads {config.num_kv_heads} or be a multiple of it")
    if rules:
        raise ValueError(f"tensor_parallel is {devices}; it must {' and '.join(rules)}")


def kv_heads(config: ModelConfig, devices: int = 1) -> int:
    """KV heads on one device; with more devices than heads each holds a copy of one."""
    return -(-config.num_kv_heads // devices)


def layer_shapes(config: ModelConfig, layer: LayerConfig, devices: int = 1) -> LayerShapes:
    moe = layer.moe
    return LayerShapes(
        projections=_projections(config, devices),
        dense=0 if moe else _mlp(config, config.intermediate_size, config.mlp_bias) / devices,
        expert=_mlp(config, moe.intermediate_size, moe.bias) if moe else 0,
        experts=moe.num_experts / devices if moe else 0,
        router=moe.num_experts * (config.hidden_size + moe.bias) if moe else 0,
        norms=_layer_norms(config),
    )


def embedding_size(config: ModelConfig, devices: int = 1) -> float:
    """Numbers of the embedding table, and of the head where that is a matrix of its own."""
    return config.vocab_size * config.hidden_size / devices


def norm_size(config: ModelConfig) -> int:
    return config.hidden_size * (1 + config.norm_bias)


def norms_per_layer(config: ModelConfig) -> int:
    """Norms over the hidden size; a parallel block shares one between attention and MLP."""
    return (1 if config.parallel_block else 2) * (config.pre_norm + config.post_norm)


def parameters(config: ModelConfig) -> int:
    """Parameters of the whole model."""
    layers = (layer_shapes(config, layer) for layer in config.layers)
    tables = embedding_size(config) * (1 if config.tied_embeddings else 2)
    return round(sum(s.matmuls + s.router + s.norms for s in layers) + tables + norm_size(config))


def output_size(config: ModelConfig, devices: int = 1) -> float:
    """Numbers of a layer's output projection, with its bias."""
    return config.num_heads / devices * config.head_size * config.hidden_size + config.o_bias * config.hidden_size


def _projections(config: ModelConfig, devices: int) -> float:
    qkv_width = (config.num_heads / devices + 2 * kv_heads(config, devices)) * config.head_size
    return config.hidden_size * qkv_width + config.qkv_bias * qkv_width + output_size(config, devices)


def _mlp(config: ModelConfig, width: int, bias: bool) -> int:
    ups = 2 if config.gated_mlp else 1
    return config.hidden_size * width * (ups + 1) + bias * (ups * width + config.hidden_size)


def _layer_norms(config: ModelConfig) -> int:
    heads = {None: 0, "head": 2, "all": config.num_heads + config.num_kv_heads}[config.qk_norm]
    sinks = config.sinks * config.num_heads
    return norms_per_layer(config) * norm_size(config) + heads * config.head_size + sinks
