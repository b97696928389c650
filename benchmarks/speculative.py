"""What speculation costs, and what it brings.

    python -m benchmarks.speculative verification [--model llama-3-8b] [--batches 1 4 16 64] [--drafts 8 4]
        [--method draft] [--draft-model llama-3.2-1b]
    python -m benchmarks.speculative acceptance [DRAFT ...] [--temperatures 0 0.7 1]
    python -m benchmarks.speculative copying [--batches 1 4 16 64]
    python -m benchmarks.speculative drafting [--batches 1 4 16 64]
    python -m benchmarks.speculative replay [--model llama-3-8b] [--batches 1 4 16 64]
        [--method draft] [--draft-model llama-3.2-1b]

Writes `speculative.json` to the results of the device; what the file holds of other cases stays in it.
Verification: a model with random normal weights, prompts of 128 tokens, greedy. A decode step that proposes tokens,
by prompt lookup or another method, and verifies them, against a plain one, in loops on the device. What is proposed is
put off by one, so that it is never right, and both kinds of steps bring one token and see the same contexts:
acceptance is no part of this. Medians of some rounds, in which each kind has its turn, after a warm-up.
Acceptance: of the tokens that a draft proposed after right ones, those that were right too. The demo model goes on
from places in the files that neither it nor its draft was trained on, in float32; without a name it is the draft that
ships with it.
Copying: the demo model is to copy a file with another name in it, greedy, no stop, through the engine: plainly, with
proposals by prompt lookup where the engine's gate lets them, and always. New tokens a second from when every sequence
has its first one until all have ended, which the slowest decides; of a batch below 4 the texts come one after another.
What was written is recorded in `copied.json`, with the tokens that are accepted in each step.
Drafting: the same where the demo model goes on from places in the files that neither it nor its draft was trained on,
and the draft that ships with it proposes. Recorded in `drafted.json`, with what the draft says at each place.
Replay: a larger model of random weights writes the recorded texts: the logit of each next token is set above all
others, and a draft says what was recorded in the same way, so that acceptance is the recorded one and all else costs
what it costs.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np

from benchmarks import copying
from benchmarks.bench import MODELS, Bench, Subject, load
from benchmarks.decode import PROMPT
from benchmarks.record import OURS, RESULTS, Failure, Record, device_folder, environment, update
from benchmarks.serving.workload import Job
from jaxinfer.cache.gathers import gathers
from jaxinfer.decode.forward import Cache, Forward
from jaxinfer.decode.sampling import GREEDY, Needs
from jaxinfer.decode.sampling_params import SamplingParams
from jaxinfer.decode.slots import SlotState
from jaxinfer.decode.speculative import DraftModel, EarlyExit, Pass, PromptLookup, Proposal, Speculation
from jaxinfer.engine import Engine, Options
from jaxinfer.llm import DRAFT, LLM
from jaxinfer.machine import keep_compiled, known_machine
from jaxinfer.model import Model, Params, read_config
from jaxinfer.parallel import make_mesh
from jaxinfer.roofline import Hardware, decode_step
from pallas_kernels.flash_decoding import IMPLEMENTATIONS

OVER = "over a plain step"
RECORDED = {"lookup": "copied.json", "draft": "drafted.json"}
SLACK = 64  # tokens that a sequence may have beside those of its steps, should a proposal be right after all


class Missed(Speculation):
    """Proposals put off by one token: they cost what they cost, and are never right."""

    def propose(
        self, target: Forward, params: Params, needs: Needs, state: SlotState, cache: Cache
    ) -> tuple[Proposal, Cache]:
        proposal, cache = super().propose(target, params, needs, state, cache)
        return proposal._replace(drafts_Bk=(proposal.drafts_Bk + 1) % target.model.config.vocab_size), cache


class MissedLookup(Missed, PromptLookup):
    pass


class MissedDraft(Missed, DraftModel):
    pass


class MissedExit(Missed, EarlyExit):
    pass


METHODS = {"lookup": MissedLookup, "draft": MissedDraft, "early-exit": MissedExit}
Method = MissedLookup | MissedDraft | MissedExit


def measure_verification(options: argparse.Namespace) -> Iterator[list[Record]]:
    """The records of the machine, then of each batch."""
    subject = load(options.model, [], options.steps_per_dispatch, options.page_size, options.attention)
    yield subject.timed()
    method = proposing(options, subject)
    for batch in options.batches:
        yield verifying(subject, batch, method, options.drafts, options.new, options.rounds)


def proposing(options: argparse.Namespace, subject: Subject) -> Method:
    """The method, with random weights where it has some."""
    if options.method == "draft":
        model = Model(read_config(MODELS / options.draft_model), subject.model.mesh, subject.model.context)
        method = MissedDraft(options.draft_model, model=model, params=model.random_params(1))
    else:
        method = METHODS[options.method]()
    method.check(subject.model)
    return method


def verifying(
    subject: Subject, batch: int, method: Method, drafts: Sequence[int], new: int, rounds: int
) -> list[Record]:
    """A plain step, and for each number of proposed tokens one that verifies them: measured, predicted, and over the
    plain one."""
    benches = {
        count: Bench(
            subject, batch, PROMPT + new + SLACK, replace(method, num_speculative_tokens=count) if count else None
        )
        for count in (0, *drafts)
    }
    compile_all(list(benches.values()))
    seconds: dict[int, list[float]] = {count: [] for count in benches}
    for _ in range(rounds + 1):
        for count, bench in benches.items():
            bench.prefill(PROMPT, PROMPT)
            seconds[count].append(bench.decode(new) / new)
            assert int(bench.state.length_B.max()) <= bench.layout.max_tokens
    plain = statistics.median(seconds[0][1:]), predicted(subject, benches[0], new)
    records, names = [], {kind: name for name, kind in METHODS.items()}
    for count, bench in benches.items():
        by = "" if isinstance(method, PromptLookup) else f" by {names[type(method)]}"
        case = subject.case(f"B{batch} {count} drafts{by}" if count else f"B{batch} plain")
        took = [1e3 * one for one in seconds[count][1:]]
        step, expected = statistics.median(took) / 1e3, predicted(subject, bench, new)
        context = PROMPT + new // 2 + count
        limit = decode_step(subject.model.config, batch, context, subject.precision, queries=1 + count)
        fraction = limit.fraction(subject.ceilings, step)
        records += [
            Record(case, subject.attention, "step", step * 1e3, "ms", fraction, min(took), max(took), rounds),
            Record(case, subject.plan, "step", expected * 1e3, "ms"),
        ]
        if count:
            records += [
                Record(case, subject.attention, OVER, step / plain[0], "x"),
                Record(case, subject.plan, OVER, expected / plain[1], "x"),
            ]
    return records


def predicted(subject: Subject, bench: Bench, new: int) -> float:
    """Seconds of the step halfway through the new tokens, and of what runs for its proposals."""
    gathered, layout = gathers(subject.attention)[0], bench.layout
    context = layout.pages_per_row * layout.page_size if gathered else PROMPT + new // 2 + layout.drafts

    def seconds(one: Pass) -> float:
        cost = decode_step(
            one.config, layout.slots, context, subject.precision, queries=one.queries,
            attention="materialized" if gathered else "flash",
        )  # fmt: skip
        return cost.predict(subject.machine)

    proposing = [] if layout.speculation is None else layout.speculation.passes(subject.model)
    return sum(map(seconds, [Pass(subject.model.config, 1 + layout.drafts), *proposing]))


def measure_acceptance(options: argparse.Namespace) -> Iterator[list[Record]]:
    """The records of each draft."""
    for folder in options.drafts:
        yield accepting(folder, options.proposed, options.temperatures, options.new)


def accepting(folder: Path, proposed: int, temperatures: Sequence[float], new: int) -> list[Record]:
    """How often what a draft proposes is right, at each temperature."""
    method = DraftModel(folder, proposed)
    llm = LLM(dtype="float32", options=Options(max_num_seqs=16, speculation=method, always_speculate=True))
    prompts = [list(ids) for ids in copying.beginnings(llm.tokenizer, PROMPT, 8 * PROMPT)]
    records, counters = [], llm.engine.counters
    for temperature in temperatures:
        before, right_before = counters.drafts, counters.accepted or (0,) * proposed
        llm.generate(prompts, SamplingParams(temperature=temperature, max_tokens=new, seed=0, ignore_eos=True))
        drafts = counters.drafts - before
        right = [after - first for after, first in zip(counters.accepted, right_before, strict=True)]
        case = f"demo drafted by {folder.name} T={temperature:g}"
        records += [
            Record(case, OURS, "proposed tokens right", 100 * sum(right) / sum([drafts, *right[:-1]]), "%"),
            Record(case, OURS, "tokens of a step", 1 + sum(right) / drafts, "tokens"),
            Record(case, OURS, "steps with proposals", drafts, "steps"),
        ]
    return records


def compile_all(benches: Sequence[Bench]) -> None:
    """The large programs of each, in as many threads as there are processors."""
    lowered = []
    for bench in benches:
        (step,) = bench.admit(PROMPT, PROMPT)
        state = bench.params, bench.state, bench.cache
        slots_B = np.arange(bench.layout.slots, dtype=np.int32)
        lowered.append(bench.programs.lower_step(*state, step))
        loop = {"steps": bench.subject.steps, "needs": GREEDY, "drafts": bench.layout.depth}
        lowered.append(bench.programs.lower_loop(*state, slots_B, **loop))
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        list(threads.map(lambda one: one.compile(), lowered))


def measure_copying(options: argparse.Namespace) -> Iterator[list[Record]]:
    """Records what the demo model writes; then the records of each batch."""
    method = PromptLookup(options.drafts)
    llm = LLM(options=engine_options(options, method))
    jobs = [Job(ids, options.new) for ids in copying.prompts(llm.tokenizer, options.texts)]
    texts = copying.recorded(jobs, written(llm, jobs), method)
    copying.write(texts, environment(), folder(options) / RECORDED["lookup"])
    yield from comparing(options, "demo copying", llm.engine, jobs)


def measure_drafting(options: argparse.Namespace) -> Iterator[list[Record]]:
    """Records what the demo model writes, and its draft would; then the records of each batch."""
    llm = LLM(options=engine_options(options, DraftModel(num_speculative_tokens=options.drafts)))
    begun = itertools.islice(copying.beginnings(llm.tokenizer, PROMPT, 8 * PROMPT), options.texts)
    jobs = [Job(ids, options.new) for ids in begun]
    texts = copying.drafted(jobs, written(llm, jobs), LLM(DRAFT), options.drafts)
    copying.write(texts, environment(), folder(options) / RECORDED["draft"])
    yield from comparing(options, "demo drafting", llm.engine, jobs)


def written(llm: LLM, jobs: Sequence[Job]) -> list[list[int]]:
    """What it writes plainly, all at once."""
    copying.warm(llm.engine)
    return copying.run(llm.engine, copying.Shut(llm.engine.layout), jobs, len(jobs)).texts


def measure_replay(options: argparse.Namespace) -> Iterator[list[Record]]:
    """The records of each batch."""
    texts = copying.read(folder(options) / RECORDED[options.method])
    longest = max(len(text.prompt + text.output) for text in texts)
    mesh = make_mesh(devices=jax.devices()[:1])
    model = Model(read_config(MODELS / options.model), mesh, context=longest)
    method, name = PromptLookup(options.drafts), f"{options.model} replaying"
    if options.method == "draft":
        small = Model(read_config(MODELS / options.draft_model), mesh, context=longest)
        method = copying.replayed_draft(texts, small, small.random_params(1), options.drafts)
        name = f"{name} with {options.draft_model}"
    engine = Engine(model, jax.block_until_ready(model.random_params()), engine_options(options, method))
    jobs = copying.replay(engine, texts)
    copying.warm(engine)
    yield from comparing(options, name, engine, jobs)


def comparing(options: argparse.Namespace, name: str, engine: Engine, jobs: Sequence[Job]) -> Iterator[list[Record]]:
    """The records of each batch, of an engine that is warm."""
    for batch in options.batches:
        yield copying.compare(engine, name, jobs, batch, options.rounds, find_machine())


def engine_options(options: argparse.Namespace, method: Speculation) -> Options:
    return Options(
        max_num_seqs=max(options.slots, *options.batches),
        max_num_batched_tokens=options.max_num_batched_tokens,
        page_size=options.page_size,
        steps_per_dispatch=options.steps_per_dispatch,
        enable_prefix_caching=False,  # no prompt is to find what it was asked before
        speculation=method,
    )


def find_machine() -> Hardware:
    """What the engine's gate predicts with."""
    return known_machine("bf16")


