"""The engine on the host: which tokens of which requests run now, and on which pages."""

from jaxinfer.engine.engine import Engine, Options
from jaxinfer.engine.request import Request, TokenLogprobs, Update

__all__ = ["Engine", "Options", "Request", "TokenLogprobs", "Update"]
