"""The serving benchmark: its workloads, the engine under them, and a server of its own to be measured."""

import asyncio
import itertools
import json
import math
import random
import threading
import time
import weakref
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest

from benchmarks.bench import MODELS
from benchmarks.record import MACHINE, Record
from benchmarks.serving import __main__ as command
from benchmarks.serving import latency, offline, soak
from benchmarks.serving.online import Target, Timeline, arrive
from benchmarks.serving.plot import curves, plot_curve
from benchmarks.serving.summary import Objective, summarize
from benchmarks.serving.workload import WORKLOADS, Job, Workload, longest, mixed
from benchmarks.tables import TABLES
from jaxinfer.engine import Engine, WarmUp
from jaxinfer.engine.metrics import Counters
from jaxinfer.llm import DEMO
from jaxinfer.model import Model, read_config
from jaxinfer.parallel import make_mesh
from jaxinfer.roofline import Precision, find_hardware, workload_limit
from tests.engine.fake import FakePrograms
from tests.engine.tiny import assert_warm, warm_llm

JOBS = [Job((1, 2, 3), 3), Job((4, 5), 1), Job((6,), 2)]


def test_the_mixed_workload_is_the_one_that_other_systems_are_measured_with():
    random.seed(0)
    assert mixed(256).sizes == tuple((random.randint(100, 1024), random.randint(100, 1024)) for _ in range(256))


def test_prompts_have_their_lengths_and_what_they_share():
    jobs = Workload(((8, 2), (6, 3)), shared=5).jobs(vocabulary=50)
    assert [(len(job.prompt), job.output) for job in jobs] == [(8, 2), (6, 3)]
    assert longest([], static=[Workload(((8, 2), (6, 3)))]) == 11
    assert jobs[0].prompt[:5] == jobs[1].prompt[:5]
    assert jobs[0].prompt[5:7] != jobs[1].prompt[5:7]
    assert all(0 <= token < 50 for job in jobs for token in job.prompt)
    assert longest(list(WORKLOADS.values())) == 8192 + 64
    assert Workload(((1, 2), (3, 4))).first(3).sizes == ((1, 2), (3, 4), (1, 2))


@pytest.mark.parametrize("batch", [None, 2])
def test_every_job_is_served_whole(tmp_path_factory, batch):
    engine = warm_llm(tmp_path_factory.getbasetemp()).engine
    found = offline.run(engine, JOBS, batch)
    assert (found.tokens_in, found.tokens_out) == (6, 6)
    assert found.total_rate == pytest.approx(2 * found.output_rate)
    assert not engine.busy


def test_an_offline_run_stands_beside_its_limit_and_static_batching(tmp_path_factory):
    llm = warm_llm(tmp_path_factory.getbasetemp())
    machine, sizes = find_hardware("h200"), Workload(((10, 12), (9, 2), (8, 3), (7, 2), (6, 12), (5, 2)))
    alone = offline.measure(llm.engine, "a case", sizes, machine)
    assert [(record.implementation, record.metric) for record in alone] == [
        ("jaxinfer", "output throughput"),
        ("jaxinfer", "throughput in and out"),
    ]
    *records, ratio = offline.measure(llm.engine, "a case", sizes, machine, static=True)
    assert (ratio.implementation, ratio.metric, ratio.unit) == ("jaxinfer", "continuous over static batching", "x")
    rates = {record.implementation: record.value for record in records if record.metric == "output throughput"}
    assert rates.keys() == {"jaxinfer", "jaxinfer, static batching"}
    assert ratio.value == pytest.approx(rates["jaxinfer"] / rates["jaxinfer, static batching"])
    limit = workload_limit(llm.engine.model.config, machine, sizes.sizes, precision=Precision.all_in("float32"))
    for record in (*alone, *records):
        tokens = 33 if record.metric == "output throughput" else 33 + 45
        assert record.roofline_fraction == pytest.approx(limit * record.value / tokens)
    assert_warm(llm)


def test_the_limit_is_the_one_that_other_systems_are_held_against():
    config = read_config(MODELS / "llama-3-8b")
    sizes = WORKLOADS["256 requests"].sizes
    seconds = workload_limit(config, find_hardware("h200-measured"), sizes)
    assert sum(output for _, output in sizes) / seconds == pytest.approx(13_300, rel=0.03)


STALL = latency.Stall(decoding=2, context=6, prompt=80)


