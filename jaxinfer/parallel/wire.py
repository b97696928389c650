"""One connection between two processes of a group: frames, each way in order.

A frame is its length in eight bytes, then the bytes. Before both ends have a key they say JSON, of which a stranger
can make nothing but an error. From then on a frame begins with a code (HMAC-SHA256 of its number and bytes) that only
who has the key can make, and holds a pickle, which is opened after the code has been checked.
"""

from __future__ import annotations

import hmac
import json
import pickle
import socket
import struct
import threading
import time
from contextlib import suppress
from typing import Any

_LENGTH = struct.Struct(">Q")
_CODE = 32  # bytes of SHA-256
_PLAIN_LIMIT = 1 << 16  # bytes that a stranger may send
_LIMIT = 1 << 30


class WireError(Exception):
    """The other end is gone, silent, or says what it must not; says which."""


class Wire:
    """A connected socket; any thread may send, one receives."""

    def __init__(self, connected: socket.socket):
        connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket, self._lock = connected, threading.Lock()
        self._patience = 0.0
        self._keys: tuple[bytes, bytes] | None = None
        self._sent = self._received = 0

    def secure(self, token: bytes, sends: str, receives: str) -> None:
        """From now on frames have codes.

        Args:
            token: that both ends have, and nobody else.
            sends, receives: names of the two directions, so that no frame can be sent back, or to another process.
        """
        own, theirs = (hmac.digest(token, name.encode(), "sha256") for name in (sends, receives))
        self._keys = own, theirs
        self._sent = self._received = 0

    def patience(self, seconds: float) -> None:
        """How long the other end may be silent, and how long a frame without a code may be on its way."""
        self._patience = max(seconds, 1e-3)
        self._socket.settimeout(self._patience)

    def send(self, message: Any) -> None:
        """Sends plain data: of JSON before there is a key.

        Raises:
            WireError: it cannot.
        """
        with self._lock:
            if self._keys is None:
                content = json.dumps(message).encode()
            else:
                content = pickle.dumps(message, protocol=5)
                content = self._code(self._keys[0], self._sent, content) + content
            self._sent += 1
            try:
                self._socket.sendall(_LENGTH.pack(len(content)) + content)
            except OSError as error:
                raise WireError(_said(error)) from error

    def receive(self) -> Any:
        """Waits for the next message.

        Raises:
            WireError: there will be none, or it is not one of the other end.
        """
        (length,) = _LENGTH.unpack(self._read(_LENGTH.size))
        if length > (limit := _PLAIN_LIMIT if self._keys is None else _LIMIT):
            raise WireError(f"sent a frame of {length} bytes; at most {limit} are allowed")
        content = self._read(length)
        if self._keys is None:
            try:
                return json.loads(content)
            except (ValueError, RecursionError):
                raise WireError("sent what is no JSON") from None
        code, content = content[:_CODE], content[_CODE:]
        if not hmac.compare_digest(code, self._code(self._keys[1], self._received, content)):
            raise WireError("sent a frame without the code of this group")
        self._received += 1
        return pickle.loads(content)

    def close(self) -> None:
        """Ends the connection, also for a thread that receives."""
        with suppress(OSError):  # the other end did
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def _read(self, size: int) -> bytes:
        """So many bytes."""
        held, deadline = bytearray(), time.monotonic() + self._patience
        while len(held) < size:
            if self._keys is None:  # else a thread may send meanwhile, with the socket's patience
                self._socket.settimeout(max(deadline - time.monotonic(), 1e-3))
            try:
                part = self._socket.recv(min(size - len(held), 1 << 20))
            except OSError as error:
                raise WireError(_said(error)) from error
            if not part:
                raise WireError("is gone")
            held += part
        return bytes(held)

    @staticmethod
    def _code(key: bytes, number: int, content: bytes) -> bytes:
        return hmac.digest(key, _LENGTH.pack(number) + content, "sha256")


def _said(error: OSError) -> str:
    return "is silent" if isinstance(error, TimeoutError) else "is gone"
