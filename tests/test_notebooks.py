"""The notebooks are built from their text, and run from top to bottom on a CPU.

The tools are imported by the tests: they take long, and other processes collect this module too.
"""

import importlib.util
import subprocess
from pathlib import Path

import pytest

COLAB = Path(__file__).parents[1] / "colab"
TEXTS = sorted(COLAB.glob("*.py"))
notebooks = pytest.mark.parametrize("text", TEXTS, ids=lambda path: path.stem)


def test_every_notebook_has_its_text():
    assert TEXTS
    assert {path.stem for path in COLAB.glob("*.ipynb")} == {path.stem for path in TEXTS}


@notebooks
def test_the_notebook_is_what_its_text_says_and_holds_no_outputs(text):
    import jupytext
    import nbformat

    built, written = nbformat.read(text.with_suffix(".ipynb"), as_version=4), jupytext.read(text)
    assert [(c.cell_type, c.source) for c in built.cells] == [(c.cell_type, c.source) for c in written.cells]
    assert not any(cell.get("outputs") for cell in built.cells)


def test_the_first_cell_installs_from_the_address_that_the_reader_sets(monkeypatch):
    import jupytext

    markdown, code = (
        next(cell.source for cell in jupytext.read(COLAB / "01_quickstart.py").cells if cell.cell_type == kind)
        for kind in ("markdown", "code")
    )
    assert "Set `SOURCE` first" in markdown
    installed = []
    monkeypatch.setattr(subprocess, "run", lambda command, check: installed.append(command[-1]))
    exec(code, {})
    assert not installed  # jaxinfer is there
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(AssertionError, match="set SOURCE"):
        exec(code, {})
    exec(code.replace('SOURCE = ""', 'SOURCE = "file:///clone"'), {})
    assert installed == ["jaxinfer[plots] @ file:///clone"]


@notebooks
def test_the_notebook_runs(text, monkeypatch):
    import nbformat
    from nbclient import NotebookClient

    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("PYTHONPATH", str(COLAB.parent))  # this tree, whatever is installed
    notebook = nbformat.read(text.with_suffix(".ipynb"), as_version=4)
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": COLAB}}).execute()
    printed, pictures = shown(notebook)
    assert "def fibonacci(n):" in printed
    assert "-> page 5, slot 0" in printed
    assert "fit: yes" in printed
    assert pictures == 1


def shown(notebook) -> tuple[str, int]:
    """What the cells printed, and how many pictures they drew."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    data = [output.get("data", {}) for output in outputs]
    texts = [output.get("text", "") for output in outputs] + [shown.get("text/plain", "") for shown in data]
    return "".join(texts), sum("image/png" in shown for shown in data)
