"""`jaxinfer run`: a set-up of configs/runs, on the hardware that it is meant for."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import tomllib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any, Self

import typer
from rich.console import Console
from typer.core import TyperGroup

from jaxinfer.cli.models import find_model, shipped
from jaxinfer.cli.options import bad_argument
from jaxinfer.roofline import Hardware, Mesh, Plan, Precision, find_hardware, make_plan

RUNS = shipped("runs")
_PROGRAM = "jaxinfer"
_COMMANDS = ("batch", "generate", "serve")
_DEVICES = "import jax, json; print(json.dumps([device.device_kind for device in jax.devices()]))"
_USAGE: Any = typer.BadParameter.__base__  # what is wrong with a command line
_TYPES = {"str": (str,), "int": (int,), "float": (int, float), "dict[str, dict[str, str]]": (dict,)}
_OPTIONAL = {"measured": {}, "hosts": 1, "network": 0.0}
_FIGURES = ("tokens_per_second", "first_token")


def run(file: Annotated[str, typer.Argument(help="A file, or a name in configs/runs.")]) -> None:
    """Run the command of FILE, if the hardware that it is meant for is here."""
    from jaxinfer.cli.app import app

    try:
        setup = Run.read(find_run(file))
        setup.plan()  # tells what is wrong
        setup.check_devices(devices_here())
    except (ValueError, OSError) as error:
        raise bad_argument(error) from error
    Console(stderr=True, highlight=False, soft_wrap=True).print(*setup.lines(), sep="\n", markup=False)
    app(setup.arguments, prog_name=_PROGRAM)


@dataclass(frozen=True)
class Run:
    """A file of configs/runs.

    Attributes:
        command: as it is typed.
        model: in configs/models, with the shapes of the one in the command.
        hardware: an entry of the hardware table.
        devices: of it that there must be, on all hosts together.
        context: tokens of each sequence that the figures are of; there are as many sequences as the command lets run.
        tokens_per_second: of decoding.
        first_token: milliseconds to the first token of one prompt of `context` tokens.
        measured: where in benchmarks/results the measured ones of these two figures are, by name; the others are
            predicted, as `jaxinfer plan` does it, a prompt as if one step took all of it.
        hosts: on each of which the command is started, with equally many devices.
        network: bytes per second between hosts that each device has a share of, one direction. Predicted is as if all
            that a device sends went over it.
    """

    title: str
    command: str
    model: str
    hardware: str
    devices: int
    context: int
    tokens_per_second: float
    first_token: float
    measured: dict[str, dict[str, str]]
    hosts: int = 1
    network: float = 0.0

    @classmethod
    def read(cls, path: Path) -> Self:
        """
        Raises:
            OSError: the file cannot be read.
            ValueError: it is no TOML, or a field is missing, unknown or of another type.
        """
        try:
            found: dict[str, Any] = _OPTIONAL | tomllib.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} is not valid TOML: {error}") from None
        types = {field.name: str(field.type) for field in fields(cls)}
        for what, names in (("misses", types.keys() - found.keys()), ("has unknown", found.keys() - types.keys())):
            if names:
                raise ValueError(f"{path} {what} {', '.join(sorted(names))}; expected {', '.join(types)}")
        for name, kind in types.items():
            if type(found[name]) not in _TYPES[kind]:
                raise ValueError(f"{path}: {name} is {found[name]!r}; expected {kind}")
        if found["hosts"] < 1 or found["devices"] % found["hosts"] or (found["hosts"] > 1) != (found["network"] > 0):
            raise ValueError(
                f"{path}: hosts = {found['hosts']}, devices = {found['devices']} and network = {found['network']}; "
                "expected hosts that divide the devices, and a network for more than one"
            )
        if unknown := found["measured"].keys() - set(_FIGURES):
            raise ValueError(f"{path}: measured has {', '.join(sorted(unknown))}; expected {' or '.join(_FIGURES)}")
        return cls(**found)

    @property
    def arguments(self) -> list[str]:
        """Those of the program in the command."""
        return shlex.split(self.command)[1:]

    def options(self) -> Mapping[str, Any]:
        """What the command's options are set to, by the names of its parameters.

        Raises:
            ValueError: it is no command of this program, or one that the program does not understand.
        """
        from jaxinfer.cli.app import app

        words = shlex.split(self.command)
        if words[:1] != [_PROGRAM] or words[1:2] not in [[name] for name in _COMMANDS]:
            allowed = ", ".join(f"{_PROGRAM} {command}" for command in _COMMANDS)
            raise ValueError(f"command is {self.command!r}; expected one of {allowed}, with its arguments")
        group = typer.main.get_command(app)
        assert isinstance(group, TyperGroup)
        try:
            return group.commands[words[1]].make_context(words[1], words[2:]).params
        except _USAGE as error:
            raise ValueError(f"command is {self.command!r}: {error.format_message()}") from None

    def plan(self) -> Plan:
        """What `jaxinfer plan` makes of it.

        Raises:
            ValueError: as `options`, `find_model` and `make_plan`.
        """
        options, config = self.options(), find_model(self.model)
        precision = Precision.all_in(options["dtype"] or config.dtype, options["cache_dtype"])
        mesh = Mesh(
            tensor=options["tensor_parallel_size"],
            context=options["context_parallel_size"],
            replicas=options.get("data_parallel_size", 1),
            pipe=options["pipeline_parallel_size"],
        )
        batch = mesh.replicas * options.get("max_num_seqs", 1)
        return make_plan(config, self.machine(), batch, self.context, precision, mesh)

    def machine(self) -> Hardware:
        machine = find_hardware(self.hardware)
        return machine if self.hosts == 1 else replace(machine, interconnect=self.network, peers=self.devices)

    def check_devices(self, here: list[str]) -> None:
        """Raises ValueError where the devices here, by the names that JAX gives them, are not those that it is for."""
        kind, needed = self.machine().device_kind, self.devices // self.hosts
        if here.count(kind) < needed:
            found = ", ".join(f"{count} x {name}" for name, count in Counter(here).items())
            raise ValueError(f"{self.title}: needs {needed} x {kind}; here are {found or 'no devices'}")

    def lines(self) -> list[str]:
        """What runs, and how fast it is expected to be."""
        how = {name: "measured" if name in self.measured else "predicted" for name in _FIGURES}
        return [
            self.title,
            f"$ {self.command}",
            f"expected with {self.context:,} tokens in each sequence: {self.tokens_per_second:,.0f} tokens/s of "
            f"decoding ({how['tokens_per_second']}); first token of such a prompt after {self.first_token:,.1f} ms "
            f"({how['first_token']})",
        ]


def find_run(name: str) -> Path:
    """The path of a file, or of a name in configs/runs.

    Raises:
        ValueError: there is none; the message lists the names.
    """
    for path in (Path(name), RUNS / f"{name}.toml"):
        if path.is_file():
            return path
    names = ", ".join(sorted(path.stem for path in RUNS.glob("*.toml")))
    raise ValueError(f"file is {name!r}; expected a file, or one of {names}")


def devices_here() -> list[str]:
    """What JAX calls the devices of this machine. Asked in a process of its own, which holds none when it has ended.

    Raises:
        ValueError: that process failed.
    """
    asked = subprocess.run([sys.executable, "-c", _DEVICES], capture_output=True, text=True, check=False)
    if asked.returncode:
        raise ValueError(f"JAX finds no devices here: {asked.stderr.strip().rpartition(chr(10))[2]}")
    return json.loads(asked.stdout.splitlines()[-1])