@pytest.fixture
def desk(tmp_path_factory, monkeypatch):
    sizes = {"PROMPT": 5, "NEW": 8, "REPEATS": 2, "FIRST_TOKENS": 2, "SETTLE": 1, "STEADY": 2, "PIECES": 9}
    for name, value in sizes.items():
        monkeypatch.setattr(latency, name, value)
    llm = warm_llm(tmp_path_factory.getbasetemp())
    yield latency.Desk("tiny", llm.engine, find_hardware("h200"))
    assert_warm(llm)


def test_latencies_through_the_engine(desk):
    groups = [*latency.measure(desk, [7, 60], [STALL]), *(latency.decoding(desk, batch) for batch in (1, 4))]
    found = {(record.case, record.metric): record for group in groups for record in group}
    prompts = {"tiny prompt 7", "tiny prompt 60"}
    assert {case for case, _ in found} == {MACHINE, "tiny B1", "tiny B4", f"tiny {STALL.name}"} | prompts
    for batch in (1, 4):
        rate, step = (found[f"tiny B{batch}", metric] for metric in ("decode", "decode step"))
        assert rate.value * step.value == pytest.approx(1e3 * batch)
        assert rate.low <= rate.value <= rate.high
        assert rate.roofline_fraction == step.roofline_fraction
    assert found["tiny prompt 60", "first token"].samples == 2
    p99, worst = (found[MACHINE, f"{name} over a piece of Python"].value for name in ("p99", "worst"))
    assert 1 <= p99 <= worst


def test_steps_beside_a_prompt_as_the_host_sees_them_and_on_the_device_alone(desk):
    found = {record.metric: record for record in latency.beside(desk, STALL)}
    middle, p99, worst = (found[f"step with the prompt{name}"] for name in (" p50", " p99", ", worst"))
    assert middle.samples == 2 * 2  # 80 tokens beside 2 take two programs of 64 rows, in each of two rounds
    assert middle.value <= p99.value <= worst.value
    for where in ("", " on the device"):
        ratio = found[f"worst over a decode step{where}"].value
        worst = found[f"step with the prompt{where}, worst"].value
        assert ratio == pytest.approx(worst / found[f"decode step{where}"].value)
    assert found["step with the prompt on the device p50"].samples == 2 * 1  # all but the first of a round
    rows, cached = (found[name].value for name in ("rows of the worst step on the device", "tokens before its chunk"))
    assert (rows, cached) == (64, 62)  # the first chunk is 62 of the 64 rows
    assert {metric for _, metric in TABLES["beside-a-prompt"].places()} <= found.keys()
    with pytest.raises(ValueError, match="max_num_seqs = 4 must be more than the 4 sequences that decode"):
        latency.beside(desk, latency.Stall(decoding=4))


def test_the_command_measures_static_batching_where_requests_outnumber_the_slots(monkeypatch):
    """Of an engine that does nothing: which workloads, and how."""
    seen, model = [], WarmUp((), 1.0, 0)
    monkeypatch.setattr(
        command, "make_engine", lambda options, context: SimpleNamespace(warm_up=lambda: model, counters=Counters())
    )
    monkeypatch.setattr(command, "ceilings", lambda: None)
    monkeypatch.setattr(offline, "measure", lambda engine, case, sizes, machine, static: seen.append((case, static)))
    monkeypatch.setattr(latency, "decoding", lambda desk, batch: seen.append((desk.name, batch)))
    for arguments in (["--static"], ["--workload", "--static", "256 requests"], []):
        list(command.measure_offline(command.parse(["offline", "--model", "m", "--batches", *arguments])))
    usual = [("m 256 requests", False), ("m 32 x 8192 in, 64 out", False)]
    more = ["1024 requests", "1024 chats"]
    assert seen == [*usual, *((f"m {name}", True) for name in more), ("m 256 requests", True), *usual]
    seen.clear()
    list(command.measure_offline(command.parse(["offline", "--model", "m", "--workload", "--batches", "1", "4"])))
    assert seen == [("m", 1), ("m", 4)]
    assert min(len(WORKLOADS[name].sizes) for name in more) > command.parse(["offline"]).max_num_seqs


