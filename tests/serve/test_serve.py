"""The server as OpenAI's own client sees it: over a real socket, against the embedded demo model."""

import asyncio
import http.client
import json
import re
import signal
import socket
import threading
import time
from collections import defaultdict

import openai
import pytest
from pydantic import ValidationError

from jaxinfer.decode.sampling_params import SamplingParams
from jaxinfer.engine import Options
from jaxinfer.llm import LLM
from jaxinfer.serve.protocol import ChatBody, CompletionBody
from tests.serve.running import DTYPE, OPTIONS, serving

MESSAGES = [{"role": "user", "content": "Add two numbers"}]
LONG = {"max_tokens": 900, "temperature": 0, "extra_body": {"ignore_eos": True}}
ABORTED = 'jaxinfer_requests_total{reason="abort"}'
# Of completions: the prompt, what OpenAI's client passes, what vLLM has besides, and the same for `LLM.generate`.
CASES = {
    "greedy": ("def fibonacci(n):", {"max_tokens": 24, "temperature": 0}, {}),
    "sampled": ("import os\n", {"max_tokens": 20, "temperature": 0.9, "top_p": 0.9, "seed": 7}, {"top_k": 40}),
    "several": ("class Stack:", {"max_tokens": 12, "n": 3, "seed": 11}, {"min_p": 0.05}),
    "stop": ("def f(x):", {"max_tokens": 40, "temperature": 0, "stop": ["return", "never"]},
             {"min_tokens": 1, "priority": -1}),
    "logprobs": ("for i in", {"max_tokens": 9, "temperature": 0, "logprobs": 3}, {"ignore_eos": True}),
    "penalties": ("x = [1, 2", {"max_tokens": 12, "temperature": 0, "frequency_penalty": 1.0, "logit_bias": {"7": -5}},
                  {"repetition_penalty": 1.2}),
}  # fmt: skip


@pytest.fixture(scope="module")
def server():
    with serving(max_waiting=4) as running:
        yield running


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def llm():
    """One request at a time: what the server runs together must be the same."""
    return LLM(dtype=DTYPE, options=Options(**OPTIONS | {"max_num_seqs": 1}))


@pytest.fixture(scope="module")
def expected(llm):
    """What `LLM.generate` answers in each case."""
    params = [sampling_params(given | more) for _, given, more in CASES.values()]
    answers = llm.generate([prompt for prompt, _, _ in CASES.values()], params)
    return dict(zip(CASES, answers, strict=True))


def sampling_params(options):
    bias = {int(token): value for token, value in options.get("logit_bias", {}).items()} or None
    options = {name: value for name, value in options.items() if name != "priority"}
    return SamplingParams(**options | {"logit_bias": bias})


def whole(completion):
    """Text, reason and log-probabilities of every choice, by index, and the usage."""
    choices = {choice.index: (choice.text, choice.finish_reason, choice.logprobs) for choice in completion.choices}
    return choices, completion.usage.model_dump(exclude_none=True)


def joined(stream):
    """The same of a stream."""
    texts, reasons, logprobs, usage = defaultdict(str), {}, {}, None
    for chunk in stream:
        assert (chunk.usage is None) == bool(chunk.choices)
        usage = chunk.usage or usage
        for choice in chunk.choices:
            assert choice.index not in reasons
            texts[choice.index] += choice.text
            if choice.finish_reason:
                reasons[choice.index] = choice.finish_reason
            if choice.logprobs:
                into = logprobs.setdefault(choice.index, defaultdict(list))
                for name, values in choice.logprobs.model_dump().items():
                    into[name] += values
    choices = {index: (texts[index], reasons[index], logprobs.get(index)) for index in texts}
    return choices, usage.model_dump(exclude_none=True)


