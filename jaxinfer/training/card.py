"""The demo model's card and loss curve, written from the figures of its training."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CARD = """---
license: other
license_name: psf-2.0
license_link: https://docs.python.org/3/license.html
language: code
library_name: jaxinfer
pipeline_tag: text-generation
---

# jaxinfer demo: a small model of Python code

A Llama of {parameters:.1f} million parameters, trained from random weights on the source of the Python standard
library. It exists so that jaxinfer, and anything else that reads Hugging Face checkpoints, has a real model to run
without a download. It writes text that looks like Python; it does not program.

| | |
|---|---|
| Data | standard library of Python {python}: {train_files:,} files, {megabytes:.1f} MB, {train_tokens:,} tokens |
| Left out | other people's packages, generated tables, odd test data (`jaxinfer/training/data.py` lists them) |
| Held out | {held_out}: {held_out_bytes:,} bytes; their tests are left out |
| Held-out loss | **{per_byte:.4f} nats ({bits:.3f} bits) per byte**, {per_token:.3f} nats per token |
| Training loss | {loss:.3f} nats per token over the last {report} steps |
| Training | {steps:,} steps of {batch} x {row} tokens ({passes:.1f} passes), AdamW, {seconds:.0f} s on one {device} |
| Weights | bfloat16, tied embeddings, grouped-query attention, context {row} |
| Licence | the training text is under the [PSF licence](https://docs.python.org/3/license.html); so is this model |

![Loss by training step](loss.png)

To train it again:

    uv run jaxinfer train demo

or, where the accelerator has no network, in three steps of which the second runs there:

    python -m jaxinfer.training.demo prepare WORK
    python -m jaxinfer.training.demo fit WORK --steps {steps} --batch {batch} --seed {seed}
    python -m jaxinfer.training.demo export WORK jaxinfer/assets/demo

A document, and so a prompt, begins with `<|endoftext|>`, which the tokenizer adds. The chat template writes what the
user says as a comment, for code to follow.
"""


def write_card(data: dict[str, Any], log: dict[str, Any], path: Path) -> None:
    """Writes the card from `data.json` and `training_log.json`."""
    recipe, last = log["recipe"], log["reports"][-1]
    text = CARD.format(
        parameters=log["parameters"] / 1e6,
        python=data["python"],
        train_files=data["train_files"],
        megabytes=data["train_bytes"] / 1e6,
        train_tokens=data["train_tokens"],
        held_out=", ".join(f"`{name}`" for name in data["held_out_files"]),
        held_out_bytes=data["held_out_bytes"],
        per_byte=last["held_out_per_byte"],
        bits=last["held_out_per_byte"] / math.log(2),
        per_token=last["held_out_loss"],
        loss=last["loss"],
        passes=last["tokens"] / data["train_tokens"],
        seconds=last["seconds"],
        device=log["device"],
        **{name: recipe[name] for name in ("report", "steps", "batch", "row", "seed")},
    )
    path.write_text(text)


def figure_class() -> type[Figure]:
    """Matplotlib's figure, which only the loss curve needs.

    Raises:
      ModuleNotFoundError: matplotlib is missing; the message names the extra that brings it.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise ModuleNotFoundError("the loss curve needs matplotlib: pip install 'jaxinfer[plots]'") from None
    return Figure


def draw_curve(log: dict[str, Any], path: Path) -> None:
    """Draws training and held-out loss by step."""
    steps = [report["step"] for report in log["reports"]]
    figure = figure_class()(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(steps, [report["loss"] for report in log["reports"]], label="training")
    axes.plot(steps, [report["held_out_loss"] for report in log["reports"]], label="held-out modules")
    axes.set_xlabel("step")
    axes.set_ylabel("loss, nats per token")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120)
