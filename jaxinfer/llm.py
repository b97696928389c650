"""`LLM`: the front door. Text in, text out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from jaxinfer import checkpoint
from jaxinfer.decode.sampling_params import SamplingParams
from jaxinfer.engine import Engine, Options, Request, TokenLogprobs, Update
from jaxinfer.model import Model, read_config
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
        options: Options | None = None,
    ):
        """Loads a checkpoint straight onto the devices.

        Args:
            model: a folder in Hugging Face or our own layout, or a Hugging Face id.
            dtype: bfloat16, float16 or float32; the checkpoint's own by default.
            max_model_len: tokens of the longest sequence, prompt and output; the checkpoint's context by default.
            tensor_parallel_size: devices that share the model.
            seed: of the requests that name none.
            options: of the engine.

        Raises:
            FileNotFoundError, ValueError: what is missing or wrong in the checkpoint, by file and tensor; or the
                argument, its value and what is allowed.
        """
        self.folder = checkpoint.resolve(model)
        config = read_config(self.folder)
        _check_arguments(dtype, max_model_len)
        self.tokenizer = Tokenizer.from_folder(self.folder)
        self.model = Model(config, make_mesh(tensor_parallel_size), max_model_len, dtype)
        params = self.model.params(checkpoint.load(self.folder, self.model))
        self.engine = Engine(self.model, params, options)
        self._seeds, self._ids = np.random.default_rng(seed), count()
        self._running: dict[int, _Continuation] = {}

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
        listed = _listed(prompts)
        params = _paired(sampling_params, len(listed))
        tokens = self._encode(listed, params)
        continuations = [self._start(ids, p) for ids, p in zip(tokens, params, strict=True)]
        flat = [continuation for group in continuations for continuation in group]
        try:
            while any(continuation.finish_reason is None for continuation in flat):
                self._step()
        finally:
            self._drop(flat)
        return [
            RequestOutput(
                prompt=prompt if isinstance(prompt, str) else None,
                prompt_token_ids=ids,
                prompt_logprobs=group[0].prompt_logprobs,
                outputs=[continuation.output() for continuation in group],
            )
            for prompt, ids, group in zip(listed, tokens, continuations, strict=True)
        ]

    def stream(self, prompt: Prompt, sampling_params: SamplingParams | None = None) -> Iterator[CompletionOutput]:
        """Continues one prompt and yields each piece as it comes: new text and new tokens only.

        The pieces put together are the output of `generate`. Leaving the loop early drops the request.

        Raises:
            ValueError: as `generate`; also where `n` is not 1.
        """
        params = sampling_params or SamplingParams()
        if params.n != 1:
            raise ValueError(f"n = {params.n} must be 1 in a stream")
        (tokens,) = self._encode([prompt], [params])
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
            ValueError: there is no template, or a message is malformed; names it.
        """
        template = ChatTemplate.from_folder(self.folder)
        several = bool(messages) and not isinstance(messages[0], Mapping)
        conversations: Any = messages if several else [messages]
        texts = [template.render(conversation) for conversation in conversations]
        ids = [self.tokenizer.encode(text, add_special_tokens=False) for text in texts]
        return self.generate(ids, sampling_params)

    # --- prompts in

    def _encode(self, prompts: Sequence[Prompt], params: Sequence[SamplingParams]) -> list[list[int]]:
        """Token ids of all prompts, every one of them checked before any runs."""
        tokens, problems = [], []
        for index, (prompt, p) in enumerate(zip(prompts, params, strict=True)):
            try:
                ids = self._tokens(prompt)
                found = self._problems(ids, p)
            except ValueError as error:
                ids, found = [], [str(error)]
            tokens.append(ids)
            problems += [f"prompt {index}: {problem}" for problem in found]
        if problems:
            raise ValueError("; ".join(problems))
        return tokens

    def _tokens(self, prompt: Prompt) -> list[int]:
        if not isinstance(prompt, str):
            return _checked_ids(prompt)
        return self.tokenizer.encode(prompt) if prompt else []  # a lone beginning-of-sequence token is no prompt

    def _problems(self, ids: list[int], params: SamplingParams) -> list[str]:
        vocab, context = self.model.config.vocab_size, self.model.context
        if not ids:
            return ["the prompt is empty; it must have at least one token"]
        found = [
            f"token id {i} at position {at} must be in 0..{vocab - 1}"
            for at, i in enumerate(ids)
            if not 0 <= i < vocab
        ]
        if len(ids) >= context:
            found.append(
                f"the prompt has {len(ids)} tokens; at most {context - 1} leave room in a context of {context}"
            )
            return found
        found += params.problems(vocab, context, len(ids))
        return found or self.engine.problems(self._request(ids, params, 0))

    def _request(self, ids: list[int], params: SamplingParams, seed: int) -> Request:
        return Request(next(self._ids), tuple(ids), params, tuple(sorted(self.tokenizer.eos_ids)), seed)

    def _start(self, ids: list[int], params: SamplingParams) -> list[_Continuation]:
        """Queues the n continuations of one prompt."""
        seed = int(self._seeds.integers(2**32)) if params.seed is None else params.seed
        group = []
        for index in range(params.n):
            request = self._request(ids, params, (seed + index) % 2**32)
            self.engine.add(request)
            decoder, checker = IncrementalDecoder(self.tokenizer), StopChecker(params.stop_strings)
            self._running[request.id] = _Continuation(request, index, decoder, checker)
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

    def _drop(self, continuations: Sequence[_Continuation]) -> None:
        """Forgets continuations; those that still run, after a stop string or an interrupt, stop running."""
        for continuation in continuations:
            if self._running.pop(continuation.request.id, None) is not None:
                self.engine.abort(continuation.request.id)


