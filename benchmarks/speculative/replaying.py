"""Text that the demo model wrote, and how much of what was proposed meanwhile was right: recorded, and written again,
token for token, by a larger model of random weights."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from benchmarks.serving.offline import request
from benchmarks.serving.workload import Job
from benchmarks.speculative.methods import changed
from jaxinfer.decode.batch import Batch
from jaxinfer.decode.forward import Cache, Forward, Ran
from jaxinfer.decode.slots import SlotState
from jaxinfer.decode.speculative import PromptLookup, Proposal, Speculation, Tree, depth_of
from jaxinfer.decode.speculative.lookup import propose
from jaxinfer.decode.tree import GrownTree
from jaxinfer.engine import Engine
from jaxinfer.engine.gate import Gate
from jaxinfer.model import Params


@dataclass(frozen=True)
class Text:
    """A prompt and what followed it.

    Attributes:
        accepted: proposed tokens that are right in each step, from the second token of the output on.
        right: of a method whose proposals depend on nothing but the text, how many are right after each token of the
            output but the last.
    """

    prompt: tuple[int, ...]
    output: tuple[int, ...]
    accepted: tuple[int, ...] = ()
    right: tuple[int, ...] = ()


def drafted(engine: Engine, jobs: Sequence[Job], outputs: Sequence[Sequence[int]]) -> list[Text]:
    """What the engine wrote, with how many proposals of its method are right: it is asked to go on from each place."""
    engine.gate = engine.scheduler.gate = Gate(engine.layout)
    longest, texts = engine.layout.depth + 2, []
    for job, output in zip(jobs, outputs, strict=True):
        ends = range(len(output) - 1)
        asked = [Job((*job.prompt, *output[:end]), min(longest, len(output) - end)) for end in ends]
        right = [count for group in _together(engine, asked) for count in _right(engine, group)]
        texts.append(Text(job.prompt, tuple(output), tuple(_accepted(right)), tuple(right)))
    return texts


def _together(engine: Engine, jobs: Sequence[Job]) -> Iterator[list[Job]]:
    """As many as have slots, and have all of their prompts in one step: then none decodes beside a prompt."""
    group: list[Job] = []
    for job in jobs:
        tokens = sum(len(one.prompt) for one in group) + len(job.prompt)
        if group and (len(group) == engine.layout.slots or tokens > engine.options.max_num_batched_tokens):
            yield group
            group = []
        group.append(job)
    yield group


def _right(engine: Engine, jobs: Sequence[Job]) -> list[int]:
    """Of the first step after each prompt's, how many proposed tokens are right: those before the first that another
    one had to be put in the place of. The last token of an output counts as the model's own."""
    begun, right = set[int](), dict[int, int]()
    for number, job in enumerate(jobs):
        engine.add(request(number, job))
    while engine.busy:
        for update in engine.step():
            number = update.request.id
            if number not in begun:
                begun.add(number)
                assert len(update.tokens) == 1
            elif number not in right:
                correct = min(update.corrected, default=engine.layout.depth)
                right[number] = min(correct, jobs[number].output - 2)
    return [right[number] for number in range(len(jobs))]


def _accepted(right: Sequence[int]) -> Iterator[int]:
    """In each step, as one comes after the other."""
    at = 0
    while at < len(right):
        yield right[at]
        at += right[at] + 1


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


def at_random(count: int, prompt: int, output: int, vocabulary: int) -> list[Text]:
    """Texts of so many tokens that nobody foresees, as many different ones as a vocabulary of this size lets a model
    tell apart; nothing that is proposed is right."""
    rng, tokens = np.random.default_rng(0), vocabulary // count
    drawn = [tuple(rng.integers(0, tokens, prompt + output).tolist()) for _ in range(count)]
    return [Text(text[:prompt], text[prompt:], right=(0,) * (output - 1)) for text in drawn]


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
        raise FileNotFoundError(f"{path} is not there; the part `copying` records it, or `drafting`")
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

    def __call__(self, params: Params, cache: Cache, batch: Batch, rows_W: jax.Array) -> Ran:
        ran = super().__call__(params, cache, batch, rows_W)
        text_W, place_W = batch.tokens_T[rows_W] // self.base, batch.positions_T[rows_W] + 1
        next_W = jnp.asarray(self.book_RT).at[text_W, place_W].get(mode="clip")
        row_W = jnp.arange(len(next_W), dtype=jnp.int32)
        logits_WV = jax.sharding.reshard(ran.logits_WV, P(None, None)).at[row_W, next_W].set(jnp.inf)
        return replace(ran, logits_WV=logits_WV)


