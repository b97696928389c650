"""`LLM`: the front door. Text in, text out."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import count
from numbers import Number
from pathlib import Path
from typing import Any, cast

import numpy as np

from jaxinfer import checkpoint
from jaxinfer.continuation import Continuation
from jaxinfer.decode.sampling import MAX_EOS_IDS
from jaxinfer.decode.sampling_params import SamplingParams, first_few
from jaxinfer.engine import Engine, Options, Request
from jaxinfer.model import Model, ModelConfig, read_config
from jaxinfer.model.rope import Dynamic, LongRope, Yarn
from jaxinfer.outputs import CompletionOutput, RequestOutput
from jaxinfer.parallel import make_mesh
from jaxinfer.text import ChatTemplate, IncrementalDecoder, StopChecker, Tokenizer

Prompt = str | Sequence[int]
DEMO = Path(__file__).parent / "assets" / "demo"
"""The checkpoint that ships with the package: a small model of Python code."""


class LLM:
    """A checkpoint, ready to generate.

    Attributes:
        folder: where the checkpoint lies on this machine.
        model, engine, tokenizer: the pieces, for those who want to look inside.
    """

    def __init__(
        self,
        model: str | Path = DEMO,
        *,
        dtype: str | None = None,
        max_model_len: int | None = None,
        tensor_parallel_size: int = 1,
        seed: int = 0,
        warm_up: bool = False,
        options: Options | None = None,
    ):
        """Loads a checkpoint straight onto the devices.

        Args:
            model: a folder in Hugging Face or our own layout, or a Hugging Face id.
            dtype: bfloat16, float16 or float32; the checkpoint's own by default.
            max_model_len: tokens of the longest sequence, prompt and output; the checkpoint's context by default, and
                at most that, unless its rotary embeddings adapt to longer ones (dynamic NTK, LongRoPE).
            tensor_parallel_size: devices that share the model.
            seed: of the requests that name none.
            warm_up: compile now whatever requests can meet, so that none waits for a compiler: by default 18 programs
                of the model, for the sizes of prompts and of decoding, and 9 small ones. Without it each program is
                compiled when a request first needs it.
            options: of the engine.

        Raises:
            FileNotFoundError, ValueError: what is missing or wrong in the checkpoint, by file and tensor; or the
                argument, its value and what is allowed.
        """
        _check_arguments(dtype, max_model_len, tensor_parallel_size, seed, warm_up, options)
        self.folder = checkpoint.resolve(model)
        config = read_config(self.folder)
        _check_context(max_model_len, config)
        self.tokenizer = Tokenizer.from_folder(self.folder)
        self._eos_ids = _checked_eos(self.folder, self.tokenizer, config.vocab_size)
        self.model = Model(config, make_mesh(tensor_parallel_size), max_model_len, dtype)
        params = self.model.params(checkpoint.load(self.folder, self.model))
        self.engine = Engine(self.model, params, options)
        if warm_up:
            self.engine.warm_up()
        self._seeds, self._ids = np.random.default_rng(seed), count()
        self._running: dict[int, Continuation] = {}

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[RequestOutput]:
        """Continues every prompt.

        Args:
            prompts: text, token ids, or a list of either.
            sampling_params: for all prompts, or one for each.

        Returns:
            one output per prompt, in their order.

        Raises:
            ValueError: lists every prompt and parameter that cannot be served; nothing has run then.
        """
        return self._answer("prompt", _listed(prompts), sampling_params, self._tokens)

    def stream(self, prompt: Prompt, sampling_params: SamplingParams | None = None) -> Iterator[CompletionOutput]:
        """Continues one prompt and yields each piece as it comes: new text and new tokens only.

        The pieces put together are the output of `generate`. Leaving the loop early drops the request.

        Raises:
            ValueError: as `generate`; also where `n` is not 1, or `prompt_logprobs` are asked for.
        """
        ((tokens, params),) = self._checked("prompt", [prompt], sampling_params, self._tokens, _stream_problems)
        return self._stream(tokens, params)

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]] | Sequence[Sequence[Mapping[str, Any]]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[RequestOutput]:
        """Answers one conversation or several, through the checkpoint's own chat template.

        Args:
            messages: `{"role": ..., "content": ...}` objects, or a list of such lists.

        Raises:
            ValueError: there is no template; or as `generate`, also for every message that is malformed.
        """
        template = ChatTemplate.from_folder(self.folder)
        several = _is_list(messages) and len(messages) > 0 and not isinstance(messages[0], Mapping)

        def encode(conversation: Sequence[Mapping[str, Any]]) -> list[int]:
            return self.tokenizer.encode(template.render(conversation), add_special_tokens=False)

        return self._answer("conversation", messages if several else [messages], sampling_params, encode)

    def _answer(
        self,
        what: str,
        inputs: Sequence[Any],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
        encode: Callable[[Any], list[int]],
    ) -> list[RequestOutput]:
        """Runs all inputs to their ends; `what` is the word for one of them, `encode` gives its token ids."""
        requests = self._checked(what, inputs, sampling_params, encode)
        continuations = [self._start(ids, params) for ids, params in requests]
        flat = [continuation for group in continuations for continuation in group]
        try:
            while any(continuation.finish_reason is None for continuation in flat):
                self._step()
        finally:
            self._drop(flat)
        return [
            RequestOutput(
                prompt=given if isinstance(given, str) else None,
                prompt_token_ids=ids,
                prompt_logprobs=group[0].prompt_logprobs,
                outputs=[continuation.output() for continuation in group],
            )
            for given, (ids, _), group in zip(inputs, requests, continuations, strict=True)
        ]

    # --- prompts in

    def _checked(
        self,
        what: str,
        inputs: Sequence[Any],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
        encode: Callable[[Any], list[int]],
        more_problems: Callable[[SamplingParams], list[str]] = lambda params: [],
    ) -> list[tuple[list[int], SamplingParams]]:
        """Token ids and parameters of all inputs, every one of them checked before any runs."""
        paired, problems = _paired(sampling_params, len(inputs), what)
        requests = []
        for index, (given, params) in enumerate(zip(inputs, paired, strict=True)):
            found = [] if params is None else more_problems(params)
            try:
                ids = encode(given)
                found += self._problems(ids, params)
            except ValueError as error:
                ids = []
                found.append(str(error))
            if params is not None:
                requests.append((ids, params))
            problems += [f"{what} {index}: {problem}" for problem in found]
        if problems:
            raise ValueError("; ".join(problems))
        return requests

    def _tokens(self, prompt: Prompt) -> list[int]:
        if not isinstance(prompt, str):
            return _checked_ids(prompt)
        return self.tokenizer.encode(prompt) if prompt else []  # a lone beginning-of-sequence token is no prompt

    def _problems(self, ids: list[int], params: SamplingParams | None) -> list[str]:
        """What cannot be served of a prompt, and of its parameters unless they are already refused (None)."""
        vocab, context = self.model.config.vocab_size, self.model.context
        if not ids:
            return ["the prompt is empty; it must have at least one token"]
        wrong = [(at, i) for at, i in enumerate(ids) if not 0 <= i < vocab]
        found = first_few([f"token id {i} at position {at} must be in 0..{vocab - 1}" for at, i in wrong])
        if len(ids) >= context:
            found.append(
                f"the prompt has {len(ids)} tokens; at most {context - 1} leave room in a context of {context}"
            )
            return found
        if params is None:
            return found
        found += params.problems(vocab, context, len(ids))
        return found or self.engine.problems(Request(-1, tuple(ids), params, self._eos_ids, 0))

    def _start(self, ids: list[int], params: SamplingParams) -> list[Continuation]:
        """Queues the n continuations of one prompt."""
        seed = int(self._seeds.integers(2**32)) if params.seed is None else params.seed
        group = []
        for index in range(params.n):
            request = Request(next(self._ids), tuple(ids), params, self._eos_ids, (seed + index) % 2**32)
            self.engine.add(request)
            decoder, checker = IncrementalDecoder(self.tokenizer), StopChecker(params.stop_strings)
            self._running[request.id] = Continuation(request, index, decoder, checker)
            group.append(self._running[request.id])
        return group

    # --- text out

    def _stream(self, tokens: list[int], params: SamplingParams) -> Iterator[CompletionOutput]:
        (continuation,) = self._start(tokens, params)
        try:
            piece = None
            while piece is None or piece.finish_reason is None:
                if continuation.finish_reason is None:  # else it ended in a step that another caller ran
                    self._step()
                if (piece := continuation.piece()) is not None:
                    yield piece
        finally:
            self._drop([continuation])

    def _step(self) -> None:
        """Runs the engine once; gives every update to its continuation, whoever asked for it."""
        for update in self.engine.step():
            if (continuation := self._running.get(update.request.id)) is not None:
                continuation.push(update)
                if continuation.finish_reason is not None:
                    self._drop([continuation])

    def _drop(self, continuations: Sequence[Continuation]) -> None:
        """Forgets continuations; those that still run, after a stop string or an interrupt, stop running."""
        for continuation in continuations:
            if self._running.pop(continuation.request.id, None) is not None:
                self.engine.abort(continuation.request.id)


def _check_arguments(
    dtype: str | None, max_model_len: int | None, tensor_parallel_size: int, seed: int, warm_up: bool,
    options: Options | None,
) -> None:  # fmt: skip
    if dtype is not None and (not isinstance(dtype, str) or dtype not in ("bfloat16", "float16", "float32")):
        raise ValueError(f"dtype = {dtype!r} must be bfloat16, float16 or float32")
    if max_model_len is not None and not _is_integer(max_model_len, 2):
        raise ValueError(
            f"max_model_len = {max_model_len!r} must be an integer, at least 2 (a prompt and a new token)"
        )
    for name, value, least in (("tensor_parallel_size", tensor_parallel_size, 1), ("seed", seed, 0)):
        if not _is_integer(value, least):
            raise ValueError(f"{name} = {value!r} must be an integer, at least {least}")
    if not isinstance(warm_up, bool):
        raise ValueError(f"warm_up = {warm_up!r} must be True or False")
    if not isinstance(options, Options | None):
        raise ValueError(f"options = {reprlib.repr(options)} must be an Options")


def _check_context(max_model_len: int | None, config: ModelConfig) -> None:
    """Refuses positions that the model was not made for, unless its rotary embeddings adapt to the context."""
    scalings = {layer.rope.scaling for layer in config.layers}
    if max_model_len is None or any(isinstance(scaling, Dynamic | LongRope) for scaling in scalings):
        return
    # Published YaRN configs state the context before its extension.
    extended = [int(scaling.original_context * scaling.factor) for scaling in scalings if isinstance(scaling, Yarn)]
    longest = max(config.context, *extended, 0)
    if max_model_len > longest:
        raise ValueError(f"max_model_len = {max_model_len} must be in 2..{longest}, the checkpoint's context")


def _checked_eos(folder: Path, tokenizer: Tokenizer, vocab: int) -> tuple[int, ...]:
    ids = sorted(tokenizer.eos_ids)
    if len(ids) > MAX_EOS_IDS:
        raise ValueError(f"{folder}: eos_token_id has {len(ids)} token ids; at most {MAX_EOS_IDS} are allowed")
    if ids and ids[-1] >= vocab:
        raise ValueError(f"{folder}: eos_token_id has token id {ids[-1]}; each must be in 0..{vocab - 1}")
    return tuple(ids)


def _listed(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt is a list of one; a list of numbers is one prompt."""
    if isinstance(prompts, str):
        return [prompts]
    if not _is_list(prompts):
        allowed = "a string, a list of integer token ids, or a list of either"
        raise ValueError(f"prompts = {reprlib.repr(prompts)} must be {allowed}")
    one = len(prompts) > 0 and isinstance(prompts[0], Number)
    return [cast("Prompt", prompts)] if one else list(cast("Sequence[Prompt]", prompts))


