"""Make the golden files, or check that the committed ones are what transformers still answers.

    make_golden.py [--check] [case ...]      every family, or the cases named
    make_golden.py [--check] --demo FOLDER   the demo checkpoint in FOLDER

A check of everything includes the demo checkpoint where the repository holds one. README.md says how the environment
is made. The exit status of a check is 1 when a file differs.
"""

import argparse
import dataclasses
import json
import re
import sys
import tempfile
from pathlib import Path

import demo
import numpy as np
import oracle
from families import CASES, CONTEXT, DEFAULT_PROMPT_LENGTHS, PROMPT_LENGTHS, VOCABULARY
from load import DATA, Golden, cases, load
from safetensors import safe_open
from transformers import PreTrainedModel
from weights import write_checkpoint

NEW_TOKENS = 64
SEEDS = range(50)
TOLERANCE = 2e-5  # of the logits' standard deviation: what another CPU's order of summation may change
MARGIN = 1e-3  # of the same: far above the tolerance of any comparison, so that greedy tokens are well defined


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare with the committed files, write nothing")
    parser.add_argument("--demo", type=Path, metavar="FOLDER", help="a Llama checkpoint with its tokenizer.json")
    parser.add_argument("cases", nargs="*", metavar="case", help="names in families.py")
    arguments = parser.parse_args()
    unknown = sorted(set(arguments.cases) - set(CASES))
    if unknown:
        parser.error(f"unknown cases {unknown}, known are {sorted(CASES)}")

    everything = not arguments.cases and not arguments.demo
    chosen = list(CASES) if everything else arguments.cases
    folder = demo.FOLDER if everything and arguments.check and demo.FOLDER.exists() else arguments.demo
    if arguments.check:
        return report(chosen, folder, strangers=sorted(set(cases()) - set(CASES)))
    for case in chosen:
        save(case, make(case))
    if folder:
        demo.save(demo.record(folder))
    return 0


def report(chosen: list[str], folder: Path | None, strangers: list[str]) -> int:
    """Check the chosen cases, and the demo checkpoint if there is one, and print what differs; the exit status."""
    differences = [f"{case}: is not in families.py" for case in strangers]
    for case in chosen:
        differences += check(case)
    if folder:
        differences += demo.check(folder)
    checked = chosen + (["demo"] if folder else [])
    print("\n".join(differences) or f"the golden files agree: {', '.join(checked)}")
    return int(bool(differences))


def make(case: str) -> Golden:
    """The case with the first seed whose logits are lively and whose greedy tokens are well defined.

    Raises RuntimeError when there is none among SEEDS: the case then needs other gains in `weights.py`.
    """
    for seed in SEEDS:
        golden = answer(case, seed)
        complaint = weakness(golden)
        print(f"{case} seed {seed}: {complaint or 'good'}")
        if not complaint:
            return golden
    raise RuntimeError(f"no seed of {SEEDS} gives {case} good answers")


def check(case: str) -> list[str]:
    """How the committed case differs from what the oracle answers now; empty when it does not."""
    try:
        committed = load(case)
    except FileNotFoundError as error:
        return [f"{case}: {error}"]
    now = answer(case, committed.seed, committed.sequences)
    retraced = [retrace(prompt, rows) for prompt, rows in zip(now.prompts, now.logits, strict=True)]
    now = dataclasses.replace(now, sequences=retraced)
    facts = ("config", "tensors", "context", "prompts", "sequences")
    differing = [name for name in facts if getattr(committed, name) != getattr(now, name)]
    if not differing:
        error = max(np.abs(a - b).max() for a, b in zip(committed.logits, now.logits, strict=True))
        allowed = TOLERANCE * np.concatenate(now.logits).std()
        differing = [f"logits by {error:.1e}, allowed {allowed:.1e}"] if error > allowed else []
    return [f"{case}: differs in {name}" for name in differing]


