"""The endpoints: OpenAI's completions, chats and models, and vLLM's tokenizer, health and metrics."""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastapi import Depends, FastAPI, Request
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from jaxinfer.outputs import CompletionOutput
from jaxinfer.serve.client import Client, Group
from jaxinfer.serve.endpoints import ENDPOINTS, Endpoint, check_model
from jaxinfer.serve.errors import ApiError
from jaxinfer.serve.http import EventStream, HangUp, key_check, read, unless_gone
from jaxinfer.serve.prompts import Prompts
from jaxinfer.serve.protocol import TokenizeBody
from jaxinfer.serve.readers import Readers
from jaxinfer.serve.responses import DONE, Answer, event, usage

PAGE = Path(__file__).parent / "page.html"
PAGE_HEADERS = {  # the page asks this server alone, and nobody may frame it
    "Content-Security-Policy": "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
}

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Service:
    """What the endpoints serve.

    Attributes:
        name: of the model, in requests and answers.
        created: when it began to, in seconds since 1970.
    """

    name: str
    client: Client
    prompts: Prompts
    created: int
    readers: Readers = field(default_factory=Readers)


def make_app(service: Service, api_key: str | None = None) -> FastAPI:
    """The application; with a key, all but the page at `/` and `/health` asks for it."""
    app = FastAPI(title="jaxinfer", openapi_url=None, docs_url=None, redoc_url=None)
    guarded = [Depends(key_check(api_key))]
    _handle_errors(app, service)

    for path, endpoint in ENDPOINTS.items():
        app.post(path, dependencies=guarded)(_handler(service, endpoint))

    @app.post("/tokenize", dependencies=guarded)
    async def tokenize(request: Request) -> Response:
        body, size = await read(request, TokenizeBody)
        check_model(body.model, service.name)
        reading = service.readers.run(body, size, service.prompts.tokens, body)
        ids, limits = await unless_gone(request, reading), service.prompts.intake.limits
        return JSONResponse({"tokens": ids, "count": len(ids), "max_model_len": limits.context})

    @app.get("/v1/models", dependencies=guarded)
    async def models() -> Response:
        return JSONResponse({"object": "list", "data": [_model(service)]})

    @app.get("/v1/models/{name:path}", dependencies=guarded)
    async def model(name: str) -> Response:
        check_model(name, service.name)
        return JSONResponse(_model(service))

    @app.get("/metrics", dependencies=guarded)
    async def metrics() -> Response:
        return Response(service.client.metrics.page(), media_type="text/plain; version=0.0.4")

    @app.get("/")
    async def page() -> Response:
        return Response(PAGE.read_bytes(), media_type="text/html; charset=utf-8", headers=PAGE_HEADERS)

    @app.get("/health")
    async def health() -> Response:
        closed = service.client.closed
        return JSONResponse({"status": "ok"} if closed is None else closed.body, 200 if closed is None else 503)

    return app


def _handler(service: Service, endpoint: Endpoint) -> Callable[[Request], Awaitable[Response]]:
    """Answers requests to one endpoint, whole or as a stream."""

    async def handle(request: Request) -> Response:
        (body, size), arrived = await read(request, endpoint.body), time.monotonic()
        with service.client.places(body.continuations):
            reading = service.readers.run(body, size, endpoint.asked, body, service.prompts, service.name)
            (prompts, params), answer = await unless_gone(request, reading)
        group = service.client.start(prompts, params, body.priority or 0, arrived, body.spelled)
        used = sum(map(len, prompts))
        try:
            if body.stream:
                pieces = group.pieces()
                first = await unless_gone(request, anext(pieces))  # an error until then has a status of its own
                return EventStream(_events(group, first, pieces, answer, used, body.include_usage), group.close)
            outputs = await unless_gone(request, group.outputs())
        except BaseException:
            group.close()
            raise
        group.close()
        return JSONResponse(answer.body(outputs, usage(used, group.new_tokens)))

    return handle


async def _events(
    group: Group,
    first: CompletionOutput,
    rest: AsyncIterator[CompletionOutput],
    answer: Answer,
    prompt_tokens: int,
    include_usage: bool,
) -> AsyncIterator[bytes]:
    """The events of a stream: chunks, the usage where it is asked for, and [DONE]; or an error in their place."""
    usage_so_far = {"usage": None} if include_usage else {}
    try:
        for opening in answer.opening(len(group.continuations)):
            yield event(opening | usage_so_far)
        yield event(answer.chunk(first) | usage_so_far)
        async for piece in rest:  # also of tokens without text, or whose text is held back: they tell that tokens come
            yield event(answer.chunk(piece) | usage_so_far)
        if include_usage:
            yield event(answer.last(usage(prompt_tokens, group.new_tokens)))
    except ApiError as error:
        yield event(error.body)
    except Exception:
        logger.exception("a stream failed")
        yield event(_internal().body)
    yield DONE


def _model(service: Service) -> dict[str, Any]:
    context = service.prompts.intake.limits.context
    return {
        "id": service.name,
        "object": "model",
        "created": service.created,
        "owned_by": "jaxinfer",
        "max_model_len": context,
    }


def _internal() -> ApiError:
    return ApiError(500, "the server failed on this request; its log says why", code="internal_error")


def _handle_errors(app: FastAPI, service: Service) -> None:
    """Whatever happens, the caller gets an error body, and never a trace."""

    def told(error: ApiError) -> Response:
        service.client.metrics.rejected.labels(str(error.status)).inc()
        return JSONResponse(error.body, error.status, error.headers)

    @app.exception_handler(ApiError)
    async def api_error(request: Request, error: ApiError) -> Response:
        return told(error)

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        message = f"{request.method} {request.url.path[:200]}: {error.detail}"
        return told(ApiError(error.status_code, message, headers=dict(error.headers or {})))

    @app.exception_handler(HangUp)
    async def gone(request: Request, error: HangUp) -> Response:
        return Response(status_code=499)  # nobody reads it

    @app.exception_handler(Exception)  # a bug, which Uvicorn writes to the log
    async def bug(request: Request, error: Exception) -> Response:
        return told(_internal())
