"""The committed golden files: what a small random model of each family answers in float32."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

DATA = Path(__file__).parent / "data"


@dataclass(frozen=True)
class Golden:
    """A random model and its greedy continuations of three prompts.

    `config` is its `config.json`. `tensors` gives the shape of every tensor by its name on disk; `weights.py` fills
    them from `seed`. `context` is the context length, in tokens, that an engine must be given for the same rotary
    frequencies. A sequence is its prompt followed by the generated tokens; `logits[i]` is float32 of shape
    [len(sequences[i]), vocabulary], the logits after each of its tokens.
    """

    config: dict
    tensors: dict[str, tuple[int, ...]]
    seed: int
    context: int
    prompts: list[list[int]]
    sequences: list[list[int]]
    logits: list[np.ndarray]


def cases() -> list[str]:
    """Names of the committed models, sorted."""
    return sorted(path.stem for path in DATA.glob("*.json") if path.stem != "demo")


def load(case: str) -> Golden:
    """Read one committed model. Raises FileNotFoundError when there is none of that name."""
    facts = json.loads((DATA / f"{case}.json").read_text())
    with np.load(DATA / f"{case}.npz") as arrays:
        prompts, sequences = _prompts_and_sequences(arrays)
        return Golden(
            config=facts["config"],
            tensors={name: tuple(shape) for name, shape in facts["tensors"].items()},
            seed=facts["seed"],
            context=facts["context"],
            prompts=prompts,
            sequences=sequences,
            logits=_split(arrays["logits"], arrays["sequence_lengths"]),
        )


@dataclass(frozen=True)
class Demo:
    """What the demo model answers in float32, its checkpoint being part of the package.

    `texts` encode to `prompts`; a sequence is its prompt followed by the generated tokens, and `margins[i, j]` says
    by how much generated token j of sequence i leads the second best. For the first few prompts `logits[i]` is
    float32 of shape [len(prompts[i]), len(columns)], the logits of the tokens `columns`, and `logsumexp[i]`, of
    shape [len(prompts[i])], goes over the whole vocabulary. `deviation` is the standard deviation of all the logits
    of those prompts, the scale of a tolerance.
    """

    texts: list[str]
    prompts: list[list[int]]
    sequences: list[list[int]]
    margins: np.ndarray
    columns: np.ndarray
    logits: list[np.ndarray]
    logsumexp: list[np.ndarray]
    deviation: float

    def certain(self) -> list[int]:
        """Length of each sequence up to its first token that a rounding error could change.

        Logits that agree to 1e-4 of their deviation cannot turn a lead of twice that.
        """
        too_close = self.margins < 2e-4 * self.deviation
        generated = np.where(too_close.any(axis=1), too_close.argmax(axis=1), too_close.shape[1])
        return [len(prompt) + int(count) for prompt, count in zip(self.prompts, generated, strict=True)]


def load_demo() -> Demo:
    """Read the demo model's answers. Raises FileNotFoundError when there are none."""
    facts = json.loads((DATA / "demo.json").read_text())
    with np.load(DATA / "demo.npz") as arrays:
        prompts, sequences = _prompts_and_sequences(arrays)
        rows = [len(prompt) for prompt in prompts]
        with_logits = int(np.searchsorted(np.cumsum(rows), len(arrays["logits"]))) + 1
        return Demo(
            texts=facts["texts"],
            prompts=prompts,
            sequences=sequences,
            margins=arrays["margins"],
            columns=arrays["columns"],
            logits=_split(arrays["logits"], rows[:with_logits]),
            logsumexp=_split(arrays["logsumexp"], rows[:with_logits]),
            deviation=facts["deviation"],
        )


def _prompts_and_sequences(arrays) -> tuple[list[list[int]], list[list[int]]]:
    sequences = [part.tolist() for part in _split(arrays["tokens"], arrays["sequence_lengths"])]
    lengths = arrays["prompt_lengths"].tolist()
    return [sequence[:length] for sequence, length in zip(sequences, lengths, strict=True)], sequences


def _split(rows: np.ndarray, lengths) -> list[np.ndarray]:
    return np.split(rows, np.cumsum(lengths)[:-1])
