"""Reads a Hugging Face `config.json` into a `ModelConfig`.

Every family is a short function that says where it differs from `_common`. A field that no function asked for, and
that is not known to be without effect on inference, is an error: a model that is not understood whole is not run.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import UnionType
from typing import Any

from jaxinfer.model import rope as rotary
from jaxinfer.model.config import LayerConfig, ModelConfig, MoEConfig
from jaxinfer.model.rope import Rope

# Fields that say nothing about the forward pass of inference.
_WITHOUT_EFFECT = frozenset({
    "_attn_implementation_autoset", "_name_or_path", "add_cross_attention", "architectures", "attention_dropout",
    "attention_softmax_in_fp32", "attn_implementation", "auto_map", "bos_token_id", "cache_implementation",
    "chunk_size_feed_forward", "classifier_dropout", "dtype", "embd_pdrop", "embedding_dropout", "eos_token_id",
    "experts_implementation", "ffn_dropout", "hidden_dropout", "id2label", "initial_context_length",
    "initializer_range", "is_decoder", "is_encoder_decoder", "label2id", "mlp_dropout", "model_type",
    "output_attentions", "output_hidden_states", "output_router_logits", "pad_token_id", "pretraining_tp",
    "problem_type", "resid_pdrop", "residual_dropout", "return_dict", "router_aux_loss_coef", "router_jitter_noise",
    "scale_attention_softmax_in_fp32", "sep_token_id", "tokenizer_class", "torch_dtype", "transformers_version",
    "unk_token_id", "unsloth_fixed", "unsloth_version", "use_cache",
})  # fmt: skip
_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
}
_DTYPES = ("bfloat16", "float16", "float32")


class ConfigReader:
    """Hands out the fields of a `config.json` and remembers which were asked for."""

    def __init__(self, fields: dict[str, Any]):
        self.fields = fields
        self._asked: set[str] = set()

    def get(self, name: str, default: Any = None) -> Any:
        self._asked.add(name)
        return self.fields.get(name, default)

    def integer(self, name: str, default: int | None = None, least: int = 1) -> int:
        """A count; a field that is absent or null takes the default, and without one is an error."""
        value = self.get(name)
        value = default if value is None else value
        if value is None:
            raise ValueError(f"config.json lacks the field {name}; expected an integer of at least {least}")
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"config.json: {name} is {value!r}; expected an integer of at least {least}")
        return value

    def number(self, name: str, default: float) -> float:
        value = self.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise ValueError(f"config.json: {name} is {value!r}; expected a positive number")
        return float(value)

    def optional(self, name: str, default: float | None = None) -> float | None:
        """A number, or None where the field is null."""
        return None if self.get(name, default) is None else self.number(name, default or 0.0)

    def flag(self, name: str, default: bool) -> bool:
        value = self.get(name, default)
        if not isinstance(value, bool):
            raise ValueError(f"config.json: {name} is {value!r}; expected true or false")
        return value

    def choice(self, name: str, allowed: dict[str, Any], default: str) -> Any:
        value = self.get(name, default)
        if not isinstance(value, str) or value not in allowed:
            raise ValueError(f"config.json: {name} is {value!r}; expected one of {sorted(allowed)}")
        return allowed[value]

    def listed(self, name: str, kind: type | UnionType) -> tuple[Any, ...]:
        """The items of a list, all of one kind; none where the field is absent or null."""
        value = self.get(name)
        value = [] if value is None else value
        if not isinstance(value, list) or not all(isinstance(item, kind) for item in value):
            raise ValueError(f"config.json: {name} is {value!r}; expected a list of {getattr(kind, '__name__', kind)}")
        return tuple(value)

    def object(self, name: str) -> dict[str, Any]:
        """Named values; none where the field is absent or null."""
        value = self.get(name)
        value = {} if value is None else value
        if not isinstance(value, dict):
            raise ValueError(f"config.json: {name} is {value!r}; expected an object")
        return value

    def refuse_unread(self, architecture: str) -> None:
        unread = self.fields.keys() - self._asked - _WITHOUT_EFFECT
        odd = {name: self.fields[name] for name in sorted(unread) if self.fields[name] not in (None, False)}
        if odd:
            raise ValueError(f"config.json: unsupported fields for {architecture}: {odd}")


def read_config(source: str | Path | dict[str, Any]) -> ModelConfig:
    """Reads a model description from a folder, a `config.json` file or its parsed contents.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not JSON, the architecture is unknown, or a field is missing, malformed or
            unsupported; the message names it, its value and what is allowed.
    """
    fields = source if isinstance(source, dict) else _parse(Path(source))
    fields = _text_part(fields)
    architecture = _architecture(fields)
    reader = ConfigReader(fields)
    config = FAMILIES[architecture](reader, _common(reader, architecture))
    reader.refuse_unread(architecture)
    return config


def _parse(path: Path) -> dict[str, Any]:
    file = path / "config.json" if path.is_dir() else path
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"no config.json at {file}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not valid JSON: {error}") from None
    if not isinstance(fields, dict):
        raise ValueError(f"{file} holds {type(fields).__name__}; expected a JSON object")
    return fields


def _text_part(fields: dict[str, Any]) -> dict[str, Any]:
    """The language model of a multimodal Gemma 3, whose fields stand in `text_config`."""
    if fields.get("architectures") != ["Gemma3ForConditionalGeneration"]:
        return fields
    text = ConfigReader(fields).object("text_config")
    inherited = {name: fields[name] for name in ("torch_dtype", "dtype") if name in fields}
    # The published multimodal configs leave out what equals the defaults of the language model.
    defaults = {"vocab_size": 262208, "num_attention_heads": 8, "num_key_value_heads": 4}
    return defaults | inherited | text | {"architectures": fields["architectures"]}


def _architecture(fields: dict[str, Any]) -> str:
    names = fields.get("architectures")
    if not isinstance(names, list) or len(names) != 1:
        raise ValueError(f"config.json: architectures is {names!r}; expected a list with one name")
    if names[0] not in FAMILIES:
        raise ValueError(f"unknown architecture {names[0]!r}; supported are {', '.join(sorted(FAMILIES))}")
    return names[0]


def _common(read: ConfigReader, architecture: str) -> ModelConfig:
    """What nearly every family spells alike: a Llama. The families change what differs."""
    hidden, heads = read.integer("hidden_size"), read.integer("num_attention_heads")
    if read.get("head_dim") is None and hidden % heads:
        raise ValueError(f"config.json: hidden_size {hidden} must be a multiple of num_attention_heads {heads}")
    head_size = read.integer("head_dim", max(1, hidden // heads))
    context = read.integer("max_position_embeddings", 2048)
    depth = read.integer("num_hidden_layers")
    layer = LayerConfig(rope=_rope(read, head_size, context))
    return ModelConfig(
        architecture=architecture,
        vocab_size=read.integer("vocab_size"),
        hidden_size=hidden,
        intermediate_size=read.integer("intermediate_size", 4 * hidden),
        num_heads=heads,
        num_kv_heads=read.integer("num_key_value_heads", heads),
        head_size=head_size,
        layers=(layer,) * depth,
        context=context,
        norm_eps=read.number("rms_norm_eps", 1e-6),
        dtype=_dtype(read),
        activation=_activation(read),
        tied_embeddings=read.flag("tie_word_embeddings", architecture in _TIED_BY_DEFAULT),
    )


def _dtype(read: ConfigReader) -> str:
    name = read.get("torch_dtype") or read.get("dtype") or "bfloat16"
    if name not in _DTYPES:
        raise ValueError(f"config.json: torch_dtype is {name!r}; expected one of {_DTYPES}")
    return name


def _activation(read: ConfigReader) -> Any:
    default = read.get("hidden_activation") or "silu"
    return read.choice("hidden_act", _ACTIVATIONS, default)


# --- rotary embeddings


def _rope(read: ConfigReader, head_size: int, context: int) -> Rope:
    theta = read.number("rope_theta", 10000.0)
    parameters = read.object("rope_parameters") or read.object("rope_scaling")
    partial = read.number("partial_rotary_factor", 1.0)
    if "full_attention" in parameters:  # one set per kind of layer
        parameters = ConfigReader(parameters).object("full_attention")
    return _rope_from(parameters, theta, partial, head_size, context, read)


def _rope_from(parameters: dict[str, Any], theta: float, partial: float, head_size: int, context: int,
               read: ConfigReader) -> Rope:  # fmt: skip
    """A rope from one `rope_scaling` or `rope_parameters` object."""
    inner = ConfigReader(parameters)
    theta = inner.number("rope_theta", theta)
    dim = int(head_size * inner.number("partial_rotary_factor", partial))
    kind = inner.get("rope_type") or inner.get("type") or "default"
    inner.get("type")
    if not isinstance(kind, str) or kind not in _SCALINGS:
        raise ValueError(f"config.json: rope_scaling type is {kind!r}; expected one of {sorted(_SCALINGS)}")
    outer = read.integer("original_max_position_embeddings", context)
    original = inner.integer("original_max_position_embeddings", outer)
    rope = Rope(theta, dim, _SCALINGS[kind](inner, original, context))
    inner.refuse_unread(f"rope_scaling of type {kind}")
    rope.frequencies(context)  # raises what only a wrong combination of fields shows
    return rope


def _longrope(read: ConfigReader, original: int, context: int) -> rotary.LongRope:
    return rotary.LongRope(
        short_factor=read.listed("short_factor", int | float),
        long_factor=read.listed("long_factor", int | float),
        original_context=original,
        factor=read.optional("factor") or context / original,
        attention_factor=read.optional("attention_factor"),
    )


def _yarn(read: ConfigReader, original: int, context: int) -> rotary.Yarn:
    return rotary.Yarn(
        factor=read.number("factor", 1.0),
        original_context=original,
        beta_fast=read.optional("beta_fast") or 32.0,
        beta_slow=read.optional("beta_slow") or 1.0,
        attention_factor=read.optional("attention_factor"),
        mscale=read.optional("mscale"),
        mscale_all_dim=read.optional("mscale_all_dim"),
        truncate=read.flag("truncate", True),
    )


def _llama3(read: ConfigReader, original: int, context: int) -> rotary.Llama3:
    return rotary.Llama3(
        factor=read.number("factor", 8.0),
        low_freq_factor=read.number("low_freq_factor", 1.0),
        high_freq_factor=read.number("high_freq_factor", 4.0),
        original_context=original,
    )


_SCALINGS: dict[str, Callable[[ConfigReader, int, int], rotary.Scaling | None]] = {
    "default": lambda read, original, context: None,
    "linear": lambda read, original, context: rotary.Linear(read.number("factor", 1.0)),
    "dynamic": lambda read, original, context: rotary.Dynamic(read.number("factor", 1.0), original),
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
    "su": _longrope,  # the name in Phi-3's first configs
}


# --- which layers see a window


def _windowed(config: ModelConfig, is_local: list[bool], window: int | None, local_rope: Rope | None = None):
    """Gives the local layers their window, and their own rope where they have one."""
    if window is None:
        return config
    layers = tuple(
        replace(layer, window=window, rope=local_rope or layer.rope) if local else layer
        for layer, local in zip(config.layers, is_local, strict=True)
    )
    return replace(config, layers=layers)


def _window(read: ConfigReader, default: int | None) -> int | None:
    value = read.get("sliding_window", default)
    return None if value is None else read.integer("sliding_window", default)


def _local_layers(read: ConfigReader, depth: int, default: list[bool]) -> list[bool]:
    """From `layer_types` where the config has it, else from the family's own rule."""
    kinds = read.listed("layer_types", str)
    if not kinds:
        return default
    if len(kinds) != depth or not set(kinds) <= {"sliding_attention", "full_attention"}:
        raise ValueError(
            f"config.json: layer_types is {kinds!r}; expected {depth} of sliding_attention or full_attention"
        )
    return [kind == "sliding_attention" for kind in kinds]


