"""Prefill and decoding of a whole model with random normal weights.

    python -m benchmarks.decode [--model llama-3-8b] [--batches 1 16 64 256] [--prompts 512 2048 8192]

Decoding: prompts of 128 tokens, 256 new tokens, greedy, no stop; new tokens over all sequences by the time of the 256
steps. First token: one prompt, from the upload to the token on the host. Medians of three after a warm-up.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.record import Record, write
from jaxinfer.cli.measure import measure_machine
from jaxinfer.decode.sampling import needs, pack
from jaxinfer.decode.sampling_params import SamplingParams
from jaxinfer.decode.slots import Admission
from jaxinfer.decode.step import Layout, Programs
from jaxinfer.engine.request import Request, Sequence
from jaxinfer.engine.scheduler import Chunk, lay_out
from jaxinfer.model import Model, ModelConfig, Params, read_config
from jaxinfer.parallel import make_mesh
from jaxinfer.roofline import Hardware, decode_step, page_bytes, prefill
from jaxinfer.roofline.memory import weight_memory
from jaxinfer.roofline.precision import BF16

MODELS = Path(__file__).parents[1] / "configs" / "models"
PROMPT, NEW, REPEATS = 128, 256, 3
GREEDY = SamplingParams(temperature=0.0, max_tokens=NEW + 1, ignore_eos=True)


class Bench:
    """One model in one layout: `slots` sequences of up to `length` tokens."""

    def __init__(self, model: Model, params: Params, slots: int, length: int, page_size: int):
        row = -(-length // page_size)
        groups = len(model.config.windows)
        layout = Layout(slots, page_size, (slots * row + 1,) * groups, length, model.config.dtype)
        self.params, self.layout = params, layout
        self.programs = Programs(model, layout)
        self.state, self.cache = self.programs.new_state()
        self.random = np.random.default_rng(0)
        self.vocab = model.config.vocab_size

    def prefill(self, tokens: int) -> float:
        """Gives every slot a prompt of `tokens` tokens; seconds until the first tokens are on the host."""
        row, packed = self.layout.pages_per_row, pack(GREEDY, (), 0)
        chunks = []
        for slot in range(self.layout.slots):
            pages = np.arange(1 + slot * row, 1 + (slot + 1) * row, dtype=np.int32)
            admission = Admission(
                (pages,) * len(self.layout.num_pages), np.asarray(GREEDY.max_tokens, np.int32), packed,
                np.full(1, -1, np.int32),
            )  # fmt: skip
            self.state = self.programs.admit(self.state, slot, admission)
            prompt = tuple(self.random.integers(0, self.vocab, tokens).tolist())
            sequence = Sequence(Request(slot, prompt, GREEDY, (), 0), slot, ())
            chunks.append(Chunk(sequence, 0, tokens))
        jax.block_until_ready(self.state)
        step = lay_out(chunks, tokens * self.layout.slots, self.layout.slots)
        start = time.perf_counter()
        self.state, self.cache, output = self.programs.step(
            self.params, self.state, self.cache, step, None, 0, needs([GREEDY])
        )
        np.asarray(output.sampled.tokens_B)
        return time.perf_counter() - start

    def decode(self, steps_per_dispatch: int) -> float:
        """Seconds of NEW decode steps of every slot, the last token on the host."""
        start = time.perf_counter()
        output = None
        for _ in range(NEW // steps_per_dispatch):
            self.state, self.cache, output = self.programs.loop(
                self.params, self.state, self.cache, decode=self.layout.slots, steps=steps_per_dispatch,
                needs=needs([GREEDY]),
            )  # fmt: skip
        assert output is not None
        assert np.asarray(output.emits_nW).all()
        return time.perf_counter() - start


def run_decode(
    model: Model, params: Params, batch: int, page_size: int, steps: int, machine: Hardware
) -> list[Record]:
    bench = Bench(model, params, batch, PROMPT + NEW + 1, page_size)
    seconds = []
    for _ in range(REPEATS + 1):
        bench.prefill(PROMPT)
        seconds.append(bench.decode(steps))
    step = statistics.median(seconds[1:]) / NEW
    cost = decode_step(model.config, batch, PROMPT + NEW // 2)
    # XLA gathers each slot's whole row of pages, so that row is the context of the prediction.
    predicted = decode_step(model.config, batch, PROMPT + NEW, attention="materialized")
    fraction = cost.fraction(machine, step)
    case = f"{model.name} B{batch}"
    return [
        Record(case, "xla", "decode", batch / step, "tok/s", fraction),
        Record(case, "xla", "decode step", step * 1e3, "ms", fraction),
        Record(case, "plan", "decode step", predicted.predict(machine) * 1e3, "ms"),
        *memory_records(case, bench),
    ]


def memory_records(case: str, bench: Bench) -> list[Record]:
    """Weights and cache as the device counts them, where it does, and as they are planned."""
    stats, config = jax.devices()[0].memory_stats(), bench.programs.model.config
    pages = bench.layout.num_pages[0]
    cache = pages * sum(page_bytes(config, window, bench.layout.page_size, BF16) for window in config.windows)
    planned = weight_memory(config, BF16) + cache
    measured = [Record(case, "device", "memory in use", stats["bytes_in_use"] / 1e9, "GB")] if stats else []
    return [*measured, Record(case, "plan", "memory in use", planned / 1e9, "GB")]


def run_first_token(model: Model, params: Params, tokens: int, page_size: int, machine: Hardware) -> list[Record]:
    bench = Bench(model, params, 1, tokens + GREEDY.max_tokens, page_size)
    seconds = statistics.median([bench.prefill(tokens) for _ in range(REPEATS + 1)][1:])
    cost = prefill(model.config, tokens)
    predicted = prefill(model.config, tokens, attention="materialized")
    case = f"{model.name} prompt {tokens}"
    return [
        Record(case, "xla", "first token", seconds * 1e3, "ms", cost.fraction(machine, seconds)),
        Record(case, "plan", "first token", predicted.predict(machine) * 1e3, "ms"),
    ]


class NamedModel(Model):
    """A model with the name that its records carry."""

    def __init__(self, name: str, config: ModelConfig):
        super().__init__(config, make_mesh(devices=jax.devices()[:1]))
        self.name = name


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama-3-8b", help="a folder of configs/models")
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 16, 64, 256])
    parser.add_argument("--prompts", type=int, nargs="*", default=[512, 2048, 8192])
    parser.add_argument("--page-size", type=int, default=16)
    parser.add_argument("--steps-per-dispatch", type=int, default=16)
    parser.add_argument("--output", type=Path, help="folder of the JSON file")
    arguments = parser.parse_args()
    console = Console()
    machine = measure_machine()
    model = NamedModel(arguments.model, read_config(MODELS / arguments.model))
    params = model.random_params()
    table = Table("case", "implementation", "metric", "value", "unit", "of the limit")
    records = [
        Record("machine", "measured", "bandwidth", machine.bandwidth / 1e12, "TB/s"),
        Record("machine", "measured", "bf16 matmul", machine.rate("bf16") / 1e12, "TFLOP/s"),
    ]
    for batch in arguments.batches:
        records += run_decode(model, params, batch, arguments.page_size, arguments.steps_per_dispatch, machine)
        console.print(*records[-5:], sep="\n")
    for tokens in arguments.prompts:
        records += run_first_token(model, params, tokens, arguments.page_size, machine)
        console.print(*records[-2:], sep="\n")
    for record in records:
        fraction = "" if record.roofline_fraction is None else f"{record.roofline_fraction:.0%}"
        table.add_row(record.case, record.implementation, record.metric, f"{record.value:.4g}", record.unit, fraction)
    console.print(table)
    console.print(f"written to {write('decode', records, arguments.output)}")


if __name__ == "__main__":
    main()
