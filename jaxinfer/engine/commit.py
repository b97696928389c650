"""What the host reads of a program, as the tokens and log-probabilities of sequences."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import numpy as np

from jaxinfer.decode.prompt_logprobs import PromptLogprobs
from jaxinfer.decode.sampling import Sampled
from jaxinfer.decode.step import StepOutput
from jaxinfer.engine.request import FinishReason, TokenLogprobs
from jaxinfer.engine.sequence import Chunk, Sequence


@dataclass(frozen=True)
class Row:
    """The tokens that a program brought to one sequence, up to the one that ends it."""

    tokens: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...]
    reason: FinishReason | None


def read_row(output: StepOutput, row: int, sequence: Sequence) -> Row:
    """Appends what a row brought to the sequence's tokens."""
    request, tokens, logprobs, reason = sequence.request, [], [], None
    stop_ids, left = request.stop_ids, request.params.max_tokens - sequence.outputs
    emitted = zip(output.emits_nW[:, row].tolist(), output.sampled.tokens_W[:, row].tolist(), strict=True)
    for step, (emits, token) in enumerate(emitted):
        if not emits:
            continue
        tokens.append(token)
        if sequence.constraint is not None:
            sequence.constraint.accept(token)
        if request.params.logprobs is not None:
            logprobs.append(_chosen(output.sampled, (step, row), request.params.logprobs))
        if token in stop_ids:
            reason = "stop"
        elif len(tokens) == left:
            reason = "length"
        if reason:
            break
    if reason == "stop" and sequence.constraint is not None and sequence.constraint.failed:
        reason = "constraint"
    sequence.tokens += tokens
    return Row(tuple(tokens), tuple(logprobs), reason)


def corrections(emits_nQ: np.ndarray, tokens: int) -> tuple[int, ...]:
    """Which of a sequence's first `tokens` tokens stand where another was proposed: the last of each step that took
    less than all proposals and one more.

    Args:
        emits_nQ: which places of each step brought a token.
    """
    taken_n = emits_nQ.sum(axis=1)
    last_n = np.cumsum(taken_n) - 1
    return tuple(last_n[(taken_n > 0) & (taken_n < emits_nQ.shape[1]) & (last_n < tokens)].tolist())


def join_tiles(tiles: tuple[PromptLogprobs, ...]) -> PromptLogprobs:
    """The log-probabilities of all rows of a step."""
    return jax.tree.map(lambda *arrays: np.concatenate(arrays), *tiles)


def keep_prompt_logprobs(chunk: Chunk, row: int, scored: PromptLogprobs) -> None:
    """Gives a chunk's sequence, if it wants them, the log-probabilities of the prompt tokens that follow the chunk's
    own.

    A prompt that is computed again, after a preemption, gets them again.

    Args:
        row: the chunk's first in `scored`.
    """
    request = chunk.sequence.request
    if (top := request.params.prompt_logprobs) is None:
        return
    for offset, token in enumerate(request.prompt_ids[chunk.start + 1 : chunk.end + 1]):
        ids, values = scored.top_ids_TL[row + offset], scored.top_logprobs_TL[row + offset]
        likeliest = tuple(zip(ids[:top].tolist(), values[:top].tolist(), strict=True))
        entry = TokenLogprobs(token, float(scored.logprob_T[row + offset]), likeliest)
        chunk.sequence.prompt_logprobs[chunk.start + 1 + offset] = entry


def _chosen(sampled: Sampled, at: tuple[int, int], top: int) -> TokenLogprobs:
    likeliest = zip(sampled.top_ids_WL[at][:top].tolist(), sampled.top_logprobs_WL[at][:top].tolist(), strict=True)
    return TokenLogprobs(int(sampled.tokens_W[at]), float(sampled.logprobs_W[at]), tuple(likeliest))
