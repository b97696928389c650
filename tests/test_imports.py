"""A room of the code imports the rooms that its row of the design's table names, and no others.

Each import counts for itself: that a room may import another gives it nothing of what that one imports. Where the code
has more than the table, a line of `DEVIATIONS` says why.
"""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# The design's table, row by row.
TABLE = {
    "pallas_kernels": set(),
    "parallel": {"pallas_kernels"},
    "quantize": {"pallas_kernels", "parallel"},
    "cache": {"pallas_kernels", "parallel"},
    "model": {"pallas_kernels", "parallel", "quantize", "cache"},  # "the four above"
    "checkpoint": {"model"},
    "text": set(),
    "decode": {"model", "cache", "roofline"},
    "engine": {"decode"},
    "llm": {"engine", "checkpoint", "text"},
    "training": {"decode", "model"},
    "roofline": set(),
    "serve": {"llm", "engine"},
    "cli": {"llm", "engine"},
}
# Rooms that the table has no row for.
MORE_ROOMS = {
    "dims": set(),  # the letters of array names: documentation
    "logs": set(),  # shows what is logged on a terminal
    "machine": {"roofline"},  # measures this machine as an entry of the hardware table, which itself needs no device
}
# Files beside `llm.py` that are the front door too: what is refused, prompts in, the text of a request as it
# grows, what is returned.
PART_OF = {"checks": "llm", "intake": "llm", "outputs": "llm", "continuation": "llm", "structured": "llm"}
DEVIATIONS = {
    ("roofline", "model"): "for types alone: costs are counted of a ModelConfig; nothing is imported when it runs",
    ("decode", "parallel"): "the rows of a step are spread over the devices that share a sequence",
    ("engine", "model"): "an Engine is given the model that it runs",
    ("engine", "cache"): "the allocator gives out the cache's pages: it must know the null page, and a page's bytes",
    ("engine", "parallel"): "what the leader's runner runs, the other processes of its group are told",
    ("engine", "machine"): "pages that fit on a CPU depend on the host's memory, and predicted times on the machine",
    ("engine", "roofline"): "pages of a sequence are one formula, for plan and allocator; a budget of predicted time",
    ("llm", "model"): "the front door builds the model that it loads a checkpoint into",
    ("llm", "parallel"): "and the mesh that the model lies on",
    ("llm", "decode"): "a request's SamplingParams, which are checked before there is a request",
    ("training", "parallel"): "training runs on the same mesh, with attention over whole sequences in place of pages",
    ("training", "engine"): "a draft that learns while it serves is told what the engine brings",
    ("training", "checkpoint"): "the demo model and drafts are written as checkpoints, and a teacher is read",
    ("serve", "text"): "the HTTP process makes prompts and text without JAX: `LLM` stays in the engine process",
    ("serve", "decode"): "a body becomes SamplingParams",
    ("serve", "parallel"): "an engine process joins those of other hosts",
    ("serve", "machine"): "an engine that does not fit tells the memory of its device",
    ("serve", "logs"): "an engine process shows what its kernels say",
    ("cli", "logs"): "every command shows what is said of it",
    ("cli", "serve"): "`serve` starts the server",
    ("cli", "checkpoint"): "`convert` reads one checkpoint and writes another",
    ("cli", "parallel"): "`convert` places the weights on a mesh to write them",
    ("cli", "model"): "`plan` reads a config without loading a model",
    ("cli", "decode"): "`generate` makes SamplingParams of its options",
    ("cli", "roofline"): "`plan` prints the cost model, and `generate` its share of the limit",
    ("cli", "machine"): "`doctor`, `plan` and `generate` measure this machine",
    ("cli", "training"): "`train` trains the demo model and drafts",
    ("cli", "pallas_kernels"): "`doctor` says which kernels run here",
}
ROWS = TABLE | MORE_ROOMS
ALLOWED = {room: rooms | {to for by, to in DEVIATIONS if by == room} for room, rooms in ROWS.items()}

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
            name = path.relative_to(ROOT / "jaxinfer").parts[0].removesuffix(".py")
            yield PART_OF.get(name, name), path


