"""Where each parameter stands in a published checkpoint: tables of names, and nothing of how they are read."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from jaxinfer.checkpoint import forms
from jaxinfer.checkpoint.forms import Form
from jaxinfer.model import ModelConfig


@dataclass(frozen=True)
class Rule:
    """A parameter's published names and the form in which they make it up."""

    form: Form
    names: tuple[str, ...]


Table = dict[str, Rule]


def _rule(form: Form, *names: str) -> Rule:
    return Rule(form, names)


def _norms(**published: str) -> Table:
    """Norms by the name of their module."""
    rules = {f"{ours}.scale_D": _rule(forms.SAME, f"{name}.weight") for ours, name in published.items()}
    return rules | {f"{ours}.bias_D": _rule(forms.SAME, f"{name}.bias") for ours, name in published.items()}


def _dense(*up: str, down: str) -> Table:
    return {
        "mlp.up_DcF": _rule(forms.UP, *(f"{name}.weight" for name in up)),
        "mlp.up_bias_cF": _rule(forms.UP_BIAS, *(f"{name}.bias" for name in up)),
        "mlp.down_FD": _rule(forms.TRANSPOSED, f"{down}.weight"),
        "mlp.down_bias_D": _rule(forms.SAME, f"{down}.bias"),
    }


def _experts(router: str, experts: str, *up: str, down: str) -> Table:
    """`{expert}` stands for every expert in turn."""
    up_names = (f"{experts}.{{expert}}.{name}.weight" for name in up)
    return {
        "mlp.router_DE": _rule(forms.TRANSPOSED, f"{router}.weight"),
        "mlp.up_EDcF": _rule(forms.EXPERTS_UP, *up_names),
        "mlp.down_EFD": _rule(forms.EXPERTS_DOWN, f"{experts}.{{expert}}.{down}.weight"),
    }


# Parameters of a layer, under "layers.{i}." here and under a prefix of the family's in the checkpoint.
_LLAMA: Table = {
    "attention.qkv_DKgH": _rule(forms.QKV, *(f"self_attn.{x}_proj.weight" for x in "qkv")),
    "attention.qkv_bias_KgH": _rule(forms.QKV_BIAS, *(f"self_attn.{x}_proj.bias" for x in "qkv")),
    "attention.o_MD": _rule(forms.TRANSPOSED, "self_attn.o_proj.weight"),
    "attention.o_bias_D": _rule(forms.SAME, "self_attn.o_proj.bias"),
    "attention.q_norm.scale_H": _rule(forms.SAME, "self_attn.q_norm.weight"),
    "attention.k_norm.scale_H": _rule(forms.SAME, "self_attn.k_norm.weight"),
    "attention.q_norm.scale_KgH": _rule(forms.QUERY_SCALE, "self_attn.q_norm.weight"),
    "attention.k_norm.scale_KgH": _rule(forms.KEY_SCALE, "self_attn.k_norm.weight"),
    **_norms(attention_norm="input_layernorm", mlp_norm="post_attention_layernorm"),
    **_dense("mlp.gate_proj", "mlp.up_proj", down="mlp.down_proj"),
}
_POST_NORMS = _norms(attention_post_norm="post_attention_layernorm", mlp_post_norm="post_feedforward_layernorm")
_GEMMA2 = _LLAMA | _norms(mlp_norm="pre_feedforward_layernorm") | _POST_NORMS
_PHI3 = _LLAMA | {
    "attention.qkv_DKgH": _rule(forms.FUSED_QKV, "self_attn.qkv_proj.weight"),
    "mlp.up_DcF": _rule(forms.FUSED_UP, "mlp.gate_up_proj.weight"),
}
_FALCON = {
    "attention.qkv_DKgH": _rule(forms.FUSED_QKV, "self_attention.query_key_value.weight"),
    "attention.o_MD": _rule(forms.TRANSPOSED, "self_attention.dense.weight"),
    **_norms(attention_norm="input_layernorm"),
    **_dense("mlp.dense_h_to_4h", down="mlp.dense_4h_to_h"),
}
_STARCODER2 = _LLAMA | _dense("mlp.c_fc", down="mlp.c_proj")
_QWEN_MOE = _LLAMA | _experts("mlp.gate", "mlp.experts", "gate_proj", "up_proj", down="down_proj")
_MIXTRAL = _LLAMA | _experts("block_sparse_moe.gate", "block_sparse_moe.experts", "w1", "w3", down="w2")
_GPT_OSS = _LLAMA | {
    "attention.sinks_Kg": _rule(forms.SINKS, "self_attn.sinks"),
    "mlp.router_DE": _rule(forms.TRANSPOSED, "mlp.router.weight"),
    "mlp.router_bias_E": _rule(forms.SAME, "mlp.router.bias"),
    "mlp.up_EDcF": _rule(forms.INTERLEAVED_UP, "mlp.experts.gate_up_proj"),
    "mlp.up_bias_EcF": _rule(forms.INTERLEAVED_UP, "mlp.experts.gate_up_proj_bias"),
    "mlp.down_EFD": _rule(forms.SAME, "mlp.experts.down_proj"),
    "mlp.down_bias_ED": _rule(forms.SAME, "mlp.experts.down_proj_bias"),
}
_LAYER: dict[str, Table] = {
    "LlamaForCausalLM": _LLAMA,
    "MistralForCausalLM": _LLAMA,
    "Qwen2ForCausalLM": _LLAMA,
    "Qwen3ForCausalLM": _LLAMA,
    "GemmaForCausalLM": _LLAMA,
    "Gemma2ForCausalLM": _GEMMA2,
    "Gemma3ForCausalLM": _GEMMA2,
    "Gemma3ForConditionalGeneration": _GEMMA2,
    "Phi3ForCausalLM": _PHI3,
    "Olmo2ForCausalLM": _LLAMA | _POST_NORMS,
    "FalconForCausalLM": _FALCON,
    "Starcoder2ForCausalLM": _STARCODER2,
    "MixtralForCausalLM": _MIXTRAL,
    "Qwen3MoeForCausalLM": _QWEN_MOE,
    "OlmoeForCausalLM": _QWEN_MOE,
    "GptOssForCausalLM": _GPT_OSS,
    "EagleHead": _LLAMA,
    "Eagle3Head": _LLAMA,
}


