"""How a result is kept: a list of records and the environment that they were measured in."""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax

RESULTS = Path(__file__).parent / "results"
OURS = "jaxinfer"  # the implementation of what the engine does as a whole
MACHINE = "machine"  # the case of what the device itself was timed at
PACKAGES = ("jax", "jaxlib", "flax", "numpy")


@dataclass(frozen=True)
class Record:
    """One figure.

    Attributes:
        case: what was measured, such as `llama-3-8b B16`.
        implementation: what ran.
        metric, value, unit: the figure.
        roofline_fraction: the time that `roofline.MEASURED` makes the limit over the measured one; None where no
            limit is stated.
        low, high, samples: range and number of the samples whose median is `value`; None where they are not kept.
    """

    case: str
    implementation: str
    metric: str
    value: float
    unit: str
    roofline_fraction: float | None = None
    low: float | None = None
    high: float | None = None
    samples: int | None = None

    def __str__(self) -> str:
        fraction = "" if self.roofline_fraction is None else f"{self.roofline_fraction:.0%} of the limit"
        figure = f"{self.value:>9,.4g} {self.unit:8}"
        return f"{self.case:24} {self.implementation:10} {self.metric:14} {figure} {fraction}".rstrip()


@dataclass(frozen=True)
class Failure:
    """An implementation that gave no figure of a case, and why."""

    case: str
    implementation: str
    reason: str


def arguments_of(module: str, described: str | None) -> argparse.ArgumentParser:
    """The parser of a command `python -m MODULE`, whose help is the module's docstring."""
    return argparse.ArgumentParser(
        prog=f"python -m {module}", description=described, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def environment() -> dict[str, str]:
    """GPU, driver, versions, date and commit."""
    return {
        "device": jax.devices()[0].device_kind,
        "driver": _run("nvidia-smi", "--id=0", "--query-gpu=driver_version", "--format=csv,noheader"),
        "python": platform.python_version(),
        **{package: version(package) for package in PACKAGES},
        "date": datetime.now(UTC).date().isoformat(),
        # A copy without its history can be told where it comes from.
        "commit": os.environ.get("GIT_COMMIT") or _run("git", "rev-parse", "HEAD"),
    }


def update(
    name: str,
    made_in: dict[str, str],
    records: list[Record],
    failures: list[Failure],
    folder: Path | None = None,
) -> Path:
    """Writes `<folder>/<name>.json` with what is new, and what it held of other cases or implementations.

    That stays with the environment that it was measured in, and with what the machine was timed at then: a file is a
    part, of an environment, its records and failures, and under `earlier` a list of such parts. By default the folder
    is that of this machine's device.
    """
    new = {(item.case, item.implementation) for item in (*records, *failures)}
    first = {
        "environment": made_in,
        "records": [_entry(record) for record in records],
        "failures": [_entry(failure) for failure in failures],
    }
    path, earlier = results_folder(folder) / f"{name}.json", []
    for part in parts(json.loads(path.read_text())) if path.exists() else []:
        same = part["environment"] == made_in
        replaced = new if same else {key for key in new if key[0] != MACHINE}
        kept = {
            kind: [item for item in part[kind] if (item["case"], item["implementation"]) not in replaced]
            for kind in ("records", "failures")
        }
        if same:
            first |= {kind: kept[kind] + first[kind] for kind in kept}
        elif any(item["case"] != MACHINE for items in kept.values() for item in items):
            earlier.append({"environment": part["environment"], **kept})
    return _write(name, first | {"earlier": earlier}, path.parent)


def parts(content: dict[str, Any]) -> list[dict[str, Any]]:
    """The parts of a file of results, the newest first; one that is not updated is a single part."""
    return [{"failures": [], **part} for part in (content, *content.get("earlier", []))]


def records_of(path: Path) -> list[Record]:
    """All that a file of results holds."""
    return [Record(**record) for part in parts(json.loads(path.read_text())) for record in part["records"]]


def _entry(item: Record | Failure) -> dict[str, Any]:
    kept = asdict(item).items()
    return {field: value for field, value in kept if value is not None or field == "roofline_fraction"}


def _write(name: str, content: dict[str, Any], folder: Path | None) -> Path:
    folder = results_folder(folder)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(json.dumps(content, indent=1) + "\n")
    return path


def results_folder(given: Path | None) -> Path:
    """Where results go: by default to those of this machine's device."""
    return given or RESULTS / device_folder()


def device_folder() -> str:
    """`h200` for an NVIDIA H200."""
    return jax.devices()[0].device_kind.lower().removeprefix("nvidia ").replace(" ", "-")


def _run(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"
