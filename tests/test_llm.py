"""`LLM` from the outside: text, reasons to stop, log-probabilities, streams, and what an interruption leaves."""

import io
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console
from scipy.special import log_softmax

import jaxinfer
from jaxinfer.continuation import Continuation
from jaxinfer.decode.sampling_params import SamplingParams
from jaxinfer.engine import Request, TokenLogprobs, Update
from jaxinfer.llm import LLM, _warm_up
from jaxinfer.outputs import CompletionOutput
from jaxinfer.text import IncrementalDecoder, StopChecker
from tests.engine.tiny import BOS, CHARACTERS, CONFIG, CONTEXT, EOS, assert_clean, assert_warm, warm_llm
from tests.model.dense import run

PROMPT = "def f(x):"
# Half characters, special tokens and what has no text would blur what is counted; without them nothing ends early.
ASCII_ONLY = dict.fromkeys(range(CHARACTERS.index("Ã"), CONFIG["vocab_size"]), -100.0)


def greedy(**options) -> SamplingParams:
    return SamplingParams(temperature=0.0, logit_bias=ASCII_ONLY, **options)


@pytest.fixture
def llm(tmp_path_factory):
    """The session's engine, clean and warm before and after every test."""
    shared = warm_llm(tmp_path_factory.getbasetemp())
    yield shared
    assert_warm(shared)


def test_a_terminal_shows_how_many_programs_are_ready(monkeypatch):
    shown = io.StringIO()
    monkeypatch.setattr("jaxinfer.llm.Console", lambda stderr: Console(file=shown, force_terminal=True, width=100))
    ready = [SimpleNamespace(name=f"program {number}") for number in (1, 2)]
    _warm_up(SimpleNamespace(warm_up=lambda progress: [progress(one, len(ready)) for one in ready]))
    assert "program 2" in shown.getvalue()
    assert "2/2" in shown.getvalue()


@pytest.fixture
def long(llm) -> CompletionOutput:
    """What the model writes when nothing stops it: a character for every token."""
    (request,) = llm.generate(PROMPT, greedy(max_tokens=40))
    (output,) = request.outputs
    assert len(output.text) == len(output.token_ids) == 40
    return output


def joined(pieces) -> CompletionOutput:
    pieces = list(pieces)
    ids = [token for piece in pieces for token in piece.token_ids]
    logprobs = None if pieces[0].logprobs is None else [entry for piece in pieces for entry in piece.logprobs]
    assert all(piece.finish_reason is None for piece in pieces[:-1])
    text = "".join(piece.text for piece in pieces)
    return CompletionOutput(0, text, ids, logprobs, pieces[-1].finish_reason, pieces[-1].stop_reason)


# --- reasons to stop


def test_outputs_tell_of_their_prompts(llm):
    tokens = llm.tokenizer.encode("ab")
    text, ids, several = llm.generate(["ab", tokens, "é"], greedy(max_tokens=3))
    assert (text.prompt, text.prompt_token_ids, text.prompt_logprobs) == ("ab", tokens, None)
    assert (ids.prompt, ids.prompt_token_ids) == (None, tokens)
    assert text.prompt_token_ids[0] == BOS
    assert text.outputs == ids.outputs
    assert several.prompt_token_ids == [BOS, CHARACTERS.index("Ã"), CHARACTERS.index("©")]
    assert llm.generate([]) == []


@pytest.mark.parametrize("length", [1, 2, 5])
def test_a_stop_string_ends_the_text_before_it(llm, long, length):
    """Also one that spans several tokens and steps; the tokens up to its end stay."""
    at = next(i for i in range(3, 40 - length) if long.text.find(long.text[i : i + length]) == i)
    stop = long.text[at : at + length]
    params = greedy(max_tokens=40, stop=["never", stop])
    (request,) = llm.generate(PROMPT, params)
    expected = CompletionOutput(0, long.text[:at], long.token_ids[: at + length], None, "stop", stop)
    assert request.outputs == [expected]
    assert joined(llm.stream(PROMPT, params)) == expected


def test_a_stop_string_that_only_begins_is_shown_in_the_end(llm, long):
    params = greedy(max_tokens=10, stop=long.text[8:10] + "\0")
    (request,) = llm.generate(PROMPT, params)
    expected = CompletionOutput(0, long.text[:10], long.token_ids[:10], None, "length")
    assert request.outputs == [expected]
    assert joined(llm.stream(PROMPT, params)) == expected


def test_a_stop_token_ends_the_text_without_showing(llm, long):
    token = long.token_ids[6]
    end = long.token_ids.index(token)
    (request,) = llm.generate(PROMPT, greedy(max_tokens=40, stop_token_ids=[token]))
    expected = CompletionOutput(0, long.text[:end], long.token_ids[: end + 1], None, "stop", token)
    assert request.outputs == [expected]