def assert_same(found, answer, tokenizer):
    """What came over HTTP is what `LLM` returned."""
    choices, usage = found
    assert sorted(choices) == list(range(len(answer.outputs)))
    for output in answer.outputs:
        text, reason, logprobs = choices[output.index]
        assert (text, reason) == (output.text, output.finish_reason)
        assert (logprobs is None) == (output.logprobs is None)
        if logprobs is not None:
            logprobs = logprobs if isinstance(logprobs, dict) else logprobs.model_dump()
            assert logprobs["tokens"] == [tokenizer.decode([entry.token]) for entry in output.logprobs]
            values = [entry.logprob for entry in output.logprobs]
            assert logprobs["token_logprobs"] == pytest.approx(values, abs=1e-4)
            for told, entry in zip(logprobs["top_logprobs"], output.logprobs, strict=True):
                top = {tokenizer.decode([token]): value for token, value in entry.top}
                assert told == pytest.approx(top, abs=1e-4)
            assert logprobs["text_offset"] == [
                len("".join(logprobs["tokens"][:index])) for index in range(len(values))
            ]
    new = sum(len(output.token_ids) for output in answer.outputs)
    prompt = len(answer.prompt_token_ids)
    assert usage == {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}


# --- answers


@pytest.mark.parametrize("name", CASES)
def test_streamed_is_not_streamed_is_generate(client, expected, llm, name):
    prompt, given, more = CASES[name]
    options = {"model": "demo", "prompt": prompt, **given, "extra_body": more}
    assert_same(whole(client.completions.create(**options)), expected[name], llm.tokenizer)
    with client.completions.create(**options, stream=True, stream_options={"include_usage": True}) as stream:
        assert_same(joined(stream), expected[name], llm.tokenizer)


def test_requests_that_run_together_are_the_same(server, expected, llm):
    async def ask():
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            return await asyncio.gather(
                *(
                    client.completions.create(model="demo", prompt=prompt, **given, extra_body=more)
                    for prompt, given, more in CASES.values()
                )
            )

    for name, completion in zip(CASES, asyncio.run(ask()), strict=True):
        assert_same(whole(completion), expected[name], llm.tokenizer)


def test_several_prompts_of_one_request(client, llm):
    prompts = [llm.tokenizer.encode("import "), llm.tokenizer.encode("def f(")]
    answers = llm.generate(prompts, SamplingParams(max_tokens=6, temperature=0.8, n=2, seed=3))
    completion = client.completions.create(model="demo", prompt=prompts, max_tokens=6, temperature=0.8, n=2, seed=3)
    assert [choice.text for choice in completion.choices] == [
        output.text for answer in answers for output in answer.outputs
    ]
    assert [choice.index for choice in completion.choices] == [0, 1, 2, 3]


def test_chat(client, llm):
    params = SamplingParams(max_tokens=16, temperature=0, logprobs=2)
    (answer,) = llm.chat(MESSAGES, params)
    (output,) = answer.outputs
    options = {"model": "demo", "messages": MESSAGES, "max_completion_tokens": 16, "temperature": 0}
    completion = client.chat.completions.create(**options, logprobs=True, top_logprobs=2)
    (choice,) = completion.choices
    assert (choice.message.role, choice.message.content) == ("assistant", output.text)
    assert choice.finish_reason == "length"
    assert [entry.logprob for entry in choice.logprobs.content] == pytest.approx(
        [entry.logprob for entry in output.logprobs], abs=1e-4
    )
    for told, entry in zip(choice.logprobs.content, output.logprobs, strict=True):
        assert told.token == llm.tokenizer.decode([entry.token]) == bytes(told.bytes).decode()
        assert [top.token for top in told.top_logprobs] == [llm.tokenizer.decode([token]) for token, _ in entry.top]
    assert completion.usage.prompt_tokens == len(answer.prompt_token_ids)

    with client.chat.completions.create(**options, stream=True) as stream:
        chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content for chunk in chunks) == output.text
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices[0].finish_reason] == ["length"]
    assert all(chunk.usage is None for chunk in chunks)

    # An answer goes back as it came, and parts of text are a text.
    turns = [*MESSAGES, choice.message, {"role": "user", "content": [{"type": "text", "text": "a"}]}]
    again = client.chat.completions.create(model="demo", messages=turns, max_tokens=1)
    given = [*MESSAGES, {"role": "assistant", "content": output.text}, {"role": "user", "content": "a"}]
    assert again.usage.prompt_tokens == len(llm.chat(given, SamplingParams(max_tokens=1))[0].prompt_token_ids)


