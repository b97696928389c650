"""The text of one request, from the tokens that the engine brings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Self

from jaxinfer.engine import Request, TokenLogprobs, Update
from jaxinfer.engine.request import FinishReason
from jaxinfer.outputs import CompletionOutput, RequestOutput
from jaxinfer.text import IncrementalDecoder, StopChecker, Tokenizer


@dataclass
class Continuation:
    """The text of one request as it grows."""

    request: Request
    index: int
    decoder: IncrementalDecoder
    checker: StopChecker
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    problem: str | None = None
    sent: tuple[int, int] = (0, 0)  # tokens and characters that `piece` has handed out

    @classmethod
    def start(cls, request: Request, index: int, tokenizer: Tokenizer) -> Self:
        """Nothing yet of the continuation `index` of a prompt."""
        decoder = IncrementalDecoder(tokenizer, request.prompt_ids)
        return cls(request, index, decoder, StopChecker(request.params.stop_strings))

    def push(self, update: Update) -> None:
        """Takes the new tokens, up to the one that completes a stop string."""
        if update.prompt_logprobs is not None:
            self.prompt_logprobs = list(update.prompt_logprobs)
        for position, token in enumerate(update.tokens):
            self.token_ids.append(token)
            self.logprobs += update.logprobs[position : position + 1]
            ends = update.finish_reason == "stop" and position == len(update.tokens) - 1
            if not ends and self._show(self.decoder.push(token)):
                return
        if update.finish_reason is not None and not self._show(self.decoder.flush()):
            self.text += self.checker.flush()
            self.finish_reason, self.problem = update.finish_reason, update.problem
            if update.finish_reason == "stop" and not self._at_own_end():
                self.stop_reason = self.token_ids[-1]

    def _at_own_end(self) -> bool:
        """Whether the last token is the model's own end of sequence, and counts as such."""
        return not self.request.params.ignore_eos and self.token_ids[-1] in self.request.eos_ids

    def _show(self, piece: str) -> bool:
        """Appends text; true where a stop string ended it. None ends with the first `min_tokens` tokens."""
        shown, stopped = self.checker.push(piece, may_end=len(self.token_ids) > self.request.params.min_tokens)
        self.text += shown
        if stopped:
            self.finish_reason, self.stop_reason = "stop", self.checker.matched
        return stopped

    def output(self, token: int = 0, character: int = 0) -> CompletionOutput:
        """What there is from a given token and character on; all of it by default."""
        logprobs = self.logprobs[token:] if self.request.params.logprobs is not None else None
        text, token_ids = self.text[character:], self.token_ids[token:]
        return CompletionOutput(
            self.index, text, token_ids, logprobs, self.finish_reason, self.stop_reason, self.problem
        )

    def piece(self) -> CompletionOutput | None:
        """What came since the last piece, if anything did."""
        new = self.output(*self.sent)
        self.sent = (len(self.token_ids), len(self.text))
        return new if new.token_ids or new.text or new.finish_reason else None


def request_output(given: Any, group: Sequence[Continuation]) -> RequestOutput:
    """What came of one prompt, as it was given, in its n continuations."""
    return RequestOutput(
        prompt=given if isinstance(given, str) else None,
        prompt_token_ids=list(group[0].request.prompt_ids),
        prompt_logprobs=group[0].prompt_logprobs,
        outputs=[continuation.output() for continuation in group],
    )
