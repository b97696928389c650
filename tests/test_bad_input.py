"""What cannot be served is refused before any device work, by an error that names field, value and range."""

import json
import shutil

import numpy as np
import pytest

from jaxinfer.decode.sampling_params import SamplingParams
from jaxinfer.decode.speculative import Medusa
from jaxinfer.engine import Options
from jaxinfer.llm import LLM
from tests.engine.tiny import CONFIG, CONTEXT, assert_warm, tiny_folder, warm_llm

VOCABULARY = CONFIG["vocab_size"]
PROMPTS = {
    "empty text": ("", ["empty", "at least one token"]),
    "no tokens": ([], ["empty", "at least one token"]),
    "longer than the context": ([1] * (CONTEXT + 4), [str(CONTEXT + 4), str(CONTEXT - 1), f"context of {CONTEXT}"]),
    "as long as the context": ([1] * CONTEXT, [f"{CONTEXT} tokens", str(CONTEXT - 1)]),
    "a token past the vocabulary": ([1, VOCABULARY], [f"token id {VOCABULARY}", "position 1", f"0..{VOCABULARY - 1}"]),
    "a negative token": ([-1], ["token id -1", "position 0", f"0..{VOCABULARY - 1}"]),
    "a token that is no integer": ([1, 2.5], ["integer token ids"]),
    "a token that is a flag": ([True], ["integer token ids"]),
    "a lone surrogate": ("ab\ud800c", ["prompt", "surrogate", "U+D800", "position 2"]),
    "bytes": (b"ab", ["b'ab'", "string", "token ids"]),
    "no prompt at all": (None, ["string", "token ids"]),
    "a number": (5.0, ["string", "token ids"]),
}
FIELDS = {  # each refused by SamplingParams alone
    "max_tokens": [0, -1, 1.5, None, True],
    "min_tokens": [-1, "1"],
    "temperature": [float("nan"), float("inf"), -0.1, "hot", None],
    "top_k": [-2, 1.5, float("nan")],
    "top_p": [0.0, 1.1, -0.5, float("nan")],
    "min_p": [-0.1, 1.1, float("nan")],
    "repetition_penalty": [0.0, -1.0, float("nan"), float("inf")],
    "presence_penalty": [2.1, -2.1, float("nan")],
    "frequency_penalty": [2.1, -2.1, float("nan")],
    "seed": [-1, 2**32, 0.5],
    "n": [0, -1, 1.5, 1025],
    "logprobs": [-1, 21],
    "prompt_logprobs": [-1, 21],
    "stop": [5, [""], [3], "", "\ud800", ["a\udfff"]],
    "stop_token_ids": [[-1], ["a"], 7],
    "logit_bias": [{-1: 1.0}, {1: float("nan")}, {1: 101.0}, [1]],
    "ignore_eos": [None, 1],
}
REQUESTS = {  # each refused for this model
    "max_tokens past the context": (SamplingParams(max_tokens=CONTEXT), ["max_tokens", str(CONTEXT), "1.."]),
    "an unknown stop token": (SamplingParams(stop_token_ids=[VOCABULARY]), ["stop_token_ids", str(VOCABULARY - 1)]),
    "an unknown biased token": (SamplingParams(logit_bias={VOCABULARY: 1.0}), ["logit_bias", str(VOCABULARY - 1)]),
}


@pytest.fixture
def llm(tmp_path_factory):
    """An engine in which nothing may be traced or left."""
    shared = warm_llm(tmp_path_factory.getbasetemp())
    yield shared
    assert_warm(shared)


def assert_names(error, words: list[str]):
    assert [word for word in words if word not in str(error.value)] == []


@pytest.mark.parametrize("name", PROMPTS)
def test_prompts(llm, name):
    prompt, words = PROMPTS[name]
    for call in (lambda: llm.generate([prompt]), lambda: llm.stream(prompt)):
        with pytest.raises(ValueError, match=r".") as error:
            call()
        assert_names(error, words)


@pytest.mark.parametrize("prompts", [None, 5, {"prompt": "a"}, b"ab", bytearray(b"ab"), np.array(5), iter(["a"])])
def test_prompts_of_another_type(llm, prompts):
    with pytest.raises(ValueError, match=r"^prompts = .+ must be a string, a list of integer token ids, or a list"):
        llm.generate(prompts)