def test_end_of_sequence(llm):
    bias = ASCII_ONLY | {EOS: 100.0}  # so that it comes whenever it may
    base = {"temperature": 0.0, "logit_bias": bias, "max_tokens": 6}
    ended, kept_on, forced, asked = llm.generate(
        [PROMPT] * 4,
        [
            SamplingParams(**base),
            SamplingParams(**base, ignore_eos=True),
            SamplingParams(**base, min_tokens=4),
            SamplingParams(**base, ignore_eos=True, stop_token_ids=[EOS]),
        ],
    )
    assert ended.outputs == [CompletionOutput(0, "", [EOS], None, "stop", None)]
    assert kept_on.outputs == [CompletionOutput(0, "", [EOS] * 6, None, "length", None)]
    assert asked.outputs == [CompletionOutput(0, "", [EOS], None, "stop", EOS)]
    (output,) = forced.outputs
    assert EOS not in output.token_ids[:4]
    assert output.token_ids[4:] == [EOS]
    assert (len(output.text), output.finish_reason) == (4, "stop")


@pytest.mark.parametrize(("text", "stop", "min_tokens", "expected", "reason"), [
    ("abcabc", ["bc"], 0, "a", "bc"),
    ("abcabc", ["bc"], 2, "a", "bc"),  # begins early, ends late
    ("abcabc", ["bc"], 3, "abca", "bc"),
    ("abcabc", ["bc"], 6, "abcabc", None),
    ("aaaa", ["aa"], 2, "a", "aa"),  # a late match that overlaps an early one
    ("ababac", ["abac"], 5, "ab", "abac"),
    ("xaby", ["ab", "a"], 3, "xaby", None),
    ("xabya", ["ab", "a"], 3, "xaby", "a"),
    ("abab", ["abc"], 2, "abab", None),
    ("abc", ["b", "abc"], 2, "", "abc"),  # one that ends too early, inside of one that ends late
    ("xabcab", ["ab", "cab"], 4, "xab", "cab"),
    ("aé", ["é"], 2, "a", "é"),  # the character is whole with the third token only
])  # fmt: skip
def test_stop_strings_wait_for_min_tokens(llm, text, stop, min_tokens, expected, reason):
    tokens = tuple(llm.tokenizer.encode(text, add_special_tokens=False))
    request = Request(0, (1,), SamplingParams(max_tokens=len(tokens), min_tokens=min_tokens, stop=stop), (EOS,), 0)
    for size in (1, len(tokens)):  # tokens of an update
        continuation = Continuation(request, 0, IncrementalDecoder(llm.tokenizer), StopChecker(stop))
        for start in range(0, len(tokens), size):
            ends = start + size == len(tokens)
            update = Update(request, tokens[start : start + size], (), None, "length" if ends else None)
            if continuation.finish_reason is None:
                continuation.push(update)
            assert expected.startswith(continuation.text)
        assert (continuation.text, continuation.stop_reason) == (expected, reason)
        assert continuation.finish_reason == ("length" if reason is None else "stop")


def test_up_to_the_edge_of_the_context(llm):
    prompt = [1 + i % 90 for i in range(CONTEXT - 5)]
    (request,) = llm.generate([prompt], greedy(max_tokens=5))
    assert len(request.outputs[0].token_ids) == 5
    assert request.outputs[0].finish_reason == "length"
    (last,) = llm.generate([prompt + request.outputs[0].token_ids[:4]], greedy(max_tokens=1))
    assert last.outputs[0].token_ids == request.outputs[0].token_ids[4:]


# --- several continuations


def test_n_continuations_are_those_of_the_seeds_that_follow(llm):
    params = {"top_k": 50, "max_tokens": 12}
    (request,) = llm.generate(PROMPT, SamplingParams(**params, seed=7, n=3))
    alone = [llm.generate(PROMPT, SamplingParams(**params, seed=7 + i))[0].outputs[0] for i in range(3)]
    assert [output.index for output in request.outputs] == [0, 1, 2]
    assert [output.token_ids for output in request.outputs] == [output.token_ids for output in alone]
    assert len({output.text for output in request.outputs}) == 3


def test_without_a_seed_every_request_draws_its_own(llm):
    outputs = llm.generate([PROMPT] * 4, SamplingParams(top_k=50, max_tokens=12, ignore_eos=True))
    assert len({request.outputs[0].text for request in outputs}) == 4


# --- log-probabilities


def dense_logprobs(llm: LLM, tokens: list[int]) -> np.ndarray:
    """log softmax of the model's own logits after every token, without a cache; one program for any length."""
    padded = np.pad(np.array(tokens, np.int32), (0, CONTEXT - len(tokens)))
    logits_TV = run(llm.model, llm.engine.runner.params, padded).logits_TV
    return log_softmax(logits_TV[: len(tokens)].astype(np.float64), axis=1)


