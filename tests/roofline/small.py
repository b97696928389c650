"""Small models for the arithmetic: a plain Llama, which every test changes where it looks."""

from jaxinfer.model.config import LayerConfig, ModelConfig, MoEConfig
from jaxinfer.model.rope import Rope

ROPE = Rope(10_000.0, 64)


def small(**changes) -> ModelConfig:
    """Two layers whose work is nearly all matmuls, as in a real model, and a third of it attention's."""
    fields = {
        "architecture": "LlamaForCausalLM",
        "vocab_size": 512,
        "hidden_size": 96,
        "intermediate_size": 192,
        "num_heads": 8,
        "num_kv_heads": 2,
        "head_size": 64,
        "layers": windowed(None, None),
        "context": 1024,
        "norm_eps": 1e-5,
    }
    return ModelConfig(**(fields | changes))


def windowed(*windows: int | None) -> tuple[LayerConfig, ...]:
    return tuple(LayerConfig(ROPE, window=window) for window in windows)


def sparse(moe: MoEConfig) -> tuple[LayerConfig, ...]:
    """A dense layer, then one of experts."""
    return LayerConfig(ROPE), LayerConfig(ROPE, moe=moe)
