"""Writes the README's tables of figures from `benchmarks/results`.

    python -m benchmarks.tables

A table stands between `<!-- table: NAME -->` and `<!-- /table -->`. Its figures come from the records of
`decode.json`, which `benchmarks.decode` writes, and of `anchors.json`, which holds other systems' figures under the
same protocol. The marked table `sources` states the environment of each file, its `what` without the key.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

from benchmarks.record import RESULTS, Record

README = Path(__file__).parents[1] / "README.md"
FILES = ("decode.json", "anchors.json")  # rows come in this order
NAMES = {"xla": "**jaxinfer**, XLA attention", "plan": "*predicted by `jaxinfer plan`*"}
_MARKED = re.compile(r"(<!-- table: (\S+) -->\n).*?(<!-- /table -->)", re.DOTALL)


@dataclass(frozen=True)
class Table:
    """Figures of one metric: a row for each implementation, a column for each case.

    Attributes:
        metric: of the records that the table shows.
        head: what stands above the names of the rows.
        columns: titles by case.
    """

    metric: str
    head: str
    columns: dict[str, str]


BATCHES = {f"llama-3-8b B{batch}": f"batch {batch}" for batch in (1, 16, 64, 256)}
PROMPTS = {f"llama-3-8b prompt {tokens}": f"{tokens:,} tokens" for tokens in (512, 2048, 8192)}
TABLES = {
    "decode": Table("decode", "tokens/s", BATCHES),
    "decode-step": Table("decode step", "ms a step", BATCHES),
    "first-token": Table("first token", "ms to the first token", PROMPTS),
}


def main() -> None:
    README.write_text(render(README.read_text(), RESULTS / "h200"))


def render(text: str, folder: Path) -> str:
    """The text with every marked table made from the results in `folder`; a file that is missing adds no rows.

    Raises:
        ValueError: the text marks a table that is not known.
    """
    files = [json.loads((folder / name).read_text()) for name in FILES if (folder / name).exists()]
    records = [Record(**record) for file in files for record in file["records"]]
    sections = {name: markdown(table, records) for name, table in TABLES.items()}
    sections["sources"] = "".join(describe(file["environment"]) for file in files)
    if unknown := {match[2] for match in _MARKED.finditer(text)} - sections.keys():
        raise ValueError(f"the text marks tables {sorted(unknown)}; known are {', '.join(sections)}")
    return _MARKED.sub(lambda match: match[1] + sections[match[2]] + match[3], text)


def markdown(table: Table, records: list[Record]) -> str:
    """One table: a figure, and behind it the fraction of the hardware's limit. Empty without a figure."""
    chosen = [record for record in records if record.metric == table.metric and record.case in table.columns]
    rows: dict[str, dict[str, str]] = {}
    for record in chosen:
        rows.setdefault(record.implementation, {})[record.case] = figure(record)
    if not rows:
        return ""
    lines = [[table.head, *table.columns.values()], ["---", *["---:"] * len(table.columns)]]
    for name, cells in rows.items():
        lines.append([NAMES.get(name, name), *(cells.get(case, "") for case in table.columns)])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def figure(record: Record) -> str:
    """Three digits at least, and whole numbers from 100 on: `4.41`, `227 (75 %)`, `10,445 (81 %)`."""
    number = f"{record.value:,.0f}" if record.value >= 100 else f"{record.value:.3g}"
    return number if record.roofline_fraction is None else f"{number} ({record.roofline_fraction:.0%})"


def describe(environment: dict[str, str]) -> str:
    """Where the figures of one file come from."""
    parts = [value if name == "what" else f"{name} {value}" for name, value in environment.items()]
    return f"- {', '.join(parts)}\n"


if __name__ == "__main__":
    main()