def test_logprobs_are_those_of_the_model(llm):
    """Whatever filters and penalties did to the choice; of prompt and output alike."""
    params = SamplingParams(
        seed=1, top_k=5, presence_penalty=1.0, max_tokens=12, ignore_eos=True, logprobs=3, prompt_logprobs=2
    )
    prompt = list(range(1, 75))  # two chunks
    (request,) = llm.generate([prompt], params)
    (output,) = request.outputs
    expected_TV = dense_logprobs(llm, prompt + output.token_ids)
    assert request.prompt_logprobs[0] is None
    rows = [*request.prompt_logprobs[1:], *output.logprobs]
    assert len(rows) == len(prompt) - 1 + 12
    for position, entry in enumerate(rows):
        token, expected_V = (prompt + output.token_ids)[position + 1], expected_TV[position]
        top = 2 if position < len(prompt) - 1 else 3
        assert entry.token == token
        # float32 logits of size 1 to 5, summed in another order.
        assert entry.logprob == pytest.approx(expected_V[token], abs=2e-5)
        assert [i for i, _ in entry.top] == np.argsort(-expected_V)[:top].tolist()
        np.testing.assert_allclose([value for _, value in entry.top], np.sort(expected_V)[::-1][:top], atol=2e-5)
    assert output.cumulative_logprob == pytest.approx(sum(entry.logprob for entry in output.logprobs))


# --- streams


def test_outputs_come_as_they_are_whole(llm):
    prompts, counts = ["first", "second", "third"], [12, 2, 5]
    params = [SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True) for count in counts]
    found = list(llm.generate_iter(prompts, params))
    assert [index for index, _ in found] == [1, 2, 0]  # the shortest first
    assert [output for _, output in sorted(found, key=lambda pair: pair[0])] == llm.generate(prompts, params)
    assert_warm(llm)


def test_the_lowest_priority_comes_first(llm):
    """Of more prompts than there are slots, all of one length."""
    prompts, params = [f"number {i}" for i in range(9)], greedy(max_tokens=8, ignore_eos=True)
    given = [3, -1, 2, 0, 8, 7, 1, 5, 4]
    found = [given[index] for index, _ in llm.generate_iter(prompts, params, priority=given)]
    assert [set(found[:4]), set(found[4:8]), found[8]] == [{-1, 0, 1, 2}, {3, 4, 5, 7}, 8]
    assert llm.generate(prompts, params, priority=given) == llm.generate(prompts, params)


@pytest.mark.parametrize("given", [[1], 1, [1, "2"], [1, 2.0], [True, 1], "12"])
def test_priorities_that_are_none(llm, given):
    with pytest.raises(ValueError, match=r"priority = .* must be a list of integers, one for each of 2 prompts"):
        llm.generate(["a", "b"], priority=given)


def test_outputs_that_another_caller_brings_along_are_not_lost(llm):
    params = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)
    outputs = llm.generate_iter(["one", "two", "three", "four", "five", "six"], params)
    first = next(outputs)
    llm.generate("another", SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True))
    assert sorted(index for index, _ in [first, *outputs]) == list(range(6))


def test_leaving_the_outputs_early_frees_what_runs(llm):
    outputs = llm.generate_iter(["one", "two", "three", "four", "five", "six"], SamplingParams(max_tokens=8))
    next(outputs)
    outputs.close()
    assert not llm.engine.scheduler.sequences
    assert_warm(llm)


def test_every_prompt_is_checked_before_the_first_output(llm):
    with pytest.raises(ValueError, match="prompt 1: the prompt is empty"):
        llm.generate_iter(["fine", ""])


def test_progress_is_shown_where_it_is_asked_for(llm, capsys):
    params = SamplingParams(max_tokens=2, ignore_eos=True)
    llm.generate(["one", "two"], params)
    assert capsys.readouterr().out == ""
    llm.generate(["one", "two"], params, progress=True)
    shown = capsys.readouterr().out
    assert "prompts" in shown
    assert "2/2" in shown


def test_a_stream_is_what_generate_gives(llm):
    params = SamplingParams(seed=11, top_k=60, max_tokens=30)  # é comes in halves
    (request,) = llm.generate(PROMPT, params)
    pieces = list(llm.stream(PROMPT, params))
    assert len(pieces) > 2
    assert joined(pieces) == request.outputs[0]


def test_every_piece_has_the_logprobs_of_its_own_tokens(llm):
    request = Request(0, (1,), SamplingParams(logprobs=0), (EOS,), 0)
    continuation = Continuation(request, 0, IncrementalDecoder(llm.tokenizer), StopChecker(()))
    entries = [TokenLogprobs(token, -float(token), ()) for token in range(5, 11)]
    pieces = []
    for start, end in ((0, 1), (1, 4), (4, 6)):
        told = tuple(entries[start:end])
        continuation.push(Update(request, tuple(entry.token for entry in told), told, None, None))
        pieces.append(continuation.piece())
    assert [len(piece.logprobs) for piece in pieces] == [len(piece.token_ids) for piece in pieces] == [1, 3, 2]
    assert joined(pieces) == continuation.output()
    assert continuation.output().logprobs == entries


