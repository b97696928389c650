"""Inference of language models in JAX.

`from jaxinfer import LLM, SamplingParams` is all that most programs need.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxinfer.decode.sampling_params import SamplingParams
    from jaxinfer.decode.structured_params import StructuredOutputsParams
    from jaxinfer.llm import LLM

__all__ = ["LLM", "SamplingParams", "StructuredOutputsParams"]
_HOMES = {
    "LLM": "jaxinfer.llm",
    "SamplingParams": "jaxinfer.decode.sampling_params",
    "StructuredOutputsParams": "jaxinfer.decode.structured_params",
}


def __getattr__(name: str) -> Any:
    """Imports a name when it is first asked for (PEP 562): JAX takes seconds, and not every command needs it."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
