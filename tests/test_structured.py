"""Outputs that follow a schema, an expression or a grammar, alone and beside others."""

import json
import math
import re
import threading
import time
from dataclasses import replace
from itertools import count

import pytest

from jaxinfer import LLM, SamplingParams, StructuredOutputsParams
from jaxinfer.engine import Request
from jaxinfer.engine.commit import read_row
from jaxinfer.engine.constraints import BRIEFLY, THREADS
from jaxinfer.structured import GrammarConstraint, Grammars
from tests.engine.tiny import OPTIONS, assert_clean, assert_warm, drawing_alike, tiny_folder, warm_llm

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 5},
        "on": {"type": "boolean"},
        "n": {"enum": [1, 22, None]},
    },
    "required": ["name", "on", "n"],
    "additionalProperties": False,
}
REGEXES = [r"[a-z]{2,9}@[a-z]{1,9}\.(com|org)", r"\d{4}-(0[1-9]|1[0-2])", r"(é|a/b|\n){3}", r"(yes|no)!?"]
GROWING = "(a{1000}){1000}{1000}"  # to more than llguidance has room for, at the second token
GRAMMAR = 'root ::= "a" root "b" | "c"'
LARK = 'start: "(" start ")" | /[xyz]/'


DIGITS = "[0-9]{20}"


def break_digits(patched, llm, method, after):
    """Plants a bug in constraints to DIGITS: a method of theirs raises when it is called for the time after these."""

    def constrain(asked):
        constraint = llm.intake.grammars.constraint(asked)
        if asked.regex == DIGITS:
            sound, calls = getattr(constraint, method), count()
            setattr(constraint, method, lambda *given: sound(*given) if next(calls) < after else raised())
        return constraint

    def raised():
        raise ZeroDivisionError("planted")

    patched.setattr(llm.engine._constraints, "_constrain", constrain)


def ask(seed=0, max_tokens=80, **options) -> SamplingParams:
    """A request of the tiny model, whose tokens are characters, drawn at temperature 1."""
    kinds = {
        name: options.pop(name) for name in ("json", "regex", "choice", "grammar", "json_object") if name in options
    }
    return SamplingParams(
        seed=seed, max_tokens=max_tokens, structured_outputs=StructuredOutputsParams(**kinds), **options
    )


@pytest.fixture
def llm(tmp_path_factory):
    return warm_llm(tmp_path_factory.getbasetemp())


def texts(llm, prompts, params):
    return [[(one.text, one.finish_reason) for one in output.outputs] for output in llm.generate(prompts, params)]


@pytest.mark.parametrize("regex", REGEXES)
def test_a_regex_is_matched_whole(llm, regex):
    ((*found,),) = texts(llm, "ab", ask(n=12, regex=regex, max_tokens=40))
    for text, reason in found:
        assert reason == "stop"
        assert re.fullmatch(regex, text), text
    assert_warm(llm)


def test_choices_grammars_and_objects(llm):
    """Where an output did not end, it is the beginning of one that would."""
    choices = ["yes", "no", 'may"be\n']
    found = texts(llm, "ab", ask(n=8, choice=choices))[0]
    assert {text for text, _ in found} <= set(choices)
    for text, reason in texts(llm, "ab", ask(n=8, grammar=GRAMMAR))[0]:
        assert re.fullmatch("a*cb*" if reason == "stop" else "a*(cb*)?", text)
        assert reason == "length" or text.count("a") == text.count("b")
    for text, reason in texts(llm, "ab", ask(n=8, grammar=LARK))[0]:
        assert re.fullmatch(r"\(*[xyz]?\)*", text)
        assert reason == "length" or text.count("(") == text.count(")")
    for text, reason in texts(llm, "ab", ask(n=8, json_object=True))[0]:
        assert text[0] == "{"
        assert reason == "length" or isinstance(json.loads(text), dict)
    assert_warm(llm)


def test_what_is_said_is_the_same_alone_and_beside_others(llm):
    """Of requests with and without constraints, whose prompts are chunks and whose lengths differ."""
    cases = {
        "x" * 40: SamplingParams(seed=9, max_tokens=50),
        "ab": ask(3, regex=REGEXES[0]),
        "b" * 20: ask(4, 70, n=2, json=SCHEMA),
        "c": ask(5, temperature=0.0, choice=["ab", "ba"]),
        "y" * 80: SamplingParams(temperature=0.0, max_tokens=9),
        "d": SamplingParams(temperature=0.0, max_tokens=30),
        "e" * 70: ask(6, 20, regex=REGEXES[0]),
    }
    prompts, params = list(cases), list(cases.values())
    alone = [texts(llm, [prompt], one)[0] for prompt, one in cases.items()]
    assert texts(llm, prompts, params) == alone
    assert json.loads(alone[2][0][0]).keys() == {"name", "on", "n"}
    assert_warm(llm)


