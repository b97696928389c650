"""What a caller may ask of the model, as one table: the server and files of requests both go by it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from jaxinfer.serve.errors import ApiError
from jaxinfer.serve.prompts import Asked, Prompts
from jaxinfer.serve.protocol import ChatBody, CompletionBody, SamplingBody
from jaxinfer.serve.responses import Answer, Chat, Completion


@dataclass(frozen=True)
class Endpoint:
    """One way to ask for text.

    Attributes:
        body: what a request holds.
        read: makes prompts of it.
        answer: what comes back.
    """

    body: type[SamplingBody]
    read: Callable[[Prompts, Any], Asked]
    answer: type[Answer]

    def asked(self, body: SamplingBody, prompts: Prompts, model: str) -> tuple[Asked, Answer]:
        """The prompts of a body, and the answer that will be given; `model` is the name that is served.

        Raises:
            ApiError: the model cannot serve it, or is another.
        """
        check_model(body.model, model)
        return self.read(prompts, body), self.answer(model, prompts.intake.tokenizer)


ENDPOINTS = {
    "/v1/completions": Endpoint(CompletionBody, Prompts.completion, Completion),
    "/v1/chat/completions": Endpoint(ChatBody, Prompts.chat, Chat),
}
"""By path."""


def check_model(name: str | None, served: str) -> None:
    """Refuses the name of another model; who names none means the one that is served.

    Raises:
        ApiError: with status 404.
    """
    if name is not None and name != served:
        raise ApiError(
            404, f"the model {name[:200]!r} does not exist here; there is {served!r}",
            param="model", code="model_not_found",
        )  # fmt: skip
