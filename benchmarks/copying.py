"""Text that copies, or goes on with a draft model beside it: recorded of a small model, and written again, token for
token, by a larger one of random weights."""

from __future__ import annotations

import itertools
import json
import keyword
import re
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from benchmarks.record import OURS, Record
from benchmarks.serving.offline import request
from benchmarks.serving.workload import Job
from jaxinfer.cache.gathers import gathers
from jaxinfer.decode.batch import Batch
from jaxinfer.decode.forward import Cache, Forward
from jaxinfer.decode.sampling_params import SamplingParams
from jaxinfer.decode.speculative import DraftModel, PromptLookup
from jaxinfer.decode.speculative.lookup import propose
from jaxinfer.engine import Engine, Request
from jaxinfer.engine.gate import Gate, predicted_gate
from jaxinfer.engine.sequence import Sequence as Sequenced
from jaxinfer.engine.warm_up import make_ready, warm_programs
from jaxinfer.llm import LLM
from jaxinfer.model import Model, Params
from jaxinfer.roofline import Hardware, Precision, Verification, decode_step, tokens_per_step, verification
from jaxinfer.text.tokenizer import Tokenizer
from jaxinfer.training.data import read_library

FILE, BEGUN = 384, 64  # tokens of a file, and of its edited copy, that stand in a prompt
ALONE = 4  # texts at the least: of a smaller batch come as many after one another
PLAIN = OURS
FASTER = "over plain decoding"


@dataclass(frozen=True)
class Text:
    """A prompt and what followed it.

    Attributes:
        accepted: proposed tokens that are right in each step, from the second token of the output on.
        said: by a draft model, the likeliest token at each place of the output, after what is there before it.
    """

    prompt: tuple[int, ...]
    output: tuple[int, ...]
    accepted: tuple[int, ...] = ()
    said: tuple[int, ...] = ()


def prompts(tokenizer: Tokenizer, count: int) -> list[tuple[int, ...]]:
    """So many files of the standard library that the demo model was not trained on, each with the beginning of a copy
    in which a name is another one."""
    files = [tokenizer.encode(document.text) for document in read_library().held_out]
    pieces = itertools.chain.from_iterable(zip(*map(_pieces, files), strict=False))  # of each file by turns
    return [_edited(tokenizer, piece) for piece in itertools.islice(pieces, count)]


def beginnings(tokenizer: Tokenizer, length: int, apart: int) -> Iterator[tuple[int, ...]]:
    """So many tokens each from the files of the standard library that the demo model was not trained on."""
    for document in read_library().held_out:
        ids = tokenizer.encode(document.text)
        for at in range(length, len(ids) - length, apart):
            yield tuple(ids[at : at + length])


def _pieces(ids: list[int]) -> Iterator[list[int]]:
    for first in range(0, len(ids) - FILE, FILE):
        yield ids[first : first + FILE]


def _edited(tokenizer: Tokenizer, ids: list[int]) -> tuple[int, ...]:
    text = tokenizer.decode(ids)
    names = Counter(name for name in re.findall(r"[A-Za-z_]{4,}", text) if not keyword.iskeyword(name))
    old = names.most_common(1)[0][0]
    edited = re.sub(rf"\b{old}\b", new := f"new_{old}", text)
    begun = tokenizer.decode(tokenizer.encode(edited)[: BEGUN + 1])
    return tuple(tokenizer.encode(f"{text}\n\n\n# The same, with {new} in the place of {old}:\n\n{begun}"))


class Shut(Gate):
    """Proposes nothing."""

    def drafts(self, decoding: list[Sequenced]) -> int:
        return 0


@dataclass(frozen=True)
class Run:
    """What decoding took, from when every sequence has its first token until all have their last; and of the steps
    with proposals how often the first proposed token was right, the first two, and so on."""

    seconds: float
    tokens: int
    drafts: int
    accepted: tuple[float, ...]
    texts: list[list[int]]