def test_a_chat_without_max_tokens_may_fill_the_context(client, llm):
    """It ends at the stop string, and the engine is told: its pages are free."""
    options = {"model": "demo", "messages": MESSAGES, "temperature": 0}
    ten = client.chat.completions.create(**options, max_tokens=10).choices[0].message.content
    stop = ten[-3:]
    (choice,) = client.chat.completions.create(**options, stop=stop).choices
    assert choice.message.content == ten[: ten.find(stop)]
    assert (choice.finish_reason, choice.model_extra["stop_reason"]) == ("stop", stop)


def test_models_tokens_and_health(server, client, llm):
    (model,) = client.models.list()
    assert (model.id, client.models.retrieve("demo").id) == ("demo", "demo")
    text = "def f(é):"
    status, answer = server.post("/tokenize", {"model": "demo", "prompt": text})
    ids = llm.tokenizer.encode(text)
    assert (status, answer) == (200, {"tokens": ids, "count": len(ids), "max_model_len": 1024})
    status, answer = server.post("/tokenize", {"prompt": text, "add_special_tokens": False})
    assert answer["tokens"] == ids[1:]
    status, answer = server.post("/tokenize", {"messages": MESSAGES})
    assert answer["tokens"] == llm.chat(MESSAGES, SamplingParams(max_tokens=1))[0].prompt_token_ids
    assert server.ask("GET", "/health")[0] == 200


def test_metrics_count_what_was_asked(server, client):
    server.wait_for(running_requests=0)
    before = server.figures()
    client.completions.create(model="demo", prompt=[1, 2, 3], max_tokens=9, n=2, extra_body={"ignore_eos": True})
    after = server.figures()
    grown = {name: after[name] - before.get(name, 0) for name in after}
    assert grown["jaxinfer_prompt_tokens_total"] == 3
    assert grown["jaxinfer_tokens_total"] == 18
    assert grown['jaxinfer_requests_total{reason="length"}'] == 2
    assert grown["jaxinfer_time_to_first_token_seconds_count"] == 2
    assert grown["jaxinfer_queue_seconds_count"] == 2
    assert 0 < grown["jaxinfer_queue_seconds_sum"] < grown["jaxinfer_time_to_first_token_seconds_sum"]
    assert after["jaxinfer_cache_pages"] > 0
    assert after["jaxinfer_cache_pages_used"] == 0


def test_the_page_draws_what_the_metrics_have(server):
    """Its script names figures that are there, under no name but these."""
    status, headers, page = server.ask("GET", "/")
    assert (status, headers["content-type"]) == (200, "text/html; charset=utf-8")
    named = re.findall(r"\bjaxinfer_\w+", page.decode())
    found = server.figures()
    assert len(named) >= 7
    assert [name for name in named if name not in found and f"{name}_sum" not in found] == []


# --- what cannot be served