def test_blocks_of_several_sizes_by_engines_of_the_same_weights(monkeypatch):
    """One engine at a time, each of its size, on a device in plain Python; the cases are those of the table."""
    model, params, made = Model(read_config(DEMO), make_mesh(1), context=4096), [], []

    class Counted(Engine):
        def __init__(self, *given):
            assert [one for one in made if one() is not None] == []
            assert given[:2] == (model, params)
            super().__init__(*given)
            made.append(weakref.ref(self))

        def warm_up(self, progress=None):
            return WarmUp((), 1.0, 0)

    for name, value in {"PROMPT": 5, "NEW": 32, "REPEATS": 1}.items():
        monkeypatch.setattr(latency, name, value)
    monkeypatch.setattr("jaxinfer.engine.runner.Programs", FakePrograms)
    monkeypatch.setitem(WORKLOADS, "256 requests", Workload(((6, 5), (4, 3))))
    monkeypatch.setattr(command, "Engine", Counted)
    monkeypatch.setattr(command, "random_model", lambda name, context, mesh: (model, params))
    monkeypatch.setattr(command, "ceilings", lambda: find_hardware("h200"))
    groups = list(command.measure_blocks(command.parse(["blocks", "--batches", "1", "16", "--num-pages", "400"])))
    found = {(record.case, record.metric) for group in groups for record in group}
    sizes = (1, 2, 4, 8, 16)
    assert len(made) == len(sizes)
    places = {place for size in sizes for place in TABLES["blocks"].places(f" in blocks of {size}")}
    assert found & places == {
        (f"llama-3-8b {what} in blocks of {size}", metric)
        for size in sizes
        for what, metric in (("B1", "decode"), ("B16", "decode"), ("256 requests", "output throughput"))
    }


def test_a_static_batch_goes_on_until_its_longest_has_ended():
    jobs = [Job((1, 2), 5), Job((3,), 9), Job((4,), 1)]
    assert offline.as_long(jobs) == [Job((1, 2), 9), Job((3,), 9), Job((4,), 9)]


def test_chats_have_the_lengths_that_they_are_said_to_have():
    prompts, outputs = zip(*WORKLOADS["1024 chats"].sizes, strict=True)
    assert min(prompts) >= 1 <= min(outputs)
    assert max(outputs) == 1024  # as many as are cut off there, the mean is below that of the distribution
    for lengths, mean in ((prompts, 161), (outputs, 338)):
        cut = mean * (1 - math.exp(-1024 / mean))
        assert sum(lengths) / len(lengths) == pytest.approx(cut, rel=4 / math.sqrt(len(lengths)))


class Server(BaseHTTPRequestHandler):
    """Answers with a piece for each token, a hundredth of a second apart; refuses prompts that begin with 6."""

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if body["prompt"][0] == 6:
            self.send_error(429, "full")
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        for _ in range(body["max_tokens"]):
            time.sleep(0.01)
            self.event({"choices": [{"text": "x"}]})
        self.event({"choices": [], "usage": {"completion_tokens": body["max_tokens"]}})
        self.wfile.write(b"data: [DONE]\n\n")

    def event(self, content: dict) -> None:
        self.wfile.write(f"data: {json.dumps(content)}\n\n".encode())

    def log_message(self, format, *args):
        pass


@pytest.fixture(scope="module")
def target() -> Iterator[Target]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield Target(f"http://127.0.0.1:{server.server_port}/v1", "any")
        server.shutdown()
        thread.join()


def test_timelines_of_a_server(target):
    whole, short, refused = asyncio.run(arrive(target, JOBS, rate=float("inf")))
    assert (whole.tokens, len(whole.pieces), whole.error) == (3, 3, None)
    assert whole.first_token >= 0.01
    assert whole.per_token == pytest.approx(sum(whole.gaps) / 2)
    assert whole.whole >= 0.03
    assert (short.tokens, short.gaps, short.per_token) == (1, [], 0.0)
    assert refused.error is not None
    assert refused.error.startswith("429")


def test_the_command_sends_requests_for_a_while_at_each_rate(target, monkeypatch):
    monkeypatch.setitem(WORKLOADS, "256 requests", Workload(((3, 2), (2, 1))))
    arguments = ["online", "--url", target.url, "--model", "llama-3-8b", "--rates", "8", "16", "--seconds", "0.25"]
    groups = list(command.measure_online(command.parse(arguments)))
    found = {(record.case, record.metric): record.value for group in groups for record in group}
    case = "llama-3-8b 256 requests at {} requests/s"
    assert (found[case.format(8), "requests"], found[case.format(16), "requests"]) == (2, 4)
    for rate in (8, 16):
        assert set(TABLES["online"].places(f" at {rate} requests/s")) <= found.keys()
    with pytest.raises(SystemExit):
        command.parse([*arguments[:-3], "inf", "--seconds", "1"])