def test_a_preempted_request_goes_on_where_it_was(llm, tmp_path_factory):
    few = drawing_alike(LLM(tiny_folder(tmp_path_factory.getbasetemp()), options=replace(OPTIONS, num_pages=14)))
    params = [ask(seed, 70, regex="([a-z]{3}[0-9]){15}") for seed in range(6)]
    found = texts(few, ["ab"] * 6, params)
    assert few.engine.metrics.counters.preemptions > 0
    assert found == texts(llm, ["ab"] * 6, params)
    assert all(re.fullmatch("([a-z]{3}[0-9]){15}", text) for ((text, _),) in found)
    assert_clean(few)


def test_on_two_devices(llm, tmp_path_factory):
    two = LLM(tiny_folder(tmp_path_factory.getbasetemp()), tensor_parallel_size=2, options=OPTIONS)
    params = ask(7, n=3, regex=REGEXES[0])
    assert texts(two, "ab", params) == texts(llm, "ab", params)


def test_streams_stop_strings_and_log_probabilities(llm):
    params = ask(1, regex="[a-z]{30}")
    (whole,) = llm.generate("ab", params)[0].outputs
    assert "".join(piece.text for piece in llm.stream("ab", params)) == whole.text
    stop = whole.text[7:9]
    (stopped,) = llm.generate("ab", replace(params, stop=stop))[0].outputs
    assert (stopped.text, stopped.stop_reason) == (whole.text[: whole.text.find(stop)], stop)
    (scored,) = llm.generate("ab", ask(1, choice=["a", "b"], logprobs=2))[0].outputs
    first, end = scored.logprobs
    assert sum(math.exp(value) for _, value in first.top) == pytest.approx(1, abs=1e-5)
    assert end.logprob == pytest.approx(0, abs=1e-5)  # nothing else may follow
    assert_warm(llm)


def test_the_forward_pass_is_on_its_way_when_the_host_makes_a_mask(llm, monkeypatch):
    """And the sampler waits for it; who runs without a constraint is asked for none."""
    order, programs = [], llm.engine.runner.programs

    def logged(owner, name):
        call = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *given, **named: order.append(name) or call(*given, **named))

    for name in ("_step", "_mask", "_sample", "_loop"):
        logged(programs, name)
    logged(GrammarConstraint, "mask")
    logged(GrammarConstraint, "accept")
    (output,) = llm.generate("ab", ask(regex="abc"))
    step = ["_step", "accept", "mask", "_mask", "_sample"]
    assert len(output.outputs[0].token_ids) == 4
    assert order[:4] == [name for name in step if name != "accept"]  # there is no token before the first
    assert order[4:19] == step * 3
    order.clear()
    llm.generate("ab", SamplingParams(max_tokens=9))
    assert set(order) == {"_step", "_sample", "_loop"}
    assert_warm(llm)


def test_what_was_read_outlasts_a_step_that_fails(llm, monkeypatch):
    """The sampler fails after the host has read, while it made a mask, that another request ended."""
    bound = llm.stream("ab", ask(regex="[a-z]{30}"))
    next(bound)
    short = llm.stream("ab", SamplingParams(seed=1, max_tokens=4, ignore_eos=True))
    next(short)
    _, sequence = sorted(llm.engine.scheduler.sequences.items())[-1]
    while not sequence.all_scheduled:
        next(bound)
    assert not sequence.finished

    def fails(*given, **named):
        raise ZeroDivisionError

    with monkeypatch.context() as patched:
        patched.setattr(llm.engine.runner.programs, "_sample", fails)
        with pytest.raises(ZeroDivisionError):
            next(bound)
    assert [piece.finish_reason for piece in short][-1] == "length"
    assert not llm.engine.scheduler.sequences
    assert_warm(llm)


def test_a_neighbour_that_fails_while_a_mask_is_made_ends_alone(llm, monkeypatch):
    """The step is between its forward pass and its sampler, which has yet to read the state of the slots."""

    def fails(output, index, sequence):
        if sequence.constraint is None and len(sequence.output_ids) >= 3:
            raise ZeroDivisionError("planted")
        return read_row(output, index, sequence)

    with monkeypatch.context() as patched:
        patched.setattr("jaxinfer.engine.engine.read_row", fails)
        free, bound = llm.generate(["ab", "cd"], [SamplingParams(ignore_eos=True), ask(regex="[a-z]{12}")])
    assert free.outputs[0].finish_reason == "error"
    assert re.fullmatch("[a-z]{12}", bound.outputs[0].text)
    assert_clean(llm)
    assert_warm(llm)