def warm(engine: Engine) -> None:
    """Compiles what greedy requests meet."""
    programs = warm_programs(engine.runner, engine.options.max_num_batched_tokens, masked=False)
    greedy = [one for one in programs if not one.name.startswith("decoding") or "greedy" in one.name]
    print(make_ready(greedy, None, engine.runner.wait), flush=True)


def run(engine: Engine, gate: Gate, jobs: Sequence[Job], batch: int) -> Run:
    """Serves the jobs, `batch` of them at a time."""
    engine.gate = engine.scheduler.gate = gate
    counters = engine.counters
    drafts, accepted = counters.drafts, counters.accepted
    seconds, tokens, texts = 0.0, 0, []
    for group in itertools.batched(jobs, batch):
        written = _decode(engine, [request(number, job) for number, job in enumerate(group)])
        seconds, tokens = seconds + written[0], tokens + written[1]
        texts += written[2]
    drafts = counters.drafts - drafts
    right = [new - old for new, old in itertools.zip_longest(counters.accepted, accepted, fillvalue=0)]
    return Run(seconds, tokens, drafts, tuple(count / drafts for count in right) if drafts else (), texts)


def _decode(engine: Engine, requests: Sequence[Request]) -> tuple[float, int, list[list[int]]]:
    texts, start, before = {one.id: list[int]() for one in requests}, 0.0, 0
    for one in requests:
        engine.add(one)
    while engine.busy:
        for update in engine.step():
            texts[update.request.id] += update.tokens
        if not start and all(texts.values()):
            start, before = time.perf_counter(), sum(map(len, texts.values()))
    tokens = sum(map(len, texts.values()))
    assert tokens == sum(one.params.max_tokens for one in requests)
    return time.perf_counter() - start, tokens - before, list(texts.values())


def compare(
    engine: Engine, name: str, jobs: Sequence[Job], batch: int, rounds: int, machine: Hardware
) -> list[Record]:
    """The records of one batch: plain decoding, speculation as the gate has it, and always. Each is the fastest of
    some rounds. An engine proposes by prompt lookup, or by a draft model.

    Args:
        jobs: for a batch; of a smaller one than ALONE come so many after one another.
        machine: what the prediction is made for.
    """
    layout, many = engine.layout, max(batch, ALONE)
    jobs = list(itertools.islice(itertools.cycle(jobs), many))
    gated, always = ways(engine)
    gates = {
        PLAIN: Shut(layout),
        gated: predicted_gate(engine.model, layout, engine.options),
        always: Gate(layout),
    }
    took = {
        way: min((run(engine, gate, jobs, batch) for _ in range(rounds)), key=lambda one: one.seconds)
        for way, gate in gates.items()
    }
    case, plain = f"{name} B{batch}", took[PLAIN]
    records = [Record(case, way, "decode", one.tokens / one.seconds, "tok/s") for way, one in took.items()]
    for way in (gated, always):
        records.append(Record(case, way, FASTER, plain.seconds / took[way].seconds, "x"))
        records += _acceptance(case, way, took[way])
    pair = _predicted(engine, jobs, batch, machine)
    speedup = pair.speedup(tokens_per_step(took[always].accepted))
    records.append(Record(case, "plan", FASTER, max(speedup, 1.0), "x"))
    records.append(Record(case, f"plan, {always}", FASTER, speedup, "x"))
    return records


def ways(engine: Engine) -> tuple[str, str]:
    """What an engine with speculation is called in records: with its gate, and without."""
    by = "lookup" if isinstance(engine.layout.speculation, PromptLookup) else "draft"
    return f"{OURS}, {by}", f"{OURS}, {by} always"


def _acceptance(case: str, way: str, took: Run) -> list[Record]:
    if not took.accepted:
        return []
    return [
        Record(case, way, "tokens of a step with proposals", tokens_per_step(took.accepted), "tokens"),
        *(
            Record(case, way, f"first {count} right", 100 * fraction, "%")
            for count, fraction in enumerate(took.accepted, 1)
        ),
    ]


