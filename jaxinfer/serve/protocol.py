"""The bodies that the server takes, in OpenAI's names and vLLM's for what the sampler can do beyond them.

A body says types only: which values are allowed, `SamplingParams` and the model decide, in one place for all.
"""

from __future__ import annotations

import re
from dataclasses import fields
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, FailFast, Field

from jaxinfer.decode.sampling_params import MAX_N, SamplingParams
from jaxinfer.decode.structured_params import StructuredOutputsParams
from jaxinfer.serve.errors import ApiError, refused

# One wrong entry says enough: an error for each of millions would take minutes, in which no other caller is served.
type Listed[T] = Annotated[list[T], FailFast()]

ROLES = ("system", "developer", "user", "assistant", "tool")


def _only(*neutral: Any) -> Any:
    """A field of OpenAI's that may only be given so that it asks for nothing."""

    def check(value: Any) -> Any:
        if not any(type(value) is type(allowed) and value == allowed for allowed in neutral):
            allowed = ", ".join(map(repr, neutral))
            raise ValueError(f"is not supported; leave it out, or give one of {allowed}")
        return value

    return Annotated[Any, AfterValidator(check)]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class StreamOptions(_Body):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None  # has no effect


class StructuredOutputs(_Body):
    """vLLM's field, for what `response_format` cannot say; see `StructuredOutputsParams`."""

    schema_: dict[str, Any] | str | None = Field(None, alias="json")
    regex: str | None = None
    choice: Listed[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None

    def params(self) -> StructuredOutputsParams:
        return StructuredOutputsParams(
            json=self.schema_, regex=self.regex, choice=self.choice, grammar=self.grammar, json_object=self.json_object
        )


class JsonSchema(_Body):
    """A schema is always followed, whatever `strict` says."""

    name: str
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(_Body):
    """OpenAI's field."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    def params(self) -> StructuredOutputsParams | None:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("response_format has json_schema where its type is json_schema, and only there")
        if self.json_schema is not None:
            return StructuredOutputsParams(json=self.json_schema.schema_)
        return StructuredOutputsParams(json_object=True) if self.type == "json_object" else None


class SamplingBody(_Body):
    """What completions and chats share; None stands for the default."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    seed: int | None = None
    stop: str | Listed[str] | None = None
    stop_token_ids: Listed[int] | None = None
    ignore_eos: bool | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    priority: Annotated[int, Field(ge=-(2**31), lt=2**31)] | None = None  # the lower, the sooner; 0 by default
    # For OpenAI's own records: without effect here.
    user: str | None = None
    metadata: dict[str, Any] | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    store: _only(None, False) = None  # pyright: ignore[reportInvalidTypeForm]

    @property
    def spelled(self) -> dict[str, str]:
        """Fields that have another name here than in `SamplingParams`, by that."""
        return {} if self.response_format is None else {"structured_outputs": "response_format"}

    @property
    def continuations(self) -> int:
        """How many are asked for; an n that none can have is refused later, and counts as one."""
        return self.n if self.n is not None and 1 <= self.n <= MAX_N else 1

    @property
    def structured(self) -> bool:
        return self.response_format is not None or self.structured_outputs is not None

    def sampling_params(self, default_max_tokens: int) -> SamplingParams:
        """How to sample.

        Raises:
            ApiError: a value is out of its range.
        """
        if self.stream_options is not None and not self.stream:
            raise ApiError(400, "stream_options is for streams; set stream to true", param="stream_options")
        given: dict[str, Any] = {field.name: getattr(self, field.name, None) for field in fields(SamplingParams)}
        given |= {"max_tokens": self._max_tokens(), "logprobs": self._logprobs(), "logit_bias": self._logit_bias()}
        given = {name: value for name, value in given.items() if value is not None}
        options: dict[str, Any] = {"max_tokens": max(1, default_max_tokens)} | given
        try:
            options["structured_outputs"] = self._structured_outputs()
            return SamplingParams(**options)
        except ValueError as error:
            raise refused([str(error)], "body", self.spelled) from error

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    def _structured_outputs(self) -> StructuredOutputsParams | None:
        formatted = None if self.response_format is None else self.response_format.params()
        if self.structured_outputs is None:
            return formatted
        if formatted is not None:
            raise ValueError("structured_outputs has a say beside response_format; give one of them")
        return self.structured_outputs.params()

    def _max_tokens(self) -> int | None:
        return self.max_tokens

    def _logprobs(self) -> int | None:
        raise NotImplementedError

    def _logit_bias(self) -> dict[int, float] | None:
        """JSON has no integer keys: `{"7": -1.5}` is about token 7."""
        if self.logit_bias is None:
            return None
        for key in self.logit_bias:
            if re.fullmatch(r"[0-9]{1,10}", key) is None:
                raise ApiError(
                    400, f"logit_bias has the key {key[:40]!r}; each must be a token id", param="logit_bias"
                )
        return {int(key): value for key, value in self.logit_bias.items()}


class CompletionBody(SamplingBody):
    """Of `/v1/completions`."""

    prompt: str | Listed[str] | Listed[int] | Listed[Listed[int]]
    logprobs: int | None = None
    echo: _only(None, False) = None  # pyright: ignore[reportInvalidTypeForm]
    suffix: _only(None, "") = None  # pyright: ignore[reportInvalidTypeForm]
    best_of: _only(None, 1) = None  # pyright: ignore[reportInvalidTypeForm]

    def _logprobs(self) -> int | None:
        return self.logprobs

    @property
    def continuations(self) -> int:
        return len(self.prompts) * super().continuations

    @property
    def prompts(self) -> list[str | list[int]]:
        """One entry a prompt: a list of numbers is one."""
        if isinstance(self.prompt, str) or (self.prompt and isinstance(self.prompt[0], int)):
            return [self.prompt]  # pyright: ignore[reportReturnType]
        return list(self.prompt)  # pyright: ignore[reportReturnType]


class Part(_Body):
    """A piece of a message; text is the only kind that is taken."""

    type: Literal["text"]
    text: str


class Message(_Body):
    """One turn. What else an answer of this server holds may come back with it, where it holds nothing."""

    role: str
    content: str | Listed[Part]
    name: str | None = None
    tool_call_id: str | None = None
    refusal: _only(None) = None  # pyright: ignore[reportInvalidTypeForm]
    annotations: _only(None, []) = None  # pyright: ignore[reportInvalidTypeForm]
    audio: _only(None) = None  # pyright: ignore[reportInvalidTypeForm]
    function_call: _only(None) = None  # pyright: ignore[reportInvalidTypeForm]
    tool_calls: _only(None, []) = None  # pyright: ignore[reportInvalidTypeForm]
    reasoning: _only(None) = None  # pyright: ignore[reportInvalidTypeForm]

    def plain(self) -> dict[str, str]:
        """What a chat template reads: the parts of the content as one text."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        named = {"name": self.name, "tool_call_id": self.tool_call_id}
        return {"role": self.role, "content": text} | {key: value for key, value in named.items() if value}


def conversation(messages: list[Message], variables: dict[str, Any]) -> list[dict[str, str]]:
    """Messages as a chat template reads them.

    Raises:
        ApiError: a role is none that a message can have, or one of the template's variables is not the caller's.
    """
    for index, message in enumerate(messages):
        if message.role not in ROLES:
            param, known = f"messages[{index}].role", ", ".join(ROLES)
            raise ApiError(400, f"{param} is {message.role[:40]!r}; it must be one of {known}", param=param)
    if taken := sorted(variables.keys() & {"messages", "add_generation_prompt", "self"}):
        raise ApiError(400, f"chat_template_kwargs must not hold {', '.join(taken)}", param="chat_template_kwargs")
    return [message.plain() for message in messages]


class ChatBody(SamplingBody):
    """Of `/v1/chat/completions`."""

    messages: Listed[Message]
    add_generation_prompt: bool = True
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: _only(None, []) = None  # pyright: ignore[reportInvalidTypeForm]
    tool_choice: _only(None, "none", "auto") = None  # pyright: ignore[reportInvalidTypeForm]
    parallel_tool_calls: bool | None = None  # of no tools
    functions: _only(None, []) = None  # pyright: ignore[reportInvalidTypeForm]
    function_call: _only(None, "none", "auto") = None  # pyright: ignore[reportInvalidTypeForm]
    modalities: _only(None, ["text"]) = None  # pyright: ignore[reportInvalidTypeForm]

    @property
    def spelled(self) -> dict[str, str]:
        named = super().spelled | {"logprobs": "top_logprobs"}
        return named if self.max_completion_tokens is None else named | {"max_tokens": "max_completion_tokens"}

    def _max_tokens(self) -> int | None:
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise ApiError(
                400,
                f"max_completion_tokens = {self.max_completion_tokens} and max_tokens = {self.max_tokens} differ; "
                "give one of them",
                param="max_completion_tokens",
            )
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    def _logprobs(self) -> int | None:
        if not self.logprobs and self.top_logprobs is not None:
            raise ApiError(400, "top_logprobs needs logprobs to be true", param="top_logprobs")
        return (self.top_logprobs or 0) if self.logprobs else None


class TokenizeBody(_Body):
    """Of `/tokenize`: a prompt, or messages."""

    model: str | None = None
    prompt: str | None = None
    add_special_tokens: bool = True
    messages: Listed[Message] | None = None
    add_generation_prompt: bool = True
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)


_BODIES = (
    CompletionBody, ChatBody, TokenizeBody, Message, Part,
    StreamOptions, ResponseFormat, JsonSchema, StructuredOutputs,
)  # fmt: skip
BODY_FIELDS = {field.alias or name for body in _BODIES for name, field in body.model_fields.items()}
"""Every name that stands in a body, for the paths of errors."""