@pytest.mark.parametrize(("params", "words"), [
    ({"temperature": 0}, ["sampling_params = {'temperature': 0}", "SamplingParams"]),
    (0.5, ["sampling_params = 0.5", "SamplingParams"]),
    ([None], ["sampling_params", "None", "SamplingParams"]),
])  # fmt: skip
def test_sampling_params_of_another_type(llm, params, words):
    calls = (llm.generate, llm.stream, lambda text, params: llm.chat([{"role": "user", "content": text}], params))
    for call in calls:
        with pytest.raises(ValueError, match="must be") as error:
            call("a", params)
        assert_names(error, words)


@pytest.mark.parametrize("field", FIELDS)
def test_sampling_fields(field):
    for value in FIELDS[field]:
        with pytest.raises(ValueError, match=field) as error:
            SamplingParams(**{field: value})
        inner = value[0] if isinstance(value, list) and value else value
        inner = next(iter(inner.items())) if isinstance(inner, dict) else inner
        assert_names(error, [repr(inner), "must"])


@pytest.mark.parametrize("name", REQUESTS)
def test_requests_that_the_model_cannot_serve(llm, name):
    params, words = REQUESTS[name]
    with pytest.raises(ValueError, match=words[0]) as error:
        llm.generate("hello", params)
    assert_names(error, words)


def test_a_request_that_the_cache_can_never_hold(tmp_path_factory):
    small = LLM(tiny_folder(tmp_path_factory.getbasetemp()), options=Options(max_num_seqs=1, num_pages=3))
    with pytest.raises(ValueError, match=r"need 4 pages of 16 tokens; the cache has 2"):
        small.generate([[1] * 40], SamplingParams(max_tokens=20))
    assert not small.engine.runner.programs.traces


def test_one_error_lists_every_prompt_and_nothing_runs(llm, monkeypatch):
    steps = []
    monkeypatch.setattr(llm.engine, "step", lambda: steps.append(1) or [])
    prompts = ["fine", "", [VOCABULARY, -3], "fine too", "\udfff", "long"]
    params = [SamplingParams()] * 5 + [SamplingParams(max_tokens=CONTEXT, stop_token_ids=[VOCABULARY + 1])]
    with pytest.raises(ValueError, match="prompt 1") as error:
        llm.generate(prompts, params)
    problems = str(error.value).split("; prompt ")
    found = {int(problem.removeprefix("prompt ")[0]) for problem in problems}
    assert found == {1, 2, 4, 5}
    assert_names(error, ["empty", f"token id {VOCABULARY}", "token id -3", "U+DFFF", "max_tokens", "stop_token_ids"])
    assert "fine" not in str(error.value)
    assert not steps


def test_a_stream_is_checked_when_it_is_asked_for(llm):
    with pytest.raises(ValueError, match=r"n = 2 must be 1"):
        llm.stream("hello", SamplingParams(n=2))
    with pytest.raises(ValueError, match=r"prompt_logprobs = 0 must be None in a stream"):
        llm.stream("hello", SamplingParams(prompt_logprobs=0))
    with pytest.raises(ValueError, match=r"sampling_params = \[.+\] must be one SamplingParams in a"):
        llm.stream("hello", [SamplingParams()])


def test_a_stream_lists_the_problems_of_prompt_and_params(llm):
    with pytest.raises(ValueError, match="n = 2") as error:
        llm.stream([VOCABULARY], SamplingParams(n=2, prompt_logprobs=0))
    assert_names(error, [f"token id {VOCABULARY}", "prompt_logprobs = 0"])
    with pytest.raises(ValueError, match="sampling_params = ") as error:
        llm.stream([VOCABULARY], [SamplingParams()])
    assert_names(error, [f"token id {VOCABULARY}"])


def test_of_many_bad_tokens_the_first_few_are_named(llm):
    with pytest.raises(ValueError, match="position 0") as error:
        llm.generate([["fine"], [VOCABULARY] * 200_000])
    assert_names(error, ["prompt 0", "and 199992 more", "200000 tokens", f"context of {CONTEXT}"])
    assert len(str(error.value)) < 2000
    with pytest.raises(ValueError, match=r"stop has .* and 24 more") as error:
        SamplingParams(stop=[""] * 32, max_tokens=0)
    assert_names(error, ["max_tokens = 0"])


