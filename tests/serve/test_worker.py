"""The engine process's loop, around an engine that does as it is told."""

import io
import multiprocessing
import re
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from queue import SimpleQueue
from types import SimpleNamespace

import jax
import pytest
from rich.console import Console

from jaxinfer.cli.room import memory_lines
from jaxinfer.cli.serve import WarmUpBar
from jaxinfer.decode.sampling_params import SamplingParams
from jaxinfer.engine import Counters, Metrics, Request, Update, Warmed, WarmUp
from jaxinfer.engine.memory import NoRoomError, fitting_pages
from jaxinfer.llm import DEMO
from jaxinfer.model import Model, read_config
from jaxinfer.parallel import make_mesh
from jaxinfer.serve import worker
from jaxinfer.serve.messages import Abort, Add, Failed, Ready, Refused, Setup, Step, Stop, Tokens, Warming
from jaxinfer.serve.processes import EngineProcess, wait_until_ready

OPTIONS = {"max_num_seqs": 2, "max_num_batched_tokens": 64, "page_size": 16, "num_pages": None, "cache_dtype": None}
LLM_ARGUMENTS = {
    "dtype": None,
    "max_model_len": 64,
    "tensor_parallel_size": 1,
    "pipeline_parallel_size": 1,
    "context_parallel_size": 1,
}


def request(name: int, tokens: int = 3) -> Request:
    return Request(name, (1, 2), SamplingParams(max_tokens=tokens), (), 0)


def progress(warmed, total):
    raise AssertionError("nothing is compiled")


def held(running: int, learned: int = 0) -> Metrics:
    """A page for each that runs."""
    return Metrics(Counters(draft_updates=learned), 0, running, 9, running, 0, 0, 0, 0)


@dataclass
class Engine:
    """Brings one token a step to every request, and raises what is next in `errors`."""

    errors: list = field(default_factory=list)
    left: dict = field(default_factory=dict)
    steps: int = 0
    learned: int = 0
    refusals: list = field(default_factory=list)  # errors of `abort`

    @property
    def metrics(self):
        return held(len(self.left), self.learned)

    @property
    def busy(self):
        return bool(self.left)

    def add(self, request):
        if request.id < 0:
            raise ZeroDivisionError("a bug")
        if request.params.max_tokens > 100:
            raise ValueError("too many tokens")
        self.left[request.id] = [request, request.params.max_tokens]

    def abort(self, *names):
        if self.refusals:
            raise self.refusals.pop(0)
        for name in names:
            self.left.pop(name, None)

    def step(self):
        self.steps += 1
        if self.errors and (error := self.errors.pop(0)) is not None:
            raise error
        updates = []
        for name, entry in list(self.left.items()):
            entry[1] -= 1
            if not entry[1]:
                del self.left[name]
            updates.append(Update(entry[0], (7,), (), None, None if entry[1] else "length"))
        return updates


def run(engine, *messages, watch=None):
    """All messages, which are there from the start, and what the worker says until it has nothing to do."""
    inbox, said = SimpleQueue(), []
    for message in messages:
        inbox.put(message)
    loop = worker.Worker(engine, inbox, said.append, watch)
    code = []
    thread = threading.Thread(target=lambda: code.append(loop.run()))
    thread.start()
    while thread.is_alive() and not (inbox.empty() and not engine.busy):
        thread.join(0.001)
    steps = engine.steps
    thread.join(0.05)
    assert engine.steps - steps <= 1  # an idle engine makes no steps
    inbox.put(Stop())
    thread.join(10)
    assert not thread.is_alive()
    return code[0], said


def test_a_step_is_one_message_and_the_end_frees_everything():
    code, said = run(Engine(), Add((request(1), request(2, tokens=2))))
    assert code == 0
    assert said == [
        Step((), held(0)),
        Step((Tokens(1, (7,), (), None, None), Tokens(2, (7,), (), None, None)), held(2)),
        Step((Tokens(1, (7,), (), None, None), Tokens(2, (7,), (), None, "length")), held(1)),
        Step((Tokens(1, (7,), (), None, "length"),), held(0)),
    ]


def test_an_abort_is_obeyed_before_the_next_step():
    _, said = run(Engine(), Add((request(1, tokens=100), request(2))), Abort((1, 5)))
    assert {entry.id for step in said for entry in step.tokens} == {2}
    assert said[-1].engine == held(0)