def test_a_stream_that_is_left_frees_its_pages(llm):
    stream = llm.stream(PROMPT, greedy(max_tokens=40))
    next(stream)
    assert llm.engine.scheduler.running
    stream.close()
    assert_clean(llm)


def test_streams_and_calls_interleave(llm, long):
    params = greedy(max_tokens=40)
    short = greedy(max_tokens=8)
    first, second = llm.stream(PROMPT, params), llm.stream(PROMPT, short)
    pieces, others = [next(first)], [next(second)]
    assert llm.generate(PROMPT, params)[0].outputs == [long]  # runs both streams to their ends beside its own
    assert joined([*pieces, *first]) == long
    assert joined([*others, *second]) == CompletionOutput(0, long.text[:8], long.token_ids[:8], None, "length")


def test_who_watches_may_fail_and_no_token_of_others_is_lost(llm, long, monkeypatch):
    """That ends the call whose step it was, and no other."""
    stream = llm.stream(PROMPT, greedy(max_tokens=40))
    pieces, (name,) = [next(stream)], llm._running

    def watch(updates):
        if any(update.request.id == name for update in updates):
            raise ZeroDivisionError("a bug")

    monkeypatch.setattr(llm, "watch", watch)
    with pytest.raises(ZeroDivisionError):
        llm.generate(PROMPT, greedy(max_tokens=40))
    monkeypatch.undo()
    assert joined([*pieces, *stream]) == long
    assert_clean(llm)


def test_an_interrupted_call_leaves_nothing_behind(llm, long, monkeypatch):
    step, left = llm.engine.step, iter(range(3))

    def interrupted():
        if next(left) == 2:
            raise KeyboardInterrupt
        return step()

    monkeypatch.setattr(llm.engine, "step", interrupted)
    params = greedy(max_tokens=40)
    with pytest.raises(KeyboardInterrupt):
        llm.generate([PROMPT] * 6, params)  # more than run at once
    assert_clean(llm)
    monkeypatch.undo()
    assert llm.generate(PROMPT, params)[0].outputs == [long]


def test_every_request_has_the_next_id(llm, monkeypatch):
    add, ids = llm.engine.add, []
    monkeypatch.setattr(llm.engine, "add", lambda request: ids.append(request.id) or add(request))
    for _ in range(2):
        llm.generate([PROMPT] * 2, greedy(max_tokens=1))
    assert ids == list(range(ids[0], ids[0] + 4))


# --- chat


def test_chat_writes_the_checkpoints_own_template(llm):
    messages = [{"role": "user", "content": "hi"}]
    text = "[user]hi\n[assistant]"
    expected = [BOS, *llm.tokenizer.encode(text, add_special_tokens=False)]
    (answer,) = llm.chat(messages, greedy(max_tokens=4))
    assert answer.prompt_token_ids == expected
    assert answer.outputs == llm.generate([expected], greedy(max_tokens=4))[0].outputs
    both = llm.chat([messages, [*messages, {"role": "assistant", "content": "ho"}]], greedy(max_tokens=4))
    assert both[0] == answer
    assert len(both[1].prompt_token_ids) > len(expected)


# --- names


def test_the_package_gives_its_names_without_jax_until_it_is_needed():
    assert (jaxinfer.LLM, jaxinfer.SamplingParams) == (LLM, SamplingParams)
    with pytest.raises(AttributeError, match="no attribute 'LLMs'"):
        _ = jaxinfer.LLMs
    program = "import sys, jaxinfer; from jaxinfer import SamplingParams; assert 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True, cwd=Path(__file__).parents[1])


# --- what is held where


def test_the_cache_is_what_its_pages_say(llm):
    layout, config = llm.engine.layout, llm.model.config
    per_token = 2 * config.num_kv_heads * config.head_size * 4
    held = sum(array.nbytes for array in jax.tree.leaves(llm.engine.runner.cache))
    assert held == config.num_layers * layout.num_pages[0] * layout.page_size * per_token


def test_weights_take_the_dtype_that_is_asked_for(llm):
    half = LLM(llm.folder, dtype="bfloat16", max_model_len=32)
    assert {array.dtype for array in half.engine.runner.params} == {jnp.dtype(jnp.bfloat16)}
    assert {array.dtype for array in jax.tree.leaves(half.engine.runner.cache)} == {jnp.dtype(jnp.bfloat16)}
    assert half.model.context == half.engine.layout.max_tokens == 32
