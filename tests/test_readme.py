"""What the README says is what is there: tables, families, links and commands."""

import json
import re
import shlex
import tomllib
from importlib.util import find_spec
from pathlib import Path

import pytest
import typer
from typer.core import TyperGroup

from benchmarks.record import RESULTS
from benchmarks.tables import README, SOURCES, TABLES, render, section
from jaxinfer.cli import app
from jaxinfer.model import read_config
from jaxinfer.model.families import FAMILIES
from jaxinfer.roofline import decode_step, find_hardware, prefill

ROOT = README.parent
TEXT = README.read_text()
PAGES = [
    "CONTRIBUTING.md",
    *(str(path.relative_to(ROOT)) for room in ("", "jaxinfer/**/", "pallas_kernels/**/", "tests/**/")
      for path in sorted(ROOT.glob(f"{room}README.md"))),
]  # fmt: skip
COMMANDS = re.findall(r"^    (?:pip install uv && )?uv run .*?jaxinfer (.*)$", TEXT, re.MULTILINE)


def test_tables_are_made_from_the_results():
    assert render(TEXT, RESULTS / "h200") == TEXT, "run python -m benchmarks.tables"


def test_every_table_that_has_figures_is_shown():
    """For one card at least; one without figures is not shown, for it would be empty."""
    shown = dict(re.findall(r"<!-- table: (\S+) -->\n(.*?)<!-- /table -->", TEXT, re.DOTALL))
    cards = [folder for folder in RESULTS.iterdir() if folder.is_dir()]
    filled = {name for name in (*TABLES, SOURCES) if any(section(name, card) for card in cards)}
    assert [name for name, text in shown.items() if not text] == []
    assert {name.rpartition("/")[2] for name in shown} == filled


def test_every_family_is_listed():
    listed = re.findall(r"^\| .* \| (`.*`) \| .* \|$", TEXT, re.MULTILINE)
    assert sorted(re.findall(r"`(\w+)`", " ".join(listed))) == sorted(FAMILIES)


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    path = ROOT / page
    links = re.findall(r"\]\((?!https?:)([^)#]*)(#[^)]*)?\)", path.read_text())
    assert [link for link, _ in links if not (path.parent / link).exists()] == []
    assert [link + to for link, to in links if to and to not in anchors(path.parent / link if link else path)] == []


def anchors(page: Path) -> set[str]:
    """Of the headings of a page, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {"#" + re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("line", COMMANDS)
def test_commands_are_understood(line, tmp_path, monkeypatch):
    """Every name and option; none is run."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "requests.jsonl").touch()
    command, words = typer.main.get_command(app), shlex.split(line, comments=True)
    while isinstance(command, TyperGroup):
        command, words = command.commands[words[0]], words[1:]
    command.make_context("it", words)


def test_there_are_commands():
    assert len(COMMANDS) > 10


@pytest.mark.parametrize("page", PAGES)
def test_extras_and_modules_of_commands_are_there(page):
    text = (ROOT / page).read_text()
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(re.findall(r"--extra (\w+)", text)) <= extras.keys()
    modules = set(re.findall(r"python -m (benchmarks[.\w]*\w)", text))
    assert [module for module in modules if find_spec(module) is None] == []


def test_the_pipeline_runs_the_readmes_test_command():
    command = "uv run pytest"
    assert f"    pip install uv && {command}\n" in TEXT
    assert command in (ROOT / ".ci" / "run").read_text()


def write_results(folder: Path, value: float, name: str = "decode", implementation: str = "xla") -> None:
    record = {
        "case": "llama-3-8b B1",
        "implementation": implementation,
        "metric": "decode",
        "value": value,
        "unit": "tok/s",
        "roofline_fraction": 0.754,
    }
    results = {
        "environment": {"what": "our own system", "device": "a card"},
        "records": [record],
    }
    (folder / f"{name}.json").write_text(json.dumps(results))


@pytest.mark.parametrize(
    ("value", "cell"),
    [(227.4, "227 (75%)"), (10445, "10,445 (75%)"), (4.407, "4.41 (75%)"), (99.96, "100 (75%)"), (17.4, "17.4 (75%)")],
)
def test_a_table_follows_its_file(tmp_path, value, cell):
    text = "a\n<!-- table: decode -->\nold\n<!-- /table -->\n<!-- table: sources -->\n<!-- /table -->\n"
    assert "old" not in render(text, tmp_path)  # no file: no table
    write_results(tmp_path, value)
    rendered = render(text, tmp_path)
    assert f"| **jaxinfer**, XLA attention | {cell} |  |  |  |\n" in rendered
    assert "- our own system, device a card\n" in rendered
    assert render(rendered, tmp_path) == rendered


@pytest.mark.parametrize("own", [["decode"], ["decode_xla"], ["decode", "decode_xla"]])
def test_rows_are_the_kernels_then_xlas_then_other_systems(tmp_path, own):
    names = {"decode": "mosaic_gpu", "decode_xla": "xla"}
    write_results(tmp_path, 3, "anchors", "another")
    for name in own:
        write_results(tmp_path, 1, name, names[name])
    titles = {"decode": "**jaxinfer**", "decode_xla": "**jaxinfer**, XLA attention"}
    rows = re.findall(
        r"^\| (\S.*?) \| \d", render("<!-- table: decode -->\n<!-- /table -->\n", tmp_path), re.MULTILINE
    )
    assert rows == [*(titles[name] for name in own), "another"]


def test_an_unknown_table_is_named(tmp_path):
    with pytest.raises(ValueError, match="'speed'; known are decode, "):
        render("<!-- table: speed -->\n<!-- /table -->\n", tmp_path)


@pytest.mark.parametrize("name", ["h200-measured", "h100-measured"])
def test_the_ceilings_that_the_readme_states_are_those_of_the_fractions(name):
    machine = find_hardware(name)
    ceilings = f"{machine.bandwidth / 1e12:g} TB/s of memory and {machine.rate('bf16') / 1e12:g} TFLOP/s of matmul"
    assert ceilings in " ".join(TEXT.split())


def test_fractions_of_other_systems_are_those_of_our_roofline():
    """Their records come from elsewhere; their limit is the one that our own figures are held against."""
    config, machine = read_config(ROOT / "configs" / "models" / "llama-3-8b"), find_hardware("h200-measured")
    limits = {f"llama-3-8b B{b}": b / decode_step(config, b, 256).limit(machine) for b in (1, 16, 64, 256)}
    seconds = {f"llama-3-8b prompt {t}": prefill(config, t).limit(machine) for t in (512, 2048, 8192)}
    for record in json.loads((RESULTS / "h200" / "anchors.json").read_text())["records"]:
        case, value = record["case"], record["value"]
        fraction = value / limits[case] if case in limits else seconds[case] / (value / 1e3)
        assert record["roofline_fraction"] == pytest.approx(fraction, abs=5e-3), record