def test_a_request_that_cannot_be_queued_costs_no_other(caplog):
    code, said = run(Engine(), Add((request(1, tokens=101), request(-2), request(3, tokens=1))))
    assert code == 0
    assert said[1:] == [
        Refused(1, "too many tokens"),
        Refused(-2, "a bug"),
        Step((Tokens(3, (7,), (), None, "length"),), held(0)),
    ]
    assert [record.message for record in caplog.records] == ["request -2 cannot be queued"]


def test_a_device_error_ends_the_process():
    error = jax.errors.JaxRuntimeError("INTERNAL: an illegal memory access\nand where")
    code, said = run(Engine([None, error]), Add((request(1),)))
    assert code == 1
    assert said[-1].reason == "device"
    assert said[-1].message == "the device failed: INTERNAL: an illegal memory access"


@pytest.mark.parametrize(("failures", "code"), [(worker.FAILURES - 1, 0), (worker.FAILURES, 1)])
def test_the_host_may_fail_now_and_then(failures, code):
    errors = [ZeroDivisionError("a bug")] * failures
    ended, said = run(Engine([*errors, None, *errors[:-1]]), Add((request(1, tokens=5),)))
    assert ended == code
    assert (said[-1] == Step((Tokens(1, (7,), (), None, "length"),), held(0))) == (not code)
    assert isinstance(said[-1], Failed) == bool(code)


def test_an_abort_that_fails_is_a_step_that_fails(caplog):
    """On the device the engine is given up, on the host only after some in a row."""
    code, said = run(
        Engine(refusals=[jax.errors.JaxRuntimeError("INTERNAL: broken")]), Add((request(1),)), Abort((1,))
    )
    assert code == 1
    assert said[-1].message == "the device failed: INTERNAL: broken"
    bugs = [ZeroDivisionError("a bug")] * worker.FAILURES
    aborts = [Abort((1,))] * worker.FAILURES
    code, said = run(Engine(refusals=bugs[:-1]), Add((request(1), request(2))), *aborts)
    assert code == 0
    assert {entry.id for step in said for entry in step.tokens} == {2}
    code, said = run(Engine(refusals=bugs), Add((request(1),)), *aborts)
    assert code == 1
    assert said[-1].message == "3 steps in a row failed: a bug"


def test_who_watches_is_told_after_the_callers_and_what_that_changes_is_told_too():
    engine, seen = Engine(), []

    def watch(updates):
        seen.append([update.tokens for update in updates])
        engine.learned += 1

    code, said = run(engine, Add((request(1, tokens=2),)), watch=watch)
    assert (code, seen) == (0, [[(7,)]] * 2)
    assert said == [
        Step((), held(0)),
        Step((Tokens(1, (7,), (), None, None),), held(1)),
        Step((), held(1, learned=1)),
        Step((Tokens(1, (7,), (), None, "length"),), held(0, learned=1)),
        Step((), held(0, learned=2)),
    ]


@pytest.mark.parametrize(("failures", "code"), [(worker.FAILURES - 1, 0), (worker.FAILURES, 1)])
def test_who_watches_may_fail_now_and_then_and_no_token_is_lost(failures, code, caplog):
    left = [ZeroDivisionError("a bug")] * failures

    def watch(updates):
        if left:
            raise left.pop()

    ended, said = run(Engine(), Add((request(1, tokens=failures),)), watch=watch)
    assert ended == code
    assert [entry.finish_reason for step in said[1 : failures + 1] for entry in step.tokens][-1] == "length"
    assert isinstance(said[-1], Failed) == bool(code)
    assert {record.message for record in caplog.records} == {"what watches the steps failed at one"}


def test_what_the_cache_holds_is_asked_of_the_engine():
    engine = SimpleNamespace(problems=lambda request: ["no"] if request.capacity > 37 else [])
    assert worker.longest(engine, 64) == 37
    assert worker.longest(engine, 37) == 37
    assert worker.longest(engine, 20) == 20


WARMED = (Warmed("64 rows of prompts", 0.5, 1.0, 2, 1), Warmed("decoding 1 slots, greedy", 0.1, 0.4, 1, 1))
DONE = WarmUp(WARMED, seconds=2.0, kernels=3)


