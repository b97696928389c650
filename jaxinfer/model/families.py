"""Reads a Hugging Face `config.json` into a `ModelConfig`.

Every family is a short function that says where it differs from `_common`. A field that no function asked for, and
that is not known to be without effect on inference, is an error: a model that is not understood whole is not run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jaxinfer.model.config import LayerConfig, ModelConfig, MoEConfig
from jaxinfer.model.reader import ConfigReader, parse
from jaxinfer.model.rope import Rope
from jaxinfer.model.rope_config import LEAST_THETA, read_rope, rope_from

_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
}
_DTYPES = ("bfloat16", "float16", "float32")
_MOST_BUILT = 1 << 16  # bounds the fields that reading itself makes an array or a tuple of


def read_config(source: str | Path | dict[str, Any]) -> ModelConfig:
    """Reads a model description from a folder, a `config.json` file or its parsed contents.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not JSON, the architecture is unknown, or a field is missing, malformed or
            unsupported; the message names it, its value and what is allowed.
    """
    fields = source if isinstance(source, dict) else parse(Path(source))
    fields = _text_part(fields)
    architecture = _architecture(fields)
    reader = ConfigReader(fields)
    config = FAMILIES[architecture](reader, _common(reader, architecture, _UNSTATED.get(architecture, Unstated())))
    reader.refuse_unread(architecture)
    return config


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
    if not isinstance(names, list) or len(names) != 1 or not isinstance(names[0], str):
        raise ValueError(f"config.json: architectures is {names!r}; expected a list with one name")
    if names[0] not in FAMILIES:
        known = f"a list with one of {', '.join(sorted(FAMILIES))}"
        raise ValueError(f"config.json: architectures is {names!r}, which is unknown; expected {known}")
    return names[0]


@dataclass(frozen=True)
class Unstated:
    """What holds where a file does not say: Llama's defaults in transformers 5.

    Attributes:
        head_size: None is the hidden size over the heads.
    """

    context: int = 2048
    norm_eps: float = 1e-6
    theta: float = 10_000.0
    head_size: int | None = None
    tied_embeddings: bool = False


def _common(read: ConfigReader, architecture: str, unstated: Unstated) -> ModelConfig:
    """What nearly every family spells alike: a Llama. The families change what differs."""
    hidden, heads = read.integer("hidden_size"), read.integer("num_attention_heads")
    if read.get("head_dim", unstated.head_size) is None and hidden % heads:
        raise ValueError(f"config.json: hidden_size {hidden} must be a multiple of num_attention_heads {heads}")
    head_size = read.integer("head_dim", unstated.head_size or max(1, hidden // heads), most=_MOST_BUILT)
    context = read.integer("max_position_embeddings", unstated.context)
    depth = read.integer("num_hidden_layers", most=_MOST_BUILT)
    kv_heads = read.integer("num_key_value_heads", heads)
    if heads % kv_heads:
        raise ValueError(
            f"config.json: num_key_value_heads is {kv_heads}; expected a divisor of num_attention_heads, {heads}"
        )
    layer = LayerConfig(rope=read_rope(read, head_size, context, unstated.theta))
    return ModelConfig(
        architecture=architecture,
        vocab_size=read.integer("vocab_size"),
        hidden_size=hidden,
        intermediate_size=read.integer("intermediate_size", 4 * hidden),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_size=head_size,
        layers=(layer,) * depth,
        context=context,
        norm_eps=read.number("rms_norm_eps", unstated.norm_eps),
        dtype=_dtype(read),
        activation=_activation(read),
        tied_embeddings=read.flag("tie_word_embeddings", unstated.tied_embeddings),
    )


def _dtype(read: ConfigReader) -> str:
    """From `torch_dtype`, or `dtype` as transformers 5 names it."""
    stated = {key: read.get(key) for key in ("torch_dtype", "dtype") if read.get(key) is not None}
    for key, value in stated.items():
        if value not in _DTYPES:
            raise ValueError(f"config.json: {key} is {value!r}; expected one of {_DTYPES}")
    if len(set(stated.values())) > 1:
        both = " and ".join(f"{key} is {value!r}" for key, value in stated.items())
        raise ValueError(f"config.json: {both}; expected one dtype in both")
    return next(iter(stated.values()), "bfloat16")


def _activation(read: ConfigReader) -> Any:
    default = read.get("hidden_activation") or "silu"
    return read.choice("hidden_act", _ACTIVATIONS, default)


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


def _local_window(read: ConfigReader, default: int, is_local: list[bool]) -> int | None:
    """The window of a family whose local layers always have one."""
    window = _window(read, default)
    if window is None and any(is_local):
        raise ValueError(
            "config.json: sliding_window is null; expected an integer of at least 1, "
            f"the keys that a query of the {sum(is_local)} local layers sees"
        )
    return window


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
        *_expert_counts(read, "num_experts", 128, "num_experts_per_tok", 8),
        intermediate_size=read.integer("moe_intermediate_size", 768),
        renormalize=read.flag("norm_topk_prob", False),
    )
    every, dense = read.integer("decoder_sparse_step", 1), set(read.listed("mlp_only_layers", int))
    sparse = [i not in dense and (i + 1) % every == 0 for i in range(config.num_layers)]
    return _with_experts(config, moe, sparse)


def _expert_counts(
    read: ConfigReader, total: str, total_default: int, chosen: str, chosen_default: int
) -> tuple[int, int]:
    """How many experts there are, and how many of them a token takes, from the fields of these names."""
    experts, per_token = read.integer(total, total_default), read.integer(chosen, chosen_default)
    if per_token > experts:
        raise ValueError(f"config.json: {chosen} is {per_token}; expected at most {total}, {experts}")
    return experts, per_token


def _with_experts(config: ModelConfig, moe: MoEConfig, sparse: list[bool]) -> ModelConfig:
    layers = zip(config.layers, sparse, strict=True)
    return replace(config, layers=tuple(replace(layer, moe=moe) if s else layer for layer, s in layers))


def _mixtral(read: ConfigReader, config: ModelConfig) -> ModelConfig:
    moe = MoEConfig(
        *_expert_counts(read, "num_local_experts", 8, "num_experts_per_tok", 2),
        intermediate_size=config.intermediate_size,
    )
    everywhere = [True] * config.num_layers
    return _with_experts(_windowed(config, everywhere, _window(read, None)), moe, everywhere)


def _olmo2(read: ConfigReader, config: ModelConfig) -> ModelConfig:
    bias = read.flag("attention_bias", False)
    return replace(config, qk_norm="all", pre_norm=False, post_norm=True, qkv_bias=bias, o_bias=bias)


def _olmoe(read: ConfigReader, config: ModelConfig) -> ModelConfig:
    moe = MoEConfig(
        *_expert_counts(read, "num_experts", 64, "num_experts_per_tok", 8),
        intermediate_size=config.intermediate_size,
        renormalize=read.flag("norm_topk_prob", False),
    )
    bias = read.flag("attention_bias", False)
    config = replace(config, qk_norm="all", clip_qkv=read.optional("clip_qkv"))
    return _with_experts(replace(config, qkv_bias=bias, o_bias=bias), moe, [True] * config.num_layers)


def _phi3(read: ConfigReader, config: ModelConfig) -> ModelConfig:
    return _windowed(config, [True] * config.num_layers, _window(read, None))


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
    read.require("use_bidirectional_attention", False)
    config = replace(
        _gemma(read, config),
        post_norm=True,
        attention_scale=read.number("query_pre_attn_scalar", 256.0) ** -0.5,
        attention_soft_cap=read.optional("attn_logit_softcapping", 50.0),
        final_soft_cap=read.optional("final_logit_softcapping", 30.0),
    )
    local = _local_layers(read, config.num_layers, [i % 2 == 0 for i in range(config.num_layers)])
    window = _local_window(read, 4096, local)
    again = read.get("sliding_window_size", window)  # the published files state it twice
    if window is not None and again != window:
        raise ValueError(f"config.json: sliding_window_size is {again!r}; expected sliding_window's {window}")
    return _windowed(config, local, window)


def _gemma3(read: ConfigReader, config: ModelConfig) -> ModelConfig:
    config = replace(
        _gemma(read, config),
        post_norm=True,
        qk_norm="head",
        attention_scale=read.number("query_pre_attn_scalar", 256.0) ** -0.5,
        attention_soft_cap=read.optional("attn_logit_softcapping"),
        final_soft_cap=read.optional("final_logit_softcapping"),
    )
    read.require("use_bidirectional_attention", False)
    every = read.integer("sliding_window_pattern", read.get("_sliding_window_pattern") or 6)
    local = [(i + 1) % every != 0 for i in range(config.num_layers)]
    local_theta = read.number("rope_local_base_freq", 10000.0, least=LEAST_THETA)
    stated = ConfigReader(read.object("rope_parameters"), "rope_parameters").object("sliding_attention")
    stated = ConfigReader(stated, "rope_parameters.sliding_attention")
    local_rope = rope_from(stated, local_theta, 1.0, config.head_size, config.context, read)
    local = _local_layers(read, config.num_layers, local)
    return _windowed(config, local, _local_window(read, 4096, local), local_rope)


def _falcon(read: ConfigReader, config: ModelConfig) -> ModelConfig:
    read.require("new_decoder_architecture", False)
    read.require("multi_query", True)
    read.require("parallel_attn", True)
    read.require("alibi", False)
    read.get("num_kv_heads")  # written by some versions, without effect beside multi_query
    read.require("bias", False)
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
    )


def _starcoder2(read: ConfigReader, config: ModelConfig) -> ModelConfig:
    for name, needed in (("norm_type", "layer_norm"), ("mlp_type", "default"), ("scale_attn_weights", True)):
        read.require(name, needed)
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
    older = read.get("experts_per_token") is not None and read.get("num_experts_per_tok") is None
    per_token = "experts_per_token" if older else "num_experts_per_tok"
    moe = MoEConfig(
        *_expert_counts(read, "num_local_experts", 128, per_token, 4),
        intermediate_size=config.intermediate_size,
        bias=True,
    )
    bias = read.flag("attention_bias", True)
    config = replace(
        config,
        qkv_bias=bias,
        o_bias=bias,
        sinks=True,
        activation="swiglu_clamped",
        activation_limit=read.number("swiglu_limit", 7.0),
    )
    alternate = [i % 2 == 0 for i in range(config.num_layers)]
    local = _local_layers(read, config.num_layers, alternate)
    config = _windowed(config, local, _local_window(read, 128, local))
    return _with_experts(config, moe, [True] * config.num_layers)


_GEMMA2 = Unstated(context=8192, head_size=256, tied_embeddings=True)
_GEMMA3 = Unstated(context=131_072, theta=1_000_000.0, head_size=256, tied_embeddings=True)
_UNSTATED = {
    "MistralForCausalLM": Unstated(context=131_072),
    "Qwen2ForCausalLM": Unstated(context=32_768),
    "Qwen3ForCausalLM": Unstated(context=32_768, head_size=128),
    "Qwen3MoeForCausalLM": Unstated(context=32_768),
    "GemmaForCausalLM": _GEMMA2,
    "Gemma2ForCausalLM": _GEMMA2,
    "Gemma3ForCausalLM": _GEMMA3,
    "Gemma3ForConditionalGeneration": _GEMMA3,
    "Phi3ForCausalLM": Unstated(context=4096, norm_eps=1e-5),
    "Olmo2ForCausalLM": Unstated(norm_eps=1e-5),
    "FalconForCausalLM": Unstated(tied_embeddings=True),
    "Starcoder2ForCausalLM": Unstated(context=4096, tied_embeddings=True),
    "MixtralForCausalLM": Unstated(context=131_072, norm_eps=1e-5, theta=1_000_000.0),
    "OlmoeForCausalLM": Unstated(context=4096, norm_eps=1e-5),
    "GptOssForCausalLM": Unstated(context=131_072, norm_eps=1e-5, theta=150_000.0, head_size=64),
}

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
