"""Every room of the code imports only the rooms below it."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# The design's table: what each room may import, and with it what that room may import in turn.
FRONT_DOOR = {"engine", "checkpoint", "text"}
TABLE = {
    "pallas_kernels": set(),
    "parallel": {"pallas_kernels"},
    "quantize": {"pallas_kernels", "parallel"},
    "cache": {"pallas_kernels", "parallel"},
    "model": {"pallas_kernels", "parallel", "quantize", "cache"},
    "checkpoint": {"model"},
    "text": set(),
    "roofline": set(),
    "decode": {"model", "cache", "roofline"},
    "engine": {"decode", "machine"},
    # The front door in three files: what it returns, the text as it grows, and itself.
    "outputs": FRONT_DOOR,
    "continuation": FRONT_DOOR | {"outputs"},
    "llm": FRONT_DOOR | {"outputs", "continuation"},
    # Beyond the design: the demo model is written as a checkpoint, and what the machine is has a room of its own.
    "training": {"decode", "model", "checkpoint"},
    "machine": {"roofline"},
    "dims": set(),
}


def reached(room: str) -> set[str]:
    return TABLE[room].union(*(reached(below) for below in TABLE[room]))


ROOMS = {room: reached(room) for room in TABLE}
ROOMS["cli"] = set(ROOMS)  # commands may use everything; nothing uses them

# What some rooms may import from outside, besides the standard library. The others take what the project depends on.
OUTSIDE = {
    "pallas_kernels": {"jax", "numpy"},
    "text": {"jinja2", "tokenizers"},
    "roofline": {"matplotlib"},
}
FORBIDDEN = {"torch", "transformers", ""}  # golden files stand for the first two; a relative import has no name


def modules() -> Iterator[tuple[str, Path]]:
    """Every module with its room: the package `pallas_kernels`, or a file or folder of `jaxinfer`."""
    for path in sorted(ROOT.glob("pallas_kernels/**/*.py")):
        yield "pallas_kernels", path
    for path in sorted(ROOT.glob("jaxinfer/**/*.py")):
        if path != ROOT / "jaxinfer" / "__init__.py":
            yield path.relative_to(ROOT / "jaxinfer").parts[0].removesuffix(".py"), path


def imported(node: ast.AST) -> Iterator[str]:
    """Dotted names that a module imports when it runs, at its top or within a function."""
    match node:
        case ast.If(test=ast.Name("TYPE_CHECKING")):
            inner = node.orelse
        case ast.Import():
            inner = []
            yield from (alias.name for alias in node.names)
        case ast.ImportFrom():
            inner = []
            yield from ("." * node.level + f"{node.module}.{alias.name}" for alias in node.names)
        case _:
            inner = ast.iter_child_nodes(node)
    for child in inner:
        yield from imported(child)


def violations(room: str, source: str) -> list[str]:
    """What a module of `room` imports beyond its room's share."""
    found = []
    for name in imported(ast.parse(source)):
        package, _, rest = name.partition(".")
        target = rest.partition(".")[0] if package == "jaxinfer" else package
        if package in {"jaxinfer", "pallas_kernels"}:
            allowed = target in ROOMS[room] | {room}
        elif package in sys.stdlib_module_names:
            allowed = True
        else:
            allowed = package not in FORBIDDEN and package in OUTSIDE.get(room, {package})
        if not allowed:
            found.append(name)
    return found


@pytest.mark.parametrize(
    ("room", "path"), [pytest.param(*pair, id=str(pair[1].relative_to(ROOT))) for pair in modules()]
)
def test_a_module_imports_only_its_rooms_share(room, path):
    assert violations(room, path.read_text()) == []


@pytest.mark.parametrize(
    ("room", "source", "found"),
    [
        ("cache", "from jaxinfer.model import Model", ["jaxinfer.model.Model"]),
        ("cache", "def f():\n    from jaxinfer import engine", ["jaxinfer.engine"]),
        ("pallas_kernels", "import jaxinfer.cache", ["jaxinfer.cache"]),
        ("pallas_kernels", "from einops import rearrange", ["einops.rearrange"]),
        ("roofline", "import jax", ["jax"]),
        ("model", "from ..engine import Engine", ["..engine.Engine"]),
        ("model", "try:\n    import torch\nexcept ImportError:\n    torch = None", ["torch"]),
        (
            "decode",
            "if TYPE_CHECKING:\n    import jaxinfer.cli\nelse:\n    import jaxinfer.engine",
            ["jaxinfer.engine"],
        ),
        ("engine", "import jaxinfer.engine.pages, json, jax\nfrom jaxinfer.decode.step import Layout", []),
    ],
)
def test_what_is_beyond_it_is_found(room, source, found):
    assert violations(room, source) == found


def test_the_table_has_no_cycle():
    below = {room: set(rooms) for room, rooms in ROOMS.items()}
    while ground := [room for room, rooms in below.items() if not rooms]:
        below = {room: rooms.difference(ground) for room, rooms in below.items() if room not in ground}
    assert not below