@pytest.mark.parametrize("call", ["generate", "chat"])
def test_one_error_lists_bad_params_and_bad_prompts(llm, call):
    inputs = ["", "fine", "\ud800", "fine"]
    if call == "chat":
        inputs = [[{"role": "user", "content": text} if text else {}] for text in inputs]
    params = [None, SamplingParams(max_tokens=CONTEXT), SamplingParams(), {"n": 1}]
    with pytest.raises(ValueError, match=r"sampling_params\[0\] = None") as error:
        getattr(llm, call)(inputs, params)
    what = "prompt" if call == "generate" else "conversation"
    assert_names(error, ["sampling_params[3] = {'n': 1}", f"{what} 0: ", f"{what} 1: max_tokens", f"{what} 2: "])
    assert f"{what} 3" not in str(error.value)
    for wrong in (params[:2], 5):
        with pytest.raises(ValueError, match="sampling_params") as error:
            getattr(llm, call)(inputs, wrong)
        assert_names(error, [f"{what} 0: ", f"{what} 2: "])


def test_params_for_another_number_of_prompts(llm):
    with pytest.raises(ValueError, match=r"sampling_params has 2 entries for 3 prompts"):
        llm.generate(["a", "b", "c"], [SamplingParams()] * 2)


@pytest.mark.parametrize(("messages", "words"), [
    ([], ["messages", "at least one"]),
    ([{"role": "user"}], ["messages[0].content", "missing"]),
    ([{"role": 3, "content": "hi"}], ["messages[0].role", "string"]),
    ([{"role": "user", "content": "\ud800"}], ["messages[0].content", "U+D800"]),
    ("hello", ["messages", "'hello'"]),
    (5, ["messages", "5"]),
    (None, ["messages", "None"]),
    ([None], ["messages", "None"]),
])  # fmt: skip
def test_messages(llm, messages, words):
    with pytest.raises(ValueError, match="messages") as error:
        llm.chat(messages)
    assert_names(error, words)


def test_one_error_lists_every_conversation(llm):
    long = [{"role": "user", "content": "x" * CONTEXT}]
    with pytest.raises(ValueError, match=r"^conversation 0: ") as error:
        llm.chat([[{"role": 3, "content": "hi"}], [{"role": "user", "content": "hi"}], [], long])
    found = [problem[0] for problem in str(error.value).removeprefix("conversation ").split("; conversation ")]
    assert found == ["0", "2", "3"]
    assert_names(error, ["messages[0].role", "at least one message", f"context of {CONTEXT}"])


@pytest.mark.parametrize(("options", "words"), [
    ({"max_num_seqs": 3}, ["max_num_seqs = 3", "power of two"]),
    ({"max_num_seqs": 0}, ["max_num_seqs = 0", "1..4096"]),
    ({"max_num_seqs": 2**30}, ["max_num_seqs = 1073741824", "1..4096"]),
    ({"max_num_batched_tokens": 2**40}, ["max_num_batched_tokens = 1099511627776", "64..1048576"]),
    ({"steps_per_dispatch": 10**9}, ["steps_per_dispatch = 1000000000", "1..1024"]),
    ({"max_slowdown": 0.5}, ["max_slowdown = 0.5", "at least 1"]),
    ({"max_slowdown": float("nan")}, ["max_slowdown = nan", "at least 1"]),
    ({"max_slowdown": True}, ["max_slowdown = True", "at least 1"]),
    ({"max_num_seqs": 128, "max_num_batched_tokens": 128}, ["max_num_batched_tokens = 128", "max_num_seqs = 128"]),
    ({"max_num_batched_tokens": 32}, ["max_num_batched_tokens = 32", "64..1048576"]),
    ({"page_size": 12}, ["page_size = 12", "power of two"]),
    ({"cache_dtype": "fp8"}, ["cache_dtype = 'fp8'", "float32, bfloat16, float16, int8, float8_e4m3fn"]),
    ({"num_pages": 1}, ["num_pages = 1", "at least 2"]),
    ({"enable_prefix_caching": 1}, ["enable_prefix_caching = 1", "True or False"]),
    ({"always_speculate": "no"}, ["always_speculate = 'no'", "True or False"]),
    ({"adaptive_speculation": 1}, ["adaptive_speculation = 1", "True or False"]),
    ({"adaptive_speculation": True}, ["speculation = None", "one of DraftModel, EarlyExit, PromptLookup"]),
    (
        {"adaptive_speculation": True, "speculation": Medusa()},
        ["adaptive_speculation = True", "speculation = Medusa(", "tokens one after the other"],
    ),
    ({"speculation": "lookup"}, ["speculation = 'lookup'", "a method of speculation, or None"]),
    ({"max_waiting_time": 0}, ["max_waiting_time = 0", "above 0"]),
    ({"max_waiting_time": float("nan")}, ["max_waiting_time = nan", "above 0"]),
    ({"max_waiting_time": "1"}, ["max_waiting_time = '1'", "above 0"]),
    ({"steps_per_dispatch": 0}, ["steps_per_dispatch = 0", "1..1024"]),
])  # fmt: skip
def test_options(options, words):
    with pytest.raises(ValueError, match=words[0]) as error:
        Options(**options)
    assert_names(error, words)


