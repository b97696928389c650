"""Golden answers of the embedded demo model: greedy continuations of code, and logits of a few prompts."""

import json
from pathlib import Path

import numpy as np
import oracle
import torch
from load import DATA, Demo, load_demo
from tokenizers import Tokenizer
from transformers import PreTrainedModel

FOLDER = Path(__file__).parents[2] / "jaxinfer" / "assets" / "demo"
NEW_TOKENS = 256
COLUMNS = 64  # logits of this many evenly spaced tokens are kept, and the logarithm of the sum over all
PROMPTS_WITH_LOGITS = 4
TOLERANCE = 2e-5  # of the logits' standard deviation, as for the families

PROMPTS = [
    "def fibonacci(n):",
    "def factorial(n):\n    ",
    "def is_prime(number):\n    if number < 2:\n",
    "class Stack:\n    def __init__(self):\n",
    "import numpy as np\n\n",
    "import os\nimport sys\n\ndef main():\n",
    "def quicksort(items):\n    if len(items) <= 1:\n        return items\n",
    "for i in range(10):\n    print(",
    "def read_lines(path):\n    with open(path) as file:\n",
    "class Node:\n    def __init__(self, value, next=None):\n        self.value = value\n",
    "def add(a, b):\n    return",
    'if __name__ == "__main__":\n',
    "def gcd(a, b):\n    while b:\n",
    "try:\n    value = int(text)\nexcept",
    "def reverse_string(text):\n    ",
    "squares = [x ** 2 for x in",
    "def binary_search(items, target):\n    low, high = 0, len(items) - 1\n",
    "@property\ndef name(self):\n    ",
    "def count_words(text):\n    counts = {}\n    for word in text.split():\n",
    "import json\n\ndef load_config(path):\n    ",
]


def record(folder: Path, expected: list[list[int]] | None = None) -> Demo:
    """Answer every prompt with the checkpoint in `folder`; sequences that are expected are only retraced.

    Raises ValueError when its context is too short.
    """
    model = oracle.load_model(folder)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    prompts = [tokenizer.encode(text).ids for text in PROMPTS]
    needed = max(map(len, prompts)) + NEW_TOKENS
    if needed > model.config.max_position_embeddings:
        context = model.config.max_position_embeddings
        raise ValueError(f"max_position_embeddings must be at least {needed}, is {context}")

    if expected is None:
        continuations = [continue_greedily(model, prompt) for prompt in prompts]
    else:
        continuations = [retrace(model, *both) for both in zip(prompts, expected, strict=True)]
    logits = [oracle.full_logits(model, prompt) for prompt in prompts[:PROMPTS_WITH_LOGITS]]
    columns = np.linspace(0, logits[0].shape[1] - 1, COLUMNS).astype(np.int32)
    return Demo(
        texts=PROMPTS,
        prompts=prompts,
        sequences=[prompt + new for prompt, (new, _) in zip(prompts, continuations, strict=True)],
        margins=np.array([margins for _, margins in continuations], np.float32),
        columns=columns,
        logits=[rows[:, columns] for rows in logits],
        logsumexp=[np.log(np.exp(rows.astype(np.float64)).sum(axis=1)).astype(np.float32) for rows in logits],
        deviation=float(np.concatenate(logits).std()),
    )


def continue_greedily(model: PreTrainedModel, prompt: list[int]) -> tuple[list[int], list[float]]:
    """NEW_TOKENS greedy tokens, an end of sequence among them or not, and the lead of each over the second best."""
    new, margins = [], []
    step, cache = torch.tensor([prompt]), None
    for _ in range(NEW_TOKENS):
        output = model(step, past_key_values=cache, use_cache=True)
        cache, last = output.past_key_values, output.logits[0, -1:].numpy()
        new.append(int(last.argmax()))
        margins.append(float(oracle.margins(last)[0]))
        step = torch.tensor([new[-1:]])
    return new, margins


def retrace(model: PreTrainedModel, prompt: list[int], sequence: list[int]) -> tuple[list[int], list[float]]:
    """The same of all positions at once, each after the tokens before it in `sequence`."""
    first = len(prompt) - 1
    rows = oracle.full_logits(model, sequence)[first : first + NEW_TOKENS]
    return rows.argmax(axis=1).tolist(), oracle.margins(rows).tolist()


def check(folder: Path) -> list[str]:
    """How the committed answers differ from what the oracle says of this folder now; empty when they do not."""
    try:
        committed = load_demo()
    except FileNotFoundError as error:
        return [f"demo: {error}"]
    if committed.texts != PROMPTS:
        return ["demo: differs in texts"]
    now = record(folder, committed.sequences)
    if committed.prompts != now.prompts:
        return ["demo: differs in prompts"]
    differences = [
        f"demo: differs in the continuation of prompt {i}"
        for i, certain in enumerate(committed.certain())
        if committed.sequences[i][:certain] != now.sequences[i][:certain]
    ]
    for name in ("logits", "logsumexp"):
        committed_values, values = (np.concatenate(getattr(demo, name)) for demo in (committed, now))
        error = np.abs(committed_values - values).max()
        if error > TOLERANCE * now.deviation:
            differences.append(f"demo: differs in {name} by {error:.1e}")
    return differences


def save(demo: Demo) -> None:
    """Write `data/demo.json` and `data/demo.npz`, as `load_demo` reads them."""
    facts = {"versions": oracle.versions(), "deviation": demo.deviation, "texts": demo.texts}
    (DATA / "demo.json").write_text(json.dumps(facts, indent=2) + "\n")
    np.savez_compressed(
        DATA / "demo.npz",
        prompt_lengths=np.array([len(prompt) for prompt in demo.prompts], np.int32),
        sequence_lengths=np.array([len(sequence) for sequence in demo.sequences], np.int32),
        tokens=np.concatenate(demo.sequences).astype(np.int32),
        margins=demo.margins,
        columns=demo.columns,
        logits=np.concatenate(demo.logits),
        logsumexp=np.concatenate(demo.logsumexp),
    )
