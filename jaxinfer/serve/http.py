"""HTTP that knows nothing of models: bodies in, server-sent events out, and callers who hang up or speak none."""

from __future__ import annotations

import asyncio
import hmac
import json
from collections.abc import Awaitable, Callable

from fastapi import Request
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.auto import AutoHTTPProtocol

from jaxinfer.serve.errors import ApiError, malformed
from jaxinfer.serve.protocol import BODY_FIELDS

MAX_BODY = 8 << 20  # bytes: a prompt of a million tokens, as numbers
# A parser holds Python's lock, and with it every other caller: for about a tenth of a second at worst with these.
MAX_PARTS = 20_000  # strings, lists and objects: a chat of some 4,000 messages
MAX_VALUES = 1_000_000  # in them
_READ_ON = 8  # bodies of that size that are read to their end all the same, so that the caller reads the answer


class Protocol(AutoHTTPProtocol):
    """Uvicorn's; but what is no HTTP gets an error body, too."""

    transport: asyncio.Transport

    def send_400_response(self, msg: str) -> None:
        body = json.dumps(ApiError(400, msg, code="invalid_http").body)
        head = ("HTTP/1.1 400 Bad Request", "Content-Type: application/json", f"Content-Length: {len(body)}")
        self.transport.write("\r\n".join((*head, "Connection: close", "", body)).encode())
        self.transport.close()


class HangUp(Exception):
    """The caller is gone."""


async def read[Body: BaseModel](request: Request, kind: type[Body]) -> tuple[Body, int]:
    """The JSON body of a request, and how many bytes it has.

    Raises:
        ApiError: it is too large, has too many parts, is no JSON, or none of `kind`.
        HangUp: the caller did before its end.
    """
    declared = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if declared != "application/json":
        # Also: a page of another site can send any other type here from a browser, without asking.
        raise ApiError(415, f"content-type is {declared[:80]!r}; it must be application/json")
    body, size = bytearray(), 0
    try:
        async for part in request.stream():
            size += len(part)
            if size <= MAX_BODY:
                body += part
            elif size > _READ_ON * MAX_BODY:
                break
    except ClientDisconnect:
        raise HangUp from None
    if size > MAX_BODY:
        raise ApiError(413, f"the body has more than {MAX_BODY} bytes, the most that is taken", code="body_too_large")
    if crowded(body):
        message = f"the body has more than {MAX_PARTS} strings, lists and objects, or {MAX_VALUES} values"
        raise ApiError(413, message, code="body_too_large")
    try:
        return kind.model_validate_json(bytes(body)), size
    except ValidationError as error:
        raise malformed(error, BODY_FIELDS) from None


def crowded(body: bytes | bytearray, parts: int = MAX_PARTS, values: int = MAX_VALUES) -> bool:
    """Whether JSON has more than `parts` strings, lists and objects, or `values` values that follow another.

    Found by counting signs, which takes some milliseconds a MB. Of what is no JSON, what a parser would read counts.
    """
    unescaped = body.replace(rb"\\", b"").replace(rb"\"", b"")
    strings = unescaped.count(b'"') // 2
    if strings > parts:
        return True
    outside = b"".join(unescaped.split(b'"')[::2])
    opened, separated = outside.count(b"[") + outside.count(b"{"), outside.count(b",")
    return strings + opened > parts or separated >= values


async def unless_gone[Result](request: Request, answer: Awaitable[Result]) -> Result:
    """What `answer` brings, unless the caller hangs up first: then it is cancelled.

    Raises:
        HangUp: that happened.
    """
    working = asyncio.ensure_future(answer)
    watching = asyncio.ensure_future(_hang_up(request.receive))
    try:
        await asyncio.wait((working, watching), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise HangUp
        return working.result()
    finally:
        working.cancel()
        watching.cancel()


async def _hang_up(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(StreamingResponse):
    """Server-sent events. `close` is called in the end, however that comes about."""

    media_type = "text/event-stream"

    def __init__(self, events, close: Callable[[], None]):
        super().__init__(events, headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        self._close = close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._close()


def key_check(api_key: str | None) -> Callable[[Request], None]:
    """A check of the `Authorization` header, in a time that does not tell how much of a key was right."""

    def check(request: Request) -> None:
        if api_key is None:
            return
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        same = hmac.compare_digest(given.strip().encode(), api_key.encode())
        if scheme.lower() != "bearer" or not same:
            raise ApiError(
                401, "the API key is missing or wrong; send it as Authorization: Bearer KEY", code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )  # fmt: skip

    return check
