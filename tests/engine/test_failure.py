"""A step that fails, or is interrupted, costs the requests that ran, and nothing else. What fails at one request costs
that one alone."""

import dataclasses
from random import Random

import jax
import pytest

from jaxinfer.continuation import Continuation
from jaxinfer.decode.sampling_params import SamplingParams
from jaxinfer.engine import Engine, Request
from jaxinfer.engine.commit import read_row
from tests.engine.fake import Chain, Told, expected_tokens, fake_engine, gather, run
from tests.engine.test_paging import CONTEXT, OPTIONS, TIMES, assert_exact, assert_idle, assert_told, request
from tests.engine.tiny import CONTEXT as CONTEXT_OF_TINY
from tests.engine.tiny import assert_warm, warm_llm

PARAMS = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True)


def arrive(engine: Engine, told: Told, request: Request, random: Random) -> None:
    """Asks for one more, then runs some steps or none."""
    engine.add(request)
    for _ in range(random.choice([0, 1, 3])):
        gather(told, engine.step())
        assert_exact(engine)


@pytest.mark.parametrize("program", ["step", "loop", "admit", "extend"])
def test_an_interrupt_after_the_cache_was_donated(tmp_path_factory, monkeypatch, program):
    llm = warm_llm(tmp_path_factory.getbasetemp())
    expected = llm.generate("hello", PARAMS)
    run = getattr(llm.engine.runner.programs, program)

    def interrupted(*arguments, **options):
        run(*arguments, **options)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(llm.engine.runner.programs, program, interrupted)
        with pytest.raises(KeyboardInterrupt):
            llm.generate(["hello", "you"], PARAMS)
    assert llm.generate("hello", PARAMS) == expected
    assert_warm(llm)


