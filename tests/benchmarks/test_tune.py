"""The search for configs, on an op whose configs differ in how much needless work they do."""

import json
import math
import re
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from benchmarks.kernels import __main__ as command
from benchmarks.kernels import tune as search
from benchmarks.kernels.op import Op, Run, Tuning
from benchmarks.kernels.ops import OPS
from benchmarks.kernels.ops import flash_attention as attention
from benchmarks.kernels.ops import flash_decoding as decoding
from benchmarks.kernels.ops import streaming_matmul as matmul
from benchmarks.kernels.timing import Timing
from benchmarks.kernels.tune import choose, tune
from pallas_kernels import tuned
from pallas_kernels.flash_attention.problems import Problem as Prefill
from pallas_kernels.flash_decoding.problems import Problem as Decode
from pallas_kernels.models import Heads
from pallas_kernels.streaming_matmul.problems import Problem as Product
from tests.benchmarks.tiny import BENCH, TINY
from tests.pallas_kernels.gpu_program import lower

pytestmark = pytest.mark.usefixtures("short_programs")


@dataclass(frozen=True)
class Config:
    seconds: float
    wrong: bool = False
    fails: bool = False


@dataclass(frozen=True)
class Problem:
    size: int
    configs: tuple[Config, ...]
    flops: float = 1.0
    bytes: float = 1.0


def configured(problem: Problem, config: Config) -> Run:
    if config.fails:
        raise ValueError("too much shared memory")
    return Run(lambda arguments: arguments["x"] * (2.0 if config.wrong else 1.0))


def make_op(path: Path, **problems: Problem) -> Op[Problem]:
    return Op(
        name="identity",
        problems=problems,
        arguments=lambda problem, key: {"x": jnp.ones(problem.size)},
        implementations={"xla": lambda problem: Run(lambda arguments: arguments["x"])},
        peers=lambda problem: ("xla",),
        unit="TB/s",
        quick=(),
        curve={},
        curve_label="",
        tuning=Tuning(path, lambda problem: f"size {problem.size}", lambda problem: problem.configs, configured),
    )


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "tuned.json"


def tuned_on(path: Path, **problems: Problem) -> list[str]:
    op = make_op(path, **problems)
    return [*tune(op, [*problems], BENCH, "a card", path, math.inf)]


def saved(path: Path) -> dict[str, dict]:
    return {key: entry["config"] for (_, key), entry in tuned.read(path).items()}


@pytest.fixture
def known_times(monkeypatch):
    """Runs are checked as ever, and take the seconds that their config says."""
    original, start = search.time_started, search.start_run
    configs = {}

    def start_run(make_run, *rest):
        run = start(make_run, *rest)
        configs[id(run)] = run, make_run.args[1]
        return run

    def time_started(run, *rest):
        outcome, seconds = original(run, *rest), configs[id(run)][1].seconds
        return outcome if isinstance(outcome, str) else Timing(seconds, seconds, seconds, 1)

    monkeypatch.setattr(search, "start_run", start_run)
    monkeypatch.setattr(search, "time_started", time_started)


def test_the_fastest_right_config_of_each_key_is_saved(known_times, path):
    slow, fast = Config(2e-3), Config(1e-3)
    bad = (Config(1e-4, wrong=True), Config(1e-5, fails=True))
    text = tuned_on(path, a=Problem(4, (slow, *bad, fast)), b=Problem(8, (slow, *bad)))
    assert json.loads(path.read_text()) == [
        {"device": "a card", "key": "size 4", "config": {"seconds": 1e-3}, "us": 1000.0},
        {"device": "a card", "key": "size 8", "config": {"seconds": 2e-3}, "us": 2000.0},
    ]
    assert any(line.endswith("failed: ValueError: too much shared memory") for line in text)
    assert any("failed: WrongResult: differs from xla by 1 of its size" in line for line in text)
    assert f"identity size 4: {fast}, 1,000 us" in text


def test_problems_with_one_key_get_one_config(known_times, path):
    """The one with the least loss over all of them, among those that run on all of them."""
    x, y, z = Config(1e-3), Config(1.1e-3), Config(1.2e-3)
    text = tuned_on(path, a=Problem(4, (x, y, z)), b=Problem(4, (y, z)))
    assert text[-1] == f"identity size 4: {y}, 1,100 us"
    assert choose([{x: 1.0, y: 2.0, z: 1.2}, {x: 100.0, y: 50.0, z: 55.0}]) == z


def test_what_is_hopeless_on_one_problem_is_not_tried_on_the_next(known_times, path):
    x, y = Config(1e-3), Config(2e-3)
    text = tuned_on(path, a=Problem(4, (x, y)), b=Problem(4, (y, x)))
    assert [line.split("  ")[1] for line in text if line.startswith("identity b")] == [str(x)]


def test_where_nothing_runs_nothing_is_saved(known_times, path):
    text = tuned_on(path, a=Problem(4, (Config(1.0, fails=True),)))
    assert text[-1] == "identity size 4: no candidate runs on all of its problems"
    assert not path.exists()


def test_another_implementation_is_kept_by_its_name(path):
    tuned.save(path, "a card", "a weight", "xla", 1e-6)
    assert saved(path) == {"a weight": "xla"}


def test_no_key_is_begun_after_the_deadline(path):
    op = make_op(path, a=Problem(4, (Config(0.0),)))
    assert [*tune(op, ["a"], BENCH, "a card", path, -math.inf)] == ["identity size 4: not begun, the time is up"]


