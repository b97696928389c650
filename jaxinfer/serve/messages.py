"""What the HTTP process and those of the engine tell each other. All of it is plain data, made to be pickled."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from jaxinfer.engine import Metrics, Request, TokenLogprobs, Update, Warmed, WarmUp
from jaxinfer.engine.request import FinishReason, Watch

if TYPE_CHECKING:
    from jaxinfer.engine import Engine

# --- to the engine


@dataclass(frozen=True)
class Setup:
    """How the engine process loads its model.

    Attributes:
        model: a folder or a Hugging Face id; None for the demo model.
        llm: arguments of `LLM` by name.
        options: of `Options` by name.
        warm_up: compile everything before the first request, and tell each program.
        speculation: arguments of `decode.speculative.by_name`.
        watch: is called in the engine process, by the name that it is pickled with, and gives who is told what each
            step brought.
        devices: `CUDA_VISIBLE_DEVICES` of the process; None leaves it as it is.
        group: arguments of `parallel.join`, where processes on several hosts share the model; None where one has it.
    """

    model: str | None
    llm: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    warm_up: bool = False
    speculation: dict[str, Any] = field(default_factory=dict)
    watch: Callable[[Engine], Watch] | None = None
    devices: str | None = None
    group: dict[str, Any] | None = None


@dataclass(frozen=True)
class Add:
    """Requests to queue, in order; those of one prompt share its token ids, and so does their pickle."""

    requests: tuple[Request, ...]


@dataclass(frozen=True)
class Abort:
    """Requests to drop, wherever they are; those that ended are left alone."""

    ids: tuple[int, ...]


@dataclass(frozen=True)
class Stop:
    """End the process."""


# --- from the engine


@dataclass(frozen=True)
class Warming:
    """A program is ready, one of `total`, before the engine is."""

    warmed: Warmed
    total: int


@dataclass(frozen=True)
class Loading:
    """Seconds of an engine process's start, one part after the other, but for what is compiled then.

    Attributes:
        imports: from the order to start it until JAX and the engine's code are there.
        device: until JAX has its devices.
        model: until tokenizer, weights and an empty cache are.
    """

    imports: float
    device: float
    model: float

    def __str__(self) -> str:
        return (
            f"model loaded in {self.imports + self.device + self.model:.1f} s: imports {self.imports:.1f} s, "
            f"device {self.device:.1f} s, weights and cache {self.model:.1f} s"
        )


@dataclass(frozen=True)
class Ready:
    """The model is loaded and compiled.

    Attributes:
        folder: where the checkpoint lies, with its tokenizer.
        vocab_size, context, eos_ids: as in `Limits`.
        longest: tokens of prompt and output that the cache can hold for one request; at most `context`.
        max_num_seqs: sequences that run at once.
        page_size: tokens of a page of the cache.
        pages: that can be found there; 0 where prompts do not share them.
        loading: how long that took.
        warm_up: what was compiled for it; None leaves that to the requests.
    """

    folder: str
    vocab_size: int
    context: int
    eos_ids: tuple[int, ...]
    longest: int
    max_num_seqs: int
    page_size: int
    pages: int
    loading: Loading
    warm_up: WarmUp | None = None


@dataclass(frozen=True)
class Following:
    """The model is loaded, and the engine runs what that of process 0 does, which has the requests.

    Attributes:
        which: of how many processes this is.
    """

    which: str
    loading: Loading


@dataclass(frozen=True)
class Failed:
    """The engine process ends now.

    Attributes:
        reason: `input` where the model or an option is wrong, `memory` where the device's memory does not suffice,
            `device` for all that goes wrong later.
        message: one or a few lines for the terminal.
        device: kind of the first device, its platform, and bytes of its memory, where they are known.
    """

    reason: Literal["input", "memory", "device"]
    message: str
    device: tuple[str, str, int] | None = None


@dataclass(frozen=True)
class Refused:
    """A request that was not queued, and why."""

    id: int
    message: str


@dataclass(frozen=True)
class Tokens:
    """What one step brought to one request: an `Update` without the request itself, whose prompt may be long."""

    id: int
    tokens: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...]
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None
    finish_reason: FinishReason | None
    queued: float | None = None
    problem: str | None = None

    @classmethod
    def of(cls, update: Update) -> Tokens:
        return cls(
            update.request.id, update.tokens, update.logprobs, update.prompt_logprobs, update.finish_reason,
            update.queued, update.problem,
        )  # fmt: skip

    def update(self, request: Request) -> Update:
        """The update again, of the request that `id` names."""
        return Update(
            request, self.tokens, self.logprobs, self.prompt_logprobs, self.finish_reason, self.queued,
            problem=self.problem,
        )  # fmt: skip


@dataclass(frozen=True)
class Step:
    """What one step brought to all requests together, and how the engine is after it."""

    tokens: tuple[Tokens, ...]
    engine: Metrics
