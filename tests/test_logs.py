"""What is said while a command runs is shown once, on standard error, and only then."""

import logging
import sys

from typer.testing import CliRunner

from jaxinfer.cli import app
from jaxinfer.logs import LOGGERS, shown


def test_each_line_is_shown_once(capsys, monkeypatch):
    """However often that is asked for, whatever handlers the root logger has, and not what other libraries say."""
    monkeypatch.setattr(logging.getLogger(), "handlers", [logging.StreamHandler(sys.stderr)])
    with shown(), shown(), shown("jaxinfer.machine"):
        for name in ("jaxinfer.machine", "pallas_kernels", "another.library"):
            logging.getLogger(name).info("%s says %d", name, 1)
    logging.getLogger("pallas_kernels").info("after it")
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.splitlines() == ["jaxinfer.machine says 1", "pallas_kernels says 1"]


def test_it_goes_where_standard_error_is_then(capsys, monkeypatch, tmp_path):
    """As to a progress bar, which puts its own in the place of `sys.stderr`."""
    with shown(), open(tmp_path / "bar", "w") as bar, monkeypatch.context() as patch:
        patch.setattr("sys.stderr", bar)
        logging.getLogger("pallas_kernels").info("above the bar")
    assert capsys.readouterr().err == ""
    assert (tmp_path / "bar").read_text() == "above the bar\n"


def test_loggers_are_as_before_when_a_command_has_ended():
    def state() -> list:
        return [(one.level, one.propagate, [*one.handlers]) for one in map(logging.getLogger, LOGGERS)]

    before = state()
    assert CliRunner().invoke(app, ["plan", "llama-3-8b"]).exit_code == 0
    assert state() == before