def test_a_constraint_that_fails_ends_its_request_alone(llm, monkeypatch):
    taken = []

    def fails(self, token):
        taken.append(token)
        if len(taken) == 3:
            self._fail("planted")
        else:
            self._matcher.consume_token(token)

    free = SamplingParams(seed=2, max_tokens=30)
    expected = texts(llm, "ab", free)
    with monkeypatch.context() as patched:
        patched.setattr(GrammarConstraint, "accept", fails)
        bound, other = llm.generate(["ab", "ab"], [ask(regex="[a-z]{30}"), free])
        (failed,) = bound.outputs
        assert (failed.finish_reason, len(failed.token_ids)) == ("constraint", 4)
        assert failed.problem == "structured_outputs has a regex that cannot be used: planted"
        assert [(one.text, one.finish_reason) for one in other.outputs] == expected[0]
    assert_warm(llm)


@pytest.mark.parametrize("method", ["mask", "accept"])
def test_a_constraint_with_a_bug_ends_its_request_alone(llm, monkeypatch, caplog, method):
    """And the others say what they say beside a sound one, those with a constraint too."""
    params = [ask(3, regex=DIGITS), ask(4, regex="[a-z]{20}"), SamplingParams(seed=2, max_tokens=30)]
    (whole,), *expected = texts(llm, ["ab"] * 3, params)
    with monkeypatch.context() as patched:
        break_digits(patched, llm, method, 5)
        (failed,), *others = texts(llm, ["ab"] * 3, params)
    assert others == expected
    assert failed == (whole[0][: len(failed[0])], "error")
    assert 4 <= len(failed[0]) <= 5
    assert [record.exc_info[1].args for record in caplog.records] == [("planted",)]
    assert_clean(llm)
    assert_warm(llm)


def test_a_grammar_that_grows_too_large_says_so(llm):
    """Its first mask is made without trouble: the end comes with a later one."""
    (output,) = llm.generate("ab", ask(regex=GROWING))
    (failed,) = output.outputs
    assert (failed.finish_reason, failed.stop_reason) == ("constraint", None)
    assert failed.problem is not None
    assert failed.problem.startswith("structured_outputs has a regex that cannot be used: ")
    assert failed.problem.endswith("too many expressions constructed")
    assert_warm(llm)


def test_a_constraint_is_made_beside_the_steps(llm, monkeypatch):
    """Who needs none is not held up; and one that cannot be made ends its request, be it by a bug."""
    made, grammars = threading.Event(), llm.intake.grammars

    def slow(asked):
        assert made.wait(60)
        if asked.regex != "a":
            raise (ValueError if asked.regex == "b" else ZeroDivisionError)("planted")
        return grammars.constraint(asked)

    monkeypatch.setattr(llm.engine._constraints, "_constrain", slow)
    outputs = llm.generate_iter(
        ["ab"] * 4, [ask(regex="a"), ask(regex="b"), SamplingParams(max_tokens=9), ask(regex="c")]
    )
    assert next(outputs)[0] == 2
    assert llm.engine.metrics.waiting == 3
    made.set()
    rest = {index: output.outputs[0] for index, output in outputs}
    assert {index: (one.text, one.finish_reason, one.problem) for index, one in rest.items()} == {
        0: ("a", "stop", None), 1: ("", "constraint", "planted"), 3: ("", "error", None)
    }  # fmt: skip
    assert_warm(llm)


def test_masks_do_not_wait_for_constraints_that_are_made(llm, monkeypatch):
    """However many of them there are."""
    made, ended, count = threading.Event(), [], THREADS + 1

    def slow(asked):
        ended.append(made.wait(20))
        return llm.intake.grammars.constraint(asked)

    bound = llm.stream("ab", ask(regex="[a-z]{30}"))
    first = next(bound).text
    with monkeypatch.context() as patched:
        patched.setattr(llm.engine._constraints, "_constrain", slow)
        for name in range(10**6, 10**6 + count):
            llm.engine.add(Request(name, (1, 2), ask(regex="a"), llm.intake.limits.eos_ids, 0))
        assert re.fullmatch("[a-z]{30}", first + "".join(piece.text for piece in bound))
        assert not ended
        made.set()
        while llm.engine.busy:
            llm.engine.step()
    assert ended == [True] * count
    assert_warm(llm)


