"""Medusa heads for a model that stays as it is (Cai et al. 2024, "Medusa", arXiv 2401.10774, section 2.2.1: Medusa-1).

A head learns from the hidden states of a text which token stands there two places on, the next head three. All heads
have the model's own output matrix, so that they are small: a residual block each.
"""

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from time import perf_counter

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from safetensors.numpy import save_file

from jaxinfer import checkpoint
from jaxinfer.decode.speculative.medusa import FILE, Head, head_logits
from jaxinfer.model import Model, Params, read_config
from jaxinfer.parallel import make_mesh
from jaxinfer.training.data import TokenData, held_out_rows, read_library, tokenize_library, whole_rows
from jaxinfer.training.demo import check_output, training_log
from jaxinfer.training.student import teacher_tokenizer
from jaxinfer.training.train import (
    DenseRows,
    Loss,
    Recipe,
    adamw,
    check_attention,
    compute_params,
    cross_entropy,
    dispatches,
    initial_state,
)

DECAY = 0.8  # of a head's part in the loss, from each head to the next, which is right more seldom


def train_heads(
    output: Path, target: Path, recipe: Recipe, *, heads: int = 3, root: Path | None = None
) -> list[float]:
    """Trains heads on one device and writes them to `output`, in bfloat16 and the layout that `Medusa` reads.

    Args:
      output: absent or an empty folder.
      target: folder of a checkpoint whose tokenizer has the token that ends a document of our text.
      recipe: whose row is cut to the target's context.
      root: the standard library, by default the interpreter's.

    Returns:
      of each head how often the token that it takes for the likeliest is right in the held-out text.

    Raises:
      ValueError: an argument is out of range, or the target cannot have heads; before anything is computed.
    """
    check_output(output)
    if heads < 1:
        raise ValueError(f"heads = {heads} must be at least 1")
    config = read_config(target)
    check_attention(f"the target {target}", config)
    data = tokenize_library(read_library(root), teacher_tokenizer(target))
    recipe = recipe.within(config.context)
    if recipe.row < heads + 2:
        raise ValueError(f"row is {recipe.row}; it must be at least {heads + 2} for {heads} heads")
    whole_rows(len(data.train_T), recipe.row, recipe.batch)

    model = Model(config, make_mesh(devices=jax.devices()[:1]))
    taught = model.params(checkpoint.load(target, model))
    params, reports = _train(model, taught, identities(model, heads), data, recipe)
    right = _accuracy(model, taught, compute_params(params), data, recipe)
    print("held out, right: " + ", ".join(f"{100 * one:.1f} %" for one in right), flush=True)
    output.mkdir(parents=True, exist_ok=True)
    save_file({name: np.asarray(array) for name, array in named(compute_params(params)).items()}, output / FILE)
    facts = {"medusa_num_heads": heads, "medusa_num_layers": 1, "base_model_name_or_path": target.name}
    (output / "config.json").write_text(json.dumps(facts, indent=2) + "\n")
    log = json.loads(training_log(params, recipe, [], target=target.name, held_out_right=right)) | {"reports": reports}
    (output / "training_log.json").write_text(json.dumps(log, indent=2) + "\n")
    return right


def identities(model: Model, heads: int) -> Params:
    """Weight and bias of each head's block, which begin at zero: the head is the model's own."""
    D = model.config.hidden_size
    return [array for _ in range(heads) for array in (jnp.zeros((D, D), jnp.float32), jnp.zeros(D, jnp.float32))]


def named(params: Params) -> dict[str, jax.Array]:
    """The tensors of a file of heads."""
    names = [f"{head}.0.linear.{part}" for head in range(len(params) // 2) for part in ("weight", "bias")]
    return dict(zip(names, params, strict=True))


def medusa_loss(model: Model, taught: Params) -> Loss:
    """Mean nats of each head's token, a head's part DECAY times that of the one before; `taught` stays as it is."""
    return Loss(partial(_loss, model), taught)


def _loss(model: Model, taught: Params, params: Params, tokens_BS: jax.Array) -> jax.Array:
    # The logits of one head at a time: they are made anew for the gradient.
    nats = [jax.checkpoint(_nats)(*one) for one in _pairs(model, taught, params, tokens_BS)]
    return jnp.stack([DECAY**place * one for place, one in enumerate(nats)]).sum()


def _nats(logits_of: jax.tree_util.Partial, targets_T: jax.Array) -> jax.Array:
    return cross_entropy(logits_of(), targets_T).mean()


def _pairs(
    model: Model, taught: Params, params: Params, tokens_BS: jax.Array
) -> list[tuple[jax.tree_util.Partial, jax.Array]]:
    """Of each head what gives its logits, and the tokens that it should have said, [T]; row by row of the text, as far
    as that goes."""
    rows = DenseRows(tokens_BS[:, :-1])
    hidden_TD, _, _ = model.forward(taught, rows, (None,) * model.config.num_layers)
    normed_TD, own_VD, _ = model.head(taught, hidden_TD)
    normed_BSD = jax.lax.stop_gradient(normed_TD).reshape(*rows.tokens_BS.shape, -1)
    pairs = []
    for place, block in enumerate(zip(params[::2], params[1::2], strict=True)):
        known = normed_BSD.shape[1] - 1 - place
        x_TD = normed_BSD[:, :known].reshape(-1, normed_BSD.shape[2])
        logits = jax.tree_util.Partial(head_logits, Head((block,), None), x_TD, own_VD)
        pairs.append((logits, tokens_BS[:, 2 + place :].reshape(-1)))
    return pairs


def _train(
    model: Model, taught: Params, params: Params, data: TokenData, recipe: Recipe
) -> tuple[Params, list[dict[str, float]]]:
    """The master weights, and the reports."""
    optimizer, _ = adamw(recipe)
    reports: list[dict[str, float]] = []
    with jax.set_mesh(model.mesh):
        state, train_T, begin = initial_state(params, optimizer), jax.device_put(data.train_T), perf_counter()
        for step, params, loss in dispatches(optimizer, state, medusa_loss(model, taught), train_T, recipe):  # noqa: B007, the last ones are returned
            report = {"step": step, "loss": loss, "seconds": perf_counter() - begin}
            print(f"step {step:5}  {report['seconds']:6.1f} s  loss {report['loss']:.3f}", flush=True)
            reports.append(report)
    return params, reports


def _accuracy(model: Model, taught: Params, params: Params, data: TokenData, recipe: Recipe) -> list[float]:
    """Of each head how often the token that it takes for the likeliest is right; of what rows leave out at the end of
    the text, and at their own ends, nothing is asked."""

    @jax.jit
    def hits(taught: Params, params: Params, tokens_BS: jax.Array) -> list[jax.Array]:
        pairs = _pairs(model, taught, params, tokens_BS)
        whole = [(jax.sharding.reshard(logits(), P(None, None)), targets_T) for logits, targets_T in pairs]
        return [(jnp.argmax(logits_TV, axis=1) == targets_T).mean() for logits_TV, targets_T in whole]

    rows_IBS, counted_IBS = held_out_rows(data.held_out_T, recipe.row, 1)
    whole = [rows_BS for rows_BS, counted_BS in zip(rows_IBS, counted_IBS, strict=True) if counted_BS.all()]
    with jax.set_mesh(model.mesh):
        found: Sequence[list[float]] = [jax.tree.map(float, hits(taught, params, jnp.asarray(one))) for one in whole]
    return np.mean(found, axis=0).tolist()
