"""The demo model: a small Llama that writes Python, trained on the standard library's own source.

Three steps, each a command of this module, so that the middle one can run where there is an accelerator and
no network:

    python -m jaxinfer.training.demo prepare WORK            the text: tokens.npz, tokenizer, data.json
    python -m jaxinfer.training.demo fit WORK                the weights and the log: checkpoint/, training_log.json
    python -m jaxinfer.training.demo export WORK OUTPUT      the finished checkpoint: with log, curve and card
"""

import argparse
import json
import platform
import shutil
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import jax
import numpy as np
import tokenizers

from jaxinfer import checkpoint
from jaxinfer.model import Model, Params, read_config
from jaxinfer.parallel import make_mesh
from jaxinfer.training.card import draw_curve, figure_class, write_card
from jaxinfer.training.data import HELD_OUT, TokenData, end_of_text, read_library, tokenize_library
from jaxinfer.training.tokenizer import train_tokenizer, write_tokenizer
from jaxinfer.training.train import Recipe, Report, compute_params, train

# About 11 million parameters: 22 MB in bfloat16.
SIZES = {
    "vocab_size": 4096,
    "hidden_size": 384,
    "intermediate_size": 1024,
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 1024,
}
SHARD_BYTES = 14_000_000
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


def train_demo(output: Path, recipe: Recipe | None = None) -> None:
    """Makes the demo model and writes it to `output`: minutes on an H200, about a day on a CPU.

    Raises:
      ValueError: `output` is neither absent nor an empty folder, or the running interpreter comes without the
        source of its standard library.
      ModuleNotFoundError: matplotlib, from the extra `plots`, is missing.
    """
    # What stands in the way of `export` would otherwise show only after the training.
    check_output(output)
    figure_class()
    with TemporaryDirectory() as work:
        prepare(Path(work))
        fit(Path(work), Recipe() if recipe is None else recipe)
        export(Path(work), output)


def check_output(output: Path) -> None:
    """Refuses a place that holds something: a checkpoint of old and new files would be none."""
    if output.exists() and not output.is_dir():
        raise ValueError(f"{output} is a file; it must be absent or an empty folder")
    if output.is_dir() and any(output.iterdir()):
        raise ValueError(f"{output} is not empty; it must be absent or an empty folder")


def prepare(work: Path, root: Path | None = None, vocab_size: int = SIZES["vocab_size"]) -> None:
    """Reads the standard library (at `root`, by default the interpreter's), trains the tokenizer, encodes."""
    work.mkdir(parents=True, exist_ok=True)
    library = read_library(root)
    tokenizer = train_tokenizer((document.text for document in library.train), vocab_size)
    data = tokenize_library(library, tokenizer)
    write_tokenizer(tokenizer, work, SIZES["max_position_embeddings"])
    np.savez_compressed(work / "tokens.npz", **asdict(data))
    facts = {
        "python": platform.python_version(),
        "train_files": len(library.train),
        "train_bytes": sum(len(document.text.encode()) for document in library.train),
        "train_tokens": len(data.train_T),
        "held_out_files": HELD_OUT,
        "held_out_bytes": data.held_out_bytes,
        "held_out_tokens": len(data.held_out_T),
    }
    (work / "data.json").write_text(_json(facts))


def fit(work: Path, recipe: Recipe, sizes: dict[str, int] | None = None) -> None:
    """Trains on what `prepare` left in `work`, and writes the checkpoint and the log beside it.

    An older `checkpoint` in `work` is replaced.
    """
    tokenizer = tokenizers.Tokenizer.from_file(str(work / "tokenizer.json"))
    config = hf_config(SIZES if sizes is None else sizes, end_of_text(tokenizer))
    model = Model(read_config(config), make_mesh(devices=jax.devices()[:1]), dtype="float32")
    params, reports = train(model, model.random_params(recipe.seed), _read_tokens(work), recipe, print_report)
    shutil.rmtree(work / "checkpoint", ignore_errors=True)
    write_checkpoint(work / "checkpoint", model, params, config, work)
    (work / "training_log.json").write_text(training_log(params, recipe, reports))


def export(work: Path, output: Path) -> None:
    """Copies the checkpoint and the log from `work` to `output`, and adds the loss curve and the model card.

    Raises:
      ModuleNotFoundError: matplotlib, from the extra `plots`, is missing; nothing is written then.
    """
    figure_class()
    output.mkdir(parents=True, exist_ok=True)
    for path in (*sorted((work / "checkpoint").iterdir()), work / "training_log.json"):
        shutil.copyfile(path, output / path.name)
    data, log = (json.loads((work / name).read_text()) for name in ("data.json", "training_log.json"))
    draw_curve(log, output / "loss.png")
    write_card(data, log, output / "README.md")


def training_log(params: Params, recipe: Recipe, reports: list[Report], **facts: Any) -> str:
    """The text of `training_log.json`: how a training was made, and its reports; `facts` come first."""
    log = facts | {
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "parameters": sum(param.size for param in params),
        "recipe": asdict(recipe),
        "reports": [asdict(report) for report in reports],
    }
    return _json(log)


def hf_config(sizes: dict[str, int], end_id: int) -> dict[str, Any]:
    """The fields of `config.json` for a Llama of these sizes."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **sizes,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "bos_token_id": end_id,
        "eos_token_id": end_id,
        "torch_dtype": "bfloat16",
    }


def write_checkpoint(
    folder: Path, model: Model, params: Params, config: dict[str, Any], tokenizer: Path, **files: str
) -> None:
    """Writes master weights in bfloat16, with the tokenizer's files from its folder, and `files` beside them."""
    arrays = dict(zip(model.parameters, compute_params(params), strict=True))
    generation = {name: config[name] for name in ("bos_token_id", "eos_token_id")}
    files |= {name: (tokenizer / name).read_text(encoding="utf-8") for name in TOKENIZER_FILES}
    files |= {"config.json": _json(config), "generation_config.json": _json(generation)}
    checkpoint.export(folder, model, arrays, files, SHARD_BYTES)


def _read_tokens(work: Path) -> TokenData:
    with np.load(work / "tokens.npz") as file:
        return TokenData(file["train_T"], file["held_out_T"], int(file["held_out_bytes"]))


def print_report(report: Report) -> None:
    print(
        f"step {report.step:5}  {report.seconds:6.1f} s  loss {report.loss:.3f}  "
        f"held out {report.held_out_loss:.3f} a token, {report.held_out_per_byte:.4f} a byte",
        flush=True,
    )


def _json(content: dict[str, Any]) -> str:
    return json.dumps(content, indent=2) + "\n"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    steps = parser.add_subparsers(required=True)
    command = steps.add_parser("prepare")
    command.add_argument("work", type=Path)
    command.set_defaults(run=lambda args: prepare(args.work))
    command = steps.add_parser("fit")
    command.add_argument("work", type=Path)
    for name in ("steps", "batch", "seed"):
        command.add_argument(f"--{name}", type=int, default=getattr(Recipe, name))
    command.set_defaults(run=lambda args: fit(args.work, Recipe(steps=args.steps, batch=args.batch, seed=args.seed)))
    command = steps.add_parser("export")
    command.add_argument("work", type=Path)
    command.add_argument("output", type=Path)
    command.set_defaults(run=lambda args: export(args.work, args.output))
    return parser


if __name__ == "__main__":
    arguments = _parser().parse_args()
    arguments.run(arguments)
