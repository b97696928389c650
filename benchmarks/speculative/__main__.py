"""What speculation costs, and what it brings.

    python -m benchmarks.speculative verification [--method lookup] [--batches 1 4 16 64] [--drafts 8 4]
        [--model llama-3-8b] [--draft-model llama-3.2-1b]
    python -m benchmarks.speculative acceptance [--methods ...] [--draft-models FOLDER ...] [--temperatures 0 0.7 1]
    python -m benchmarks.speculative copying [--batches 1 4 16 64]
    python -m benchmarks.speculative drafting [--method draft] [--batches 1 4 16 64]
    python -m benchmarks.speculative replay [--method lookup] [--batches 1 4 16 64]
        [--model llama-3-8b] [--draft-model llama-3.2-1b]
    python -m benchmarks.speculative random [--method lookup] [--batches 1 4 16 64]
        [--model llama-3-8b] [--draft-model llama-3.2-1b]
    python -m benchmarks.speculative plot

Writes `speculative.json` to the results of the device; what the file holds of other cases stays in it. Of all that it
holds then `speculative.png` shows how many times as fast decoding is.
Verification: a model with random normal weights, prompts of 128 tokens, greedy. A decode step that proposes tokens,
by prompt lookup or another method, and verifies them, against a plain one, in loops on the device. A draft model and
heads have random weights too; chains are of 8 and of 4 tokens, trees of the method's own size. What is proposed is put
off by one, so that it is never right, and both kinds of steps bring one token and see the same contexts: acceptance is
no part of this. Medians of some rounds, in which each kind has its turn, after a warm-up.
Acceptance: tokens of a step with proposals; and where these are a chain, of the tokens that were proposed after right
ones those that were right too. The demo model goes on from places in the files that neither it nor what drafts for it
was trained on, in float32; draft and heads are those that ship with it, or drafts that are named.
Copying: the demo model is to copy a file with another name in it, greedy, no stop, through the engine: plainly, with
proposals by prompt lookup where the engine's gate lets them, and always. New tokens a second from when every sequence
has its first one until all have ended, which the slowest decides; of a batch below 4 the texts come one after another.
What was written is recorded in `copied.json`, with the tokens that are accepted in each step.
Drafting: the same where the demo model goes on from places in the files that neither it nor what drafts for it was
trained on, by the method that is named. What was written is recorded in `drafted_by_METHOD.json`, with how many
proposed tokens are right after each token; but not of lookahead, whose proposals depend on the steps before.
Replay: a larger model of random weights writes the recorded texts, with the method that is named and random weights
for it: the logit of each next token is set above all others, and as many proposed tokens are made right as were, so
that acceptance is the recorded one and all else costs what it costs.
Random: the same with texts of random tokens. Nothing that is proposed is right there: the gate is to decode plainly.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.bench import MODELS, load, random_model
from benchmarks.decode import PROMPT
from benchmarks.record import Failure, Record, arguments_of, environment, records_of, results_folder, update
from benchmarks.serving.workload import Job
from benchmarks.speculative import comparing, replaying, texts
from benchmarks.speculative.acceptance import accepting
from benchmarks.speculative.methods import CHAINS, named, shaped
from benchmarks.speculative.plot import gains, plot_gains
from benchmarks.speculative.verification import verifying
from jaxinfer.decode.speculative import METHODS, PromptLookup, Speculation
from jaxinfer.engine import Engine, Options
from jaxinfer.llm import DRAFT, LLM
from jaxinfer.machine import keep_compiled
from jaxinfer.model import read_config
from pallas_kernels.flash_decoding import IMPLEMENTATIONS

NAME = "speculative"  # of the files
COPIED = "copied.json"
RECORDED = {method: f"drafted_by_{method}.json" for method in ("draft", "early-exit", "eagle", "medusa")}
LOOKED_UP, DRAFTED = 8, 3  # tokens of a proposal, of texts that are recorded


def measure_verification(options: argparse.Namespace) -> Iterator[list[Record]]:
    """The records of the machine, then of each batch."""
    subject = load(options.model, [], options.steps_per_dispatch, options.page_size, options.attention)
    yield subject.timed()
    methods = shaped(options.method, options.drafts, options.draft_model, subject.model)
    for batch in options.batches:
        yield verifying(subject, batch, methods, options.new, options.rounds)


def measure_acceptance(options: argparse.Namespace) -> Iterator[list[Record]]:
    """The records of each method, of the draft model's those of each draft."""
    methods = {name: named(name, options.drafts) for name in options.methods if name != "draft"}
    if "draft" in options.methods:
        drafts = {Path(folder).name: named("draft", options.drafts, folder) for folder in options.draft_models}
        methods = drafts | methods
    for name, method in methods.items():
        yield accepting(name, method, options.temperatures, options.new, options.texts)


