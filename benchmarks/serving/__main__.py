"""Many requests at once.

    python -m benchmarks.serving offline [--model llama-3-8b] [--static]
    python -m benchmarks.serving online --url http://127.0.0.1:8000/v1 --model NAME [--rates 1 2 4 8] [--key KEY]
    python -m benchmarks.serving soak [--requests 10000] [--rate 20]

Offline: requests of a workload that are all there at once, greedy, no stop, through the engine on random normal
weights; `--static` adds static batching by the same engine, which gives out the next batch when the last has ended.
Online: the workload "256 requests", arriving at each rate (a Poisson process), at any OpenAI-compatible server, ours
or another; `inf` sends all at once. Soak: a server of the demo model under random arrivals, lengths, callers who hang
up and overload; it must account for all of them, lose no page and compile nothing. Writes `serving.json`, and online a
plot of throughput against latency.
"""

from __future__ import annotations

import argparse
import asyncio
import math
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import jax

from benchmarks.decode import MODELS
from benchmarks.record import RESULTS, Failure, Record, device_folder, environment, update
from benchmarks.serving import offline, online, soak
from benchmarks.serving.latency import Objective, summarize
from benchmarks.serving.plot import plot_curve
from benchmarks.serving.workload import WORKLOADS, Workload, longest
from jaxinfer.engine import Engine, Options, WarmUp
from jaxinfer.machine import keep_compiled
from jaxinfer.model import Model, read_config
from jaxinfer.parallel import make_mesh

OURS = "jaxinfer"


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    records, made_in = [], environment()
    for group in WAYS[options.how](options):
        records += group
        path = update("serving", made_in, records, list[Failure](), options.output)
        print(*group, f"written to {path}", sep="\n", flush=True)
    if options.how == "online":
        folder = options.output or RESULTS / device_folder()
        plot_curve(records).savefig(folder / "serving.png", dpi=120)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.serving",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--output", type=Path, help="folder of what is written")
    ways = parser.add_subparsers(dest="how", required=True)
    alone = ways.add_parser("offline")
    alone.add_argument("--model", default="llama-3-8b", help="a folder of configs/models")
    alone.add_argument("--workload", nargs="+", choices=WORKLOADS, default=["256 requests", "32 x 8192 in, 64 out"])
    alone.add_argument("--max-num-seqs", type=int, default=256)
    alone.add_argument("--max-num-batched-tokens", type=int, default=8192)
    alone.add_argument("--page-size", type=int, default=64)
    alone.add_argument("--steps-per-dispatch", type=int, default=8)
    alone.add_argument("--max-slowdown", type=float, default=math.inf, help="of a decode step by prompts beside it")
    alone.add_argument("--static", action="store_true", help="also with static batching")
    served = ways.add_parser("online")
    served.add_argument("--url", required=True, help="of the server, with /v1")
    served.add_argument("--model", required=True, help="the name that it serves")
    served.add_argument("--key", help="of its API")
    served.add_argument("--name", default=OURS, help="what the records call the system")
    served.add_argument("--rates", type=float, nargs="+", default=[1.0, 2.0, 4.0, 8.0, 16.0], help="requests/s")
    served.add_argument("--requests", type=int, default=256)
    served.add_argument("--vocabulary", type=int, default=1000, help="prompts are token ids below it")
    served.add_argument("--first-token", type=float, default=1.0, help="seconds; more is not served well")
    served.add_argument("--per-token", type=float, default=0.05, help="seconds; likewise")
    soaked = ways.add_parser("soak")
    soaked.add_argument("--requests", type=int, default=10_000)
    soaked.add_argument("--rate", type=float, default=20.0, help="requests/s")
    return parser.parse_args(arguments)


def measure_offline(options: argparse.Namespace) -> Iterator[list[Record]]:
    """The records of getting ready, then of each workload."""
    workloads = {name: WORKLOADS[name] for name in options.workload}
    mesh = make_mesh(devices=jax.devices()[:1])
    model = Model(read_config(MODELS / options.model), mesh, context=longest([*workloads.values()]))
    params = jax.block_until_ready(model.random_params())
    engine = Engine(model, params, engine_options(options))
    yield warm_up_records(options.model, engine.warm_up())
    for name, workload in workloads.items():
        yield run_workload(engine, f"{options.model} {name}", workload, options.static)


def warm_up_records(case: str, done: WarmUp) -> list[Record]:
    """Of a first start, which compiles all, or a second one, which finds all in the cache; of others nothing."""
    print(done, flush=True)
    if done.found not in (0, done.programs):
        return []
    start = "first start" if done.found == 0 else "second start"
    return [
        Record(case, OURS, f"warm-up, {start}", done.seconds, "s"),
        Record(case, OURS, f"kernels and programs lowered, {start}", done.lowering, "s"),
        Record(case, OURS, "programs", done.programs, "programs"),
        Record(case, OURS, "kernels", done.kernels, "kernels"),
    ]


def engine_options(options: argparse.Namespace) -> Options:
    return Options(
        max_num_seqs=options.max_num_seqs,
        max_num_batched_tokens=options.max_num_batched_tokens,
        page_size=options.page_size,
        steps_per_dispatch=options.steps_per_dispatch,
        max_slowdown=options.max_slowdown,
    )


def run_workload(engine: Engine, case: str, workload: Workload, static: bool) -> list[Record]:
    draw = partial(workload.jobs, engine.model.config.vocab_size)
    runs = {OURS: offline.run(engine, draw(seed=0))}
    if static:  # with other prompts: those of the first run can be found in the cache
        runs[f"{OURS}, static batching"] = offline.run(engine, draw(seed=1), engine.layout.slots)
    return [
        record
        for name, run in runs.items()
        for record in (
            Record(case, name, "output throughput", run.output_rate, "tok/s"),
            Record(case, name, "throughput in and out", run.total_rate, "tok/s"),
        )
    ]


def measure_online(options: argparse.Namespace) -> Iterator[list[Record]]:
    """The records of each rate of arrival."""
    target = online.Target(options.url.rstrip("/"), options.model, options.key)
    objective = Objective(options.first_token, options.per_token)
    workload = WORKLOADS["256 requests"].first(options.requests)
    for seed, rate in enumerate(options.rates):  # no prompt twice: it would be found in the server's cache
        timelines = asyncio.run(online.arrive(target, workload.jobs(options.vocabulary, seed), rate))
        yield summarize(f"{options.model} at {rate:g} requests/s", options.name, timelines, objective)


def measure_soak(options: argparse.Namespace) -> Iterator[list[Record]]:
    with soak.serving() as server:
        yield soak.soak(server, options.requests, options.rate)


WAYS = {"offline": measure_offline, "online": measure_online, "soak": measure_soak}


if __name__ == "__main__":
    keep_compiled()
    main()
