"""Prefill and decoding of a whole model with random normal weights.

    python -m benchmarks.decode [--model llama-3-8b] [--batches 1 16 64 256] [--prompts 512 2048 8192]
        [--attention xla] [--cache-dtype int8] [--chunk 8192]
    python -m benchmarks.decode --batches --prompts 131072
    python -m benchmarks.decode --tensor-parallel-size 2

Writes `decode.json` to the results of the device, or `decode_xla.json` where attention is asked for by that name; what
the file holds of other cases stays in it, with the environment that it was measured in.
Decoding: prompts of 128 tokens, 256 new tokens, greedy, no stop; new tokens over all sequences by the time of the 256
steps. First token: one prompt, from the upload to the token on the host; one of more tokens than --chunk goes in
chunks, each a step. Medians after a warm-up, of three, or of as many prompts as take a second. A prompt may be longer
than the model was made for, since the time depends on the shapes alone. With --cache-dtype the cases are named by it:
`llama-3-8b B16 int8`; with several devices by their mesh: `llama-3-8b B16 on tensor 2`. Memory is the first device's.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from benchmarks.bench import Bench, Subject, add_mesh, load, memory_statistics, mesh_in
from benchmarks.record import Record, arguments_of, environment, update
from jaxinfer.cache import CACHE_DTYPES
from jaxinfer.cache.gathers import gathers
from jaxinfer.model import ModelConfig
from jaxinfer.roofline import Mesh, Pipeline, activation_memory, page_bytes, weight_memory
from jaxinfer.roofline.mesh import ONE
from jaxinfer.roofline.pipeline import decode_on, prefill_on
from jaxinfer.roofline.precision import BF16, Precision
from pallas_kernels.flash_decoding import IMPLEMENTATIONS

PROMPT, NEW, REPEATS = 128, 256, 3
SECONDS = 1.0  # of prompts in all, at least: a host may hold one up by as much as a short one takes


def measure(subject: Subject, batches: list[int], prompts: list[int]) -> Iterator[list[Record]]:
    """The records of one case after the other, as they come."""
    yield subject.timed()
    # Prompts first: they need less memory, and a peak is only seen when it is the highest so far.
    cases = [partial(run_first_token, subject, tokens) for tokens in prompts]
    cases += [partial(run_decode, subject, batch) for batch in batches]
    for index, case in enumerate(cases):
        # In the first one the compiler tries kernels on arrays of its own: the peak is the compiler's.
        yield [record for record in case() if index or record.metric != "memory at peak"]


def run_decode(subject: Subject, batch: int) -> list[Record]:
    bench = Bench(subject, batch, PROMPT + NEW + 1)
    seconds = []
    for _ in range(REPEATS + 1):
        bench.prefill(PROMPT, PROMPT)
        seconds.append(bench.decode(NEW))
    step = statistics.median(seconds[1:]) / NEW
    config, precision, mesh = subject.model.config, subject.precision, subject.mesh
    fraction = decode_on(config, mesh, batch, PROMPT + NEW // 2, precision).limit(subject.ceilings) / step
    predicted = predicted_decode(config, batch, subject.attention, precision, mesh)
    case = subject.case(f"B{batch}")
    return [
        Record(case, subject.attention, "decode", batch / step, "tok/s", fraction),
        Record(case, subject.attention, "decode step", step * 1e3, "ms", fraction),
        Record(case, subject.plan, "decode step", predicted.predict(subject.machine) * 1e3, "ms"),
        *memory_records(case, bench, batch * PROMPT),
    ]


def predicted_decode(
    config: ModelConfig, batch: int, attention: str, precision: Precision = BF16, mesh: Mesh = ONE
) -> Pipeline:
    """The step halfway through the new tokens, with the attention of that implementation."""
    if gathers(attention)[0]:  # each slot's whole row of pages: that row is the context
        return decode_on(config, mesh, batch, PROMPT + NEW, precision, "materialized")
    return decode_on(config, mesh, batch, PROMPT + NEW // 2, precision)


def predicted_prefill(
    config: ModelConfig, tokens: int, attention: str, precision: Precision = BF16, chunk: int | None = None,
    mesh: Mesh = ONE,
) -> list[Pipeline]:  # fmt: skip
    """The steps that prefill one prompt, with the attention of that implementation; one step without `chunk`."""
    kind, chunk = "materialized" if gathers(attention)[1] else "flash", chunk or tokens
    return [
        prefill_on(config, mesh, min(chunk, tokens - first), precision, kind, cached=first)
        for first in range(0, tokens, chunk)
    ]


def memory_records(case: str, bench: Bench, tokens: int) -> list[Record]:
    """Weights and cache, and the most that was in use during a step that prefills `tokens` tokens over all slots: as
    the device counts them, and as they are planned. A peak that an earlier case has exceeded cannot be seen."""
    statistics, config, layout = memory_statistics(), bench.programs.model.config, bench.layout
    precision, mesh = bench.subject.precision, bench.subject.mesh
    if mesh.pipe * mesh.context > 1:  # its first device is not like the others
        return []
    page = sum(page_bytes(config, window, layout.page_size, precision, mesh.tensor) for window in config.windows)
    held = weight_memory(config, precision, mesh.tensor) + layout.num_pages[0] * page
    planned = {
        "memory in use": held,
        "memory at peak": held + activation_memory(config, layout.slots, tokens, precision, mesh.tensor),
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


def run_first_token(subject: Subject, tokens: int) -> list[Record]:
    """The fraction is of the limit of one step with the whole prompt: what chunks read again is no part of it."""
    bench, chunk = Bench(subject, 1, tokens + 1), min(tokens, subject.chunk)
    bench.prefill(tokens, chunk)
    samples: list[float] = []
    while len(samples) < REPEATS or sum(samples) < SECONDS:
        samples.append(bench.prefill(tokens, chunk))
    seconds, spread = statistics.median(samples), (min(samples) * 1e3, max(samples) * 1e3, len(samples))
    config, precision, mesh = subject.model.config, subject.precision, subject.mesh
    fraction = prefill_on(config, mesh, tokens, precision).limit(subject.ceilings) / seconds
    steps = predicted_prefill(config, tokens, subject.attention, precision, chunk, mesh)
    predicted = sum(step.predict(subject.machine) for step in steps)
    case = subject.case(f"prompt {tokens}" if chunk == tokens else f"prompt {tokens} in chunks of {chunk}")
    return [
        Record(case, subject.attention, "first token", seconds * 1e3, "ms", fraction, *spread),
        Record(case, subject.plan, "first token", predicted * 1e3, "ms"),
        *memory_records(case, bench, chunk),
    ]


def main() -> None:
    parser = arguments_of("benchmarks.decode", __doc__)
    parser.add_argument("--model", default="llama-3-8b", help="a folder of configs/models")
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 16, 64, 256])
    parser.add_argument("--prompts", type=int, nargs="*", default=[512, 2048, 8192])
    parser.add_argument(
        "--attention", choices=["auto", *IMPLEMENTATIONS], default="auto", help="its implementation by name"
    )
    parser.add_argument("--cache-dtype", choices=CACHE_DTYPES, help="of keys and values; the model's by default")
    parser.add_argument("--chunk", type=int, default=8192, help="tokens of a prompt that one step takes at most")
    parser.add_argument("--page-size", type=int, default=64)
    parser.add_argument("--steps-per-dispatch", type=int, default=16)
    add_mesh(parser)
    parser.add_argument("--output", type=Path, help="folder of the JSON file")
    arguments = parser.parse_args()
    subject = load(
        arguments.model, arguments.prompts, arguments.steps_per_dispatch, arguments.page_size, arguments.attention,
        arguments.cache_dtype, arguments.chunk, mesh_in(arguments),
    )  # fmt: skip
    name = "decode" if arguments.attention == "auto" else f"decode_{arguments.attention}"
    records, made_in = [], environment()
    for group in measure(subject, arguments.batches, arguments.prompts):
        records += group
        path = update(name, made_in, records, [], arguments.output)  # a run cut short leaves what it has done
        print(*group, f"written to {path}", sep="\n", flush=True)


if __name__ == "__main__":
    main()