# --- the families


def _llama(read: ConfigReader, config: ModelConfig) -> ModelConfig:
    bias = read.flag("attention_bias", False)
    return replace(config, qkv_bias=bias, o_bias=bias, mlp_bias=read.flag("mlp_bias", False))


def _mistral(read: ConfigReader, config: ModelConfig) -> ModelConfig:
    everywhere = [True] * config.num_layers
    return _windowed(config, _local_layers(read, config.num_layers, everywhere), _window(read, 4096))


def _qwen2(read: ConfigReader, config: ModelConfig) -> ModelConfig:
    return replace(_qwen_windows(read, config), qkv_bias=True)


def _qwen_windows(read: ConfigReader, config: ModelConfig) -> ModelConfig:
    window, first = _window(read, 4096), read.integer("max_window_layers", 28, least=0)
    used = read.flag("use_sliding_window", False)
    local = _local_layers(read, config.num_layers, [i >= first for i in range(config.num_layers)])
    return _windowed(config, local, window if used else None)


def _qwen3(read: ConfigReader, config: ModelConfig) -> ModelConfig:
    bias = read.flag("attention_bias", False)
    return replace(_qwen_windows(read, config), qk_norm="head", qkv_bias=bias, o_bias=bias)


def _qwen3_moe(read: ConfigReader, config: ModelConfig) -> ModelConfig:
    config = _qwen3(read, config)
    moe = MoEConfig(
        num_experts=read.integer("num_experts", 128),
        experts_per_token=read.integer("num_experts_per_tok", 8),
        intermediate_size=read.integer("moe_intermediate_size", 768),
        renormalize=read.flag("norm_topk_prob", False),
    )
    every, dense = read.integer("decoder_sparse_step", 1), set(read.listed("mlp_only_layers", int))
    sparse = [i not in dense and (i + 1) % every == 0 for i in range(config.num_layers)]
    return _with_experts(config, moe, sparse)