def test_arrivals_are_random_and_do_not_wait_for_answers(target):
    jobs, rate = [Job((1,), 20)] * 30, 100.0
    timelines = asyncio.run(arrive(target, jobs, rate))
    sent = [timeline.sent for timeline in timelines]
    gaps = [after - before for before, after in itertools.pairwise(sent)]
    # The sum of 29 exponential gaps has a deviation of 19 % of its mean; a loaded machine only delays.
    assert 0.5 / rate < sum(gaps) / len(gaps)
    assert max(gaps) > 1.5 / rate
    assert sent[3] < timelines[0].pieces[-1]  # while the first was being answered


def test_a_server_that_is_not_there_is_an_error_of_the_request():
    (timeline,) = asyncio.run(arrive(Target("http://127.0.0.1:1/v1", "any"), JOBS[:1], rate=1.0))
    assert timeline.error is not None
    assert "ConnectError" in timeline.error
    with pytest.raises(RuntimeError, match=r"no request of 'a case' was answered: ConnectError"):
        summarize("a case", "a server", [timeline], Objective())


def test_percentiles_throughput_and_goodput():
    timelines = [Timeline(0.0, [0.1 + 0.01 * slow, 0.2 + 0.1 * slow], 11) for slow in range(4)]
    timelines.append(Timeline(0.0, error="429: full"))
    records = summarize("a case", "a server", timelines, Objective(first_token=0.12, per_token=0.015))
    found = {record.metric: record.value for record in records}
    assert found["output throughput"] == pytest.approx(44 / 0.5)
    assert found["goodput"] == pytest.approx(1 / 0.5)  # a token of the second takes 19 ms
    assert found["failed"] == 1
    assert (found["objective, first token"], found["objective, time per token"], found["requests"]) == (120, 15, 5)
    assert found["first token p50"] == pytest.approx(115)
    assert found["time per token p99"] == pytest.approx(36.7, abs=0.3)
    assert found["gap p50"] == pytest.approx(235)
    assert found["end to end p50"] == pytest.approx(350)


def test_the_curve_goes_through_the_rates():
    records = [
        Record(f"at {rate}", "a server", metric, value, "")
        for rate, throughput, token in ((2, 200.0, 20.0), (1, 100.0, 10.0))
        for metric, value in (("output throughput", throughput), ("time per token p50", token))
    ]
    assert curves(records) == {("a server", "p50"): ([100.0, 200.0], [10.0, 20.0])}
    (axes,) = plot_curve(records).axes
    assert [text.get_text() for text in axes.get_legend().get_texts()] == [
        "a server, p50",
        "people read at this speed",
    ]


# --- soak


def soaked(settled: dict[str, float], memories: list[int]) -> list[Record]:
    """The records of a server that nobody calls."""
    start = {soak.COMPILED: 40.0, "jaxinfer_cache_pages_used": 0.0}
    figures, memories = iter([start, start | settled]), list(memories)
    server = SimpleNamespace(url="http://127.0.0.1:1", memory=lambda: memories.pop(0))
    server.figures, server.settle = lambda: start, lambda: next(figures)
    return soak.soak(server, 0, 1.0)


@pytest.mark.parametrize(
    ("settled", "memories", "words"),
    [
        ({"jaxinfer_cache_pages_used": 2.0}, [10**9, 10**9], "2 pages are lost"),
        ({soak.COMPILED: 43.0}, [10**9, 10**9], "3 programs were compiled meanwhile"),
        ({}, [10**9, 11 * 10**8], "memory grew from 1000 to 1100 MB"),
    ],
)
def test_what_a_server_owes_after_a_soak(settled, memories, words):
    with pytest.raises(RuntimeError, match=words):
        soaked(settled, memories)


def test_a_soak_that_went_well():
    found = {record.metric: record.value for record in soaked({}, [10**9, 1001 * 10**6])}
    assert found == {
        "pages lost": 0, "memory after a tenth": 1000, "memory at the end": 1001, "programs compiled meanwhile": 0,
    }  # fmt: skip