def folder(options: argparse.Namespace) -> Path:
    return options.output or RESULTS / device_folder()


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    records, made_in = [], environment()
    for group in PARTS[options.part](options):
        records += group
        path = update("speculative", made_in, records, list[Failure](), options.output)
        print(*group, f"written to {path}", sep="\n", flush=True)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.speculative",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--output", type=Path, help="folder of the JSON file")
    parts = parser.add_subparsers(dest="part", required=True)
    cost = parts.add_parser("verification")
    cost.add_argument("--model", default="llama-3-8b", help="a folder of configs/models")
    cost.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16, 64])
    cost.add_argument("--drafts", type=int, nargs="+", default=[8, 4], help="tokens of a proposal")
    cost.add_argument("--new", type=int, default=128, help="steps that are timed")
    cost.add_argument("--rounds", type=int, default=3)
    cost.add_argument("--method", choices=METHODS, default="lookup")
    cost.add_argument("--draft-model", default="llama-3.2-1b", help="of --method draft, a folder of configs/models")
    cost.add_argument("--attention", choices=["auto", *IMPLEMENTATIONS], default="auto")
    cost.add_argument("--page-size", type=int, default=64)
    cost.add_argument("--steps-per-dispatch", type=int, default=16)
    accepted = parts.add_parser("acceptance")
    accepted.add_argument("drafts", type=Path, nargs="*", default=[DRAFT], metavar="DRAFT", help="folders")
    accepted.add_argument("--temperatures", type=float, nargs="+", default=[0.0, 0.7, 1.0])
    accepted.add_argument("--proposed", type=int, default=4, help="tokens of a proposal")
    accepted.add_argument("--new", type=int, default=96, help="tokens of each output")
    copied, drafted, replayed = (parts.add_parser(name) for name in ("copying", "drafting", "replay"))
    for part in (copied, drafted):
        part.add_argument("--texts", type=int, default=16)
        part.add_argument("--new", type=int, default=320, help="tokens of each output")
    replayed.add_argument("--model", default="llama-3-8b", help="a folder of configs/models")
    replayed.add_argument("--method", choices=RECORDED, default="lookup", help="whose recorded text")
    replayed.add_argument(
        "--draft-model", default="llama-3.2-1b", help="of --method draft, a folder of configs/models"
    )
    for part, drafts in ((copied, 8), (drafted, 3), (replayed, None)):
        part.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16, 64])
        part.add_argument("--drafts", type=int, default=drafts, help="tokens of a proposal: 8 by lookup, 3 of a draft")
        part.add_argument("--rounds", type=int, default=2)
        part.add_argument("--slots", type=int, default=64, help="of the engine, at the least")
        part.add_argument("--max-num-batched-tokens", type=int, default=2048)
        part.add_argument("--page-size", type=int, default=64)
        part.add_argument("--steps-per-dispatch", type=int, default=8)
    options = parser.parse_args(arguments)
    if options.part == "replay" and options.drafts is None:
        options.drafts = parser.parse_args(["drafting" if options.method == "draft" else "copying"]).drafts
    return options


PARTS = {
    "verification": measure_verification,
    "acceptance": measure_acceptance,
    "copying": measure_copying,
    "drafting": measure_drafting,
    "replay": measure_replay,
}

if __name__ == "__main__":
    keep_compiled()
    main()