COMPLETION, CHAT = "/v1/completions", "/v1/chat/completions"
BAD = {  # path, body, status, param, words of the message
    "no JSON": (COMPLETION, b'{"prompt": "a"', 400, None, "not valid JSON"),
    "no object": (COMPLETION, b"[]", 400, None, "the body"),
    "nothing": (COMPLETION, b"", 400, None, "not valid JSON"),
    "deep": (COMPLETION, b'{"prompt": ' + b"[" * 10_000, 400, None, "not valid JSON"),
    "crowded": (COMPLETION, b'{"prompt": ' + b"[" * 100_000, 413, None, "20000 strings, lists and objects"),
    "no UTF-8": (COMPLETION, b'{"prompt": "\xff"}', 400, None, "not valid JSON"),
    "a lone surrogate": (COMPLETION, b'{"prompt": "a\\ud800"}', 400, None, "end of hex escape"),
    "large": (COMPLETION, b'{"prompt": "' + b"a" * 10_000_000 + b'"}', 413, None, "8388608 bytes"),
    "no prompt": (COMPLETION, {"model": "demo"}, 400, "prompt", "missing"),
    "an empty prompt": (COMPLETION, {"prompt": ""}, 400, "prompt", "at least one token"),
    "no prompts": (COMPLETION, {"prompt": []}, 400, "prompt", "at least one token"),
    "a prompt of another type": (COMPLETION, {"prompt": 5}, 400, "prompt", "valid string"),
    "half a prompt": (COMPLETION, {"prompt": [1, 2, 3.5]}, 400, "prompt[2]", "prompt[2]: Input should be a valid int"),
    "half of the prompts": (COMPLETION, {"prompt": [[1], [2, "a"]]}, 400, "prompt[1][1]", "valid integer, got 'a'"),
    "a prompt of strange tokens": (COMPLETION, {"prompt": [1, 4096]}, 400, "prompt", "token id 4096 at position 1"),
    "a prompt of huge tokens": (COMPLETION, {"prompt": [10**400]}, 400, "prompt", "must be in 0..4095"),
    "a prompt that is too long": (COMPLETION, {"prompt": [1] * 1024}, 400, "prompt", "context of 1024"),
    "no room": (COMPLETION, {"prompt": [1] * 1000, "max_tokens": 30}, 400, "max_tokens", "must be in 1..24"),
    "another model": (COMPLETION, {"prompt": "a", "model": "gpt"}, 404, "model", "'gpt' does not exist"),
    "a model of another type": (COMPLETION, {"prompt": "a", "model": 4}, 400, "model", "valid string"),
    "negative": (COMPLETION, {"prompt": "a", "max_tokens": -1}, 400, "max_tokens", "max_tokens = -1 must be"),
    "huge": (COMPLETION, {"prompt": "a", "max_tokens": 10**30}, 400, "max_tokens", "must be an integer in 1.."),
    "a fraction": (COMPLETION, {"prompt": "a", "max_tokens": 1.5}, 400, "max_tokens", "valid integer"),
    "a text": (COMPLETION, {"prompt": "a", "temperature": "hot"}, 400, "temperature", "valid number"),
    "not a number": (COMPLETION, b'{"prompt": "a", "temperature": NaN}', 400, "temperature", "must be a number"),
    "beyond floats": (COMPLETION, b'{"prompt": "a", "top_p": 1e999}', 400, "top_p", "must be a number"),
    "a flag": (COMPLETION, {"prompt": "a", "n": True}, 400, "n", "valid integer"),
    "many": (COMPLETION, {"prompt": "a", "n": 1000}, 400, "n", "at most 8 at once"),
    "an unknown field": (COMPLETION, {"prompt": "a", "tempereature": 1}, 400, "tempereature", "not a field"),
    "a seed": (COMPLETION, {"prompt": "a", "seed": -1}, 400, "seed", "seed = -1 must be"),
    "a stop string": (COMPLETION, {"prompt": "a", "stop": [""]}, 400, "stop", "not empty"),
    "many stop strings": (COMPLETION, {"prompt": "a", "stop": ["a"] * 33}, 400, "stop", "at most 32 strings"),
    "stop of another type": (COMPLETION, {"prompt": "a", "stop": {"a": 1}}, 400, "stop", "valid string or "),
    "a bias": (COMPLETION, {"prompt": "a", "logit_bias": {"x": 1}}, 400, "logit_bias", "'x'; each must be a token"),
    "a large bias": (COMPLETION, {"prompt": "a", "logit_bias": {"4096": 1}}, 400, "logit_bias", "4096; each must"),
    "options of no stream": (COMPLETION, {"prompt": "a", "stream_options": {}}, 400, "stream_options", "stream"),
    "an inner field": (COMPLETION, {"prompt": "a", "stream": True, "stream_options": {"x": 1}}, 400,
                       "stream_options.x", "not a field"),
    "a priority": (COMPLETION, {"prompt": "a", "priority": 2**31}, 400, "priority", "less than 2147483648"),
    "echo": (COMPLETION, {"prompt": "a", "echo": True}, 400, "echo", "not supported"),
    "no messages": (CHAT, {"messages": []}, 400, "messages", "at least one message"),
    "no list": (CHAT, {"messages": "hello"}, 400, "messages", "valid array"),
    "an unknown role": (CHAT, {"messages": [*MESSAGES, {"role": "boss", "content": "a"}]}, 400, "messages[1].role",
                        "'boss'; it must be one of system"),
    "no role": (CHAT, {"messages": [{"content": "a"}]}, 400, "messages[0].role", "missing"),
    "no content": (CHAT, {"messages": [{"role": "user", "content": None}]}, 400, "messages[0].content", "valid"),
    "an image": (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400,
                 "messages[0].content[0].type", "'text'"),
    "a field of a message": (CHAT, {"messages": [MESSAGES[0] | {"mood": 1}]}, 400, "messages[0].mood", "not a field"),
    "a chat that is too long": (CHAT, {"messages": [{"role": "user", "content": "a b " * 2000}]}, 400, "messages",
                                "context of 1024"),
    "too many tokens of a chat": (CHAT, {"messages": MESSAGES, "max_completion_tokens": 5000}, 400,
                                  "max_completion_tokens", "max_completion_tokens = 5000 must be in 1.."),
    "two bounds": (CHAT, {"messages": MESSAGES, "max_completion_tokens": 5, "max_tokens": 6}, 400,
                   "max_completion_tokens", "differ"),
    "tools": (CHAT, {"messages": MESSAGES, "tools": [{"type": "function"}]}, 400, "tools", "not supported"),
    "a format": (CHAT, {"messages": MESSAGES, "response_format": {"type": "yaml"}}, 400, "response_format.type",
                 "'json_schema', got 'yaml'"),
    "a format without its schema": (CHAT, {"messages": MESSAGES, "response_format": {"type": "json_schema"}}, 400,
                                    "response_format", "has json_schema where its type is json_schema"),
    "a schema without a name": (COMPLETION, {"prompt": "a", "response_format": {
        "type": "json_schema", "json_schema": {"schema": {}}}}, 400, "response_format.json_schema.name", "missing"),
    "a schema": (CHAT, {"messages": MESSAGES, "response_format": {
        "type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "strin"}}}}, 400, "response_format",
        "response_format has a JSON schema that cannot be used: Invalid type: strin"),
    "a schema of more than there is": (COMPLETION, {"prompt": "a", "structured_outputs": {"json": {
        "not": {"type": "string"}}}}, 400, "structured_outputs", 'Unimplemented keys: ["not"]'),
    "a schema that is no JSON": (COMPLETION, {"prompt": "a", "structured_outputs": {"json": "{"}}, 400,
                                 "structured_outputs", "has a JSON schema that cannot be used"),
    "a schema of another type": (COMPLETION, {"prompt": "a", "structured_outputs": {"json": 5}}, 400,
                                 "structured_outputs.json", "valid string, got 5"),
    "a regex": (COMPLETION, {"prompt": "a", "structured_outputs": {"regex": "[a"}}, 400, "structured_outputs",
                "unclosed character class"),
    "a huge regex": (COMPLETION, {"prompt": "a", "structured_outputs": {"regex": "a" * 300_000}}, 400,
                     "structured_outputs", "300000 characters; at most 262144"),
    "a grammar": (COMPLETION, {"prompt": "a", "structured_outputs": {"grammar": "start: nothing"}}, 400,
                  "structured_outputs", 'unknown name: "nothing"'),
    "no choice": (COMPLETION, {"prompt": "a", "structured_outputs": {"choice": []}}, 400, "structured_outputs",
                  "choice = []; it must be a list of texts"),
    "no structure": (COMPLETION, {"prompt": "a", "structured_outputs": {}}, 400, "structured_outputs",
                     "exactly one must be given"),
    "two structures": (COMPLETION, {"prompt": "a", "structured_outputs": {"regex": "a", "json_object": True}}, 400,
                       "structured_outputs", "has regex and json_object of json, regex"),
    "a format and a structure": (CHAT, {"messages": MESSAGES, "response_format": {"type": "json_object"},
                                        "structured_outputs": {"regex": "a"}}, 400, None, "give one of them"),
    "an unknown structure": (COMPLETION, {"prompt": "a", "structured_outputs": {"xml": "a"}}, 400,
                             "structured_outputs.xml", "not a field"),
    "a structure with a least length": (COMPLETION, {"prompt": "a", "min_tokens": 3,
                                                     "structured_outputs": {"regex": "a"}}, 400, "min_tokens",
                                        "min_tokens = 3 must be 0 with structured_outputs"),
    "no logprobs": (CHAT, {"messages": MESSAGES, "top_logprobs": 3}, 400, "top_logprobs", "logprobs"),
    "many logprobs": (CHAT, {"messages": MESSAGES, "logprobs": True, "top_logprobs": 99}, 400, "top_logprobs",
                      "top_logprobs = 99 must be"),
    "a template's own": (CHAT, {"messages": MESSAGES, "chat_template_kwargs": {"messages": []}}, 400,
                         "chat_template_kwargs", "must not hold messages"),
    "nothing to tokenize": ("/tokenize", {}, 400, "prompt", "missing"),
    "both to tokenize": ("/tokenize", {"prompt": "a", "messages": MESSAGES}, 400, "prompt", "not both"),
    "no endpoint": ("/v1/nothing", {}, 404, None, "Not Found"),
    "no method": ("/health", {}, 405, None, "Method Not Allowed"),
}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        (CompletionBody, b'{"prompt": [%s]}'),
        (CompletionBody, b'{"prompt": [[%s]]}'),
        (CompletionBody, b'{"prompt": "a", "stop": [%s]}'),
        (CompletionBody, b'{"prompt": "a", "stop_token_ids": [%s]}'),
        (CompletionBody, b'{"prompt": "a", "structured_outputs": {"choice": [%s]}}'),
        (ChatBody, b'{"messages": [%s]}'),
        (ChatBody, b'{"messages": [{"role": "user", "content": [%s]}]}'),
    ],
)
def test_of_many_wrong_entries_one_is_told(kind, body):
    """An error for each would keep the process for minutes over a body of some MB."""
    with pytest.raises(ValidationError) as caught:
        kind.model_validate_json(body % b",".join([b"{}"] * 1000))
    assert caught.value.error_count() <= 6


