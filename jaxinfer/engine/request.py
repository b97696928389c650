"""A request, the sequence that it becomes while it runs, and what comes back of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from jaxinfer.decode.sampling_params import SamplingParams

FinishReason = Literal["stop", "length", "abort"]


@dataclass(frozen=True)
class Request:
    """One continuation of one prompt.

    Attributes:
        id: the caller's name for it; unique among the requests that run.
        prompt_ids: at least one token.
        params: valid for the model; `n` is the caller's business.
        eos_ids: tokens that end the output, unless `params.ignore_eos`.
        seed: of the random draws.
    """

    id: int
    prompt_ids: tuple[int, ...]
    params: SamplingParams
    eos_ids: tuple[int, ...]
    seed: int

    @property
    def capacity(self) -> int:
        """Tokens that the request's cache may have to hold."""
        return len(self.prompt_ids) + self.params.max_tokens

    @property
    def stop_ids(self) -> frozenset[int]:
        own = frozenset(self.params.stop_token_ids or ())
        return own if self.params.ignore_eos else own | frozenset(self.eos_ids)


@dataclass(frozen=True)
class TokenLogprobs:
    """Log-probabilities of one position: of the token that is there, and of the likeliest ones by falling value."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Update:
    """What one step brought to one request.

    Attributes:
        request: whose.
        tokens: new tokens of the output, the one that ended it included.
        logprobs: one entry per new token, where `params.logprobs` asks for them.
        prompt_logprobs: one entry per prompt token, with the update of the first token; None for the first.
        finish_reason: `stop` after an end-of-sequence or stop token, `length` at `max_tokens`, `abort` where a
            failed step took the request's cache with it; None goes on.
    """

    request: Request
    tokens: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...]
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None
    finish_reason: FinishReason | None


@dataclass
class Sequence:
    """A request that has a slot and pages.

    0 <= prefilled <= prompt length; outputs <= scheduled; prompt length + outputs <= capacity.
    """

    request: Request
    slot: int
    pages: tuple[list[int], ...]
    prefilled: int = 0  # prompt tokens that were dispatched
    scheduled: int = 0  # output tokens that dispatched steps may bring
    outputs: int = 0  # output tokens that were read
    prompt_logprobs: list[TokenLogprobs | None] = field(default_factory=lambda: [None])
    finished: bool = False

    @property
    def prompt_left(self) -> int:
        return len(self.request.prompt_ids) - self.prefilled

    @property
    def decodes(self) -> bool:
        """Whether another decode step may bring a token that is not on its way already."""
        return self.prompt_left == 0 and self.scheduled < self.request.params.max_tokens

    def check(self) -> None:
        assert 0 <= self.prefilled <= len(self.request.prompt_ids), self
        assert 0 <= self.outputs <= self.scheduled, self
        assert len(self.request.prompt_ids) + self.outputs <= self.request.capacity, self