def test_the_command_tunes(capsys, monkeypatch, path, tmp_path):
    """Elsewhere than beside the config, the entries that are not measured again are there too."""
    monkeypatch.setattr(command, "measure_machine", lambda: BENCH.ceilings)
    monkeypatch.setattr(command, "Effort", lambda: BENCH.effort)
    tuned.save(path, "a card", "size 8", Config(2.0), 3.0)
    op = make_op(path, a=Problem(4, (Config(0.0),)))
    command.main(["--tune", "--output", str(tmp_path / "out")], {"identity": op})
    assert "identity size 4: Config(" in capsys.readouterr().out
    assert saved(path) == {"size 8": {"seconds": 2.0}}
    assert saved(tmp_path / "out" / "identity.json") == {"size 8": {"seconds": 2.0}, "size 4": {"seconds": 0.0}}
    command.main(["--tune"], {"identity": op})
    assert saved(path).keys() == {"size 4", "size 8"}


def test_an_op_without_configs_is_named(monkeypatch):
    monkeypatch.setattr(command, "measure_machine", lambda: BENCH.ceilings)
    op = replace(TINY["flash_decoding"], tuning=None)
    with pytest.raises(SystemExit, match="nothing to tune in flash_decoding"):
        command.main(["--tune"], {op.name: op})


# What `auto` and the heuristics take for each problem of the benchmark, by op.
TUNED = [name for name, op in OPS.items() if op.tuning is not None]
CHOSEN = {
    "flash_attention": lambda problem: attention.candidates(problem)[0],
    "flash_decoding": lambda problem: decoding.candidates(problem)[0],
    "streaming_matmul": lambda problem: matmul.candidates(problem)[0],
}
# The modules that read the files.
READERS = {
    "flash_attention": attention.configs,
    "flash_decoding": decoding.choice,
    "streaming_matmul": matmul.configs,
}


def test_a_device_without_an_entry_gets_that_of_the_nearest(path):
    first, second = tuned.NEAREST
    assert tuned.find(path, "size 4") is None
    for device, seconds in ((second, 1.0), (first, 2.0), (jax.devices()[0].device_kind, 3.0)):
        tuned.save(path, device, "size 4", Config(seconds), seconds)
        assert tuned.find(path, "size 4") == {"seconds": seconds}
        assert tuned.find(path, "size 5") is None
    tuned.save(path, second, "size 5", Config(4.0), 4.0)
    assert [tuned.find(path, f"size {size}") for size in (4, 5)] == [{"seconds": 3.0}, {"seconds": 4.0}]


@pytest.mark.parametrize("name", TUNED)
def test_the_committed_configs_are_those_that_run(monkeypatch, path, name):
    """Every entry is of a problem of the benchmark, is chosen for it, and is among what fits the card."""
    op, chosen, module = OPS[name], CHOSEN[name], READERS[name]
    problems = {op.tuning.key(problem): problem for problem in op.problems.values()}
    if not op.tuning.path.exists():
        pytest.skip(f"no config of {name} was searched for since its kernel changed")
    entries = tuned.read(op.tuning.path)
    assert entries
    for (device, key), entry in entries.items():
        assert device in tuned.NEAREST
        assert entry["us"] is None or entry["us"] > 0
        if entry["config"] == "xla":
            assert "XLA is faster" in matmul.configs.slower(matmul.shape_of(problems[key]))
        else:
            config = chosen(problems[key])
            assert entry["config"].items() <= asdict(config).items()
            with monkeypatch.context() as patch:
                patch.setattr(module, "TUNED", path)  # of nothing
                assert config in op.tuning.candidates(problems[key])


SMALL = {
    "flash_attention": Prefill(Heads(4, 2, 64), 1, 128, 64),
    "flash_decoding": Decode(Heads(4, 2, 64), 2, 128, 64),
    "streaming_matmul": Product(16, 256, 256),
}


@pytest.mark.parametrize("name", TUNED)
def test_tuning_a_small_stand_in_makes_a_file_that_the_config_reads(monkeypatch, path, name):
    """Without a card the candidates, here two, run as XLA; which is the fastest is then chance, and what is written
    is not."""
    op, problem = OPS[name], SMALL[name]
    plain, candidates = op.implementations["xla"], op.tuning.candidates
    tuning = replace(
        op.tuning,
        path=path,
        candidates=lambda problem: candidates(problem)[:2],
        configured=lambda problem, config: plain(problem),
    )
    op = replace(op, problems={"small": problem}, tuning=tuning)
    last = [*tune(op, ["small"], BENCH, tuned.NEAREST[0], path, math.inf)][-1]
    module = READERS[name]
    monkeypatch.setattr(module, "TUNED", path)
    (found,) = saved(path).values()
    if found == "xla":
        assert "XLA is faster" in module.slower(matmul.shape_of(problem))
    else:
        assert f"{CHOSEN[name](problem)}, " in last


LOWERED = [
    *((name, SMALL[name]) for name in TUNED),
    ("flash_attention", replace(SMALL["flash_attention"], cache="float8_e4m3fn")),  # with scales
]


@pytest.mark.parametrize(("name", "problem"), LOWERED, ids=lambda given: getattr(given, "cache", given))
def test_a_candidate_is_lowered_as_it_is(name, problem):
    """The run of a config launches our kernel with it: another trace for each, which can be lowered."""
    op = OPS[name]
    shapes = jax.eval_shape(lambda key: op.arguments(problem, key), jax.random.key(0))
    configs = [config for config in op.tuning.candidates(problem) if config != "xla"][:2]
    runs = [op.tuning.configured(problem, config) for config in configs]
    given = [shapes if run.prepare is None else jax.eval_shape(run.prepare, shapes) for run in runs]
    traces = [str(jax.make_jaxpr(run.call)(inputs)) for run, inputs in zip(runs, given, strict=True)]
    assert len({re.sub("0x[0-9a-f]+", "", trace) for trace in traces}) == len(configs)
    assert "mosaic_gpu" in lower(runs[0].call, given[0])
