"""Published configs read into what their models are, and refused wherever they are not understood whole."""

import json
import math
from dataclasses import dataclass
from typing import Any

import pytest

from jaxinfer.model import read_config
from jaxinfer.model.rope import Dynamic, Linear, Llama3, LongRope, Yarn


@dataclass(frozen=True)
class Published:
    """The fields of a published config that matter, and what they mean.

    Attributes:
        fields: of `config.json`.
        heads: query heads, KV heads and head size.
        windows: of the first layers, a whole period of them.
        rope: base and kind of scaling of the first layer that sees everything, or else of the first.
        facts: other attributes of the `ModelConfig`.
    """

    fields: dict[str, Any]
    heads: tuple[int, int, int]
    windows: tuple[int | None, ...] = (None,)
    rope: tuple[float, type | None] = (10000.0, None)
    facts: tuple[tuple[str, Any], ...] = ()


def fields(architecture: str, layers: int, hidden: int, inner: int, heads: int, kv_heads: int, vocab: int, **rest):
    return {
        "architectures": [architecture],
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
    } | rest


LLAMA3_SCALING = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                  "original_max_position_embeddings": 8192}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
        "original_max_position_embeddings": 4096}  # fmt: skip
PUBLISHED = {
    "Llama-2-7B": Published(
        fields("LlamaForCausalLM", 32, 4096, 11008, 32, 32, 32000, max_position_embeddings=4096, pretraining_tp=1),
        (32, 32, 128), facts=(("context", 4096), ("tied_embeddings", False), ("norm", "rms"),
                              ("attention_scale", None), ("scale", 128**-0.5)),
    ),
    "Llama-3.1-8B": Published(
        fields("LlamaForCausalLM", 32, 4096, 14336, 32, 8, 128256, max_position_embeddings=131072,
               rope_theta=500000.0, rope_scaling=LLAMA3_SCALING, torch_dtype="bfloat16"),
        (32, 8, 128), rope=(500000.0, Llama3), facts=(("dtype", "bfloat16"), ("context", 131072)),
    ),
    "Llama-3.2-1B": Published(
        fields("LlamaForCausalLM", 16, 2048, 8192, 32, 8, 128256, head_dim=64, rope_theta=500000.0,
               rope_scaling=LLAMA3_SCALING | {"factor": 32.0}, tie_word_embeddings=True),
        (32, 8, 64), rope=(500000.0, Llama3), facts=(("tied_embeddings", True),),
    ),
    "Mistral-7B-v0.1": Published(
        fields("MistralForCausalLM", 32, 4096, 14336, 32, 8, 32000, sliding_window=4096), (32, 8, 128), (4096,),
    ),
    "Mistral-7B-v0.3": Published(
        fields("MistralForCausalLM", 32, 4096, 14336, 32, 8, 32768, sliding_window=None, rope_theta=1e6),
        (32, 8, 128), rope=(1e6, None),
    ),
    "Qwen2.5-7B": Published(
        fields("Qwen2ForCausalLM", 28, 3584, 18944, 28, 4, 152064, rope_theta=1e6, sliding_window=131072,
               use_sliding_window=False, max_window_layers=28),
        (28, 4, 128), rope=(1e6, None), facts=(("qkv_bias", True), ("o_bias", False)),
    ),
    "Qwen3-8B": Published(
        fields("Qwen3ForCausalLM", 36, 4096, 12288, 32, 8, 151936, head_dim=128, rope_theta=1e6,
               sliding_window=None, use_sliding_window=False, max_window_layers=36, attention_bias=False),
        (32, 8, 128), rope=(1e6, None), facts=(("qk_norm", "head"), ("qkv_bias", False)),
    ),
    "Gemma-7B": Published(
        fields("GemmaForCausalLM", 28, 3072, 24576, 16, 16, 256000, head_dim=256, hidden_act="gelu"),
        (16, 16, 256),
        facts=(("activation", "gelu_tanh"), ("norm_offset", 1.0), ("embedding_scale", math.sqrt(3072)),
               ("tied_embeddings", True)),
    ),
    "Gemma-2-9B": Published(
        fields("Gemma2ForCausalLM", 42, 3584, 14336, 16, 8, 256000, head_dim=256, sliding_window=4096,
               query_pre_attn_scalar=256, attn_logit_softcapping=50.0, final_logit_softcapping=30.0,
               hidden_act="gelu_pytorch_tanh", hidden_activation="gelu_pytorch_tanh", cache_implementation="hybrid"),
        (16, 8, 256), (4096, None),
        facts=(("attention_soft_cap", 50.0), ("final_soft_cap", 30.0), ("scale", 1 / 16), ("post_norm", True),
               ("pre_norm", True)),
    ),
    "Gemma-3-4B, multimodal": Published(
        {"architectures": ["Gemma3ForConditionalGeneration"], "torch_dtype": "bfloat16", "vision_config": {"a": 1},
         "text_config": {"hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34,
                         "sliding_window": 1024, "model_type": "gemma3_text",
                         "rope_scaling": {"factor": 8.0, "rope_type": "linear"}}},
        (8, 4, 256), (1024,) * 5 + (None,), (1e6, Linear),
        (("vocab_size", 262208), ("qk_norm", "head"), ("attention_soft_cap", None), ("context", 131_072)),
    ),
    "Phi-3-mini-128k": Published(
        fields("Phi3ForCausalLM", 32, 3072, 8192, 32, 32, 32064, sliding_window=262144,
               original_max_position_embeddings=4096, max_position_embeddings=131072,
               rope_scaling={"type": "longrope", "short_factor": [1.0] * 48, "long_factor": [2.0] * 48}),
        (32, 32, 96), (262144,), (10000.0, LongRope), (("norm_eps", 1e-5),),
    ),
    "OLMo-2-7B": Published(
        fields("Olmo2ForCausalLM", 32, 4096, 11008, 32, 32, 100352, rope_theta=500000, rms_norm_eps=1e-6),
        (32, 32, 128), rope=(500000.0, None),
        facts=(("qk_norm", "all"), ("pre_norm", False), ("post_norm", True)),
    ),
    "Falcon-7B": Published(
        {"architectures": ["FalconForCausalLM"], "num_hidden_layers": 32, "hidden_size": 4544,
         "num_attention_heads": 71, "vocab_size": 65024, "multi_query": True, "parallel_attn": True, "bias": False,
         "alibi": False, "new_decoder_architecture": False, "layer_norm_epsilon": 1e-5},
        (71, 1, 64),
        facts=(("parallel_block", True), ("norm", "layer"), ("norm_bias", True), ("gated_mlp", False),
               ("activation", "gelu"), ("intermediate_size", 18176), ("tied_embeddings", True)),
    ),
    "StarCoder2-7B": Published(
        fields("Starcoder2ForCausalLM", 32, 4608, 18432, 36, 4, 49152, hidden_act="gelu_pytorch_tanh",
               rope_theta=1e6, sliding_window=4096, use_bias=True, norm_epsilon=1e-5),
        (36, 4, 128), (4096,), (1e6, None),
        (("qkv_bias", True), ("mlp_bias", True), ("norm", "layer"), ("gated_mlp", False)),
    ),
    "Mixtral-8x7B": Published(
        fields("MixtralForCausalLM", 32, 4096, 14336, 32, 8, 32000, rope_theta=1e6, num_local_experts=8,
               num_experts_per_tok=2, sliding_window=None, router_aux_loss_coef=0.02),
        (32, 8, 128), rope=(1e6, None),
    ),
    "Qwen3-30B-A3B": Published(
        fields("Qwen3MoeForCausalLM", 48, 2048, 6144, 32, 4, 151936, head_dim=128, rope_theta=1e6, num_experts=128,
               num_experts_per_tok=8, moe_intermediate_size=768, norm_topk_prob=True, decoder_sparse_step=1,
               mlp_only_layers=[], sliding_window=None, use_sliding_window=False, max_window_layers=48),
        (32, 4, 128), rope=(1e6, None), facts=(("qk_norm", "head"),),
    ),
    "OLMoE-1B-7B": Published(
        fields("OlmoeForCausalLM", 16, 2048, 1024, 16, 16, 50304, num_experts=64, num_experts_per_tok=8,
               norm_topk_prob=False, clip_qkv=None),
        (16, 16, 128), facts=(("qk_norm", "all"), ("clip_qkv", None)),
    ),
    "gpt-oss-20b": Published(
        fields("GptOssForCausalLM", 24, 2880, 2880, 64, 8, 201088, head_dim=64, rope_theta=150000,
               rope_scaling=YARN, sliding_window=128, num_local_experts=32, num_experts_per_tok=4, swiglu_limit=7.0,
               attention_bias=True, layer_types=["sliding_attention", "full_attention"] * 12),
        (64, 8, 64), (128, None), (150000.0, Yarn),
        (("sinks", True), ("activation", "swiglu_clamped"), ("o_bias", True)),
    ),
}  # fmt: skip
EXPERTS = {  # experts, experts per token, their hidden size, whether the kept weights sum to one
    "Mixtral-8x7B": (8, 2, 14336, True),
    "Qwen3-30B-A3B": (128, 8, 768, True),
    "OLMoE-1B-7B": (64, 8, 1024, False),
    "gpt-oss-20b": (32, 4, 2880, True),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs(name):
    published = PUBLISHED[name]
    config = read_config(published.fields)
    assert (config.num_heads, config.num_kv_heads, config.head_size) == published.heads
    assert config.num_layers == (published.fields.get("text_config") or published.fields)["num_hidden_layers"]
    period = len(published.windows)
    assert all(layer.window == published.windows[i % period] for i, layer in enumerate(config.layers))
    ropes = {layer.window: layer.rope for layer in reversed(config.layers)}
    rope = ropes.get(None, config.layers[0].rope)
    assert (rope.theta, None if rope.scaling is None else type(rope.scaling)) == published.rope
    assert rope.dim == config.head_size
    assert {key: getattr(config, key) for key, _ in published.facts} == pytest.approx(dict(published.facts))


@pytest.mark.parametrize("name", PUBLISHED)
def test_experts(name):
    found = {layer.moe for layer in read_config(PUBLISHED[name].fields).layers}
    if name not in EXPERTS:
        assert found == {None}
        return
    (moe,) = found
    sizes = (moe.num_experts, moe.experts_per_token, moe.intermediate_size, moe.renormalize)
    assert sizes == EXPERTS[name]


def test_local_layers_of_gemma_3_have_a_rope_of_their_own():
    layers = read_config(PUBLISHED["Gemma-3-4B, multimodal"].fields).layers
    assert {(layer.rope.theta, layer.rope.scaling) for layer in layers if layer.window} == {(10000.0, None)}
    assert {(layer.rope.theta, layer.rope.scaling) for layer in layers if not layer.window} == {(1e6, Linear(8.0))}


def test_windows_begin_where_the_config_says():
    config = read_config(
        PUBLISHED["Qwen2.5-7B"].fields | {"use_sliding_window": True, "max_window_layers": 20, "sliding_window": 512}
    )
    assert [layer.window for layer in config.layers] == [None] * 20 + [512] * 8
    assert config.windows == (None, 512)


def test_layers_without_experts():
    fields = PUBLISHED["Qwen3-30B-A3B"].fields | {"decoder_sparse_step": 2, "mlp_only_layers": [1]}
    sparse = [layer.moe is not None for layer in read_config(fields).layers]
    assert sparse == [i % 2 == 1 and i != 1 for i in range(48)]


@pytest.mark.parametrize(
    ("name", "left_out", "held"),
    [
        ("Llama-2-7B", ("max_position_embeddings", "rms_norm_eps", "rope_theta"), (2048, 1e-6, 1e4, 128)),
        ("OLMo-2-7B", ("max_position_embeddings", "rms_norm_eps", "rope_theta"), (2048, 1e-5, 1e4, 128)),
        ("Mixtral-8x7B", ("max_position_embeddings", "rms_norm_eps", "rope_theta"), (131_072, 1e-5, 1e6, 128)),
        ("Gemma-2-9B", ("max_position_embeddings", "rms_norm_eps", "head_dim"), (8192, 1e-6, 1e4, 256)),
        ("gpt-oss-20b", ("head_dim", "rms_norm_eps"), (131_072, 1e-5, 150_000.0, 64)),
    ],
)
def test_what_is_left_out_is_as_transformers_has_it(name, left_out, held):
    fields = {field: value for field, value in PUBLISHED[name].fields.items() if field not in left_out}
    config = read_config(fields)
    assert (config.context, config.norm_eps, config.layers[-1].rope.theta, config.head_size) == held


def test_partial_rotation():
    config = read_config(PUBLISHED["Llama-2-7B"].fields | {"partial_rotary_factor": 0.25})
    assert config.layers[0].rope.dim == 32


def test_dynamic_scaling_starts_from_the_context_of_training():
    fields = PUBLISHED["Llama-2-7B"].fields | {"rope_scaling": {"type": "dynamic", "factor": 2.0}}
    assert read_config(fields).layers[0].rope.scaling == Dynamic(2.0, 4096)


BAD = {  # what is changed of Llama-2-7B, and what the error names
    "unknown architecture": (
        {"architectures": ["MambaForCausalLM"]},
        ["config.json: architectures is ['MambaForCausalLM']", "FalconForCausalLM, Gemma2ForCausalLM"],
    ),
    "no architecture": ({"architectures": None}, ["architectures", "None"]),
    "two architectures": ({"architectures": ["LlamaForCausalLM"] * 2}, ["architectures"]),
    "a field that nothing reads": ({"residual_multiplier": 0.2}, ["residual_multiplier", "0.2", "LlamaForCausalLM"]),
    "quantized weights": ({"quantization_config": {"bits": 4}}, ["quantization_config"]),
    "a size of zero": ({"hidden_size": 0}, ["hidden_size", "0", "at least 1"]),
    "a size that is no integer": ({"num_hidden_layers": "32"}, ["num_hidden_layers", "'32'", "integer"]),
    "a size that is a flag": ({"vocab_size": True}, ["vocab_size", "True", "integer"]),
    "a missing size": ({"vocab_size": None}, ["vocab_size"]),
    "heads that do not divide": ({"num_attention_heads": 33}, ["num_attention_heads", "33", "hidden_size"]),
    "groups that are uneven": ({"num_key_value_heads": 5}, ["config.json: num_key_value_heads is 5", "heads, 32"]),
    "an unknown activation": ({"hidden_act": "relu"}, ["hidden_act", "'relu'", "silu"]),
    "a number that is text": ({"rms_norm_eps": "1e-5"}, ["rms_norm_eps", "'1e-5'", "number"]),
    "a flag that is text": ({"tie_word_embeddings": "no"}, ["tie_word_embeddings", "'no'", "true or false"]),
    "an unknown dtype": ({"torch_dtype": "int8"}, ["torch_dtype", "'int8'", "bfloat16"]),
    "an unknown scaling": ({"rope_scaling": {"type": "cubic"}}, ["rope_scaling", "'cubic'", "yarn"]),
    "a scaling that is no object": ({"rope_scaling": [1]}, ["rope_scaling", "[1]"]),
    "a scaling's unread field": ({"rope_scaling": {"type": "linear", "factor": 2.0, "base": 3}}, ["base", "linear"]),
    "a factor that is text": ({"rope_scaling": {"type": "linear", "factor": "2"}}, ["factor", "'2'", "number"]),
    "an architecture that is no text": ({"architectures": [["a"]]}, ["architectures", "[['a']]", "one name"]),
    "a size beyond int32": ({"vocab_size": 2**70}, ["vocab_size", str(2**70), str(2**31 - 1)]),
    "more layers than memory": ({"num_hidden_layers": 2**31 - 1}, ["num_hidden_layers", str(2**31 - 1), "65536"]),
    "a number beyond float32": ({"rms_norm_eps": 10**400}, ["rms_norm_eps", str(10**400), "3.40282e+38"]),
    "an encoder": ({"is_encoder_decoder": True}, ["is_encoder_decoder", "True", "false"]),
    "cross attention": ({"add_cross_attention": True}, ["add_cross_attention", "True", "false"]),
    "an odd head": ({"head_dim": 7}, ["head_dim", "7", "even"]),
    "a rotation beyond the head": ({"partial_rotary_factor": 3.0}, ["partial_rotary_factor", "384", "at most 128"]),
    "an odd rotation": ({"partial_rotary_factor": 0.14}, ["partial_rotary_factor", "0.14 of head_dim 128", "even"]),
    "nothing that rotates": ({"partial_rotary_factor": 0.001}, ["partial_rotary_factor", "0.001", "at least 2"]),
    "a base of one": ({"rope_theta": 1.0}, ["rope_theta", "1.0", "at least 2"]),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_what_is_not_understood_is_refused(name):
    change, named = BAD[name]
    with pytest.raises(ValueError, match=r".") as error:
        read_config(PUBLISHED["Llama-2-7B"].fields | change)
    assert [word for word in named if word not in str(error.value)] == []


@pytest.mark.parametrize(("name", "change", "named"), [
    ("gpt-oss-20b", {"layer_types": ["full_attention"]}, ["layer_types", "24"]),
    ("gpt-oss-20b", {"quantization_config": {"quant_method": "mxfp4"}}, ["quantization_config", "bfloat16"]),
    ("gpt-oss-20b", {"sliding_window": 0}, ["sliding_window", "0"]),
    ("Falcon-7B", {"alibi": True}, ["alibi", "True"]),
    ("Falcon-7B", {"bias": True}, ["bias is True; expected False"]),
    ("Falcon-7B", {"new_decoder_architecture": True}, ["new_decoder_architecture"]),
    ("Falcon-7B", {"multi_query": 1}, ["multi_query is 1; expected True"]),
    ("Falcon-7B", {"parallel_attn": None}, ["parallel_attn is missing or null; expected True"]),
    ("Falcon-7B", {"alibi": 0}, ["alibi is 0; expected False"]),
    ("StarCoder2-7B", {"scale_attn_weights": 1.0}, ["scale_attn_weights is 1.0; expected True"]),
    ("StarCoder2-7B", {"norm_type": "rms"}, ["norm_type", "'rms'", "layer_norm"]),
    ("Gemma-2-9B", {"use_bidirectional_attention": True}, ["use_bidirectional_attention", "True", "False"]),
    ("Gemma-2-9B", {"hidden_activation": "relu"}, ["hidden_activation", "'relu'"]),
    ("Mixtral-8x7B", {"num_experts_per_tok": 0}, ["num_experts_per_tok", "0"]),
    ("Mixtral-8x7B", {"num_experts_per_tok": 9}, ["num_experts_per_tok is 9", "num_local_experts, 8"]),
    ("Qwen3-30B-A3B", {"norm_topk_prob": 1}, ["norm_topk_prob", "1"]),
])  # fmt: skip
def test_variants_that_no_supported_checkpoint_uses_are_refused(name, change, named):
    with pytest.raises(ValueError, match=r".") as error:
        read_config(PUBLISHED[name].fields | change)
    assert [word for word in named if word not in str(error.value)] == []


LLAMA3_NAMES = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
SCALINGS = {  # each with the fields that transformers requires
    "linear": {"rope_type": "linear", "factor": 2.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "llama3": LLAMA3_SCALING,
    "yarn": YARN,
    "longrope": {"type": "longrope", "short_factor": [1.0] * 64, "long_factor": [2.0] * 64, "factor": 2.0},
}


def assert_scaling_refused(scaling: dict[str, Any], named: list[str], **rest) -> None:
    with pytest.raises(ValueError, match=r".") as error:
        read_config(PUBLISHED["Llama-2-7B"].fields | rest | {"rope_scaling": scaling})
    assert [word for word in named if word not in str(error.value)] == []


@pytest.mark.parametrize(("kind", "missing"), [
    *((kind, "factor") for kind in ("linear", "dynamic", "yarn")),
    *(("llama3", name) for name in LLAMA3_NAMES),
    ("longrope", "short_factor"), ("longrope", "long_factor"),
])  # fmt: skip
def test_a_scaling_is_not_guessed(kind, missing):
    scaling = {name: value for name, value in SCALINGS[kind].items() if name != missing}
    assert_scaling_refused(scaling, [missing, "expected"])


@pytest.mark.parametrize("kind", SCALINGS)
def test_a_scaling_extends_the_context(kind):
    read_config(PUBLISHED["Llama-2-7B"].fields | {"rope_scaling": SCALINGS[kind] | {"factor": 1.0}})
    assert_scaling_refused(SCALINGS[kind] | {"factor": 0.5}, ["factor", "0.5", "at least 1"])


@pytest.mark.parametrize(("kind", "change", "rest", "named"), [
    ("llama3", {"low_freq_factor": 4.0}, {}, ["low_freq_factor", "4.0", "less than high_freq_factor 4.0"]),
    ("yarn", {}, {"rope_theta": 1.0}, ["rope_theta", "1.0", "at least 2"]),
    ("yarn", {"beta_fast": 0.5}, {}, ["beta_fast", "0.5", "beta_slow 1.0"]),
    ("dynamic", {}, {"head_dim": 2}, ["head_dim", "2", "at least 4"]),
    ("linear", {"factor": 3e38}, {"rope_theta": 3e38}, ["rope_theta", "3e+38", "frequencies"]),
    ("longrope", {"short_factor": [0.0] * 64}, {}, ["short_factor[0]", "0.0", "number"]),
    ("longrope", {"long_factor": [1.0] * 63 + [True]}, {}, ["long_factor[63]", "True", "number"]),
    ("longrope", {"long_factor": [2.0] * 63}, {}, ["long_factor", "63", "64"]),
    ("longrope", {"original_max_position_embeddings": 1}, {}, ["original_max_position_embeddings", "at least 2"]),
])  # fmt: skip
def test_scalings_without_meaning_are_refused(kind, change, rest, named):
    assert_scaling_refused(SCALINGS[kind] | change, named, **rest)


def test_fields_without_effect_are_passed_over():
    fields = PUBLISHED["Llama-2-7B"].fields
    harmless = {"is_encoder_decoder": False, "add_cross_attention": None}
    harmless |= {"attention_dropout": 0.1, "bos_token_id": 1, "use_cache": True, "transformers_version": "4.40"}
    assert read_config(fields | harmless | {"quantization_config": None}) == read_config(fields)


ODD = ("x", [], ["x"], [1], {}, {"x": 1}, {"full_attention": 3}, -1, 0, 1.5, True, None, math.nan, math.inf, 2**70,
       10**400, [["a"]])  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_any_odd_value_is_read_or_refused(name):
    """By a ValueError, never by whatever breaks on it first; also inside the scaling, and in the frequencies."""
    fields = PUBLISHED[name].fields
    scaling = fields.get("rope_scaling", {})
    optional = ("rope_theta", "rope_parameters", "layer_types", "max_window_layers", "partial_rotary_factor")
    changed = [{field: odd} for field in (*fields, *optional) for odd in ODD]
    changed += [{"rope_scaling": scaling | {field: odd}} for field in scaling for odd in ODD]
    refused = 0
    for change in changed:
        try:
            config = read_config(fields | change)
        except ValueError:
            refused += 1
        else:
            assert all(f > 0 for f in config.layers[0].rope.frequencies(config.context)[0])
    assert refused > len(changed) // 4


@pytest.mark.parametrize("content", ["{", "[]", "", "\xff"])
def test_a_file_that_is_no_json_object(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(ValueError, match=r"config\.json"):
        read_config(tmp_path)


def test_a_folder_and_a_file_read_alike(tmp_path):
    fields = PUBLISHED["Qwen3-8B"].fields
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(fields))
    assert read_config(tmp_path) == read_config(tmp_path / "config.json") == read_config(fields)
