"""The server as OpenAI's own client sees it: over a real socket."""

import asyncio
from collections import defaultdict

import openai
import pytest

from jaxinfer.decode.sampling_params import SamplingParams
from jaxinfer.engine import Options
from jaxinfer.llm import LLM
from tests.serve.running import DTYPE, MESSAGES, OPTIONS

# Of completions: the prompt, what OpenAI's client passes, what vLLM has besides, and the same for `LLM.generate`.
CASES = {
    "greedy": ("def fibonacci(n):", {"max_tokens": 24, "temperature": 0}, {}),
    "sampled": ("import os\n", {"max_tokens": 20, "temperature": 0.9, "top_p": 0.9, "seed": 7}, {"top_k": 40}),
    "several": ("class Stack:", {"max_tokens": 12, "n": 3, "seed": 11}, {"min_p": 0.05}),
    "stop": ("def f(x):", {"max_tokens": 40, "temperature": 0, "stop": ["y =", "never"]},
             {"min_tokens": 1, "priority": -1}),
    "logprobs": ("for i in", {"max_tokens": 9, "temperature": 0, "logprobs": 3}, {"ignore_eos": True}),
    "penalties": ("x = [1, 2", {"max_tokens": 12, "temperature": 0, "frequency_penalty": 1.0, "logit_bias": {"7": -5}},
                  {"repetition_penalty": 1.2}),
}  # fmt: skip


@pytest.fixture(scope="module")
def llm(folder):
    """One request at a time: what the server runs together must be the same."""
    return LLM(folder, dtype=DTYPE, options=Options(**OPTIONS | {"max_num_seqs": 1}))


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


@pytest.mark.parametrize("name", CASES)
def test_streamed_is_not_streamed_is_generate(client, expected, llm, name):
    prompt, given, more = CASES[name]
    options = {"model": "demo", "prompt": prompt, **given, "extra_body": more}
    assert_same(whole(client.completions.create(**options)), expected[name], llm.tokenizer)
    with client.completions.create(**options, stream=True, stream_options={"include_usage": True}) as stream:
        assert_same(joined(stream), expected[name], llm.tokenizer)


def test_tokens_without_text_are_streamed_as_they_come(client, llm):
    (end,) = llm.tokenizer.eos_ids
    options = {"model": "demo", "prompt": "x", "max_tokens": 64, "logit_bias": {str(end): 100}}
    with client.completions.create(**options, extra_body={"ignore_eos": True}, stream=True) as stream:
        texts = [chunk.choices[0].text for chunk in stream]
    assert len(texts) > 2
    assert "".join(texts) == ""


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