def answer(case: str, seed: int, expected: list[list[int]] | None = None) -> Golden:
    """Build the case's model with the weights of this seed, and let it continue three random prompts.

    Where sequences are expected it takes these for its own: their logits tell whether they are.
    """
    random = np.random.RandomState(seed)
    lengths = PROMPT_LENGTHS.get(case, DEFAULT_PROMPT_LENGTHS)
    prompts = [random.randint(VOCABULARY, size=length).tolist() for length in lengths]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tensors = tensors_on_disk(CASES[case], folder)
        golden = Golden(CASES[case], tensors, seed, CONTEXT, prompts, sequences=[], logits=[])
        write_checkpoint(folder, golden)
        model = oracle.load_model(folder)
    # Dynamic scaling keeps the frequencies of the longest call so far: let that be the whole context, in every call.
    oracle.full_logits(model, [0] * CONTEXT)
    sequences = expected or [continue_greedily(model, prompt) for prompt in prompts]
    logits = [oracle.full_logits(model, sequence) for sequence in sequences]
    return dataclasses.replace(golden, sequences=sequences, logits=logits)


def tensors_on_disk(config: dict, folder: Path) -> dict[str, tuple[int, ...]]:
    """Shapes by the names of published checkpoints, which transformers restores when it saves."""
    (folder / "config.json").write_text(json.dumps(config))
    oracle.untrained(folder).save_pretrained(folder / "untrained")
    with safe_open(folder / "untrained" / "model.safetensors", "numpy") as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in sorted(file.keys())}


def continue_greedily(model: PreTrainedModel, prompt: list[int]) -> list[int]:
    """The prompt and NEW_TOKENS greedy tokens, all positions computed anew for each."""
    tokens = list(prompt)
    for _ in range(NEW_TOKENS):
        tokens.append(int(oracle.full_logits(model, tokens)[-1].argmax()))
    return tokens


def retrace(prompt: list[int], logits: np.ndarray) -> list[int]:
    """The prompt and NEW_TOKENS tokens, each the best after those before it in the sequence that has these logits."""
    first = len(prompt) - 1
    return prompt + logits[first : first + NEW_TOKENS].argmax(axis=1).tolist()


def weakness(golden: Golden) -> str:
    """Why a wrong implementation could pass, or a right one fail, against these answers; empty when neither."""
    deviation = np.concatenate(golden.logits).std()
    if not 0.1 < deviation < 10:
        return f"logits have standard deviation {deviation:.2g}"
    for prompt, sequence, logits in zip(golden.prompts, golden.sequences, golden.logits, strict=True):
        generated = sequence[len(prompt) :]
        if len(set(generated)) < 8:
            return f"only {len(set(generated))} different tokens among {NEW_TOKENS}"
        smallest = oracle.margins(logits[len(prompt) - 1 : -1]).min() / deviation
        if smallest < MARGIN:
            return f"the best two logits are {smallest:.1e} standard deviations apart"
    return ""


def save(case: str, golden: Golden) -> None:
    """Write `data/<case>.json` and `data/<case>.npz`, as `load` reads them."""
    facts = {
        "versions": oracle.versions(),
        "seed": golden.seed,
        "context": golden.context,
        "config": golden.config,
        "tensors": golden.tensors,
    }
    text = json.dumps(facts, indent=2)
    numbers_in_a_line = re.sub(r"\[[\d\s,]+\]", lambda match: " ".join(match[0].split()), text)
    (DATA / f"{case}.json").write_text(numbers_in_a_line + "\n")
    np.savez_compressed(
        DATA / f"{case}.npz",
        prompt_lengths=np.array([len(prompt) for prompt in golden.prompts], np.int32),
        sequence_lengths=np.array([len(sequence) for sequence in golden.sequences], np.int32),
        tokens=np.concatenate(golden.sequences).astype(np.int32),
        logits=np.concatenate(golden.logits),
    )


if __name__ == "__main__":
    sys.exit(main())