def test_an_idle_engine_waits_only_briefly_for_a_constraint(llm, monkeypatch):
    """What comes meanwhile, it takes between two steps; and it makes no more of these than it must."""
    made = threading.Event()

    def slow(asked):
        assert made.wait(20)
        return llm.intake.grammars.constraint(asked)

    monkeypatch.setattr(llm.engine._constraints, "_constrain", slow)
    while llm.engine.busy:  # with a program of the test before
        llm.engine.step()
    names = (10**6, 10**6 + 1)
    for name in names:
        llm.engine.add(Request(name, (1, 2), ask(regex="a"), llm.intake.limits.eos_ids, 0))
    begun = time.monotonic()
    assert [llm.engine.step() for _ in range(5)] == [[]] * 5
    assert time.monotonic() - begun >= 5 * BRIEFLY
    llm.engine.abort(names[0])
    made.set()
    updates = []
    while llm.engine.busy:
        updates += llm.engine.step()
    assert {update.request.id for update in updates} == {names[1]}
    assert updates[-1].finish_reason == "stop"
    assert_warm(llm)


def test_one_that_is_dropped_while_its_constraint_is_made(llm, monkeypatch):
    made = threading.Event()
    monkeypatch.setattr(llm.engine._constraints, "_constrain", lambda asked: made.wait(60))
    outputs = llm.generate_iter(["ab"] * 2, [ask(regex="a"), SamplingParams(max_tokens=9)])
    next(outputs)
    outputs.close()
    made.set()
    assert not llm.engine.scheduler.sequences
    assert_warm(llm)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({}, "structured_outputs has none of json, regex"),
        ({"regex": "a", "choice": ["b"]}, "has regex and choice of"),
        ({"regex": ""}, "regex = ''; it must be text that is not empty"),
        ({"regex": "\ud800"}, "it must be text"),
        ({"choice": "yes"}, "choice = 'yes'; it must be a list of texts"),
        ({"choice": ["a", 5]}, "it must be a list of texts"),
        ({"json": []}, r"json = \[\]; it must be a JSON schema"),
        ({"json": {"a": {1, 2}}}, "it must be a JSON schema"),
        ({"json": {"a": math.nan}}, "it must be a JSON schema"),
        ({"json_object": 1}, "json_object = 1; it must be True"),
        ({"grammar": "a" * 300_000}, "grammar of 300000 characters"),
    ],
)
def test_what_is_no_structure(given, words):
    with pytest.raises(ValueError, match=words):
        StructuredOutputsParams(**given)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"ignore_eos": True}, "ignore_eos = True must be False with structured_outputs"),
        ({"min_tokens": 1}, "min_tokens = 1 must be 0 with structured_outputs"),
        ({"structured_outputs": "[a-z]"}, r"structured_outputs = '\[a-z\]' must be None or a StructuredOutputsParams"),
    ],
)
def test_what_goes_with_no_structure(options, words):
    with pytest.raises(ValueError, match=words):
        SamplingParams(**{"structured_outputs": StructuredOutputsParams(regex="a")} | options)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ({"regex": "[a"}, "prompt 1: structured_outputs has a regex that cannot be used: .*unclosed character class"),
        ({"regex": "(?=a)b"}, "look-around"),
        ({"regex": "語"}, "a regex that cannot be used: no token of the model can come next"),
        ({"json": {"$ref": "#/nowhere"}}, "has a JSON schema that cannot be used: Pointer '/nowhere' does not exist"),
        ({"json": "{"}, "has a JSON schema that cannot be used"),
        ({"json": "[" * 200_000}, "has a JSON schema that cannot be used"),
        ({"grammar": "start: nothing"}, 'unknown name: "nothing"'),
    ],
)
def test_a_structure_that_cannot_be_is_refused_before_anything_runs(llm, kind, words):
    with pytest.raises(ValueError, match=words):
        llm.generate(["ab", "cd"], [SamplingParams(), ask(**kind)])
    assert not llm.engine.scheduler.sequences
    assert_warm(llm)


def test_what_is_missing_is_named(llm, monkeypatch):
    endless = Grammars(llm.tokenizer, 104, ())
    assert not endless.possible
    assert "no end-of-sequence token" in endless.problem(StructuredOutputsParams(regex="a"))
    monkeypatch.setattr("jaxinfer.structured.find_spec", lambda name: None)
    assert not llm.intake.grammars.possible
    with pytest.raises(ValueError, match=r"no llguidance here; install jaxinfer\[structured\]"):
        llm.generate("ab", ask(regex="a"))
