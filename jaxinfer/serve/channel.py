"""One end of the pipe between the processes: neither side ever waits for the other to read."""

from __future__ import annotations

import threading
from collections.abc import Callable
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import Any


class Channel:
    """Sends and receives messages in two threads of its own, each way in order."""

    def __init__(self, connection: Connection, receive: Callable[[Any], None], ended: Callable[[], None]):
        """Begins to listen.

        Args:
            receive: is called with every message, in a thread of the channel.
            ended: is called once, in that thread, when the other process has closed its end or died.
        """
        self._connection, self._receive, self._ended = connection, receive, ended
        self._outgoing: SimpleQueue[Any] = SimpleQueue()
        self._sender = threading.Thread(target=self._send, name="channel-send", daemon=True)
        self._sender.start()
        threading.Thread(target=self._listen, name="channel-receive", daemon=True).start()

    def send(self, message: Any) -> None:
        """Queues a message and returns at once. To a process that has ended, nothing is sent."""
        self._outgoing.put(message)

    def flush(self, seconds: float) -> None:
        """Waits until all that was queued is sent, after which nothing more can be; but no longer than that, for a
        process that does not read."""
        self._outgoing.put(None)
        self._sender.join(seconds)

    def _send(self) -> None:
        while (message := self._outgoing.get()) is not None:
            try:
                self._connection.send(message)
            except (BrokenPipeError, ConnectionResetError):
                return  # `_listen` finds the same

    def _listen(self) -> None:
        while True:
            try:
                message = self._connection.recv()
            except (EOFError, OSError):  # the latter where it died within a message
                break
            self._receive(message)
        self._ended()
