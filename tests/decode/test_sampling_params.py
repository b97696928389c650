"""`SamplingParams` refuses what the sampler cannot do, and says which field, which value and what is allowed."""

import math

import numpy as np
import pytest

from jaxinfer.decode.sampling_params import SamplingParams
from jaxinfer.decode.structured_params import shortened

INTEGERS = ["n", "max_tokens", "min_tokens", "top_k", "seed", "logprobs", "prompt_logprobs"]
REALS = ["temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"]
OUT_OF_RANGE = [
    ("n", 0),
    ("n", 1025),
    ("max_tokens", 0),
    ("max_tokens", -3),
    ("max_tokens", None),
    ("min_tokens", -1),
    ("temperature", -0.1),
    ("top_k", -2),
    ("top_k", 2**31),
    ("top_p", 0.0),
    ("top_p", 1.1),
    ("min_p", -0.1),
    ("min_p", 1.5),
    ("repetition_penalty", 0.0),
    ("repetition_penalty", -1.0),
    ("presence_penalty", 2.5),
    ("frequency_penalty", -2.5),
    ("seed", -1),
    ("seed", 2**32),
    ("logprobs", -1),
    ("logprobs", 21),
    ("prompt_logprobs", 21),
    ("ignore_eos", 1),
    ("ignore_eos", None),
    ("stop", 7),
    ("stop", ""),
    ("stop", ["end", ""]),
    ("stop", ["end", "x" * 1025]),
    ("stop", ["end", 7]),
    ("stop_token_ids", 7),
    ("stop_token_ids", [-1]),
    ("stop_token_ids", [1.0]),
    ("stop_token_ids", [True]),
    ("stop_token_ids", list(range(33))),
    ("logit_bias", [1, 2]),
    ("logit_bias", {-1: 1.0}),
    ("logit_bias", {"5": 1.0}),
    ("logit_bias", {5: math.nan}),
    ("logit_bias", {5: -math.inf}),
    ("logit_bias", {5: 100.5}),
    ("logit_bias", dict.fromkeys(range(301), 1.0)),
]
WRONG_TYPES = [(field, value) for field in INTEGERS for value in (True, 1.0, "1", math.nan, [1])]
WRONG_TYPES += [(field, value) for field in REALS for value in (True, "1", None, math.nan, math.inf, 1j)]


@pytest.mark.parametrize(("field", "value"), OUT_OF_RANGE + WRONG_TYPES)
def test_a_bad_value_is_refused_by_name(field, value):
    with pytest.raises(ValueError, match=rf"^SamplingParams: {field} (=|has) .+ must be ") as error:
        SamplingParams(**{field: value})
    items = value.items() if isinstance(value, dict) else value if isinstance(value, list) else []
    assert any(repr(shown)[:70] in str(error.value) for shown in [value, *items])


def test_of_a_large_value_the_beginning_is_shown():
    assert shortened("a" * 10**7) == "'" + "a" * 76 + "..."
    assert shortened([7] * 10**7) == "[" + "7, " * 25 + "7..."
    assert shortened({10**40: 1}) == "{" + "1" + "0" * 40 + ": 1}"
    assert shortened(10**5000) == "a number that is too long to write"


def test_all_problems_of_one_request_come_in_one_error():
    with pytest.raises(ValueError, match="SamplingParams") as error:
        SamplingParams(temperature=math.nan, top_p=2, stop=["", "x", 3], logit_bias={-4: 1.0, 5: 500.0, 6: 1.0})
    message = str(error.value)
    assert message.count("must be") == 6
    for expected in (
        "temperature = nan must be a number in [0, 1e+06]",
        "top_p = 2 must be a number in (0, 1]",
        "stop has ''; each must be a string that is not empty",
        "stop has 3; each",
        "logit_bias has (-4, 1.0); each",
        "logit_bias has (5, 500.0); each must be an integer in 0..2147483647 with a number in [-100, 100]",
    ):
        assert expected in message


def test_min_tokens_is_bounded_by_max_tokens():
    with pytest.raises(ValueError, match=r"min_tokens = 5 must be in 0\.\.4"):
        SamplingParams(min_tokens=5, max_tokens=4)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"temperature": 0},
        {"top_k": -1},
        {"top_k": np.int64(5), "temperature": np.float32(0.5)},
        {"min_tokens": 16},
        {"n": 1024},
        {"seed": 2**32 - 1, "logprobs": 0, "prompt_logprobs": 20},
        {"stop": "x" * 1024, "stop_token_ids": list(range(32)), "ignore_eos": True},
        {"stop": [], "stop_token_ids": [], "logit_bias": {}},
        {"logit_bias": dict.fromkeys(range(300), -100)},
        {"top_p": 1e-9, "min_p": 1, "presence_penalty": -2, "frequency_penalty": 2},
    ],
)
def test_the_ends_of_every_range_are_allowed(fields):
    params = SamplingParams(**fields)
    assert {name: getattr(params, name) for name in fields} == fields
    assert params.problems(vocab_size=300, max_model_len=16) == []


def test_problems_with_a_model_are_all_listed():
    params = SamplingParams(max_tokens=7, stop_token_ids=[99, 100], logit_bias={100: 1.0, 3: 1.0, 1000: -1.0})
    assert params.problems(vocab_size=100, max_model_len=16, prompt_tokens=10) == [
        "max_tokens = 7 must be in 1..6 (a context of 16 tokens less 10 of the prompt)",
        "logit_bias has token id 100; each must be in 0..99",
        "logit_bias has token id 1000; each must be in 0..99",
        "stop_token_ids has token id 100; each must be in 0..99",
    ]
    assert params.problems(vocab_size=1001, max_model_len=17, prompt_tokens=10) == []


@pytest.mark.parametrize(("stop", "strings"), [(None, ()), ("ab", ("ab",)), (["a", "b"], ("a", "b"))])
def test_stop_strings_come_as_a_tuple(stop, strings):
    assert SamplingParams(stop=stop).stop_strings == strings
