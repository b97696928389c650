"""Prompts on their way in: token ids, and every reason why a model cannot serve them. Needs no device."""

from __future__ import annotations

import reprlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from numbers import Number
from typing import Any, cast

import numpy as np

from jaxinfer.decode.arguments import is_integer
from jaxinfer.decode.sampling_params import SamplingParams, first_few
from jaxinfer.engine import Request
from jaxinfer.structured import Grammars
from jaxinfer.text import Tokenizer

Prompt = str | Sequence[int]


@dataclass(frozen=True)
class Limits:
    """What a loaded model takes.

    Attributes:
        vocab_size: token ids are below it.
        context: tokens of a prompt and its output together.
        eos_ids: tokens that end an output, unless `ignore_eos`.
    """

    vocab_size: int
    context: int
    eos_ids: tuple[int, ...]


@dataclass(frozen=True)
class Intake:
    """Turns prompts into requests that the model can serve."""

    tokenizer: Tokenizer
    limits: Limits

    @cached_property
    def grammars(self) -> Grammars:
        """Makes the constraints of structured outputs."""
        return Grammars(self.tokenizer, self.limits.vocab_size, self.limits.eos_ids)

    def tokens(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt.

        Raises:
            ValueError: it is neither valid text nor a list of integers, or as `encode`.
        """
        if not isinstance(prompt, str):
            return _checked_ids(prompt)
        return self.encode(prompt) if prompt else []  # a lone beginning-of-sequence token is no prompt

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text, as `Tokenizer.encode` gives them.

        Raises:
            ValueError: it is no valid text, or so long that it cannot fit, and is not tokenized therefore.
        """
        if (least := self.tokenizer.least_tokens(text)) >= self.limits.context:
            raise ValueError(self._too_long(f"at least {least}"))
        return self.tokenizer.encode(text, add_special_tokens=add_special_tokens)

    def problems(self, ids: Sequence[int], params: SamplingParams | None) -> list[str]:
        """What the model cannot serve of a prompt, and of its parameters unless they are already refused (None)."""
        vocab, context = self.limits.vocab_size, self.limits.context
        if not ids:
            return ["the prompt is empty; it must have at least one token"]
        wrong = [(at, i) for at, i in enumerate(ids) if not 0 <= i < vocab]
        found = first_few([f"token id {i} at position {at} must be in 0..{vocab - 1}" for at, i in wrong])
        if len(ids) >= context:
            return [*found, self._too_long(str(len(ids)))]
        if params is None:
            return found
        found += params.problems(vocab, context, len(ids))
        if params.structured_outputs is not None and (problem := self.grammars.problem(params.structured_outputs)):
            found.append(problem)
        return found

    def _too_long(self, tokens: str) -> str:
        context = self.limits.context
        return f"the prompt has {tokens} tokens; at most {context - 1} leave room in a context of {context}"

    def requests(
        self, names: Iterator[int], ids: Sequence[int], params: SamplingParams, seed: int, priority: int,
        arrived: float,
    ) -> list[Request]:  # fmt: skip
        """The n continuations of one prompt, named by the next of `names`; each draws from a seed of its own."""
        prompt_ids, eos_ids, seeds = tuple(ids), self.limits.eos_ids, [(seed + i) % 2**32 for i in range(params.n)]
        return [Request(next(names), prompt_ids, params, eos_ids, seed, priority, arrived) for seed in seeds]


def listed(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt is a list of one; a list of numbers is one prompt."""
    if isinstance(prompts, str):
        return [prompts]
    if not is_list(prompts):
        allowed = "a string, a list of integer token ids, or a list of either"
        raise ValueError(f"prompts = {reprlib.repr(prompts)} must be {allowed}")
    one = len(prompts) > 0 and isinstance(prompts[0], Number)
    return [cast("Prompt", prompts)] if one else list(cast("Sequence[Prompt]", prompts))


def paired(
    params: Any, count: int, what: str, may_be_list: bool = True
) -> tuple[list[SamplingParams | None], list[str]]:
    """The parameters of each input, None where they cannot be told, and what is wrong with what was given."""
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * count, []
    if not may_be_list or not is_list(params):
        allowed = f"a SamplingParams, or one for each {what}" if may_be_list else "one SamplingParams in a stream"
        return [None] * count, [f"sampling_params = {reprlib.repr(params)} must be {allowed}"]
    entries = [entry if isinstance(entry, SamplingParams) else None for entry in params]
    problems = [
        f"sampling_params[{index}] = {reprlib.repr(given)} must be a SamplingParams"
        for index, (given, entry) in enumerate(zip(params, entries, strict=True))
        if entry is None
    ]
    if len(entries) == count:
        return entries, problems
    wrong = f"sampling_params has {len(entries)} entries for {count} {what}s; give one, or one for each"
    return [None] * count, [wrong, *problems]


def priorities(given: Any, count: int, what: str) -> tuple[list[int], list[str]]:
    """The priority of each input, 0 where none are given, and what is wrong with those that are."""
    if given is None:
        return [0] * count, []
    if not is_list(given) or len(given) != count or not all(is_integer(one) for one in given):
        return [0] * count, [
            f"priority = {reprlib.repr(given)} must be a list of integers, one for each of {count} {what}s"
        ]
    return [int(one) for one in given], []


def stream_problems(params: SamplingParams) -> list[str]:
    """What one stream cannot bring."""
    found = []
    if params.n != 1:
        found.append(f"n = {params.n} must be 1 in a stream")
    if params.prompt_logprobs is not None:
        found.append(f"prompt_logprobs = {params.prompt_logprobs} must be None in a stream of new tokens")
    return found


def is_list(value: Any) -> bool:
    """Whether it holds one thing after the other; bytes are sequences of integers, but no token ids."""
    if isinstance(value, np.ndarray):
        return value.ndim > 0
    return isinstance(value, Sequence) and not isinstance(value, str | bytes | bytearray | memoryview)


def _checked_ids(prompt: Sequence[int]) -> list[int]:
    if not is_list(prompt) or not all(is_integer(i) for i in prompt):
        raise ValueError(f"the prompt {reprlib.repr(prompt)} must be a string or a list of integer token ids")
    return [int(i) for i in prompt]