@pytest.mark.parametrize("name", BAD)
def test_bad_input(server, name):
    path, body, status, param, words = BAD[name]
    found, answer = server.post(path, body)
    assert list(answer) == ["error"]
    assert sorted(answer["error"]) == ["code", "message", "param", "type"]
    assert words in answer["error"]["message"]
    assert (found, answer["error"]["type"]) == (status, "invalid_request_error")
    if param is not None:
        assert answer["error"]["param"] == param
    assert len(answer["error"]["message"]) < 1000
    assert "Traceback" not in answer["error"]["message"]


@pytest.mark.parametrize("sent", [b"nonsense\r\n\r\n", b"GET / HTTP/1.1\r\na b: c\r\n\r\n"])
def test_what_is_no_http(server, sent):
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(sent)
        response = http.client.HTTPResponse(connection)
        response.begin()
        error = json.load(response)["error"]
    assert (response.status, response.headers["Content-Type"]) == (400, "application/json")
    assert error == {
        "message": "Invalid HTTP request received.",
        "type": "invalid_request_error",
        "param": None,
        "code": "invalid_http",
    }


def test_a_body_of_another_type(server):
    status, answer = server.post(COMPLETION, {"prompt": "a"}, content_type="text/plain")
    assert status == 415
    assert "'text/plain'; it must be application/json" in answer["error"]["message"]