def _predicted(engine: Engine, jobs: Sequence[Job], batch: int, machine: Hardware) -> Verification:
    """Halfway through the outputs."""
    layout, config, gathered = engine.layout, engine.model.config, gathers(engine.layout.attention)[0]
    halfway = int(np.mean([len(job.prompt) + job.output / 2 for job in jobs]))
    context = layout.pages_per_row * layout.page_size if gathered else halfway
    precision, attention = Precision.all_in(config.dtype, layout.cache_dtype), "materialized" if gathered else "flash"
    assert layout.speculation is not None
    proposing = sum(
        decode_step(one.config, batch, context, precision, queries=one.queries, attention=attention).predict(machine)
        for one in layout.speculation.passes(engine.model)
    )
    return verification(
        config, machine, batch, context, layout.drafts, precision, attention=attention, proposing=proposing
    )


# --- the same text again


def drafted(jobs: Sequence[Job], outputs: Sequence[Sequence[int]], draft: LLM, drafts: int) -> list[Text]:
    """The texts, with what a draft model says at each place, and how many of `drafts` proposals are right in each
    step. The first token of an output is the prompt's."""
    whole = [[*job.prompt, *output] for job, output in zip(jobs, outputs, strict=True)]
    scored = draft.generate(whole, SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=1))
    texts = []
    for job, output, score in zip(jobs, outputs, scored, strict=True):
        assert score.prompt_logprobs is not None
        said = [place.top[0][0] for place in score.prompt_logprobs[len(job.prompt) :] if place is not None]
        right, accepted, at = [a == b for a, b in zip(said, output, strict=True)], list[int](), 1
        while at < len(output):
            run = len(list(itertools.takewhile(bool, right[at : at + drafts])))
            accepted.append(min(run, len(output) - at - 1))
            at += accepted[-1] + 1
        texts.append(Text(job.prompt, tuple(output), tuple(accepted), tuple(said)))
    return texts


def recorded(jobs: Sequence[Job], outputs: Sequence[Sequence[int]], method: PromptLookup) -> list[Text]:
    """The texts, with how many of the method's proposals are right in each step. The first token of an output is the
    prompt's."""
    whole = [[*job.prompt, *output] for job, output in zip(jobs, outputs, strict=True)]
    text_BT = _padded(whole)
    last_B, accepted = np.array([len(job.prompt) for job in jobs]), [list[int]() for _ in jobs]
    search = jax.jit(propose, static_argnums=(2, 3))
    while (last_B < [len(text) - 1 for text in whole]).any():
        drafts = search(text_BT, last_B.astype(np.int32), method.num_speculative_tokens, method.prompt_lookup_max)
        for row, (text, proposed) in enumerate(zip(whole, np.asarray(drafts).tolist(), strict=True)):
            follows = text[last_B[row] + 1 :]
            if follows:
                right = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(proposed, follows, strict=False))
                accepted[row].append(min(len(list(right)), len(follows) - 1))
                last_B[row] += accepted[row][-1] + 1
    kept = zip(jobs, outputs, accepted, strict=True)
    return [Text(job.prompt, tuple(output), tuple(right)) for job, output, right in kept]


def write(texts: Sequence[Text], made_in: dict[str, str], path: Path) -> None:
    """A file of them beside the results. It holds no records."""
    content = {"environment": made_in, "records": [], "texts": [asdict(text) for text in texts]}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content).replace('{"prompt"', '\n{"prompt"') + "\n")