def _paired(params: Any, count: int, what: str) -> tuple[list[SamplingParams | None], list[str]]:
    """The parameters of each input, None where they cannot be told, and what is wrong with what was given."""
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * count, []
    if not _is_list(params):
        given = reprlib.repr(params)
        return [None] * count, [f"sampling_params = {given} must be a SamplingParams, or one for each {what}"]
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


def _stream_problems(params: SamplingParams) -> list[str]:
    found = []
    if params.n != 1:
        found.append(f"n = {params.n} must be 1 in a stream")
    if params.prompt_logprobs is not None:
        found.append(f"prompt_logprobs = {params.prompt_logprobs} must be None in a stream of new tokens")
    return found


def _checked_ids(prompt: Sequence[int]) -> list[int]:
    if not _is_list(prompt) or not all(_is_integer(i) for i in prompt):
        raise ValueError(f"the prompt {reprlib.repr(prompt)} must be a string or a list of integer token ids")
    return [int(i) for i in prompt]


def _is_list(value: Any) -> bool:
    """Whether it holds one thing after the other; bytes are sequences of integers, but no token ids."""
    if isinstance(value, np.ndarray):
        return value.ndim > 0
    return isinstance(value, Sequence) and not isinstance(value, str | bytes | bytearray | memoryview)


def _is_integer(value: Any, least: float = -math.inf) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool) and int(value) >= least
