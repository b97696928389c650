"""The endpoints: OpenAI's completions, chats and models, and vLLM's tokenizer, health and metrics."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from fastapi import Depends, FastAPI, Request
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from jaxinfer.decode.sampling_params import SamplingParams
from jaxinfer.intake import Intake
from jaxinfer.outputs import CompletionOutput
from jaxinfer.serve.client import Client, Group
from jaxinfer.serve.errors import ApiError
from jaxinfer.serve.http import EventStream, HangUp, key_check, read, unless_gone
from jaxinfer.serve.protocol import ChatBody, CompletionBody, SamplingBody, TokenizeBody, conversation
from jaxinfer.serve.responses import DONE, Answer, Chat, Completion, event, usage
from jaxinfer.text import ChatTemplate

COMPLETION_TOKENS = 16  # of a completion that does not say, as OpenAI has it; a chat fills the context

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Service:
    """What the endpoints serve.

    Attributes:
        name: of the model, in requests and answers.
        template: of chats; a checkpoint without one gives the reason in its place.
    """

    name: str
    client: Client
    template: ChatTemplate | str
    created: int

    @property
    def intake(self) -> Intake:
        return self.client.intake

    def check_model(self, name: str | None) -> None:
        if name is not None and name != self.name:
            raise ApiError(
                404, f"the model {name[:200]!r} does not exist here; this server has {self.name!r}",
                param="model", code="model_not_found",
            )  # fmt: skip

    def encode(self, prompt: str | list[int], param: str) -> list[int]:
        """Token ids of a prompt; an ApiError names the field `param` where it has none."""
        try:
            return self.intake.tokens(prompt)
        except ValueError as error:
            raise ApiError(400, str(error), param=param) from error

    def encode_chat(self, messages: list[dict[str, str]], opened: bool, variables: dict[str, Any]) -> list[int]:
        """Token ids of a conversation; `opened` begins the assistant's turn."""
        if isinstance(self.template, str):
            raise ApiError(400, self.template, param="messages", code="no_chat_template")
        try:
            text = self.template.render(messages, add_generation_prompt=opened, **variables)
            return self.intake.tokenizer.encode(text, add_special_tokens=False)
        except ValueError as error:
            raise ApiError(400, str(error), param="messages") from error


def make_app(service: Service, api_key: str | None = None) -> FastAPI:
    """The application; with a key, all but `/health` asks for it."""
    app = FastAPI(title="jaxinfer", openapi_url=None, docs_url=None, redoc_url=None)
    guarded = [Depends(key_check(api_key))]
    _handle_errors(app, service)

    @app.post("/v1/completions", dependencies=guarded)
    async def completions(request: Request) -> Response:
        body = await read(request, CompletionBody)
        service.check_model(body.model)
        params = body.sampling_params(COMPLETION_TOKENS)
        prompts = body.prompts
        if not prompts:
            raise ApiError(400, "prompt is empty; it must have at least one token", param="prompt")
        encoded = [await asyncio.to_thread(service.encode, prompt, "prompt") for prompt in prompts]
        for ids in encoded:
            service.client.check(ids, params, "prompt", body.spelled)
        return await _answer(request, body, params, encoded, Completion(service.name, service.intake.tokenizer))

    @app.post("/v1/chat/completions", dependencies=guarded)
    async def chat(request: Request) -> Response:
        body = await read(request, ChatBody)
        service.check_model(body.model)
        messages = conversation(body.messages, body.chat_template_kwargs)
        ids = await asyncio.to_thread(
            service.encode_chat, messages, body.add_generation_prompt, body.chat_template_kwargs
        )
        params = body.sampling_params(service.client.longest - len(ids))
        service.client.check(ids, params, "messages", body.spelled)
        return await _answer(request, body, params, [ids], Chat(service.name, service.intake.tokenizer))

    async def _answer(
        request: Request, body: SamplingBody, params: SamplingParams, prompts: list[list[int]], answer: Answer
    ) -> Response:
        group = service.client.start(prompts, params)
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

    @app.post("/tokenize", dependencies=guarded)
    async def tokenize(request: Request) -> Response:
        body = await read(request, TokenizeBody)
        service.check_model(body.model)
        if body.messages is not None and body.prompt is not None:
            raise ApiError(400, "give a prompt or messages, not both", param="prompt")
        if body.messages is not None:
            messages = conversation(body.messages, body.chat_template_kwargs)
            ids = await asyncio.to_thread(
                service.encode_chat, messages, body.add_generation_prompt, body.chat_template_kwargs
            )
        elif body.prompt is not None:
            encode = service.intake.tokenizer.encode
            ids = await asyncio.to_thread(encode, body.prompt, add_special_tokens=body.add_special_tokens)
        else:
            raise ApiError(400, "prompt is missing", param="prompt", code="missing_field")
        return JSONResponse({"tokens": ids, "count": len(ids), "max_model_len": service.intake.limits.context})

    @app.get("/v1/models", dependencies=guarded)
    async def models() -> Response:
        return JSONResponse({"object": "list", "data": [_model(service)]})

    @app.get("/v1/models/{name:path}", dependencies=guarded)
    async def model(name: str) -> Response:
        service.check_model(name)
        return JSONResponse(_model(service))

    @app.get("/metrics", dependencies=guarded)
    async def metrics() -> Response:
        return Response(service.client.metrics.page(), media_type="text/plain; version=0.0.4")

    @app.get("/health")
    async def health() -> Response:
        closed = service.client.closed
        return JSONResponse({"status": "ok"} if closed is None else closed.body, 200 if closed is None else 503)

    return app


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
        async for piece in rest:
            # Tokens whose text is still held back have nothing to say.
            if piece.text or piece.logprobs or piece.finish_reason:
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
    context = service.intake.limits.context
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

    @app.exception_handler(Exception)
    async def bug(request: Request, error: Exception) -> Response:
        logger.error("%s %s failed", request.method, request.url.path, exc_info=error)
        return told(_internal())
