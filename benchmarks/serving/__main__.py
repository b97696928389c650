"""Many requests at once.

    python -m benchmarks.serving offline [--model llama-3-8b] [--batches 1 16 64 256] [--static]
    python -m benchmarks.serving blocks [--model llama-3-8b] [--steps-per-dispatch 1 2 4 8 16] [--batches 1 16 64 256]
    python -m benchmarks.serving latency [--model llama-3-8b]
    python -m benchmarks.serving online --url http://127.0.0.1:8000/v1 --model NAME [--rates 1 2 4 8] [--seconds 16]
    python -m benchmarks.serving ready FOLDER [--model llama-3-8b]
    python -m benchmarks.serving soak [--requests 10000] [--rate 20]

Offline: requests that are all there at once, greedy, no stop, through the engine on random normal weights: decoding
after prompts of 128 tokens, 256 steps of all sequences, and whole workloads. `--static` measures static batching too,
by the same engine: as many requests as there are slots, all of which go on until the longest has ended, then the next
ones. Of the workloads that it names, or of those with 1,024 requests.
Blocks: the same decoding, and the workload "256 requests", with as many decode steps in a program as it is told, by
engines of the same weights.
Latency: through an engine with the budget of a server. First tokens of prompts that come alone, and the steps of 16
sequences with contexts of 1,000 while a prompt of 32,768 tokens comes, as the host sees them and, run again, on the
device alone.
Online: a workload, "256 requests" by default, arriving at each rate (a Poisson process), at any OpenAI-compatible
server, ours or another; `inf` sends all at once. Goodput counts the requests within --first-token and --per-token. A
plot shows how long a token takes at each throughput, and how long it is read.
Ready: a server of the checkpoint in FOLDER, which `python -m benchmarks.checkpoint` makes, from the start of its
process until it listens: first with nothing compiled, then a second time.
Soak: a server of the demo model under random arrivals, lengths, callers who hang up and overload; it must account for
all of them, lose no page and compile nothing.
Writes `serving.json`, and online `serving.png`, of all rates that the file holds.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax

from benchmarks.bench import AXES, MODELS, add_mesh, mesh_in, on, random_model
from benchmarks.record import OURS, Failure, Record, arguments_of, environment, records_of, results_folder, update
from benchmarks.serving import latency, offline, online, ready, soak
from benchmarks.serving.plot import plot_curve
from benchmarks.serving.server import leave_the_device, serving
from benchmarks.serving.summary import Objective, summarize
from benchmarks.serving.workload import WORKLOADS, longest
from jaxinfer.engine import Engine, Options, WarmUp
from jaxinfer.machine import keep_compiled, measure_machine
from jaxinfer.roofline import MEASURED, Hardware, find_by_device
from jaxinfer.serve.worker import settle

# For static batching, which is continuous where every request has a slot.
MORE_THAN_SLOTS = ["1024 requests", "1024 chats"]

# Options of the engine, as both `Options` and `jaxinfer serve` name them.
ENGINE = (
    "max_num_seqs", "max_num_batched_tokens", "page_size", "num_pages", "steps_per_dispatch", "max_slowdown",
)  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    if options.how in BESIDE_A_SERVER:
        leave_the_device()
    records, made_in = [], environment()
    for group in WAYS[options.how](options):
        records += group
        path = update("serving", made_in, records, list[Failure](), options.output)
        print(*group, f"written to {path}", sep="\n", flush=True)
    if options.how == "online":
        folder = results_folder(options.output)
        plot_curve(records_of(folder / "serving.json")).savefig(folder / "serving.png", dpi=120)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = arguments_of("benchmarks.serving", __doc__)
    parser.add_argument("--output", type=Path, help="folder of what is written")
    ways = parser.add_subparsers(dest="how", required=True)
    alone = ways.add_parser("offline")
    _add_engine(alone, max_slowdown=math.inf)
    alone.add_argument("--batches", type=int, nargs="*", default=[1, 16, 64, 256], help="sequences that decode")
    alone.add_argument("--workload", nargs="*", choices=WORKLOADS, default=["256 requests", "32 x 8192 in, 64 out"])
    alone.add_argument("--static", nargs="*", choices=WORKLOADS, help="workloads, also with static batching")
    sized = ways.add_parser("blocks")
    _add_engine(sized, max_slowdown=math.inf, steps=[1, 2, 4, 8, 16])
    sized.add_argument("--batches", type=int, nargs="*", default=[1, 16, 64, 256], help="sequences that decode")
    sized.add_argument("--workload", nargs="*", choices=WORKLOADS, default=["256 requests"])
    timed = ways.add_parser("latency")
    _add_engine(timed, max_slowdown=1.75)  # a server's
    timed.add_argument("--prompts", type=int, nargs="*", default=[512, 2048, 8192], help="tokens of those alone")
    timed.add_argument("--long", type=int, nargs="*", default=[32768], help="tokens of those beside 16 sequences")
    _add_online(ways.add_parser("online"))
    started = ways.add_parser("ready")
    started.add_argument("folder", type=Path, help="of a checkpoint, such as benchmarks.checkpoint makes")
    _add_engine(started, max_slowdown=1.75)  # a server's
    soaked = ways.add_parser("soak")
    soaked.add_argument("--requests", type=int, default=10_000)
    soaked.add_argument("--rate", type=float, default=20.0, help="requests/s")
    options = parser.parse_args(arguments)
    if options.how == "online" and options.seconds is not None and math.inf in options.rates:
        parser.error("--seconds of arrivals at a rate of inf are endless requests; give --requests")
    return options


def _add_online(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--url", required=True, help="of the server, with /v1")
    parser.add_argument("--model", required=True, help="the name that it serves")
    parser.add_argument("--key", help="of its API")
    parser.add_argument("--name", default=OURS, help="what the records call the system")
    parser.add_argument("--rates", type=float, nargs="+", default=[1.0, 2.0, 4.0, 8.0, 16.0], help="requests/s")
    parser.add_argument("--workload", choices=WORKLOADS, default="256 requests")
    many = parser.add_mutually_exclusive_group()
    many.add_argument("--requests", type=int, default=256, help="of the workload at each rate")
    many.add_argument("--seconds", type=float, help="of arrivals at each rate, in place of a number of requests")
    parser.add_argument("--vocabulary", type=int, default=1000, help="prompts are token ids below it")
    parser.add_argument("--first-token", type=float, default=1.0, help="seconds; more is not served well")
    parser.add_argument("--per-token", type=float, default=0.05, help="seconds; likewise")


def _add_engine(parser: argparse.ArgumentParser, max_slowdown: float, steps: int | list[int] = 8) -> None:
    parser.add_argument("--model", default="llama-3-8b", help="a folder of configs/models")
    parser.add_argument("--max-num-seqs", type=int, default=256)
    parser.add_argument("--max-num-batched-tokens", type=int, default=8192)
    parser.add_argument("--page-size", type=int, default=64)
    parser.add_argument("--num-pages", type=int, help="as many as fit by default")
    parser.add_argument(
        "--steps-per-dispatch", type=int, nargs="+" if isinstance(steps, list) else None, default=steps
    )
    parser.add_argument(
        "--max-slowdown", type=float, default=max_slowdown, help="of a decode step by prompts beside it"
    )
    add_mesh(parser)


def measure_offline(options: argparse.Namespace) -> Iterator[list[Record]]:
    """The records of getting ready, then of decoding and of each workload."""
    static = MORE_THAN_SLOTS if options.static == [] else options.static or []
    names = list(dict.fromkeys([*options.workload, *static]))
    all_of_them, statically = ([WORKLOADS[name] for name in which] for which in (names, static))
    engine = make_engine(options, max(longest(all_of_them, statically), latency.ROOM))
    yield warm_up_records(options.model + on(mesh_in(options)), engine.warm_up())
    settle()
    machine = ceilings()
    desk = latency.Desk(options.model, engine, machine)
    for batch in options.batches:
        yield latency.decoding(desk, batch)
    for name in names:
        yield offline.measure(engine, f"{options.model} {name}", WORKLOADS[name], machine, name in static)


def measure_blocks(options: argparse.Namespace) -> Iterator[list[Record]]:
    """The records of each size, one engine after the other: two would not fit."""
    workloads = [WORKLOADS[name] for name in options.workload]
    model, params = random_model(MODELS / options.model, max(longest(workloads), latency.ROOM), mesh_in(options))
    machine = ceilings()
    for steps in options.steps_per_dispatch:
        sized = argparse.Namespace(**vars(options) | {"steps_per_dispatch": steps})
        yield from _block(sized, Engine(model, params, engine_options(sized)), machine)
        gc.collect()


def _block(options: argparse.Namespace, engine: Engine, machine: Hardware) -> Iterator[list[Record]]:
    how = f" in blocks of {options.steps_per_dispatch}"
    print(f"{engine.warm_up()}{how}", flush=True)
    desk = latency.Desk(options.model, engine, machine)
    for batch in options.batches:
        yield latency.decoding(desk, batch, how)
    for name in options.workload:
        yield offline.measure(engine, f"{options.model} {name}{how}", WORKLOADS[name], machine)


def measure_latency(options: argparse.Namespace) -> Iterator[list[Record]]:
    """The records of getting ready, then of each case."""
    stalls = [latency.Stall(prompt=tokens) for tokens in options.long]
    engine = make_engine(options, max([*options.prompts, *options.long, 0]) + latency.ROOM)
    yield warm_up_records(options.model + on(mesh_in(options)), engine.warm_up())
    settle()
    desk = latency.Desk(options.model, engine, ceilings())
    yield from latency.measure(desk, options.prompts, stalls)


def make_engine(options: argparse.Namespace, context: int) -> Engine:
    """With random normal weights."""
    return Engine(*random_model(MODELS / options.model, context, mesh_in(options)), engine_options(options))


def ceilings() -> Hardware:
    """What fractions are set against: the entry of this device, or what it is timed at where there is none."""
    return find_by_device(jax.devices()[0].device_kind, MEASURED) or measure_machine()


def warm_up_records(model: str, done: WarmUp) -> list[Record]:
    """Of a first start, which compiles all, or a second one, which finds all in the cache; of others nothing."""
    print(done, flush=True)
    if done.found not in (0, done.programs):
        return []
    case = f"{model} {'first' if done.found == 0 else 'second'} start"
    return [
        Record(case, OURS, "warm-up", done.seconds, "s"),
        Record(case, OURS, "lowering", done.lowering, "s"),  # within it
        Record(case, OURS, "programs", done.programs, "programs"),
        Record(case, OURS, "kernels", done.kernels, "kernels"),
    ]


def engine_options(options: argparse.Namespace) -> Options:
    return Options(**{name: getattr(options, name) for name in ENGINE})


def server_arguments(options: argparse.Namespace) -> list[str]:
    """The same for `jaxinfer serve`."""
    given = {name: value for name in (*ENGINE, *AXES) if (value := getattr(options, name)) is not None}
    return [f"--{name.replace('_', '-')}={value}" for name, value in given.items()]


def measure_online(options: argparse.Namespace) -> Iterator[list[Record]]:
    """The records of each rate of arrival."""
    target = online.Target(options.url.rstrip("/"), options.model, options.key)
    objective = Objective(options.first_token, options.per_token)
    for seed, rate in enumerate(options.rates):  # no prompt twice: it would be found in the server's cache
        count = options.requests if options.seconds is None else max(1, round(rate * options.seconds))
        jobs = WORKLOADS[options.workload].first(count).jobs(options.vocabulary, seed)
        timelines = asyncio.run(online.arrive(target, jobs, rate))
        case = f"{options.model} {options.workload} at {rate:g} requests/s"
        yield summarize(case, options.name, timelines, objective)


def measure_ready(options: argparse.Namespace) -> Iterator[list[Record]]:
    yield ready.measure(options.model, options.folder, server_arguments(options))


def measure_soak(options: argparse.Namespace) -> Iterator[list[Record]]:
    with serving(*soak.OPTIONS) as server:
        yield soak.soak(server, options.requests, options.rate)


WAYS = {
    "offline": measure_offline,
    "blocks": measure_blocks,
    "latency": measure_latency,
    "online": measure_online,
    "ready": measure_ready,
    "soak": measure_soak,
}
BESIDE_A_SERVER = ("online", "ready", "soak")


if __name__ == "__main__":
    keep_compiled()
    main()