def test_the_client_raises_what_the_server_says(client):
    with pytest.raises(openai.NotFoundError, match="'gpt' does not exist here"):
        client.completions.create(model="gpt", prompt="a")
    with pytest.raises(openai.BadRequestError, match="max_tokens = 0 must be") as caught:
        client.completions.create(model="demo", prompt="a", max_tokens=0, stream=True)
    assert caught.value.param == "max_tokens"


# --- ends


def test_a_stream_that_nobody_reads_is_aborted(server, client):
    stream = client.completions.create(model="demo", prompt="def f():", stream=True, **LONG)
    next(iter(stream))
    server.wait_for(running_requests=1)
    before = server.figures().get(ABORTED, 0)
    stream.close()
    server.wait_for(running_requests=0, cache_pages_used=0)
    assert server.figures()[ABORTED] == before + 1


def test_a_request_whose_caller_hangs_up_is_aborted(server):
    body = json.dumps({"prompt": "a", "max_tokens": 900, "temperature": 0, "ignore_eos": True, "n": 2})
    connection = server.connect()
    connection.request("POST", COMPLETION, body, {"Content-Type": "application/json"})
    server.wait_for(running_requests=2)
    before = server.figures().get(ABORTED, 0)
    connection.close()
    server.wait_for(running_requests=0, cache_pages_used=0)
    assert server.figures()[ABORTED] == before + 2