def test_what_is_compiled_is_told_before_the_engine_is_ready(monkeypatch):
    def warm_up(told):
        for warmed in WARMED:
            told(warmed, len(WARMED))
        return DONE

    there, here = multiprocessing.Pipe()
    llm = SimpleNamespace(engine=SimpleNamespace(warm_up=warm_up))
    monkeypatch.setattr("jaxinfer.llm.LLM", lambda *arguments, **options: llm)
    ordered = time.monotonic()
    loaded = worker.load(Setup(None, warm_up=True), ordered, lambda *told: there.send(Warming(*told)))
    passed = time.monotonic() - ordered
    assert (loaded.llm, loaded.warm_up) == (llm, DONE)
    parts = loaded.loading.imports, loaded.loading.device, loaded.loading.model
    assert min(parts) > 0
    assert sum(parts) <= passed
    assert worker.load(Setup(None), ordered, progress).warm_up is None
    ready = Ready("a folder", 10, 64, (), 64, 2, 16, 9, loaded.loading, DONE)
    there.send(ready)
    seen = []
    assert wait_until_ready([EngineProcess(SimpleNamespace(sentinel=there), here)], seen.append) == [ready]
    assert seen == [Warming(warmed, 2) for warmed in WARMED]


@pytest.mark.parametrize("terminal", [True, False])
def test_a_terminal_shows_the_warm_up_until_it_is_over(terminal):
    console = Console(force_terminal=terminal, file=io.StringIO(), width=100)
    with WarmUpBar(console) as bar:
        for warmed in WARMED:
            bar.show(Warming(warmed, 2))
        console.print("serving")
    shown = console.file.getvalue()
    assert (WARMED[-1].name in shown) == terminal
    assert ("100%" in shown) == terminal
    assert shown.endswith("serving\n")


def test_a_model_that_is_not_there_is_named():
    failed = worker.load(Setup("no-such-model", LLM_ARGUMENTS, OPTIONS), 0.0, progress)
    assert (failed.reason, "no-such-model" in failed.message) == ("input", True)
    failed = worker.load(Setup(None, LLM_ARGUMENTS, OPTIONS | {"max_num_seqs": 3}), 0.0, progress)
    assert failed == Failed("input", "max_num_seqs = 3 must be an integer power of two in 1..4096")


@pytest.mark.parametrize(
    "error",
    [jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: 9 bytes\nmore"), NoRoomError("RESOURCE_EXHAUSTED: 9 bytes")],
)
def test_out_of_memory_tells_the_plan(monkeypatch, error):
    def load(*arguments, **options):
        raise error

    monkeypatch.setattr("jaxinfer.llm.LLM", load)
    failed = worker.load(Setup(None, LLM_ARGUMENTS, OPTIONS), 0.0, progress)
    assert (failed.reason, failed.message) == ("memory", "RESOURCE_EXHAUSTED: 9 bytes")
    setup = Setup(None, LLM_ARGUMENTS, OPTIONS | {"num_pages": 2 * 10**9})
    lines = "\n".join(memory_lines(setup, failed.device))
    for words in ("weights: 2", " MB", "cache: 2,000,000,000 pages of 16 tokens take", "TB", "--num-pages"):
        assert words in lines
    lines = "\n".join(memory_lines(Setup(None, LLM_ARGUMENTS, OPTIONS), ("a card", "gpu", 20_000_000)))
    assert "2 x 64 tokens take" in lines
    assert "would fit: no cache at all" in lines


def test_as_many_pages_as_would_fit_do_fit():
    """What the plan of the command says is what the engine holds them to."""
    setup = Setup(None, LLM_ARGUMENTS, OPTIONS)
    lines = "\n".join(memory_lines(setup, worker._device()))
    pages = int(re.search(r"which are ([\d,]+) pages", lines)[1].replace(",", ""))
    model = Model(read_config(DEMO), make_mesh(1))
    assert fitting_pages(model, 16, model.config.dtype, (pages + 5,)) == (pages,)


def test_the_http_process_imports_no_jax():
    modules = "jaxinfer.serve.server, jaxinfer.cli.serve, jaxinfer.cli.app"
    code = f"import sys, {modules}; print([name for name in ('jax', 'jaxlib', 'flax') if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