def test_more_pages_than_fit_are_refused_before_they_are_allocated(tmp_path_factory):
    folder = tiny_folder(tmp_path_factory.getbasetemp())
    with pytest.raises(
        ValueError, match=r"num_pages = 1000000000000 must be in 2\.\.\d+, which fit beside the weights"
    ):
        LLM(folder, options=Options(num_pages=10**12))


@pytest.mark.parametrize(("arguments", "words"), [
    ({"dtype": "int4"}, ["dtype", "'int4'", "bfloat16"]),
    ({"model": 5}, ["model = 5", "folder", "org/name"]),
    ({"model": None}, ["model = None", "folder", "org/name"]),
    ({"model": ""}, ["model = ''", "folder", "org/name"]),
    ({"dtype": np.dtype("float32")}, ["dtype", "'float32'", "bfloat16"]),
    ({"max_model_len": 1}, ["max_model_len", "1", "at least 2"]),
    ({"max_model_len": "96"}, ["max_model_len = '96'", "integer"]),
    ({"max_model_len": 40.5}, ["max_model_len = 40.5", "integer"]),
    ({"max_model_len": CONTEXT + 1}, [f"max_model_len = {CONTEXT + 1}", f"2..{CONTEXT}", "context"]),
    ({"tensor_parallel_size": "2"}, ["tensor_parallel_size = '2'", "integer"]),
    ({"tensor_parallel_size": 1.0}, ["tensor_parallel_size = 1.0", "integer"]),
    ({"seed": -1}, ["seed = -1", "at least 0"]),
    ({"seed": "1"}, ["seed = '1'", "integer"]),
    ({"warm_up": 1}, ["warm_up = 1", "True or False"]),
    ({"options": {"max_num_seqs": 2}}, ["options = {'max_num_seqs': 2}", "Options"]),
    ({"tensor_parallel_size": 0}, ["tensor_parallel_size = 0", "in 1..8, the devices here"]),
    ({"tensor_parallel_size": 16}, ["tensor_parallel_size = 16", "in 1..8, the devices here"]),
    ({"tensor_parallel_size": 8}, ["tensor has 8", "num_heads", "4"]),
    ({"pipeline_parallel_size": True}, ["pipeline_parallel_size = True", "integer"]),
    ({"pipeline_parallel_size": 9}, ["pipeline_parallel_size = 9", "in 1..8, the devices here"]),
    ({"pipeline_parallel_size": 3, "tensor_parallel_size": 4},
     ["pipeline_parallel_size = 3", "tensor_parallel_size = 4", "needs 12 devices", "there are 8", "in 1..2"]),
    ({"pipeline_parallel_size": 3}, ["pipe has 3 stages", "num_layers 2"]),
])  # fmt: skip
def test_arguments(tmp_path_factory, arguments, words):
    with pytest.raises(ValueError, match=r".") as error:
        LLM(**{"model": tiny_folder(tmp_path_factory.getbasetemp())} | arguments)
    assert_names(error, words)


@pytest.mark.parametrize(("scaling", "adapts"), [
    ({"rope_type": "linear", "factor": 2.0}, False),
    ({"rope_type": "dynamic", "factor": 2.0}, True),
    ({"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}, True),
])  # fmt: skip
def test_a_context_past_the_checkpoints_own(tmp_path, scaling, adapts):
    """Only rotary embeddings that adapt to the context get past it, here to the tokenizer that is missing."""
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | {"rope_scaling": scaling}))
    error, message = (
        (FileNotFoundError, r"tokenizer\.json") if adapts else (ValueError, f"= 200 must be in 2..{CONTEXT}")
    )
    with pytest.raises(error, match=message):
        LLM(tmp_path, max_model_len=200)


