"""`LLM`: the front door. Text in, text out."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, cast

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from jaxinfer import checkpoint
from jaxinfer.checks import check_arguments, check_context, check_devices, checked_eos, facts
from jaxinfer.continuation import Continuation, request_output
from jaxinfer.decode.sampling_params import SamplingParams
from jaxinfer.decode.speculative import Loader, check_ranks
from jaxinfer.engine import Engine, Options, Request
from jaxinfer.engine.memory import check_weights
from jaxinfer.engine.request import Watch
from jaxinfer.intake import (
    Intake,
    Limits,
    Prompt,
    is_list,
    listed,
    paired,
    priorities,
    stream_problems,
)
from jaxinfer.model import EagleHead, Model, Params, read_config
from jaxinfer.outputs import CompletionOutput, RequestOutput
from jaxinfer.parallel import Group, make_mesh
from jaxinfer.text import ChatTemplate, Tokenizer

logger = logging.getLogger(__name__)
COLUMNS = (
    TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
)  # fmt: skip
Asked = tuple[list[int], SamplingParams, int]  # token ids, parameters and priority of an input
DEMO = Path(__file__).parent / "assets" / "demo"
"""The checkpoint that ships with the package: a small model of Python code."""
DRAFT = DEMO.with_name("draft")
"""A smaller one that drafts for it."""
MEDUSA, EAGLE = DEMO.with_name("medusa"), DEMO.with_name("eagle")
"""Heads that draft for it: Medusa's, and one of EAGLE."""


