"""The threads in which bodies become requests: what takes long has its own, and nothing else waits for it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from jaxinfer.serve.protocol import SamplingBody, TokenizeBody

LONG = 1 << 16  # bytes of a body, whose texts take a tokenizer about 0.05 s
LONG_READERS = 2  # of bodies that are longer
STRUCTURE_READERS = 8  # of the others with structured outputs: a grammar may take seconds


class Readers:
    """Runs beside the event loop what tokenizes texts and makes grammars."""

    def __init__(self):
        self._long = ThreadPoolExecutor(LONG_READERS, "jaxinfer-long-bodies")
        self._structured = ThreadPoolExecutor(STRUCTURE_READERS, "jaxinfer-structures")

    async def run[Result](
        self, body: SamplingBody | TokenizeBody, size: int, read: Callable[..., Result], *arguments: object
    ) -> Result:
        """What `read` makes of a body of `size` bytes; nothing, if it is cancelled before a thread has begun."""
        threads = None  # the loop's own
        if size > LONG:
            threads = self._long
        elif isinstance(body, SamplingBody) and body.structured:
            threads = self._structured
        return await asyncio.get_running_loop().run_in_executor(threads, read, *arguments)
