"""The engine on the host: which tokens of which requests run now, and on which pages."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from jaxinfer.engine.request import Request, TokenLogprobs, Update

if TYPE_CHECKING:
    from jaxinfer.engine.engine import Engine, Options

__all__ = ["Engine", "Options", "Request", "TokenLogprobs", "Update"]


def __getattr__(name: str) -> Any:
    """Imports the engine itself, and JAX with it, when it is first asked for: the HTTP process asks for neither."""
    if name not in ("Engine", "Options"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("jaxinfer.engine.engine"), name)