class LLM:
    """A checkpoint, ready to generate.

    Attributes:
        folder: where the checkpoint lies on this machine.
        model, engine, tokenizer, intake: the pieces, for those who want to look inside.
        watch: is told what each step of the engine brought, such as `OnlineDraft.see`; None tells nobody.
    """

    def __init__(
        self,
        model: str | Path = DEMO,
        *,
        dtype: str | None = None,
        max_model_len: int | None = None,
        tensor_parallel_size: int = 1,
        pipeline_parallel_size: int = 1,
        context_parallel_size: int = 1,
        seed: int = 0,
        warm_up: bool = False,
        options: Options | None = None,
        group: Group | None = None,
    ):
        """Loads a checkpoint straight onto the devices.

        Args:
            model: a folder in Hugging Face or our own layout, or a Hugging Face id.
            dtype: bfloat16, float16 or float32; the checkpoint's own by default.
            max_model_len: tokens of the longest sequence, prompt and output; the checkpoint's context by default, and
                at most that, unless its rotary embeddings adapt to longer ones (dynamic NTK, LongRoPE).
            tensor_parallel_size: devices that share every layer.
            pipeline_parallel_size: stages, of so many devices each, that the layers are divided among.
            context_parallel_size: devices that share every sequence, a power of two: each has an equal part of its
                keys and values, and of the work of its prompt. It does not go with several stages. There are as many
                devices as the product of these sizes.
            seed: of the requests that name none.
            warm_up: compile now whatever requests can meet, so that none waits for a compiler: the programs of the
                model, for the sizes of prompts and of decoding, and small ones; where llguidance is installed those of
                structured outputs too. A terminal shows how many are ready. Without it each program is compiled when
                a request first needs it.
            options: of the engine. Its default is made for throughput: a long prompt may hold up the tokens of others.
                Who streams them beside such prompts bounds that with `max_slowdown`, as `jaxinfer serve` does.
            group: of the processes that share the model, as `jaxinfer.parallel.join` gives it. Each makes an LLM with
                the same arguments; process 0 generates, and the others `follow`.

        Raises:
            FileNotFoundError, ValueError: what is missing or wrong in the checkpoint, by file and tensor; or the
                argument, its value and what is allowed.
        """
        check_arguments(dtype, max_model_len, seed, warm_up, options)
        sizes = {
            "tensor_parallel_size": tensor_parallel_size,
            "pipeline_parallel_size": pipeline_parallel_size,
            "context_parallel_size": context_parallel_size,
        }
        check_devices(**sizes)
        self.folder = checkpoint.resolve(model)
        config, self.group = read_config(self.folder), group
        if group is not None:
            group.agree(facts(config, options or Options(), dtype=dtype, max_model_len=max_model_len, **sizes))
        check_context(max_model_len, config)
        self.tokenizer = Tokenizer.from_folder(self.folder)
        eos_ids = checked_eos(self.folder, self.tokenizer, config.vocab_size)
        mesh = make_mesh(tensor_parallel_size, pipeline_parallel_size, context=context_parallel_size)
        self.model = Model(config, mesh, max_model_len, dtype)
        self.intake = Intake(self.tokenizer, Limits(config.vocab_size, self.model.context, eos_ids))
        if options is not None and options.speculation is not None:
            loader = Loader(
                self.model, self._beside, self._params_beside, self._tensors, self._head, self._head_params,
                partial(check_weights, self.model),
            )  # fmt: skip
            # What does not go with the model is refused before its weights are there.
            check_ranks(options.speculation, self.model)
            options = replace(options, speculation=options.speculation.loaded(loader))
        params = self.model.params(checkpoint.load(self.folder, self.model))
        constrain = self.intake.grammars.constraint if self.intake.grammars.possible else None
        self.engine = Engine(self.model, params, options, constrain, group)
        if warm_up and not self.follows:
            _warm_up(self.engine)
        self._seeds, self._ids = np.random.default_rng(seed), count()
        self._running: dict[int, tuple[Continuation, deque[Continuation]]] = {}
        self.watch: Watch | None = None

    @property
    def follows(self) -> bool:
        """Whether another process leads, and says what this one runs."""
        return self.group is not None and not self.group.leads

    def follow(self) -> None:
        """Runs what the leader of the group runs, until that ends in order."""
        if not self.follows:
            raise ValueError("this process leads, or is alone: generate here, and follow in the others of its group")
        self.engine.follow()

    def _beside(self, name: str | Path | None) -> Model:
        """The model of another checkpoint that reads the same tokens, for the same devices and context, and over no
        more keys; None is `DRAFT`.

        Raises:
            FileNotFoundError, ValueError: as `LLM`, or the tokenizers differ.
        """
        folder = checkpoint.resolve(DRAFT if name is None else name)
        config, tokenizer = read_config(folder), Tokenizer.from_folder(folder)
        ours, theirs = (one.backend.get_vocab() for one in (self.tokenizer, tokenizer))
        if differ := {token for token, _ in ours.items() ^ theirs.items()}:
            raise ValueError(
                f"the tokenizer of {folder} differs from that of {self.folder} in {len(differ)} tokens, such as "
                f"{min(differ)!r}; it must be the same"
            )
        config = config.within(self.model.config.windows)
        return Model(config, self.model.mesh, self.model.context, self.model.config.dtype, pipelined=False)

    def _params_beside(self, name: str | Path | None, model: Model) -> Params:
        return model.params(checkpoint.load(checkpoint.resolve(DRAFT if name is None else name), model))

    def _tensors(self, name: str | Path | None, file: str) -> dict[str, np.ndarray]:
        return checkpoint.tensors(MEDUSA if name is None else name, file)

    def _head(self, name: str | Path | None) -> EagleHead:
        return checkpoint.read_head(checkpoint.resolve(EAGLE if name is None else name), self.model)

    def _head_params(self, name: str | Path | None, head: EagleHead) -> Params:
        return checkpoint.head_params(checkpoint.resolve(EAGLE if name is None else name), head)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        priority: Sequence[int] | None = None,
        progress: bool = False,
    ) -> list[RequestOutput]:
        """Continues every prompt.

        Args:
            prompts: text, token ids, or a list of either, which may be empty.
            sampling_params: for all prompts, or one for each.
            priority: of each prompt, 0 by default: the lower, the sooner it runs.
            progress: shows on the terminal how many prompts are done, and at what rate.

        Returns:
            one output per prompt, in their order.

        Raises:
            ValueError: lists every prompt and parameter that cannot be served; nothing has run then.
        """
        return self._answer("prompt", listed(prompts), sampling_params, self.intake.tokens, progress, priority)

    def generate_iter(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        priority: Sequence[int] | None = None,
    ) -> Iterator[tuple[int, RequestOutput]]:
        """Continues every prompt, and yields each output with its prompt's place in the list as soon as it is whole.

        The engine runs while the caller asks for the next one. Leaving the loop early drops what has not ended.

        Raises:
            ValueError: as `generate`, and before anything is yielded.
        """
        inputs = listed(prompts)
        requests = self._checked("prompt", inputs, sampling_params, self.intake.tokens, priority)
        return self._finished(inputs, requests)

    def stream(self, prompt: Prompt, sampling_params: SamplingParams | None = None) -> Iterator[CompletionOutput]:
        """Continues one prompt and yields each piece as it comes: new text and new tokens only.

        The pieces put together are the output of `generate`. Leaving the loop early drops the request.

        Raises:
            ValueError: as `generate`; also where `n` is not 1, or `prompt_logprobs` are asked for.
        """
        (asked,) = self._checked("prompt", [prompt], sampling_params, self.intake.tokens, streamed=True)
        return self._stream(asked)

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]] | Sequence[Sequence[Mapping[str, Any]]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        progress: bool = False,
    ) -> list[RequestOutput]:
        """Answers one conversation or several, through the checkpoint's own chat template.

        Args:
            messages: `{"role": ..., "content": ...}` objects, or a list of such lists.
            progress: as for `generate`.

        Raises:
            ValueError: there is no template; or as `generate`, also for every message that is malformed.
        """
        template = ChatTemplate.from_folder(self.folder)
        several = is_list(messages) and len(messages) > 0 and not isinstance(messages[0], Mapping)

        def encode(conversation: Sequence[Mapping[str, Any]]) -> list[int]:
            return self.intake.encode(template.render(conversation), add_special_tokens=False)

        return self._answer("conversation", messages if several else [messages], sampling_params, encode, progress)

    def _answer(
        self,
        what: str,
        inputs: Sequence[Any],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
        encode: Callable[[Any], list[int]],
        progress: bool,
        priority: Sequence[int] | None = None,
    ) -> list[RequestOutput]:
        """Runs all inputs to their ends; `what` is the word for one of them, `encode` gives its token ids."""
        requests = self._checked(what, inputs, sampling_params, encode, priority)
        outputs: list[RequestOutput | None] = [None] * len(inputs)
        with Progress(*COLUMNS, disable=not progress) as bar:
            task = bar.add_task(f"{what}s", total=len(inputs))
            for index, output in self._finished(inputs, requests):
                outputs[index] = output
                bar.advance(task)
        return cast("list[RequestOutput]", outputs)

    def _finished(self, inputs: Sequence[Any], requests: Sequence[Asked]) -> Iterator[tuple[int, RequestOutput]]:
        """The outputs of checked requests as they end, each with its place among the inputs."""
        ended: deque[Continuation] = deque()
        groups = [self._start(asked, ended) for asked in requests]
        places = {one.request.id: index for index, group in enumerate(groups) for one in group}
        left = [len(group) for group in groups]
        try:
            while any(left):
                self._step()
                while ended:
                    index = places[ended.popleft().request.id]
                    left[index] -= 1
                    if left[index] == 0:
                        yield index, request_output(inputs[index], groups[index])
        finally:
            self._drop([one for group in groups for one in group])

    # --- prompts in

    def _checked(
        self,
        what: str,
        inputs: Sequence[Any],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
        encode: Callable[[Any], list[int]],
        priority: Sequence[int] | None = None,
        streamed: bool = False,
    ) -> list[Asked]:
        """Token ids, parameters and priorities of all inputs, every one of them checked before any runs."""
        if self.follows:
            raise ValueError(f"{self.group} follows: call `follow` here, and generate in process 0")
        each, problems = paired(sampling_params, len(inputs), what, may_be_list=not streamed)
        ranks, wrong = priorities(priority, len(inputs), what)
        problems, requests = problems + wrong, []
        for index, (given, params, rank) in enumerate(zip(inputs, each, ranks, strict=True)):
            found = stream_problems(params) if streamed and params is not None else []
            try:
                ids = encode(given)
                found += self._problems(ids, params)
            except ValueError as error:
                ids = []
                found.append(str(error))
            if params is not None:
                requests.append((ids, params, rank))
            problems += [f"{what} {index}: {problem}" for problem in found]
        if problems:
            raise ValueError("; ".join(problems))
        return requests

    def _problems(self, ids: list[int], params: SamplingParams | None) -> list[str]:
        """What cannot be served of a prompt, and of its parameters unless they are already refused (None)."""
        found = self.intake.problems(ids, params)
        if found or params is None:
            return found
        return self.engine.problems(Request(-1, tuple(ids), params, self.intake.limits.eos_ids, 0))

    def _start(self, asked: Asked, ended: deque[Continuation] | None = None) -> list[Continuation]:
        """Queues the n continuations of one prompt; each goes to `ended` when it has, whoever runs the step."""
        ids, params, priority = asked
        seed = int(self._seeds.integers(2**32)) if params.seed is None else params.seed
        group, now = [], time.monotonic()
        for index, request in enumerate(self.intake.requests(self._ids, ids, params, seed, priority, now)):
            self.engine.add(request)
            group.append(Continuation.start(request, index, self.tokenizer))
            self._running[request.id] = group[-1], deque() if ended is None else ended
        return group

    # --- text out

    def _stream(self, asked: Asked) -> Iterator[CompletionOutput]:
        (continuation,) = self._start(asked)
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
        """Runs the engine once; gives every update to its continuation, whoever asked for it, and then to `watch`."""
        updates = self.engine.step()
        for update in updates:
            if update.request.id in self._running:
                continuation, ended = self._running[update.request.id]
                try:
                    continuation.push(update)
                except Exception:  # of this request alone: the others go on
                    logger.exception("the text of request %d cannot be made", update.request.id)
                    continuation.finish_reason = "error"
                if continuation.finish_reason is not None:
                    ended.append(continuation)
                    self._drop([continuation])
        if self.watch is not None:
            self.watch(updates)

    def _drop(self, continuations: Sequence[Continuation]) -> None:
        """Forgets continuations; those that still run, after a stop string or an interrupt, stop running."""
        ids = [continuation.request.id for continuation in continuations]
        self.engine.abort(*(name for name in ids if self._running.pop(name, None) is not None))


def _warm_up(engine: Engine) -> None:
    console = Console(stderr=True)
    with Progress(*COLUMNS, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("compiling")
        engine.warm_up(lambda warmed, total: bar.update(task, total=total, advance=1, description=warmed.name))
