"""What `LLM` returns, in vLLM's names."""

from __future__ import annotations

from dataclasses import dataclass

from jaxinfer.engine import TokenLogprobs
from jaxinfer.engine.request import FinishReason


@dataclass(frozen=True)
class CompletionOutput:
    """One continuation of a prompt.

    Attributes:
        index: which of the `n` continuations.
        text: the new text, without the stop string or the token that ended it.
        token_ids: every new token, the one that ended the output included.
        logprobs: one entry per new token, where `SamplingParams.logprobs` asks for them.
        finish_reason: `stop` at the end of the sequence, a stop token or a stop string; `length` at `max_tokens`;
            `abort` where a failed step took the request's cache with it; `timeout` where it waited longer than
            `Options.max_waiting_time`; `constraint` where `structured_outputs` cannot be followed to an end; `error`
            where the host failed at this request alone, as its log says; None in a stream that goes on.
        stop_reason: the stop string or stop token that ended it; None at the model's own end of
            sequence, unless `ignore_eos` leaves that to `stop_token_ids`.
        problem: a sentence that says why, where the reason is `constraint`.
    """

    index: int
    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprobs] | None
    finish_reason: FinishReason | None
    stop_reason: int | str | None = None
    problem: str | None = None

    @property
    def cumulative_logprob(self) -> float | None:
        """Log-probability of the whole continuation, where `logprobs` has that of each token."""
        return None if self.logprobs is None else sum(entry.logprob for entry in self.logprobs)


@dataclass(frozen=True)
class RequestOutput:
    """What came of one prompt.

    Attributes:
        prompt: the text, or None where token ids were given.
        prompt_token_ids: its tokens.
        prompt_logprobs: one entry per prompt token, None for the first, where they were asked for.
        outputs: the `n` continuations.
    """

    prompt: str | None
    prompt_token_ids: list[int]
    prompt_logprobs: list[TokenLogprobs | None] | None
    outputs: list[CompletionOutput]
