"""Medusa heads for a model that stays as it is (Cai et al. 2024, "Medusa", arXiv 2401.10774, section 2.2.1: Medusa-1).

A head learns from the hidden states of a text which token stands there two places on, the next head three. All heads
have the model's own output matrix, so that they are small: a residual block each.
"""

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from jaxinfer.decode.speculative.medusa import FILE, Head, head_logits
from jaxinfer.model import Model, Params
from jaxinfer.training.beside import as_written, prepare
from jaxinfer.training.train import DenseRows, Loss, Recipe, compute_params, cross_entropy

DECAY = 0.8  # of a head's part in the loss, from each head to the next, which is right more seldom


def train_heads(
    output: Path, target: Path, recipe: Recipe, *, heads: int = 3, generated: int = 0, root: Path | None = None
) -> list[float]:
    """Trains heads on one device and writes them to `output`, in bfloat16 and the layout that `Medusa` reads.

    Args:
      output: absent or an empty folder.
      target: folder of a checkpoint whose tokenizer has the token that ends a document of our text.
      recipe: whose row is cut to the target's context.
      generated: tokens that the target writes, to learn from in the place of the library; 0 for none.
      root: the standard library, by default the interpreter's.

    Returns:
      of each head how often the token that it takes for the likeliest is right in the held-out text.

    Raises:
      ValueError: an argument is out of range, or the target cannot have heads; before anything is computed.
    """
    if heads < 1:
        raise ValueError(f"heads = {heads} must be at least 1")
    task = prepare(output, target, recipe, root, generated)
    if task.recipe.row < heads + 2:
        raise ValueError(f"row is {task.recipe.row}; it must be at least {heads + 2} for {heads} heads")
    model, taught = task.load()
    params, reports = task.train(model, taught, identities(model, heads), medusa_loss(model, taught))
    right = task.held_out(model, partial(_right, model), taught, compute_params(params))
    facts = {"medusa_num_heads": heads, "medusa_num_layers": 1, "base_model_name_or_path": target.name}
    task.write(FILE, dict(zip(_names(heads), as_written(params), strict=True)), facts, params, reports, right)
    return right


def identities(model: Model, heads: int) -> Params:
    """Weight and bias of each head's block, which begin at zero: the head is the model's own."""
    D = model.config.hidden_size
    return [array for _ in range(heads) for array in (jnp.zeros((D, D), jnp.float32), jnp.zeros(D, jnp.float32))]


def _names(heads: int) -> list[str]:
    """Of the tensors of a file of heads."""
    return [f"{head}.0.linear.{part}" for head in range(heads) for part in ("weight", "bias")]


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


def _right(model: Model, taught: Params, params: Params, tokens_BS: jax.Array) -> list[jax.Array]:
    """Of each head how often the token that it takes for the likeliest is right; of the ends of rows nothing is
    asked."""
    pairs = _pairs(model, taught, params, tokens_BS)
    whole = [(jax.sharding.reshard(logits(), P(None, None)), targets_T) for logits, targets_T in pairs]
    return [(jnp.argmax(logits_TV, axis=1) == targets_T).mean() for logits_TV, targets_T in whole]
