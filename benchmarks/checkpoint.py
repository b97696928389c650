"""A checkpoint of random weights in the shapes of a model of configs/models, for what reads one, such as a server.

    python -m benchmarks.checkpoint llama-3-8b FOLDER

The tokenizer is the demo model's; a larger vocabulary has a word for every other token, so that each one drawn is
text: an answer whose tokens have none would come in few pieces, and late.
"""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.bench import MODELS, random_model
from benchmarks.record import arguments_of
from jaxinfer.checkpoint import export
from jaxinfer.llm import DEMO
from jaxinfer.training.demo import TOKENIZER_FILES

TOKENIZER = "tokenizer.json"
SHARD_BYTES = 5 * 10**9  # of one file, as large checkpoints are published


def write(source: Path, folder: Path) -> None:
    """Writes the model of the `config.json` in `source` into `folder`.

    Raises:
        ValueError: `folder` exists.
    """
    model, params = random_model(source)
    files = {name: (DEMO / name).read_text(encoding="utf-8") for name in TOKENIZER_FILES}
    files[TOKENIZER] = with_words(files[TOKENIZER], model.config.vocab_size)
    files["config.json"] = (source / "config.json").read_text(encoding="utf-8")
    export(folder, model, dict(zip(model.parameters, params, strict=True)), files, SHARD_BYTES)


def with_words(tokenizer: str, size: int) -> str:
    """A `tokenizer.json` of byte pairs whose vocabulary goes on to that size, with words that no text is cut into."""
    content = json.loads(tokenizer)
    vocabulary = content["model"]["vocab"]
    vocabulary |= {f"Ġ<{token:x}>": token for token in range(len(vocabulary), size)}
    return json.dumps(content, ensure_ascii=False)


def main() -> None:
    parser = arguments_of("benchmarks.checkpoint", __doc__)
    parser.add_argument("model", choices=sorted(path.name for path in MODELS.iterdir()), help="of configs/models")
    parser.add_argument("folder", type=Path, help="that is to be made")
    options = parser.parse_args()
    write(MODELS / options.model, options.folder)


if __name__ == "__main__":
    main()