def test_a_caller_who_hangs_up_within_the_body_is_no_error(server):
    """The last test sees that the log has nothing of it."""
    connection = server.connect()
    connection.putrequest("POST", COMPLETION)
    for name, value in (("Content-Type", "application/json"), ("Content-Length", "1000")):
        connection.putheader(name, value)
    connection.endheaders(b'{"prompt": ')
    connection.close()
    assert server.ask("GET", "/health")[0] == 200


def test_a_full_queue_says_when_to_come_again(server, client):
    """Four run and four wait; then those that wait hang up, and there is room again."""
    stream = client.completions.create(model="demo", prompt="a", stream=True, n=4, **LONG)
    for _ in range(2):
        waiting = server.connect()
        body = json.dumps({"prompt": "a", "n": 4})
        waiting.request("POST", COMPLETION, body, {"Content-Type": "application/json"})
        server.wait_for(running_requests=4, waiting_requests=4)
        status, headers, answer = server.ask("POST", COMPLETION, {"prompt": "a"})
        assert status == 429
        assert 1 <= int(headers["retry-after"]) <= 60
        assert json.loads(answer)["error"]["code"] == "queue_full"
        with pytest.raises(openai.RateLimitError, match="the queue is full: 8 requests run or wait, at most 8 may"):
            client.completions.create(model="demo", prompt="a", n=2)
        waiting.close()
        server.wait_for(running_requests=4, waiting_requests=0)
    stream.close()
    server.wait_for(running_requests=0, waiting_requests=0, cache_pages_used=0)


def test_sigterm_ends_what_runs_and_refuses_the_new(server, client):
    """The last test of the module: nothing is served after it."""
    pieces = []
    options = {"model": "demo", "prompt": "a", "stream": True, **LONG, "max_tokens": 200}

    def read():
        pieces.extend(client.completions.create(**options))

    reader = threading.Thread(target=read)
    reader.start()
    server.wait_for(running_requests=1)
    server.process.send_signal(signal.SIGTERM)
    while (answer := server.ask("GET", "/health"))[0] == 200:
        time.sleep(0.01)
    assert answer[0] == 503
    with pytest.raises(openai.InternalServerError, match="shutting down") as caught:
        client.completions.create(model="demo", prompt="a")
    assert caught.value.status_code == 503
    reader.join()
    assert pieces[-1].choices[0].finish_reason == "length"
    assert server.wait(20) == 0
    assert not any("Traceback" in line for line in server.said)
