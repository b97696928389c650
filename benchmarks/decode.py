"""Prefill and decoding of a whole model with random normal weights.

    python -m benchmarks.decode [--model llama-3-8b] [--batches 1 16 64 256] [--prompts 512 2048 8192]
        [--attention xla]

Writes `decode.json` to the results of the device, or `decode_xla.json` where attention is asked for by that name; what
the file holds of other cases stays in it, with the environment that it was measured in.
Decoding: prompts of 128 tokens, 256 new tokens, greedy, no stop; new tokens over all sequences by the time of the 256
steps. First token: one prompt, from the upload to the token on the host. Medians of three after a warm-up.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np

from benchmarks.record import MACHINE, Record, environment, update
from jaxinfer.decode.sampling import needs
from jaxinfer.decode.sampling_params import SamplingParams
from jaxinfer.decode.step import Layout, Programs
from jaxinfer.engine.prefill import lay_out
from jaxinfer.engine.request import Request
from jaxinfer.engine.sequence import Chunk, Sequence
from jaxinfer.machine import measure_machine
from jaxinfer.model import Model, ModelConfig, Params, read_config
from jaxinfer.parallel import make_mesh
from jaxinfer.roofline import (
    MEASURED,
    Cost,
    Hardware,
    activation_memory,
    decode_step,
    find_by_device,
    page_bytes,
    prefill,
    weight_memory,
)
from jaxinfer.roofline.precision import BF16
from pallas_kernels import dispatch
from pallas_kernels.flash_decoding import IMPLEMENTATIONS

MODELS = Path(__file__).parents[1] / "configs" / "models"
PROMPT, NEW, REPEATS = 128, 256, 3
GREEDY = SamplingParams(temperature=0.0, max_tokens=NEW + 1, ignore_eos=True)


@dataclass(frozen=True)
class Subject:
    """What is measured, on what.

    Attributes:
        name: of the model in the records.
        steps: decode steps of one dispatch.
        implementation: of attention that is asked for.
        machine: as timed at the start of this run; predictions are made with it.
        ceilings: those that all figures of such a machine are set against; fractions are of them.
    """

    name: str
    model: Model
    params: Params
    page_size: int
    steps: int
    implementation: str
    machine: Hardware
    ceilings: Hardware

    @property
    def attention(self) -> str:
        """The implementation that runs here, as `pallas_kernels` chooses it."""
        return dispatch.automatic()[0] if self.implementation == "auto" else self.implementation

    @property
    def plan(self) -> str:
        """What the predictions for this attention are called."""
        return "plan with XLA attention" if self.attention == "xla" else "plan"


class Bench:
    """One model in one layout: `slots` sequences of up to `length` tokens."""

    def __init__(self, subject: Subject, slots: int, length: int):
        config, row = subject.model.config, -(-length // subject.page_size)
        pages = (slots * row + 1,) * len(config.windows)
        self.subject, self.peak_before = subject, memory_statistics().get("peak_bytes_in_use", 0)
        self.layout = Layout(slots, subject.page_size, pages, length, config.dtype, subject.implementation)
        self.programs = Programs(subject.model, self.layout)
        self.state, self.cache = self.programs.new_state()
        self.random = np.random.default_rng(0)

    def prefill(self, tokens: int) -> float:
        """Gives every slot a prompt of `tokens` tokens; seconds until the first tokens are on the host."""
        row, chunks = self.layout.pages_per_row, []
        for slot in range(self.layout.slots):
            pages = range(1 + slot * row, 1 + (slot + 1) * row)
            admission = self.programs.admission(GREEDY, [pages] * len(self.layout.num_pages))
            self.state = self.programs.admit(self.state, slot, admission)
            prompt = tuple(self.random.integers(0, self.subject.model.config.vocab_size, tokens).tolist())
            sequence = Sequence(Request(slot, prompt, GREEDY, (), 0), slot=slot)
            chunks.append(Chunk(sequence, 0, tokens))
        jax.block_until_ready(self.state)
        step = lay_out(chunks, tokens * self.layout.slots, self.layout.slots)
        start = time.perf_counter()
        self.state, self.cache, output = self.programs.step(
            self.subject.params, self.state, self.cache, step, None, 0, needs([GREEDY])
        )
        np.asarray(output.sampled.tokens_W)
        return time.perf_counter() - start

    def decode(self) -> float:
        """Seconds of NEW decode steps of every slot, the last token on the host."""
        start = time.perf_counter()
        output = None
        for _ in range(NEW // self.subject.steps):
            self.state, self.cache, output = self.programs.loop(
                self.subject.params, self.state, self.cache, decode=self.layout.slots, steps=self.subject.steps,
                needs=needs([GREEDY]),
            )  # fmt: skip
        assert output is not None
        assert np.asarray(output.emits_nW).all()
        return time.perf_counter() - start


def measure(subject: Subject, batches: list[int], prompts: list[int]) -> Iterator[list[Record]]:
    """The records of one case after the other, as they come."""
    yield [
        Record(MACHINE, "measured", "bandwidth", subject.machine.bandwidth / 1e12, "TB/s"),
        Record(MACHINE, "measured", "bf16 matmul", subject.machine.rate("bf16") / 1e12, "TFLOP/s"),
        Record(MACHINE, "measured", "kernel overhead", subject.machine.overhead * 1e6, "us"),
    ]
    for tokens in prompts:  # they need less memory, and a peak is only seen when it is the highest so far
        yield run_first_token(subject, tokens)
    for batch in batches:
        yield run_decode(subject, batch)


def run_decode(subject: Subject, batch: int) -> list[Record]:
    bench = Bench(subject, batch, PROMPT + NEW + 1)
    seconds = []
    for _ in range(REPEATS + 1):
        bench.prefill(PROMPT)
        seconds.append(bench.decode())
    step = statistics.median(seconds[1:]) / NEW
    fraction = decode_step(subject.model.config, batch, PROMPT + NEW // 2).fraction(subject.ceilings, step)
    predicted = predicted_decode(subject.model.config, batch, subject.attention)
    case = f"{subject.name} B{batch}"
    return [
        Record(case, subject.attention, "decode", batch / step, "tok/s", fraction),
        Record(case, subject.attention, "decode step", step * 1e3, "ms", fraction),
        Record(case, subject.plan, "decode step", predicted.predict(subject.machine) * 1e3, "ms"),
        *memory_records(case, bench, batch * PROMPT),
    ]


def predicted_decode(config: ModelConfig, batch: int, attention: str) -> Cost:
    """The step halfway through the new tokens, with the attention of that implementation."""
    if attention != dispatch.KERNEL:  # gathers each slot's whole row of pages: that row is the context
        return decode_step(config, batch, PROMPT + NEW, attention="materialized")
    return decode_step(config, batch, PROMPT + NEW // 2)


def predicted_prefill(config: ModelConfig, tokens: int, attention: str) -> Cost:
    """The prefill of one prompt, with the attention of that implementation."""
    return prefill(config, tokens, attention="materialized" if attention == "xla" else "flash")


def memory_records(case: str, bench: Bench, tokens: int) -> list[Record]:
    """Weights and cache, and the most that was in use during a prefill of `tokens` tokens over all slots: as the
    device counts them, and as they are planned. A peak that an earlier case has exceeded cannot be seen."""
    statistics, config, layout = memory_statistics(), bench.programs.model.config, bench.layout
    cache = layout.num_pages[0] * sum(page_bytes(config, window, layout.page_size, BF16) for window in config.windows)
    held = weight_memory(config, BF16) + cache
    planned = {
        "memory in use": held,
        "memory at peak": held + activation_memory(config, layout.slots, tokens, BF16),
    }
    measured = {}
    if statistics:
        measured["memory in use"] = statistics["bytes_in_use"]
        if statistics["peak_bytes_in_use"] > bench.peak_before:
            measured["memory at peak"] = statistics["peak_bytes_in_use"]
    return [
        Record(case, who, metric, count / 1e9, "GB")
        for who, figures in (("device", measured), (bench.subject.plan, planned))
        for metric, count in figures.items()
    ]


def memory_statistics() -> dict[str, int]:
    """Of the device; empty where it keeps none."""
    return jax.devices()[0].memory_stats() or {}


def run_first_token(subject: Subject, tokens: int) -> list[Record]:
    bench = Bench(subject, 1, tokens + 1)
    seconds = statistics.median([bench.prefill(tokens) for _ in range(REPEATS + 1)][1:])
    fraction = prefill(subject.model.config, tokens).fraction(subject.ceilings, seconds)
    predicted = predicted_prefill(subject.model.config, tokens, subject.attention)
    case = f"{subject.name} prompt {tokens}"
    return [
        Record(case, subject.attention, "first token", seconds * 1e3, "ms", fraction),
        Record(case, subject.plan, "first token", predicted.predict(subject.machine) * 1e3, "ms"),
        *memory_records(case, bench, tokens),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama-3-8b", help="a folder of configs/models")
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 16, 64, 256])
    parser.add_argument("--prompts", type=int, nargs="*", default=[512, 2048, 8192])
    parser.add_argument(
        "--attention", choices=["auto", *IMPLEMENTATIONS], default="auto", help="its implementation by name"
    )
    parser.add_argument("--page-size", type=int, default=64)
    parser.add_argument("--steps-per-dispatch", type=int, default=16)
    parser.add_argument("--output", type=Path, help="folder of the JSON file")
    arguments = parser.parse_args()
    machine = measure_machine()
    model = Model(read_config(MODELS / arguments.model), make_mesh(devices=jax.devices()[:1]))
    params = jax.block_until_ready(model.random_params())  # drawing them must not count as a case's memory
    subject = Subject(
        arguments.model, model, params, arguments.page_size, arguments.steps_per_dispatch, arguments.attention,
        machine, find_by_device(machine.device_kind, MEASURED) or machine,
    )  # fmt: skip
    name = "decode" if arguments.attention == "auto" else f"decode_{arguments.attention}"
    records, made_in = [], environment()
    for group in measure(subject, arguments.batches, arguments.prompts):
        records += group
        path = update(name, made_in, records, [], arguments.output)  # a run cut short leaves what it has done
        print(*group, f"written to {path}", sep="\n", flush=True)


if __name__ == "__main__":
    main()