@dataclass(frozen=True)
class _Outside:
    """Names of what stands outside the layers."""

    layer: str = "model.layers."
    embed: str = "model.embed_tokens"
    final_norm: str = "model.norm"

    def prefix(self, index: str) -> str:
        """What the names of a layer begin with."""
        return f"{self.layer}{index}."

    def table(self) -> Table:
        return {
            "embed.weight_VD": _rule(forms.SAME, f"{self.embed}.weight"),
            "head_VD": _rule(forms.SAME, "lm_head.weight"),
            **_norms(final_norm=self.final_norm),
        }


@dataclass(frozen=True)
class _EagleOutside(_Outside):
    """Those of a draft head."""

    layer: str = "layers."
    embed: str = "embed_tokens"

    def table(self) -> Table:
        fc = {"fc_ED": _rule(forms.TRANSPOSED, "fc.weight"), "fc_bias_D": _rule(forms.SAME, "fc.bias")}
        return super().table() | fc


@dataclass(frozen=True)
class _Eagle3Outside(_EagleOutside):
    final_norm: str = "norm"

    def prefix(self, index: str) -> str:
        return "midlayer."

    def table(self) -> Table:
        return super().table() | _norms(embed_norm="midlayer.input_layernorm", feature_norm="midlayer.hidden_norm")


_OUTSIDE = {
    "FalconForCausalLM": _Outside("transformer.h.", "transformer.word_embeddings", "transformer.ln_f"),
    "EagleHead": _EagleOutside(),
    "Eagle3Head": _Eagle3Outside(),
}

# A multimodal checkpoint holds the language model under a prefix: as published, and as transformers 5 writes it.
_PREFIXES = {
    "Gemma3ForConditionalGeneration": (
        ("language_model.model.", "model."),
        ("model.language_model.", "model."),
        ("language_model.lm_head.", "lm_head."),
    )
}
# Tensors that carry nothing for inference: tables that rotary embeddings and causal masks are computed from anew.
_IGNORED = re.compile(r"\.rotary_emb\.inv_freq$|\.(masked_bias|attn\.bias)$")
_IGNORED_PARTS = {
    "Gemma3ForConditionalGeneration": re.compile(r"^(model\.)?(vision_tower|multi_modal_projector)\."),
    "Eagle3Head": re.compile(r"^(d2t|t2d)$"),  # integers: read apart, and the inverse
}


def rules(config: ModelConfig, paths: Iterable[str]) -> dict[str, Rule]:
    """The rule of every parameter, with full names, by the parameter's path.

    Raises:
        ValueError: the architecture has no table, or its table has no rule for a parameter.
    """
    if config.architecture not in _LAYER:
        raise ValueError(f"no tensor names known for {config.architecture!r}; known are {sorted(_LAYER)}")
    outside = _OUTSIDE.get(config.architecture, _Outside())
    return {path: _full_rule(config, outside, path) for path in paths}


def _full_rule(config: ModelConfig, outside: _Outside, path: str) -> Rule:
    table, ours, prefix, experts = outside.table(), path, "", 0
    if path.startswith("layers."):
        _, index, ours = path.split(".", 2)
        table, prefix = _LAYER[config.architecture], outside.prefix(index)
        moe = config.layers[int(index)].moe
        experts = moe.num_experts if moe else 0
    if ours not in table:
        raise ValueError(f"{config.architecture} checkpoints are not known to hold the parameter {path}")
    rule = table[ours]
    names = [name.format(expert=e) for e in range(experts if rule.form.per_expert else 1) for name in rule.names]
    return Rule(rule.form, tuple(prefix + name for name in names))


def plain_name(config: ModelConfig, name: str) -> str:
    """A published name without the prefix that a multimodal checkpoint puts before its language model."""
    for prefix, replacement in _PREFIXES.get(config.architecture, ()):
        if name.startswith(prefix):
            return replacement + name.removeprefix(prefix)
    return name


def ignorable(config: ModelConfig, name: str) -> bool:
    """Whether a tensor may stand in the checkpoint though no parameter is made of it."""
    if config.tied_embeddings and plain_name(config, name) == "lm_head.weight":
        return True
    part = _IGNORED_PARTS.get(config.architecture)
    return bool(_IGNORED.search(name) or (part and part.search(name)))
