"""`jaxinfer generate`: streams a continuation, then says how fast that was and how fast it could have been."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from jaxinfer.cli.hosts import Hosting, hosting
from jaxinfer.cli.loading import loading
from jaxinfer.cli.options import bad_argument, integer, number
from jaxinfer.cli.pipe import pipe_lines
from jaxinfer.cli.speculation import Speculating, speculating
from jaxinfer.cli.units import si
from jaxinfer.roofline import Precision, Share, decode_step

if TYPE_CHECKING:
    from jaxinfer.decode.sampling_params import SamplingParams
    from jaxinfer.engine.metrics import Counters
    from jaxinfer.llm import LLM


@loading
@hosting
@speculating
def generate(
    prompt: Annotated[str, typer.Argument(help="Text to continue.")],
    model: Annotated[
        str | None, typer.Option(help="Folder of a checkpoint or Hugging Face id; the demo model by default.")
    ] = None,
    max_tokens: Annotated[int, integer(help="Tokens of the continuation, at most.")] = 200,
    temperature: Annotated[float, number(help="0 always takes the likeliest token.")] = 0.7,
    top_p: Annotated[float, number(help="Keep the likeliest tokens that hold this probability.")] = 0.9,
    seed: Annotated[int, integer(help="Of the random draws.")] = 0,
    cache_dtype: Annotated[
        str | None, typer.Option(help="Of keys and values, also int8 or float8_e4m3fn; the model's by default.")
    ] = None,
    *,
    loading: dict[str, Any],
    speculation: Speculating,
    hosts: Hosting,
) -> None:
    """Continue PROMPT and stream the text; then print tokens/s, the bandwidth that is, and the machine's limit."""
    from jaxinfer.decode.sampling_params import SamplingParams
    from jaxinfer.engine import Options
    from jaxinfer.llm import DEMO, LLM
    from jaxinfer.machine import keep_compiled

    keep_compiled()

    def load(**speculating: Any) -> LLM:
        return LLM(
            DEMO if model is None else model,
            **loading,
            options=Options(max_num_seqs=1, cache_dtype=cache_dtype, **speculating),
            group=group,
        )

    with hosts.join() as group:
        try:
            params = SamplingParams(max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed)
            llm = load(**speculation.options())
            if llm.follows:
                llm.follow()
                return
            llm.stream(prompt, params)  # tells what is wrong
            compile_for(llm, prompt, params)
        except (ValueError, OSError) as error:
            raise bad_argument(error) from error
        console = Console(stderr=True)
        speculation.warn(console.print)
        typer.echo(prompt, nl=False)
        before = replace(llm.engine.counters)
        clock = timed(llm, prompt, params, partial(typer.echo, nl=False))
        typer.echo()
        brought = llm.engine.counters.since(before)
        context = len(llm.tokenizer.encode(prompt)) + clock.before + clock.tokens // 2
        console.print(summary(llm, context, clock, brought))
        for line in pipe_lines(llm):
            console.print(line)
    if llm.engine.options.speculation is not None and clock.per_token and group is None:
        by_prediction = predicted(llm, context, brought)
        del llm  # the plain one takes its place in memory
        plain = load()
        compile_for(plain, prompt, params)
        times = timed(plain, prompt, params, lambda text: None).per_token / clock.per_token
        console.print(gain(brought, times, by_prediction))


def compile_for(llm: LLM, prompt: str, params: SamplingParams) -> None:
    """Compiles what a stream runs, with proposals and without, so that its tokens alone are timed."""
    llm.engine.compile_loops(params)
    llm.generate(prompt, replace(params, max_tokens=min(2, params.max_tokens)))


def timed(llm: LLM, prompt: str, params: SamplingParams, tell: Callable[[str], None]) -> Clock:
    """Streams a continuation."""
    clock = Clock()
    for piece in llm.stream(prompt, params):
        tell(piece.text)
        clock.tick(len(piece.token_ids))
    return clock


def predicted(llm: LLM, context: int, brought: Counters) -> str:
    """How many times as fast as plain decoding the steps were by the cost model, of what was right and what steps take
    on this machine; in words where the hardware table has no measured ceilings of it."""
    from jaxinfer.engine.costs import predicted_costs
    from jaxinfer.machine import measured_entry

    dtype = Precision.all_in(llm.model.config.dtype).residual
    if (machine := measured_entry(dtype)) is None:
        return "not predicted, as the hardware table has no measured entry of this machine"
    costs = predicted_costs(llm.model, llm.engine.layout, machine)
    return (
        f"{costs.speedup(context, brought):.2f} by prediction for {machine.name}, where a step takes as long as "
        f"{costs.cost(context, brought):.2f} plain ones"
    )


def gain(brought: Counters, times: float, by_prediction: str) -> str:
    """One line: what proposals brought."""
    if not brought.drafts:
        return f"nothing was proposed, {times:.2f} times plain decoding"
    right = " ".join(f"{fraction:.0%}" for fraction in brought.accepted_by_position)
    return (
        f"{brought.tokens_per_draft:.2f} tokens a step, {times:.2f} times plain decoding ({by_prediction}); "
        f"right by place: {right}"
    )


@dataclass
class Clock:
    """Times the decode steps of a stream: from the first piece, which prefill brings, to the last."""

    first: float = 0.0
    last: float = 0.0
    before: int = 0  # tokens of the first piece
    tokens: int = 0  # tokens after it

    def tick(self, tokens: int) -> None:
        self.last = time.perf_counter()
        if not self.before:
            self.first, self.before = self.last, tokens
        else:
            self.tokens += tokens

    @property
    def per_token(self) -> float:
        """Seconds of one decode step; 0 where there was none."""
        return (self.last - self.first) / self.tokens if self.tokens else 0.0


def summary(llm: LLM, context: int, clock: Clock, brought: Counters) -> str:
    """One line: speed, the memory traffic that it takes, and what part of the machine's limit that is.

    Args:
        context: tokens of the sequence, halfway through its output.
    """
    from jaxinfer.machine import measure_machine

    if not clock.per_token:
        return f"{clock.before} tokens, no decode step to time"
    # One sequence is in one stage of a pipe at a time.
    config, devices = llm.model.config, llm.model.tensor
    precision = Precision.all_in(config.dtype, llm.engine.options.cache_dtype)
    ranks = llm.model.ranks
    step = decode_step(config, 1, context, precision, tensor_parallel=devices, share=Share(ranks=ranks))
    seconds = clock.per_token * brought.tokens_per_step  # of a step
    bandwidth = step.bytes * devices * ranks / seconds
    machine = measure_machine()
    return (
        f"{clock.before + clock.tokens} tokens, {1 / clock.per_token:.1f} tokens/s, {si(bandwidth, 'B/s')}, "
        f"{step.fraction(machine, seconds):.1%} of this machine's limit "
        f"({1 / step.limit(machine):.0f} tokens/s, {step.bound(machine)}-bound)"
    )
