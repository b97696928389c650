"""An axis of the mesh has one size."""

from pathlib import Path

import pytest

from jaxinfer.cli.axes import _given
from jaxinfer.cli.run import Run
from tests.cli.test_cli import flat
from tests.cli.test_cli import run as invoke
from tests.cli.test_run import written

AXES = ("tensor", "pipeline", "context")


@pytest.mark.parametrize("command", [["generate", "x"], ["plan", "llama-3-8b"], ["serve"], ["batch", "x", "y"]])
@pytest.mark.parametrize("axis", AXES)
def test_an_axis_that_is_named_twice_is_refused(command, axis):
    name = f"--{axis}-parallel-size"
    for sizes in ([name, "2", name, "4"], [f"{name}=2", f"{name}=4"], [name, "2", f"{name}=4"]):
        result = invoke(*command, *sizes)
        assert result.exit_code == 2
        assert f"{name} is given 2 times, 2 and 4; an axis has one size" in flat(result.output)


def test_each_axis_once_is_none_twice():
    sizes = [word for axis in AXES for word in (f"--{axis}-parallel-size", "2")]
    assert invoke("plan", "llama-3-8b", *sizes, "--hardware", "h200").exit_code == 0


def test_nothing_is_named_twice_where_nothing_is():
    assert _given("--tensor-parallel-size", []) == []
    assert _given("--tensor-parallel-size", ["--tensor-parallel-size", "2", "x"]) == ["2"]


def test_words_behind_the_options_are_no_axis():
    result = invoke(
        "generate", "--max-model-len", "1", "--tensor-parallel-size", "1", "--", "--tensor-parallel-size=3"
    )
    assert "given 2 times" not in flat(result.output)


def test_a_set_up_is_held_to_it_too(tmp_path):
    text = "jaxinfer serve --tensor-parallel-size 2 --tensor-parallel-size=4"
    setup = Run.read(Path(written(tmp_path, command=text)))
    with pytest.raises(ValueError, match=r"--tensor-parallel-size is given 2 times, 2 and 4"):
        setup.plan()