def _with_experts(config: ModelConfig, moe: MoEConfig, sparse: list[bool]) -> ModelConfig:
    layers = zip(config.layers, sparse, strict=True)
    return replace(config, layers=tuple(replace(layer, moe=moe) if s else layer for layer, s in layers))


def _mixtral(read: ConfigReader, config: ModelConfig) -> ModelConfig:
    moe = MoEConfig(
        num_experts=read.integer("num_local_experts", 8),
        experts_per_token=read.integer("num_experts_per_tok", 2),
        intermediate_size=config.intermediate_size,
    )
    everywhere = [True] * config.num_layers
    config = replace(config, norm_eps=read.number("rms_norm_eps", 1e-5))
    return _with_experts(_windowed(config, everywhere, _window(read, None)), moe, everywhere)


def _olmo2(read: ConfigReader, config: ModelConfig) -> ModelConfig:
    bias = read.flag("attention_bias", False)
    return replace(config, qk_norm="all", pre_norm=False, post_norm=True, qkv_bias=bias, o_bias=bias)


def _olmoe(read: ConfigReader, config: ModelConfig) -> ModelConfig:
    moe = MoEConfig(
        num_experts=read.integer("num_experts", 64),
        experts_per_token=read.integer("num_experts_per_tok", 8),
        intermediate_size=config.intermediate_size,
        renormalize=read.flag("norm_topk_prob", False),
    )
    bias = read.flag("attention_bias", False)
    eps = read.number("rms_norm_eps", 1e-5)
    config = replace(config, qk_norm="all", clip_qkv=read.optional("clip_qkv"), norm_eps=eps)
    return _with_experts(replace(config, qkv_bias=bias, o_bias=bias), moe, [True] * config.num_layers)


