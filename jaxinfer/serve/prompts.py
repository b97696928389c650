"""From the body of a request to token ids and sampling parameters that the model can serve."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxinfer.decode.sampling_params import SamplingParams
from jaxinfer.intake import Intake
from jaxinfer.serve.errors import ApiError, refused
from jaxinfer.serve.protocol import ChatBody, CompletionBody, TokenizeBody, conversation
from jaxinfer.text import ChatTemplate

COMPLETION_TOKENS = 16  # of a completion that does not say, as OpenAI has it; a chat fills the context

Asked = tuple[list[list[int]], SamplingParams]
"""Token ids of every prompt of a body, and how to continue them."""


@dataclass(frozen=True)
class Prompts:
    """Reads bodies for one model; an ApiError says, with the field, what it cannot serve.

    Attributes:
        template: of chats; a checkpoint without one gives the reason in its place.
        longest: tokens of a prompt and its output together, at most.
    """

    intake: Intake
    template: ChatTemplate | str
    longest: int

    def completion(self, body: CompletionBody) -> Asked:
        params, prompts = body.sampling_params(COMPLETION_TOKENS), body.prompts
        if not prompts:
            raise ApiError(400, "prompt is empty; it must have at least one token", param="prompt")
        encoded = [self._encode(prompt) for prompt in prompts]
        for ids in encoded:
            self._check(ids, params, "prompt", body.spelled)
        return encoded, params

    def chat(self, body: ChatBody) -> Asked:
        ids = self._encode_chat(body, self.intake.encode)
        params = body.sampling_params(self.longest - len(ids))
        self._check(ids, params, "messages", body.spelled)
        return [ids], params

    def tokens(self, body: TokenizeBody) -> list[int]:
        if body.messages is not None and body.prompt is not None:
            raise ApiError(400, "give a prompt or messages, not both", param="prompt")
        if body.messages is not None:
            return self._encode_chat(body, self.intake.tokenizer.encode)
        if body.prompt is None:
            raise ApiError(400, "prompt is missing", param="prompt", code="missing_field")
        return self.intake.tokenizer.encode(body.prompt, add_special_tokens=body.add_special_tokens)

    def _encode(self, prompt: str | list[int]) -> list[int]:
        try:
            return self.intake.tokens(prompt)
        except ValueError as error:
            raise refused([str(error)], "prompt") from error

    def _encode_chat(self, body: ChatBody | TokenizeBody, encode: Callable[..., list[int]]) -> list[int]:
        variables: dict[str, Any] = body.chat_template_kwargs
        messages = conversation(body.messages or [], variables)
        if isinstance(self.template, str):
            raise ApiError(400, self.template, param="messages", code="no_chat_template")
        try:
            text = self.template.render(messages, add_generation_prompt=body.add_generation_prompt, **variables)
            return encode(text, add_special_tokens=False)
        except ValueError as error:
            raise refused([str(error)], "messages") from error

    def _check(self, ids: Sequence[int], params: SamplingParams, param: str, spelled: dict[str, str]) -> None:
        if problems := self.intake.problems(ids, params):
            raise refused(problems, param, spelled)
        if len(ids) + params.max_tokens > self.longest:
            raise ApiError(
                400,
                f"prompt and max_tokens have {len(ids)} + {params.max_tokens} tokens; the cache holds at most "
                f"{self.longest} for one request",
                param=spelled.get("max_tokens", "max_tokens"),
                code="context_length_exceeded",
            )


def template_or_reason(folder: str | Path) -> ChatTemplate | str:
    """The chat template of a checkpoint, or why there is none."""
    try:
        return ChatTemplate.from_folder(folder)
    except ValueError as error:
        return str(error)