@pytest.mark.parametrize(("eos", "words"), [
    (list(range(9)), ["eos_token_id has 10 token ids", "at most 8"]),  # the tokenizer's own besides
    ([3, VOCABULARY], [f"eos_token_id has token id {VOCABULARY}", f"0..{VOCABULARY - 1}"]),
])  # fmt: skip
def test_end_of_sequence_tokens(tmp_path, tmp_path_factory, eos, words):
    for file in tiny_folder(tmp_path_factory.getbasetemp()).glob("*.json"):
        shutil.copy(file, tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
    with pytest.raises(ValueError, match="eos_token_id") as error:
        LLM(tmp_path)
    assert_names(error, [str(tmp_path), *words])


MIXTRAL = {"architectures": ["MixtralForCausalLM"], "num_local_experts": 8}
GEMMA2 = {"architectures": ["Gemma2ForCausalLM"]}
LONGROPE = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [1.0] * 4}


@pytest.mark.parametrize(("change", "words"), [
    ({"hidden_size": -1}, ["hidden_size", "-1", "at least 1"]),
    ({"architectures": ["Unknown"]}, ["Unknown", "MistralForCausalLM"]),
    ({"num_attention_heads": "4"}, ["num_attention_heads", "'4'"]),
    ({"num_key_value_heads": 3}, ["config.json", "num_key_value_heads is 3", "num_attention_heads, 4"]),
    ({"moe_layers": 2}, ["moe_layers"]),
    (MIXTRAL | {"num_experts_per_tok": 9},
     ["config.json: num_experts_per_tok is 9; expected at most num_local_experts, 8"]),
    ({"architectures": ["GptOssForCausalLM"], "experts_per_token": 129},
     ["config.json: experts_per_token is 129; expected at most num_local_experts, 128"]),
    ({"rope_scaling": LONGROPE | {"short_factor": [1.0]}},
     ["config.json: rope_scaling.short_factor has 1 entries; expected 4"]),
    ({"rope_scaling": LONGROPE | {"long_factor": [1.0, 1.0, 0.0, 1.0]}},
     ["config.json: rope_scaling.long_factor[2] is 0.0; expected a number"]),
    ({"rope_scaling": {"type": "linear"}}, ["config.json: rope_scaling.factor is missing or null; expected a number"]),
    ({"rope_scaling": {"type": "cubic"}}, ["config.json: rope_scaling.type is 'cubic'; expected one of"]),
    ({"rope_parameters": {"full_attention": {"rope_type": "linear", "factor": -1.0}}},
     ["config.json: rope_parameters.full_attention.factor is -1.0; expected a number"]),
    ({"original_max_position_embeddings": 1, "rope_scaling": LONGROPE},
     ["config.json: original_max_position_embeddings is 1; expected an integer of at least 2"]),
    ({"partial_rotary_factor": 0.4}, ["config.json: partial_rotary_factor 0.4 of head_dim 8"]),
    ({"rope_parameters": {"partial_rotary_factor": 0.4}}, ["config.json: rope_parameters.partial_rotary_factor 0.4"]),
    ({"rope_parameters": {"rope_theta": 1.0}}, ["config.json: rope_parameters.rope_theta is 1.0", "at least 2"]),
    ({"rope_parameters": {"rope_theta": 1e4}, "rope_scaling": {"type": "linear", "factor": 2.0}}, ["rope_scaling"]),
    (GEMMA2 | {"sliding_window": None, "sliding_window_size": 4096},
     ["config.json: sliding_window is null; expected an integer of at least 1", "1 local layers"]),
    (GEMMA2 | {"sliding_window_size": 9}, ["config.json: sliding_window_size is 9; expected sliding_window's 8"]),
    ({"architectures": ["Gemma3ForCausalLM"], "sliding_window": None}, ["config.json: sliding_window is null"]),
    ({"architectures": ["GptOssForCausalLM"], "sliding_window": None}, ["config.json: sliding_window is null"]),
    ({"torch_dtype": "float64"}, ["config.json: torch_dtype is 'float64'; expected one of", "bfloat16"]),
    ({"torch_dtype": None, "dtype": "float64"}, ["config.json: dtype is 'float64'; expected one of", "bfloat16"]),
    ({"dtype": "float64"}, ["config.json: dtype is 'float64'; expected one of", "bfloat16"]),
    ({"dtype": "bfloat16"}, ["config.json: torch_dtype is 'float32' and dtype is 'bfloat16'; expected one dtype"]),
])  # fmt: skip
def test_a_malformed_config(tmp_path, change, words):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | change))
    with pytest.raises(ValueError, match=r".") as error:
        LLM(tmp_path)
    assert_names(error, words)