def _phi3(read: ConfigReader, config: ModelConfig) -> ModelConfig:
    eps = read.number("rms_norm_eps", 1e-5)
    everywhere = [True] * config.num_layers
    return _windowed(replace(config, norm_eps=eps), everywhere, _window(read, None))


def _require(read: ConfigReader, name: str, needed: Any) -> None:
    """Refuses a variant of a family that the supported checkpoints do not use."""
    if read.get(name, needed) != needed:
        raise ValueError(f"config.json: {name} is {read.get(name)!r}; supported is {needed!r}")


def _gemma(read: ConfigReader, config: ModelConfig) -> ModelConfig:
    bias = read.flag("attention_bias", False)
    # Gemma's first configs say "gelu" and were trained with its tanh form, which `hidden_activation` states.
    stated = read.get("hidden_activation") or "gelu_pytorch_tanh"
    if not isinstance(stated, str) or stated not in _ACTIVATIONS:
        raise ValueError(f"config.json: hidden_activation is {stated!r}; expected one of {sorted(_ACTIVATIONS)}")
    return replace(
        config,
        activation=_ACTIVATIONS[stated],
        norm_offset=1.0,
        embedding_scale=config.hidden_size**0.5,
        qkv_bias=bias,
        o_bias=bias,
    )


def _gemma2(read: ConfigReader, config: ModelConfig) -> ModelConfig:
    if read.get("use_bidirectional_attention"):
        raise ValueError("config.json: use_bidirectional_attention is set; only causal attention is supported")
    config = replace(
        _gemma(read, config),
        post_norm=True,
        attention_scale=read.number("query_pre_attn_scalar", 256.0) ** -0.5,
        attention_soft_cap=read.optional("attn_logit_softcapping", 50.0),
        final_soft_cap=read.optional("final_logit_softcapping", 30.0),
    )
    window = _window(read, 4096)
    _require(read, "sliding_window_size", window)  # written twice in the published files
    alternate = [i % 2 == 0 for i in range(config.num_layers)]
    return _windowed(config, _local_layers(read, config.num_layers, alternate), window)


