"""What a transformer is: the one description that every family is a value of."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from jaxinfer.model.rope import Rope

Activation = Literal["silu", "gelu", "gelu_tanh", "swiglu_clamped"]


@dataclass(frozen=True)
class MoEConfig:
    """A mixture of experts in the place of a dense MLP (Shazeer et al. 2017).

    The router takes a softmax over all experts and keeps the `experts_per_token` largest; `renormalize` divides
    the kept weights by their sum, which equals a softmax over the kept logits alone.
    """

    num_experts: int
    experts_per_token: int
    intermediate_size: int
    renormalize: bool = True
    bias: bool = False  # the router and every expert projection carry a bias

    def __post_init__(self):
        if self.experts_per_token > self.num_experts:
            chosen, all_of_them = self.experts_per_token, self.num_experts
            raise ValueError(f"experts_per_token {chosen} must be at most num_experts {all_of_them}")


@dataclass(frozen=True)
class LayerConfig:
    """What differs from layer to layer."""

    rope: Rope
    window: int | None = None  # keys that a query sees, itself included; None sees all
    moe: MoEConfig | None = None  # None is a dense MLP


@dataclass(frozen=True)
class ModelConfig:
    """One decoder-only transformer. Sizes are counts of elements; names are the field's own.

    `ModelConfig` says what a model computes and nothing of how a checkpoint spells it, except `architecture`,
    the Hugging Face class name that the checkpoint's tensor names follow from.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    layers: tuple[LayerConfig, ...]
    context: int  # positions that the checkpoint was made for
    norm_eps: float
    dtype: str = "bfloat16"

    norm: Literal["rms", "layer"] = "rms"
    norm_offset: float = 0.0  # added to a norm's weight: 1 in Gemma, whose weights are stored around 0
    norm_bias: bool = False
    pre_norm: bool = True  # norms before attention and MLP
    post_norm: bool = False  # norms after them, before the residual add
    parallel_block: bool = False  # attention and MLP read the same normed input and are added together

    attention_scale: float | None = None  # factor of q.k; None stands for 1 / sqrt(head_size)
    attention_soft_cap: float | None = None  # c tanh(score / c)
    qk_norm: Literal["head", "all"] | None = None  # RMSNorm of q and k: over each head, or over all heads at once
    clip_qkv: float | None = None
    qkv_bias: bool = False
    o_bias: bool = False
    sinks: bool = False  # one learned logit per query head that only the softmax's denominator sees

    gated_mlp: bool = True
    activation: Activation = "silu"
    activation_limit: float = 7.0  # where swiglu_clamped cuts its inputs
    mlp_bias: bool = False

    embedding_scale: float = 1.0
    tied_embeddings: bool = False
    final_soft_cap: float | None = None

    def __post_init__(self):
        for name in ("vocab_size", "hidden_size", "num_heads", "num_kv_heads", "head_size", "context"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads {self.num_heads} must be a multiple of num_kv_heads {self.num_kv_heads}")
        if not self.layers:
            raise ValueError("layers is empty; a model has at least one layer")

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def scale(self) -> float:
        """Factor of q.k before the softmax."""
        return self.head_size**-0.5 if self.attention_scale is None else self.attention_scale

    @property
    def windows(self) -> tuple[int | None, ...]:
        """The distinct attention windows, in the order in which layers first use them: one cache group each."""
        return tuple(dict.fromkeys(layer.window for layer in self.layers))

    def group(self, layer: int) -> int:
        """Index into `windows`, and so the cache group, of a layer."""
        return self.windows.index(self.layers[layer].window)

    def within(self, windows: tuple[int | None, ...]) -> ModelConfig:
        """The same layers over no more keys than a model with these attention windows keeps: one that would see more
        sees as many as the widest. What drafts beside that model is held to it, and changes what is proposed at most.
        """
        if None in windows:
            return self
        most = max(window for window in windows if window is not None)
        narrow = (replace(layer, window=min(layer.window or most, most)) for layer in self.layers)
        return replace(self, layers=tuple(narrow))
