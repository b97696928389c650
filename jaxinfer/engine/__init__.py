"""The engine on the host: which tokens of which requests run now, and on which pages."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from jaxinfer.engine.metrics import Counters, Metrics, Warmed, WarmUp
from jaxinfer.engine.request import Request, TokenLogprobs, Update

if TYPE_CHECKING:
    from jaxinfer.engine.engine import Engine
    from jaxinfer.engine.options import Options

__all__ = ["Counters", "Engine", "Metrics", "Options", "Request", "TokenLogprobs", "Update", "WarmUp", "Warmed"]
_WITH_JAX = {"Engine": "jaxinfer.engine.engine", "Options": "jaxinfer.engine.options"}


def __getattr__(name: str) -> Any:
    """Imports the engine itself, and JAX with it, when it is first asked for: the HTTP process asks for neither."""
    if name not in _WITH_JAX:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_WITH_JAX[name]), name)
