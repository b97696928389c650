"""A request, and what comes back of it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

from jaxinfer.decode.sampling_params import SamplingParams

FinishReason = Literal["stop", "length", "abort", "timeout", "constraint", "error"]


@dataclass(frozen=True)
class Request:
    """One continuation of one prompt.

    Attributes:
        id: the caller's name for it; unique among the requests that run.
        prompt_ids: at least one token.
        params: valid for the model; `n` is the caller's business.
        eos_ids: tokens that end the output, unless `params.ignore_eos`.
        seed: of the random draws.
        priority: the lower, the sooner, as in vLLM; equal ones go by arrival.
        arrived: when the caller asked, by `time.monotonic` of any process of this machine.
    """

    id: int
    prompt_ids: tuple[int, ...]
    params: SamplingParams
    eos_ids: tuple[int, ...]
    seed: int
    priority: int = 0
    arrived: float = field(default_factory=time.monotonic, compare=False)

    @property
    def capacity(self) -> int:
        """Tokens that the request's cache may have to hold."""
        return len(self.prompt_ids) + self.params.max_tokens

    @cached_property
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
            failed step took the request's cache with it, `timeout` where it waited longer than
            `Options.max_waiting_time` and never ran, `constraint` where what the output must look like cannot be, or
            not with what it has so far, `error` where the host failed at this request alone; None goes on.
        queued: seconds from the request's arrival to its first slot, with the update of the first token.
        corrected: which of the tokens stand where another was proposed.
        problem: a sentence that says why, where the reason is `constraint`.
    """

    request: Request
    tokens: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...]
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None
    finish_reason: FinishReason | None
    queued: float | None = None
    corrected: tuple[int, ...] = ()
    problem: str | None = None


Watch = Callable[[list[Update]], None]
"""Who is told what each step brought."""
