"""Steps whose tokens go round a ring (`jaxinfer.parallel.ring`), which none do by default."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import pytest

from jaxinfer.model import transformer
from jaxinfer.parallel import collectives


@contextmanager
def ring_from(tokens: int) -> Iterator[None]:
    """Those of so many tokens do, and no layer that was traced otherwise is used again."""
    traced = cast(Any, transformer._run)  # JAX's type for a jitted function leaves `clear_cache` out
    traced.clear_cache()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(collectives, "MANY_TOKENS", tokens)
        patch.setattr(collectives, "RING_TOKENS", tokens)
        yield
    traced.clear_cache()