@dataclass
class _Continuation:
    """The text of one request as it grows."""

    request: Request
    index: int
    decoder: IncrementalDecoder
    checker: StopChecker
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    finish_reason: Any = None
    stop_reason: int | str | None = None
    sent: tuple[int, int] = (0, 0)  # tokens and characters that `piece` has handed out

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
            self.finish_reason = update.finish_reason
            if update.finish_reason == "stop" and self.token_ids[-1] not in self.request.eos_ids:
                self.stop_reason = self.token_ids[-1]

    def _show(self, piece: str) -> bool:
        """Appends text; true where a stop string ended it."""
        shown, stopped = self.checker.push(piece)
        self.text += shown
        if stopped:
            self.finish_reason, self.stop_reason = "stop", self.checker.matched
        return stopped

    def output(self, token: int = 0, character: int = 0) -> CompletionOutput:
        """What there is from a given token and character on; all of it by default."""
        logprobs = self.logprobs[token:] if self.request.params.logprobs is not None else None
        text, token_ids = self.text[character:], self.token_ids[token:]
        return CompletionOutput(self.index, text, token_ids, logprobs, self.finish_reason, self.stop_reason)

    def piece(self) -> CompletionOutput | None:
        """What came since the last piece, if anything did."""
        new = self.output(*self.sent)
        self.sent = (len(self.token_ids), len(self.text))
        return new if new.token_ids or new.text or new.finish_reason else None


def _check_arguments(dtype: str | None, max_model_len: int | None) -> None:
    if dtype not in (None, "bfloat16", "float16", "float32"):
        raise ValueError(f"dtype = {dtype!r} must be bfloat16, float16 or float32")
    if max_model_len is not None and (isinstance(max_model_len, bool) or max_model_len < 2):
        raise ValueError(f"max_model_len = {max_model_len!r} must be at least 2: a prompt token and a new one")


def _listed(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt is a list of one; a list of integers is one prompt."""
    if isinstance(prompts, str) or (len(prompts) > 0 and not isinstance(prompts[0], str | Sequence | np.ndarray)):
        return [prompts]  # type: ignore[list-item]
    return list(prompts)  # type: ignore[arg-type]


def _paired(params: SamplingParams | Sequence[SamplingParams] | None, prompts: int) -> list[SamplingParams]:
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * prompts
    if len(params) != prompts:
        raise ValueError(f"sampling_params has {len(params)} entries for {prompts} prompts; give one, or one for each")
    return list(params)


def _checked_ids(prompt: Sequence[int]) -> list[int]:
    listed = isinstance(prompt, Sequence | np.ndarray)
    if not listed or any(isinstance(i, bool) or not isinstance(i, int | np.integer) for i in prompt):
        raise ValueError("the prompt must be a string or a list of integer token ids")
    return [int(i) for i in prompt]