def imported(node: ast.AST, runs: bool = True) -> Iterator[tuple[str, bool]]:
    """Dotted names that a module imports, at its top or within a function, and whether it does when it runs."""
    match node:
        case ast.If(test=ast.Name("TYPE_CHECKING")):
            for child in node.body:
                yield from imported(child, False)
            inner = node.orelse
        case ast.Import():
            inner = []
            yield from ((alias.name, runs) for alias in node.names)
        case ast.ImportFrom():
            inner = []
            yield from (("." * node.level + f"{node.module}.{alias.name}", runs) for alias in node.names)
        case _:
            inner = ast.iter_child_nodes(node)
    for child in inner:
        yield from imported(child, runs)


def target(name: str) -> str | None:
    """The room that an imported name is of; None for one from outside."""
    package, _, rest = name.partition(".")
    if package == "jaxinfer":
        room = rest.partition(".")[0]
        return PART_OF.get(room, room)
    return package if package == "pallas_kernels" else None


def allowed(room: str, name: str, runs: bool) -> bool:
    if (to := target(name)) is not None:
        return to == room or to in ALLOWED[room]
    package = name.partition(".")[0]
    if not runs or package in sys.stdlib_module_names:
        return True
    return package not in FORBIDDEN and package in OUTSIDE.get(room, {package})


def violations(room: str, source: str) -> list[str]:
    """What a module of `room` imports beyond its room's share."""
    return [name for name, runs in imported(ast.parse(source)) if not allowed(room, name, runs)]


@pytest.mark.parametrize(
    ("room", "path"), [pytest.param(*pair, id=str(pair[1].relative_to(ROOT))) for pair in modules()]
)
def test_a_module_imports_only_its_rooms_share(room, path):
    assert violations(room, path.read_text()) == []


@pytest.mark.parametrize(
    ("room", "source", "found"),
    [
        ("cache", "from jaxinfer.model import Model", ["jaxinfer.model.Model"]),
        ("checkpoint", "from jaxinfer.parallel import make_mesh", ["jaxinfer.parallel.make_mesh"]),
        ("llm", "from jaxinfer import outputs\nfrom jaxinfer.cache import Pages", ["jaxinfer.cache.Pages"]),
        ("cache", "def f():\n    from jaxinfer import engine", ["jaxinfer.engine"]),
        ("pallas_kernels", "import jaxinfer.cache", ["jaxinfer.cache"]),
        ("pallas_kernels", "from einops import rearrange", ["einops.rearrange"]),
        ("roofline", "import jax", ["jax"]),
        ("model", "from ..engine import Engine", ["..engine.Engine"]),
        ("model", "try:\n    import torch\nexcept ImportError:\n    torch = None", ["torch"]),
        (
            "decode",
            "if TYPE_CHECKING:\n    import jaxinfer.cli\nelse:\n    import jaxinfer.engine",
            ["jaxinfer.cli", "jaxinfer.engine"],
        ),
        ("roofline", "if TYPE_CHECKING:\n    import jax", []),
        ("engine", "import jaxinfer.engine.pages, json, jax\nfrom jaxinfer.decode.layout import Layout", []),
    ],
)
def test_what_is_beyond_it_is_found(room, source, found):
    assert violations(room, source) == found


def test_every_deviation_is_one_and_is_needed():
    found = {(room, target(name)) for room, path in modules() for name, _ in imported(ast.parse(path.read_text()))}
    beyond = {(room, to) for room, to in found if to is not None and to != room and to not in ROWS[room]}
    assert beyond == set(DEVIATIONS)


def test_no_rooms_import_each_other():
    below = {room: set(rooms) for room, rooms in ALLOWED.items()}
    while ground := [room for room, rooms in below.items() if not rooms]:
        below = {room: rooms.difference(ground) for room, rooms in below.items() if room not in ground}
    assert not below
