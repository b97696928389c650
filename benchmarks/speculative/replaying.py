"""Text that the demo model wrote, and what was proposed meanwhile: recorded, and written again, token for token, by a
larger model of random weights."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from benchmarks.serving.workload import Job
from jaxinfer.decode.batch import Batch
from jaxinfer.decode.forward import Cache, Forward
from jaxinfer.decode.sampling_params import SamplingParams
from jaxinfer.decode.speculative import DraftModel, PromptLookup
from jaxinfer.decode.speculative.lookup import propose
from jaxinfer.engine import Engine
from jaxinfer.llm import LLM
from jaxinfer.model import Model, Params


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
        raise FileNotFoundError(f"{path} is not there; the part `copying` records it, or for a draft `drafting`")
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