def test_a_stream_beside_a_failed_step_ends_and_says_so(tmp_path_factory, monkeypatch):
    llm = warm_llm(tmp_path_factory.getbasetemp())
    stream = llm.stream("and so on", PARAMS)
    first = next(stream)
    assert first.finish_reason is None
    with monkeypatch.context() as patched:
        patched.setattr(llm.engine.runner.programs, "loop", lambda *arguments, **options: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            llm.generate("hello", PARAMS)
    assert [piece.finish_reason for piece in stream][-1] == "abort"
    assert_warm(llm)


@pytest.mark.parametrize("seed", range(10))
def test_a_row_that_cannot_be_read_ends_its_own_request_alone(monkeypatch, caplog, seed):
    random, failed = Random(seed), set()

    def read(output, index, sequence):
        if sequence.request.id % 3 == 0 and random.random() < 0.4:
            failed.add(sequence.request.id)
            raise ZeroDivisionError("a bug")
        return read_row(output, index, sequence)

    monkeypatch.setattr("jaxinfer.engine.engine.read_row", read)
    engine, told, requests = fake_engine(OPTIONS, CONTEXT, times=random.choice(TIMES)), Told(), []
    for number in range(20):
        prompt = tuple(range(random.choice([3, 21, 40])))
        stops, priority = random.random() < 0.5, random.choice([0, 0, 1])
        requests.append(request(number, prompt, random.randint(1, 40), stops, number, priority))
        arrive(engine, told, requests[-1], random)
    run(engine, told)
    assert_idle(engine)
    assert failed
    for each in requests:
        if each.id in failed:
            assert told[each.id][1] == "error"
        else:
            assert_told(told, each)
    assert len(caplog.records) == len(failed)


def test_a_mask_that_cannot_be_made_ends_its_own_request_alone(monkeypatch, caplog):
    """Whatever is in flight, is shared or is preempted then."""
    sound, failed, preempted = Chain.mask, 0, 0

    def mask(self):
        if random.random() < 0.08:
            raise ZeroDivisionError("a bug")
        return sound(self)

    for seed in range(5):
        random, told, requests = Random(seed), Told(), []
        engine = fake_engine(OPTIONS, CONTEXT, times=random.choice(TIMES))
        with monkeypatch.context() as patched:
            patched.setattr(Chain, "mask", mask)
            for number in range(24):
                prompt, bound = tuple(range(random.choice([3, 21, 40]))), number % 2 == 0
                requests.append(request(number, prompt, random.randint(1, 40), bound, number, 0, bound))
                arrive(engine, told, requests[-1], random)
            run(engine, told)
        assert_idle(engine)
        broken = [each for each in requests if told[each.id][1] == "error"]
        for each in requests:
            if each in broken:
                assert each.params.structured_outputs
                assert told[each.id][0] == expected_tokens(each)[: len(told[each.id][0])]
            else:
                assert_told(told, each)
        failed += len(broken)
        preempted += engine.counters.preemptions
    assert len(caplog.records) == failed > 10
    assert preempted > 10


def test_a_device_error_ends_all(monkeypatch):
    engine, told = fake_engine(OPTIONS, CONTEXT), {}
    for number in range(3):
        engine.add(request(number, (1, 2, 3), 20))
    for _ in range(3):
        gather(told, engine.step())

    def broken(*arguments, **options):
        raise jax.errors.JaxRuntimeError("INTERNAL: an illegal memory access")

    with monkeypatch.context() as patched:
        patched.setattr(engine.runner.programs, "loop", broken)
        with pytest.raises(jax.errors.JaxRuntimeError):
            engine.step()
    run(engine, told)
    assert {ended for _, ended in told.values()} == {"abort"}


def test_prompt_log_probabilities_that_cannot_be_kept_end_their_own_request_alone(tmp_path_factory, monkeypatch):
    llm = warm_llm(tmp_path_factory.getbasetemp())
    params = [dataclasses.replace(PARAMS, prompt_logprobs=top) for top in (1, 2)]
    expected = llm.generate("you", params[1])
    entries = iter([None])

    def broken(*given):
        if next(entries, "the others") is None:
            raise ZeroDivisionError("a bug")
        return given

    with monkeypatch.context() as patched:
        patched.setattr("jaxinfer.engine.commit.TokenLogprobs", broken)
        first, _ = llm.generate(["hello", "you"], params)
    assert (first.outputs[0].finish_reason, first.outputs[0].token_ids) == ("error", [])
    assert llm.generate("you", params[1]) == expected
    assert_warm(llm)


def test_a_text_that_cannot_be_made_ends_its_own_request_alone(tmp_path_factory, monkeypatch, caplog):
    llm = warm_llm(tmp_path_factory.getbasetemp())
    expected = llm.generate("hello", PARAMS)
    push = Continuation.push

    def broken(self, update):
        if len(self.request.prompt_ids) == 4:
            raise UnicodeError("a bug")
        push(self, update)

    with monkeypatch.context() as patched:
        patched.setattr(Continuation, "push", broken)
        ends, whole = llm.generate([[3, 4, 5, 6], "hello"], PARAMS)
        pieces = list(llm.stream([3, 4, 5, 6], PARAMS))
    assert ends.outputs[0].finish_reason == "error"
    assert [piece.finish_reason for piece in pieces] == ["error"]
    assert [whole] == expected
    assert "cannot be made" in caplog.text
    assert_warm(llm)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"eos_ids": tuple(range(9))}, "eos_ids has 9 tokens; at most 8"),
        ({"eos_ids": (-1,)}, r"eos_ids has token ids in -1..-1; each must be in 0..2147483647"),
        ({"prompt_ids": (1, 2**31)}, r"prompt_ids has token ids in 1..2147483648; each must be in 0..2147483647"),
        ({"seed": 2**32}, r"seed = 4294967296 must be in 0..4294967295"),
        ({"seed": -1}, r"seed = -1 must be in 0..4294967295"),
        ({"prompt_ids": (1,) * (CONTEXT_OF_TINY - 19)}, "need a context of 97 tokens; the engine has 96"),
    ],
)
def test_what_the_device_cannot_be_told_is_refused_before_it_is_queued(tmp_path_factory, wrong, words):
    engine = warm_llm(tmp_path_factory.getbasetemp()).engine
    asked = Request(10**6, (1, 2), PARAMS, (), 0)
    with pytest.raises(ValueError, match=words):
        engine.add(dataclasses.replace(asked, **wrong))
    assert not engine.scheduler.sequences


def test_of_the_largest_request_that_is_queued_the_device_can_be_told(tmp_path_factory):
    llm = warm_llm(tmp_path_factory.getbasetemp())
    most = 2**31 - 1
    params = SamplingParams(
        max_tokens=1, min_tokens=1, temperature=1e6, top_k=most, repetition_penalty=100, presence_penalty=2,
        frequency_penalty=2, logit_bias={most - i: 100.0 for i in range(300)}, stop_token_ids=[most] * 32,
    )  # fmt: skip
    asked = Request(10**6, (103,) * (CONTEXT_OF_TINY - 1), params, tuple(range(most - 7, most + 1)), 2**32 - 1)
    assert not llm.engine.problems(asked)
    llm.engine.add(asked)
    (update,) = [update for _ in range(3) for update in llm.engine.step()]
    assert (update.request, update.finish_reason) == (asked, "length")
    assert_warm(llm)
