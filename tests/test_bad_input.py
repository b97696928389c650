"""What cannot be served is refused before any device work, by an error that names field, value and range."""

import json

import pytest

from jaxinfer.decode.sampling_params import SamplingParams
from jaxinfer.engine import Options
from jaxinfer.llm import LLM
from tests.engine.tiny import CONFIG, CONTEXT, assert_clean, tiny_folder, tiny_llm

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
    "n": [0, -1, 1.5],
    "logprobs": [-1, 21],
    "prompt_logprobs": [-1, 21],
    "stop": [5, [""], [3], ""],
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
    shared = tiny_llm(tmp_path_factory.getbasetemp())
    traces = dict(shared.engine.programs.traces)
    yield shared
    assert dict(shared.engine.programs.traces) == traces
    assert_clean(shared)


def assert_names(error, words: list[str]):
    assert [word for word in words if word not in str(error.value)] == []


@pytest.mark.parametrize("name", PROMPTS)
def test_prompts(llm, name):
    prompt, words = PROMPTS[name]
    for call in (lambda: llm.generate([prompt]), lambda: llm.stream(prompt)):
        with pytest.raises(ValueError, match=r".") as error:
            call()
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
    assert not small.engine.programs.traces


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


def test_params_for_another_number_of_prompts(llm):
    with pytest.raises(ValueError, match=r"sampling_params has 2 entries for 3 prompts"):
        llm.generate(["a", "b", "c"], [SamplingParams()] * 2)


@pytest.mark.parametrize(("messages", "words"), [
    ([], ["messages", "at least one"]),
    ([{"role": "user"}], ["messages[0].content", "missing"]),
    ([{"role": 3, "content": "hi"}], ["messages[0].role", "string"]),
    ([{"role": "user", "content": "\ud800"}], ["messages[0].content", "U+D800"]),
    ("hello", ["messages"]),
])  # fmt: skip
def test_messages(llm, messages, words):
    with pytest.raises(ValueError, match="messages") as error:
        llm.chat(messages)
    assert_names(error, words)


@pytest.mark.parametrize(("options", "words"), [
    ({"max_num_seqs": 3}, ["max_num_seqs = 3", "power of two"]),
    ({"max_num_seqs": 0}, ["max_num_seqs = 0", "at least 1"]),
    ({"max_num_batched_tokens": 32}, ["max_num_batched_tokens = 32", "at least 64"]),
    ({"page_size": 12}, ["page_size = 12", "power of two"]),
    ({"num_pages": 1}, ["num_pages = 1", "at least 2"]),
    ({"steps_per_dispatch": 0}, ["steps_per_dispatch = 0", "at least 1"]),
])  # fmt: skip
def test_options(options, words):
    with pytest.raises(ValueError, match=words[0]) as error:
        Options(**options)
    assert_names(error, words)


@pytest.mark.parametrize(("arguments", "words"), [
    ({"dtype": "int4"}, ["dtype", "'int4'", "bfloat16"]),
    ({"max_model_len": 1}, ["max_model_len", "1", "at least 2"]),
    ({"tensor_parallel_size": 0}, ["tensor", "0", "at least 1"]),
    ({"tensor_parallel_size": 16}, ["16 devices", "8"]),
    ({"tensor_parallel_size": 8}, ["tensor has 8", "num_heads", "4"]),
])  # fmt: skip
def test_arguments(tmp_path_factory, arguments, words):
    with pytest.raises(ValueError, match=r".") as error:
        LLM(tiny_folder(tmp_path_factory.getbasetemp()), **arguments)
    assert_names(error, words)


@pytest.mark.parametrize(("change", "words"), [
    ({"hidden_size": -1}, ["hidden_size", "-1", "at least 1"]),
    ({"architectures": ["Unknown"]}, ["Unknown", "MistralForCausalLM"]),
    ({"num_attention_heads": "4"}, ["num_attention_heads", "'4'"]),
    ({"moe_layers": 2}, ["moe_layers"]),
])  # fmt: skip
def test_a_malformed_config(tmp_path, change, words):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | change))
    with pytest.raises(ValueError, match=r".") as error:
        LLM(tmp_path)
    assert_names(error, words)
