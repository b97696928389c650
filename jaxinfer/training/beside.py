"""What the trainings of heads have in common: a model stays as it is, and something small beside it learns from its
hidden states on the demo model's text."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from jaxinfer import checkpoint
from jaxinfer.model import Model, ModelConfig, Params, read_config
from jaxinfer.parallel import make_mesh
from jaxinfer.training.data import TokenData, held_out_rows, read_library, tokenize_library
from jaxinfer.training.demo import check_output, training_log
from jaxinfer.training.generated import check_text, generate_stream
from jaxinfer.training.student import teacher_tokenizer
from jaxinfer.training.train import Loss, Recipe, adamw, check_attention, compute_params, dispatches, initial_state


@dataclass(frozen=True)
class Task:
    """What is to be trained, where nothing is computed yet.

    Attributes:
        output: absent or an empty folder.
        target: folder of the checkpoint of the model.
        config: the model's.
        recipe: whose row is at most the model's context.
        generated: tokens that the model writes, to be read in the place of the library; 0 for none.
    """

    output: Path
    target: Path
    config: ModelConfig
    data: TokenData
    recipe: Recipe
    generated: int = 0

    def load(self) -> tuple[Model, Params]:
        """The model on one device, with its weights."""
        model = Model(self.config, make_mesh(devices=jax.devices()[:1]))
        return model, model.params(checkpoint.load(self.target, model))

    def train(self, model: Model, taught: Params, params: Params, loss: Loss) -> tuple[Params, list[dict[str, float]]]:
        """The master weights that began as `params`, and the reports. `taught` are the model's."""
        optimizer, _ = adamw(self.recipe)
        reports: list[dict[str, float]] = []
        text_T = self.data.train_T
        if self.generated:
            text_T = generate_stream(model, taught, text_T, self.generated, self.recipe.seed)
        with jax.set_mesh(model.mesh):
            state, train_T = initial_state(params, optimizer), jax.device_put(text_T)
            begin = perf_counter()
            for step, params, trained in dispatches(optimizer, state, loss, train_T, self.recipe):  # noqa: B007, the last ones are returned
                report = {"step": step, "loss": trained, "seconds": perf_counter() - begin}
                print(f"step {step:5}  {report['seconds']:6.1f} s  loss {report['loss']:.3f}", flush=True)
                reports.append(report)
        return params, reports

    def held_out(self, model: Model, hits: Callable[..., list[jax.Array]], *arrays: Params) -> list[float]:
        """The means of what `hits(*arrays, tokens_BS)` gives of each row of the held-out text; of its end, which makes
        no whole row, nothing is asked."""
        hits = jax.jit(hits)
        rows_IBS, counted_IBS = held_out_rows(self.data.held_out_T, self.recipe.row, 1)
        whole = [rows_BS for rows_BS, counted_BS in zip(rows_IBS, counted_IBS, strict=True) if counted_BS.all()]
        with jax.set_mesh(model.mesh):
            found = [jax.tree.map(float, hits(*arrays, jnp.asarray(one))) for one in whole]
        return np.mean(found, axis=0).tolist()

    def write(
        self, file: str, tensors: dict[str, np.ndarray], config: dict[str, Any], params: Params,
        reports: list[dict[str, float]], right: list[float],
    ) -> None:  # fmt: skip
        """Writes a file of tensors, its `config.json`, and the log.

        Args:
            params: the master weights.
            right: how often each guess was right in the held-out text.
        """
        print("held out, right: " + ", ".join(f"{100 * one:.1f} %" for one in right), flush=True)
        self.output.mkdir(parents=True, exist_ok=True)
        save_file(tensors, self.output / file)
        (self.output / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        facts = {"target": self.target.name, "generated": self.generated, "held_out_right": right}
        log = json.loads(training_log(params, self.recipe, [], **facts))
        text = json.dumps(log | {"reports": reports}, indent=2) + "\n"
        (self.output / "training_log.json").write_text(text)


def prepare(output: Path, target: Path, recipe: Recipe, root: Path | None = None, generated: int = 0) -> Task:
    """
    Args:
        output: absent or an empty folder.
        target: folder of a checkpoint whose tokenizer has the token that ends a document of our text.
        recipe: whose row is cut to the target's context.
        root: the standard library, by default the interpreter's.
        generated: see `Task`.

    Raises:
        ValueError: an argument is out of range, or nothing can be trained beside the target.
    """
    check_output(output)
    config = read_config(target)
    check_attention(f"the target {target}", config)
    data = tokenize_library(read_library(root), teacher_tokenizer(target))
    recipe = recipe.within(config.context)
    check_text(data.train_T, generated, recipe)
    return Task(output, target, config, data, recipe, generated)


def as_written(params: Params) -> list[np.ndarray]:
    """Master weights as a file holds them, on the host."""
    return [np.asarray(param) for param in compute_params(params)]
