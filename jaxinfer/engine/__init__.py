"""The engine on the host: which tokens of which requests run now, and on which pages."""

from jaxinfer.engine.engine import Engine
from jaxinfer.engine.metrics import Metrics
from jaxinfer.engine.options import Options
from jaxinfer.engine.request import Request, TokenLogprobs, Update

__all__ = ["Engine", "Metrics", "Options", "Request", "TokenLogprobs", "Update"]