def measure_copying(options: argparse.Namespace) -> Iterator[list[Record]]:
    """Records what the demo model writes; then the records of each batch."""
    method = PromptLookup(options.drafts)
    llm = LLM(options=engine_options(options, method))
    jobs = [Job(ids, options.new) for ids in texts.copies(llm.tokenizer, options.texts)]
    comparing.warm(llm.engine, [jobs, *comparing.groups_of(jobs, options.batches)])
    recorded = replaying.recorded(jobs, written(llm.engine, jobs), method)
    replaying.write(recorded, environment(), results_folder(options.output) / COPIED)
    yield from compared(options, "demo copying", llm.engine, jobs)


def measure_drafting(options: argparse.Namespace) -> Iterator[list[Record]]:
    """Records what the demo model writes, and what of the proposals is right; then the records of each batch."""
    llm = LLM(options=engine_options(options, named(options.method, options.drafts)))
    begun = itertools.islice(texts.beginnings(llm.tokenizer, PROMPT, 8 * PROMPT), options.texts)
    jobs = [Job(ids, options.new) for ids in begun]
    comparing.warm(llm.engine, [jobs, *comparing.groups_of(jobs, options.batches)])
    if options.method in RECORDED:
        recorded = replaying.drafted(llm.engine, jobs, written(llm.engine, jobs))
        replaying.write(recorded, environment(), results_folder(options.output) / RECORDED[options.method])
    yield from compared(options, "demo drafting", llm.engine, jobs, f" by {options.method}")


def written(engine: Engine, jobs: Sequence[Job]) -> list[list[int]]:
    """What a warm engine writes plainly, all at once."""
    return comparing.run(engine, comparing.Shut(engine.layout), jobs, len(jobs)).texts


def measure_replay(options: argparse.Namespace) -> Iterator[list[Record]]:
    """The records of each batch."""
    recorded = replaying.read(results_folder(options.output) / RECORDED.get(options.method, COPIED))
    if options.method == "lookup":
        yield from replayed(options, recorded, "replaying", "")
    else:
        yield from replayed(options, recorded, "replaying drafts", f" by {options.method}")


def measure_random(options: argparse.Namespace) -> Iterator[list[Record]]:
    """The records of each batch."""
    vocabulary = read_config(MODELS / options.model).vocab_size
    drawn = replaying.at_random(options.texts, PROMPT, options.new, vocabulary)
    yield from replayed(options, drawn, "random text", f" by {options.method}")


def replayed(
    options: argparse.Namespace, recorded: list[replaying.Text], what: str, by: str
) -> Iterator[list[Record]]:
    """The records of each batch, of a larger model that writes these texts."""
    longest = max(len(text.prompt + text.output) for text in recorded)
    model, params = random_model(MODELS / options.model, longest)
    (method,) = shaped(options.method, [options.drafts], options.draft_model, model)
    if by:  # else the method finds in the text what was found there
        method = replaying.replayed(method, recorded, model.config.vocab_size)
    engine = Engine(model, params, engine_options(options, method))
    jobs = replaying.replay(engine, recorded)
    comparing.warm(engine, comparing.groups_of(jobs, options.batches))
    yield from compared(options, f"{options.model} {what}", engine, jobs, by)


def compared(
    options: argparse.Namespace, name: str, engine: Engine, jobs: Sequence[Job], by: str = ""
) -> Iterator[list[Record]]:
    """The records of each batch, of an engine that is warm."""
    for batch in options.batches:
        yield comparing.compare(engine, f"{name} B{batch}{by}", jobs, batch, options.rounds)


def engine_options(options: argparse.Namespace, method: Speculation) -> Options:
    return Options(
        max_num_seqs=max(options.slots, *options.batches),
        max_num_batched_tokens=options.max_num_batched_tokens,
        page_size=options.page_size,
        steps_per_dispatch=options.steps_per_dispatch,
        enable_prefix_caching=False,  # no prompt is to find what it was asked before
        speculation=method,
    )