def read(path: Path) -> list[Text]:
    """
    Raises:
        FileNotFoundError: nothing was recorded there.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path} is not there; the part `copying` records it")
    fields = ({name: tuple(ids) for name, ids in text.items()} for text in json.loads(path.read_text())["texts"])
    return [Text(**text) for text in fields]


@dataclass(frozen=True)
class Replaying(Forward):
    """A model whose likeliest token is always the one that a recorded text has next, at the cost of the model's step
    and of writing one logit of each row.

    Attributes:
        book_RT: tokens of each text, written with numbers of its own, so that a token says whose it is: token t of
            text r is r x base + t.
        base: above all tokens as they were recorded.
    """

    book_RT: np.ndarray = field(default_factory=lambda: np.zeros((0, 0), np.int32))
    base: int = 1

    def __call__(
        self, params: Params, cache: Cache, batch: Batch, rows_W: jax.Array
    ) -> tuple[Cache, jax.Array, jax.Array, jax.Array]:
        cache, logits_WV, hidden_TD, shown_TE = super().__call__(params, cache, batch, rows_W)
        text_W, place_W = batch.tokens_T[rows_W] // self.base, batch.positions_T[rows_W] + 1
        next_W = jnp.asarray(self.book_RT).at[text_W, place_W].get(mode="clip")
        row_W = jnp.arange(len(next_W), dtype=jnp.int32)
        logits_WV = jax.sharding.reshard(logits_WV, P(None, None)).at[row_W, next_W].set(jnp.inf)
        return cache, logits_WV, hidden_TD, shown_TE


class Books(NamedTuple):
    """Texts in the numbers that a `Replaying` model knows them by: token t of text r is r x base + t.

    Attributes:
        texts: of each the prompt and the output.
        said: the same, with what a draft says in the place of the output.
    """

    base: int
    texts: list[list[int]]
    said: list[list[int]]


def books(texts: Sequence[Text], vocabulary: int) -> Books:
    """
    Raises:
        ValueError: the vocabulary is too small for so many.
    """
    base = 1 + max(max(text.prompt + text.output + text.said) for text in texts)
    if base * len(texts) > vocabulary:
        raise ValueError(f"{len(texts)} texts of {base} tokens each need {base * len(texts)}; there are {vocabulary}")

    def numbered(rows: Iterable[tuple[int, ...]]) -> list[list[int]]:
        return [[number * base + token for token in row] for number, row in enumerate(rows)]

    whole, said = ((text.prompt + text.output for text in texts), (text.prompt + text.said for text in texts))
    return Books(base, numbered(whole), numbered(said))


def replay(engine: Engine, texts: Sequence[Text]) -> list[Job]:
    """Lets an engine write these texts, whatever its weights, and returns the jobs that ask for them.

    Raises:
        ValueError: the vocabulary is too small for so many.
    """
    base, book, _ = books(texts, engine.model.config.vocab_size)
    old = engine.runner.programs.forward
    engine.runner.programs.forward = Replaying(
        old.model, old.page_size, old.cache_dtype, old.attention, book_RT=_padded(book), base=base
    )
    return [Job(tuple(ids[: len(text.prompt)]), len(text.output)) for ids, text in zip(book, texts, strict=True)]


@dataclass(frozen=True)
class ReplayedDraft(DraftModel):
    """A draft model whose likeliest token is always the one that a recorded draft said there, at its own cost. For an
    engine that replays the same texts.

    Attributes:
        said_RT: see `Books`.
    """

    said_RT: np.ndarray = field(default_factory=lambda: np.zeros((0, 0), np.int32), compare=False)

    def _own(self, target: Forward, params: Params, cache: Cache) -> tuple[Forward, Params, Cache, Cache]:
        forward, weights, theirs, ours = super()._own(target, params, cache)
        return replace(forward, book_RT=self.said_RT), weights, theirs, ours


def replayed_draft(texts: Sequence[Text], model: Model, params: Params, drafts: int) -> ReplayedDraft:
    said = books(texts, model.config.vocab_size).said
    return ReplayedDraft("replayed", drafts, model=model, params=params, said_RT=_padded(said))


def _padded(texts: Sequence[Sequence[int]]) -> np.ndarray:
    rows = np.zeros((len(texts), max(map(len, texts))), np.int32)
    for row, text in zip(rows, texts, strict=True):
        row[: len(text)] = text
    return rows