def numbered(texts: Sequence[Text], vocabulary: int) -> tuple[int, list[list[int]]]:
    """The base, and the texts in the numbers that a `Replaying` model knows them by: token t of text r is
    r x base + t.

    Raises:
        ValueError: the vocabulary is too small for so many.
    """
    base = 1 + max(max(text.prompt + text.output) for text in texts)
    if base * len(texts) > vocabulary:
        raise ValueError(f"{len(texts)} texts of {base} tokens each need {base * len(texts)}; there are {vocabulary}")
    whole = (text.prompt + text.output for text in texts)
    return base, [[number * base + token for token in row] for number, row in enumerate(whole)]


def replay(engine: Engine, texts: Sequence[Text]) -> list[Job]:
    """Lets an engine write these texts, whatever its weights, and returns the jobs that ask for them.

    Raises:
        ValueError: the vocabulary is too small for so many.
    """
    base, book = numbered(texts, engine.model.config.vocab_size)
    programs, own = engine.runner.programs, {"book_RT": _padded(book), "base": base}
    programs.forward = Replaying(**vars(programs.forward) | own)
    return [Job(tuple(ids[: len(text.prompt)]), len(text.output)) for ids, text in zip(book, texts, strict=True)]


def replayed(method: Speculation, texts: Sequence[Text], vocabulary: int) -> Speculation:
    """The method, of which as many proposals are right after each token as were recorded there, at its own cost; the
    others are its own, as tokens of another text, which are never right. For an engine that replays the same texts.

    Of a tree those on its longest path are right; a tree that grows has such a path, and all else follows the newest
    token.
    """
    assert len(texts) > 1
    (base, book), depth, tree = numbered(texts, vocabulary), depth_of(method), method.tree
    book_RT, right_RT = _padded(book), _padded([(0,) * len(text.prompt) + text.right for text in texts])
    path_d = np.arange(depth) if not isinstance(tree, Tree) else np.array(max(tree.paths, key=len)[1:]) - 1
    ahead_1d = jnp.arange(1, depth + 1, dtype=jnp.int32)[None]
    node_k = np.arange(method.num_speculative_tokens, dtype=np.int32)
    parents_k = np.where(node_k < depth, node_k - 1, -1)

    def change(proposal: Proposal, state: SlotState) -> Proposal:
        text_B1, place_B1 = state.token_B[:, None] // base, state.length_B[:, None]
        right_B1 = jnp.asarray(right_RT).at[text_B1, place_B1].get(mode="clip")
        book_Bd = jnp.asarray(book_RT).at[text_B1, place_B1 + ahead_1d].get(mode="clip")
        wrong_Bk = (text_B1 + 1) % len(texts) * base + proposal.drafts_Bk % base
        drafts_Bk = wrong_Bk.at[:, path_d].set(jnp.where(ahead_1d <= right_B1, book_Bd, wrong_Bk[:, path_d]))
        parents_Bk = jnp.broadcast_to(parents_k, drafts_Bk.shape) if isinstance(tree, GrownTree) else None
        return Proposal(drafts_Bk, parents_Bk=parents_Bk)

    return changed(method, change)


def _padded(texts: Sequence[Sequence[int]]) -> np.ndarray:
    rows = np.zeros((len(texts), max(map(len, texts))), np.int32)
    for row, text in zip(rows, texts, strict=True):
        row[: len(text)] = text
    return rows
