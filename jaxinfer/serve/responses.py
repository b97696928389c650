"""The bodies that the server sends, from the outputs of `Continuation`."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic_core import to_json

from jaxinfer.engine import TokenLogprobs
from jaxinfer.outputs import CompletionOutput
from jaxinfer.text import Tokenizer

LEAST = -9999.0  # stands for the log-probability of what cannot be drawn: JSON has no infinity
DONE = b"data: [DONE]\n\n"


def event(body: dict[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: " + to_json(body) + b"\n\n"


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


@dataclass
class Answer:
    """The answer to one HTTP request, either whole or in chunks; `Completion` and `Chat` say how.

    Attributes:
        model: the name that the model is served by.
        tokenizer: tells the text of single tokens, where log-probabilities are asked for.
    """

    model: str
    tokenizer: Tokenizer
    name: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))
    told: dict[int, int] = field(default_factory=dict)  # by choice, characters of the tokens in earlier chunks

    def body(self, outputs: Sequence[CompletionOutput], used: dict[str, int]) -> dict[str, Any]:
        """The whole answer; `outputs` by their index."""
        return self._frame(self._kind, [self._choice(output) for output in outputs]) | {"usage": used}

    def opening(self, choices: int) -> list[dict[str, Any]]:
        """The chunks before any text."""
        return []

    def chunk(self, piece: CompletionOutput) -> dict[str, Any]:
        """The next piece of one choice."""
        raise NotImplementedError

    def last(self, used: dict[str, int]) -> dict[str, Any]:
        """The chunk that tells the usage, and nothing else."""
        return self._frame(self._chunk_kind, []) | {"usage": used}

    _kind = _chunk_kind = _prefix = ""

    def _choice(self, output: CompletionOutput) -> dict[str, Any]:
        raise NotImplementedError

    def _frame(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self._prefix + self.name,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "choices": choices,
        }

    def _token(self, token: int) -> str:
        """The text of one token; U+FFFD for a part of a character."""
        return self.tokenizer.backend.decode([token], skip_special_tokens=False)


def _end(output: CompletionOutput) -> dict[str, Any]:
    return {"finish_reason": output.finish_reason, "stop_reason": output.stop_reason}


class Completion(Answer):
    """Of `/v1/completions`."""

    _kind = _chunk_kind = "text_completion"
    _prefix = "cmpl-"

    def chunk(self, piece: CompletionOutput) -> dict[str, Any]:
        return self._frame(self._chunk_kind, [self._choice(piece)])

    def _choice(self, output: CompletionOutput) -> dict[str, Any]:
        logprobs = None if output.logprobs is None else self._logprobs(output.index, output.logprobs)
        return {"index": output.index, "text": output.text, "logprobs": logprobs} | _end(output)

    def _logprobs(self, index: int, entries: Sequence[TokenLogprobs]) -> dict[str, Any]:
        tokens, offsets = [self._token(entry.token) for entry in entries], []
        for token in tokens:
            offsets.append(self.told.get(index, 0))
            self.told[index] = offsets[-1] + len(token)
        return {
            "tokens": tokens,
            "token_logprobs": [max(LEAST, entry.logprob) for entry in entries],
            "top_logprobs": [self._top(entry) for entry in entries],
            "text_offset": offsets,
        }

    def _top(self, entry: TokenLogprobs) -> dict[str, float]:
        """Log-probabilities by text, of the likeliest tokens and of the one that is there."""
        ranked = sorted((*entry.top, (entry.token, entry.logprob)), key=lambda pair: pair[1])
        return {self._token(token): max(LEAST, logprob) for token, logprob in ranked}


class Chat(Answer):
    """Of `/v1/chat/completions`."""

    _kind, _chunk_kind, _prefix = "chat.completion", "chat.completion.chunk", "chatcmpl-"

    def opening(self, choices: int) -> list[dict[str, Any]]:
        delta = {"role": "assistant", "content": ""}
        return [
            self._frame(self._chunk_kind, [{"index": index, "delta": delta, "finish_reason": None}])
            for index in range(choices)
        ]

    def chunk(self, piece: CompletionOutput) -> dict[str, Any]:
        choice = {"index": piece.index, "delta": {"content": piece.text}, "logprobs": self._logprobs(piece)}
        return self._frame(self._chunk_kind, [choice | _end(piece)])

    def _choice(self, output: CompletionOutput) -> dict[str, Any]:
        message = {"role": "assistant", "content": output.text}
        return {"index": output.index, "message": message, "logprobs": self._logprobs(output)} | _end(output)

    def _logprobs(self, output: CompletionOutput) -> dict[str, Any] | None:
        if output.logprobs is None:
            return None
        content = [
            self._entry(entry.token, entry.logprob)
            | {"top_logprobs": [self._entry(token, logprob) for token, logprob in entry.top]}
            for entry in output.logprobs
        ]
        return {"content": content, "refusal": None}

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        text = self._token(token)
        whole = None if "\N{REPLACEMENT CHARACTER}" in text else list(text.encode())
        return {"token": text, "logprob": max(LEAST, logprob), "bytes": whole}