def _gemma3(read: ConfigReader, config: ModelConfig) -> ModelConfig:
    config = replace(
        _gemma(read, config),
        post_norm=True,
        qk_norm="head",
        attention_scale=read.number("query_pre_attn_scalar", 256.0) ** -0.5,
        attention_soft_cap=read.optional("attn_logit_softcapping"),
        final_soft_cap=read.optional("final_logit_softcapping"),
    )
    if read.get("use_bidirectional_attention"):
        raise ValueError("config.json: use_bidirectional_attention is set; only causal attention is supported")
    every = read.integer("sliding_window_pattern", read.get("_sliding_window_pattern") or 6)
    local = [(i + 1) % every != 0 for i in range(config.num_layers)]
    local_theta = read.number("rope_local_base_freq", 10000.0)
    stated = ConfigReader(read.object("rope_parameters")).object("sliding_attention")
    local_rope = _rope_from(stated, local_theta, 1.0, config.head_size, config.context, read)
    if "rope_theta" not in read.fields and "rope_parameters" not in read.fields:
        rope = replace(config.layers[0].rope, theta=1_000_000.0)
        config = replace(config, layers=tuple(replace(layer, rope=rope) for layer in config.layers))
    return _windowed(config, _local_layers(read, config.num_layers, local), _window(read, 4096), local_rope)


def _falcon(read: ConfigReader, config: ModelConfig) -> ModelConfig:
    for name, needed in (
        ("new_decoder_architecture", False),
        ("multi_query", True),
        ("parallel_attn", True),
        ("alibi", False),
    ):
        _require(read, name, needed)
    read.get("num_kv_heads")  # written by some versions, without effect beside multi_query
    bias = read.flag("bias", False)
    return replace(
        config,
        num_kv_heads=1,
        intermediate_size=read.integer("ffn_hidden_size", 4 * config.hidden_size),
        norm="layer",
        norm_bias=True,
        norm_eps=read.number("layer_norm_epsilon", 1e-5),
        parallel_block=True,
        gated_mlp=False,
        activation=read.choice("activation", _ACTIVATIONS, "gelu"),
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=bias,
    )


def _starcoder2(read: ConfigReader, config: ModelConfig) -> ModelConfig:
    for name, needed in (("norm_type", "layer_norm"), ("mlp_type", "default"), ("scale_attn_weights", True)):
        _require(read, name, needed)
    for name in ("activation_function", "layer_norm_epsilon"):  # its predecessor's names, written beside its own
        read.get(name)
    bias = read.flag("use_bias", True)
    config = replace(
        config,
        norm="layer",
        norm_bias=True,
        norm_eps=read.number("norm_epsilon", 1e-5),
        gated_mlp=False,
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=bias,
    )
    return _windowed(config, [True] * config.num_layers, _window(read, None))


def _gpt_oss(read: ConfigReader, config: ModelConfig) -> ModelConfig:
    if read.get("quantization_config") is not None:
        raise ValueError("config.json: quantization_config is set; gpt-oss is supported with bfloat16 weights")
    moe = MoEConfig(
        num_experts=read.integer("num_local_experts", 128),
        experts_per_token=read.integer("num_experts_per_tok", read.get("experts_per_token") or 4),
        intermediate_size=config.intermediate_size,
        bias=True,
    )
    bias = read.flag("attention_bias", True)
    config = replace(
        config,
        norm_eps=read.number("rms_norm_eps", 1e-5),
        qkv_bias=bias,
        o_bias=bias,
        sinks=True,
        activation="swiglu_clamped",
        activation_limit=read.number("swiglu_limit", 7.0),
    )
    alternate = [i % 2 == 0 for i in range(config.num_layers)]
    config = _windowed(config, _local_layers(read, config.num_layers, alternate), _window(read, 128))
    return _with_experts(config, moe, [True] * config.num_layers)


_TIED_BY_DEFAULT = frozenset(
    {
        "GemmaForCausalLM",
        "Gemma2ForCausalLM",
        "Gemma3ForCausalLM",
        "Gemma3ForConditionalGeneration",
        "FalconForCausalLM",
        "Starcoder2ForCausalLM",
    }
)

FAMILIES: dict[str, Callable[[ConfigReader, ModelConfig], ModelConfig]] = {
    "LlamaForCausalLM": _llama,
    "MistralForCausalLM": _mistral,
    "Qwen2ForCausalLM": _qwen2,
    "Qwen3ForCausalLM": _qwen3,
    "GemmaForCausalLM": _gemma,
    "Gemma2ForCausalLM": _gemma2,
    "Gemma3ForCausalLM": _gemma3,
    "Gemma3ForConditionalGeneration": _gemma3,
    "Phi3ForCausalLM": _phi3,
    "Olmo2ForCausalLM": _olmo2,
    "FalconForCausalLM": _falcon,
    "Starcoder2ForCausalLM": _starcoder2,
    "MixtralForCausalLM": _mixtral,
    "Qwen3MoeForCausalLM": _qwen3_moe,
    "OlmoeForCausalLM": _olmoe,
    "GptOssForCausalLM": _gpt_oss,
}