def draw(results: Path) -> None:
    """Writes the plot of the gains that the file in `results` holds, if there are any, or says what it needs."""
    records = records_of(results / f"{NAME}.json")
    try:
        if gains(records):
            plot_gains(records).savefig(results / f"{NAME}.png", dpi=120)
    except ModuleNotFoundError as error:
        print(f"no plot: {error}")


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    if options.part != "plot":
        records, made_in = [], environment()
        for group in PARTS[options.part](options):
            records += group
            path = update(NAME, made_in, records, list[Failure](), options.output)
            print(*group, f"written to {path}", sep="\n", flush=True)
    draw(results_folder(options.output))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = arguments_of("benchmarks.speculative", __doc__)
    parser.add_argument("--output", type=Path, help="folder of the files")
    found = parser.add_subparsers(dest="part", required=True)
    _add_verification(found.add_parser("verification"))
    _add_acceptance(found.add_parser("acceptance"))
    parts_of_engine = [found.add_parser(name) for name in ("copying", "drafting", "replay", "random")]
    copied, drafted, replayed, drawn = parts_of_engine
    for part in (copied, drafted, drawn):
        part.add_argument("--texts", type=int, default=16)
        part.add_argument("--new", type=int, default=320, help="tokens of each output")
    drafted.add_argument("--method", choices=METHODS, default="draft")
    for part in (replayed, drawn):
        part.add_argument("--model", default="llama-3-8b", help="a folder of configs/models")
        part.add_argument("--method", choices=["lookup", *RECORDED], default="lookup")
        part.add_argument(
            "--draft-model", default="llama-3.2-1b", help="of --method draft, a folder of configs/models"
        )
    copied.set_defaults(method="lookup")
    for part in parts_of_engine:
        _add_engine(part)
    found.add_parser("plot")
    return _completed(parser.parse_args(arguments))


def _add_verification(part: argparse.ArgumentParser) -> None:
    part.add_argument("--model", default="llama-3-8b", help="a folder of configs/models")
    part.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16, 64])
    part.add_argument(
        "--drafts", type=int, nargs="+", help="tokens of a proposal: 8 and 4 of a chain, a tree's own by default"
    )
    part.add_argument("--new", type=int, default=128, help="steps that are timed")
    part.add_argument("--rounds", type=int, default=3)
    part.add_argument("--method", choices=METHODS, default="lookup")
    part.add_argument("--draft-model", default="llama-3.2-1b", help="of --method draft, a folder of configs/models")
    part.add_argument("--attention", choices=["auto", *IMPLEMENTATIONS], default="auto")
    part.add_argument("--page-size", type=int, default=64)
    part.add_argument("--steps-per-dispatch", type=int, default=16)


def _add_acceptance(part: argparse.ArgumentParser) -> None:
    part.add_argument("--methods", choices=METHODS, nargs="+", default=[*METHODS])
    part.add_argument("--draft-models", nargs="+", default=[str(DRAFT)], help="folders, of method draft")
    part.add_argument("--temperatures", type=float, nargs="+", default=[0.0, 0.7, 1.0])
    part.add_argument("--drafts", type=int, help="tokens of a proposal, the method's own number by default")
    part.add_argument("--new", type=int, default=96, help="tokens of each output")
    part.add_argument("--texts", type=int, help="all by default")


def _add_engine(part: argparse.ArgumentParser) -> None:
    part.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16, 64])
    part.add_argument(
        "--drafts",
        type=int,
        help=f"tokens of a proposal: {LOOKED_UP} by lookup, {DRAFTED} of a draft, or the method's",
    )
    part.add_argument("--rounds", type=int, default=2)
    part.add_argument("--slots", type=int, default=64, help="of the engine, at the least")
    part.add_argument("--max-num-batched-tokens", type=int, default=2048)
    part.add_argument("--page-size", type=int, default=64)
    part.add_argument("--steps-per-dispatch", type=int, default=8)


def _completed(options: argparse.Namespace) -> argparse.Namespace:
    """With the sizes of proposals that depend on the method."""
    if options.part == "verification" and options.drafts is None:
        options.drafts = [8, 4] if options.method in CHAINS else [None]
    if options.part in ("copying", "drafting", "replay", "random") and options.drafts is None:
        options.drafts = {"lookup": LOOKED_UP, "draft": DRAFTED}.get(options.method)
    return options


PARTS = {
    "verification": measure_verification,
    "acceptance": measure_acceptance,
    "copying": measure_copying,
    "drafting": measure_drafting,
    "replay": measure_replay,
    "random": measure_random,
}

if __name__ == "__main__":
    keep_compiled()
    main()
