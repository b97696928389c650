"""The search for configs, on an op whose configs differ in how much needless work they do."""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import pytest

from benchmarks.kernels import __main__ as command
from benchmarks.kernels import tune as search
from benchmarks.kernels.op import Op, Run
from benchmarks.kernels.timing import Timing
from benchmarks.kernels.tune import choose, tune
from tests.benchmarks.tiny import BENCH, TINY

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


class Data:
    """What an op's `config.py` would keep in a file."""

    def __init__(self):
        self.saved = {}

    def candidates(self, problem: Problem):
        return problem.configs

    def tuning_key(self, problem: Problem) -> str:
        return f"size {problem.size}"

    def save_tuned(self, device: str, key: str, config: Config) -> None:
        self.saved[device, key] = config


def configured(problem: Problem, config: Config) -> Run:
    if config.fails:
        raise ValueError("too much shared memory")
    return Run(lambda arguments: arguments["x"] * (2.0 if config.wrong else 1.0))


def make_op(**problems: Problem) -> Op[Problem]:
    return Op(
        name="identity",
        problems=problems,
        arguments=lambda problem, key: {"x": jax.random.normal(key, (problem.size,), jnp.float32)},
        implementations={"xla": lambda problem: Run(lambda arguments: arguments["x"])},
        peers=lambda problem: ("xla",),
        unit="TB/s",
        quick=(),
        curve={},
        curve_label="",
        tuning=Data(),
        configured=configured,
    )


@pytest.fixture
def known_times(monkeypatch):
    """Runs are checked as ever, and take the seconds that their config says."""
    original = search.attempt

    def attempt(make_run, *rest):
        outcome = original(make_run, *rest)
        seconds = make_run.args[1].seconds
        return outcome if isinstance(outcome, str) else Timing(seconds, seconds, seconds)

    monkeypatch.setattr(search, "attempt", attempt)


def test_the_fastest_right_config_of_each_key_is_saved(known_times):
    slow, fast = Config(2e-3), Config(1e-3)
    bad = (Config(1e-4, wrong=True), Config(1e-5, fails=True))
    op = make_op(a=Problem(4, (slow, *bad, fast)), b=Problem(8, (slow, *bad)))
    text = [*tune(op, ["a", "b"], BENCH, "a card")]
    assert op.tuning.saved == {("a card", "size 4"): fast, ("a card", "size 8"): slow}
    assert any(line.endswith("failed: ValueError: too much shared memory") for line in text)
    assert any("failed: WrongResult: differs from xla by 1 of its size" in line for line in text)
    assert f"identity size 4: {fast}" in text


def test_problems_with_one_key_get_one_config(known_times):
    """The one with the least loss over all of them, among those that run on all of them."""
    x, y, z = Config(1e-3), Config(2e-3), Config(3e-3)
    op = make_op(a=Problem(4, (x, y, z)), b=Problem(4, (y, z)))
    assert [*tune(op, ["a", "b"], BENCH, "a card")][-1] == f"identity size 4: {y}"
    assert choose([{x: 1.0, y: 2.0, z: 1.2}, {x: 100.0, y: 50.0, z: 55.0}]) == z


def test_where_nothing_runs_nothing_is_saved(known_times):
    op = make_op(a=Problem(4, (Config(1.0, fails=True),)))
    assert [*tune(op, ["a"], BENCH, "a card")][-1] == "identity size 4: no candidate runs on all of its problems"
    assert op.tuning.saved == {}


def test_the_command_tunes(capsys, monkeypatch):
    monkeypatch.setattr(command, "measure_machine", lambda: BENCH.ceilings)
    monkeypatch.setattr(command, "Effort", lambda: BENCH.effort)
    op = make_op(a=Problem(4, (Config(0.0),)))
    command.main(["--tune"], {"identity": op})
    assert op.tuning.saved == {("a small machine", "size 4"): Config(0.0)}
    assert "identity size 4: Config(" in capsys.readouterr().out


def test_an_op_without_configs_is_named(monkeypatch):
    monkeypatch.setattr(command, "measure_machine", lambda: BENCH.ceilings)
    op = replace(TINY["flash_decoding"], tuning=None)
    with pytest.raises(SystemExit, match="nothing to tune in flash_decoding"):
        command.main(["--tune"], {op.name: op})
