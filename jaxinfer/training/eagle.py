"""A draft head of EAGLE for a model that stays as it is (Li et al. 2024, "EAGLE", arXiv 2401.15077, section 4.2).

The head learns to expect the model's features and what its output matrix says of them. It is given the model's own
features first, and then, as when it drafts, those that it expected itself (Zhang et al. 2024, "Learning Harmonized
Representations for Speculative Sampling", arXiv 2408.15766, section 3.2).
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from jaxinfer.checkpoint import published
from jaxinfer.model import EagleHead, Model, ModelConfig, Params, read_eagle_config
from jaxinfer.model.attention import Scores
from jaxinfer.parallel import TENSOR, attend
from jaxinfer.training.beside import as_written, prepare
from jaxinfer.training.demo import hf_config
from jaxinfer.training.distill import distillation_loss
from jaxinfer.training.train import DenseRows, Loss, Recipe, compute_params

FILE = "model.safetensors"
# The parts of the loss: how far a feature is from the model's (smooth L1, the mean of its components), and what it
# means from what the model's does (Kullback-Leibler, in nats). The paper has 1 and 0.1. The demo model's features are
# large: after 75 steps of 1,024 tokens 10.9 % of the tokens were right so, 13.1 % with these, 12.8 % with 0.02 and 1.
FEATURE, TOKEN = 0.1, 1.0
CHUNK = 1024  # tokens of vocabulary whose logits exist at a time


def train_eagle(
    output: Path, target: Path, recipe: Recipe, *, passes: int = 3, generated: int = 0, root: Path | None = None
) -> list[float]:
    """Trains a head of the sizes of one of the target's layers on one device and writes it to `output`, in bfloat16
    and the layout that `Eagle` reads. It has the target's embeddings.

    Args:
      output: absent or an empty folder.
      target: folder of a checkpoint whose tokenizer has the token that ends a document of our text.
      recipe: whose row is cut to the target's context.
      passes: tokens that it drafts one after the other in training.
      generated: tokens that the target writes, to learn from in the place of the library; 0 for none.
      root: the standard library, by default the interpreter's.

    Returns:
      of each pass how often the token that the head takes for the likeliest is the target's in the held-out text.

    Raises:
      ValueError: an argument is out of range, or the target cannot have a head; before anything is computed.
    """
    if passes < 1:
        raise ValueError(f"passes = {passes} must be at least 1")
    task = prepare(output, target, recipe, root, generated)
    config = head_config(task.config)
    model, taught = task.load()
    head = EagleHead(read_eagle_config(config), model, embeds=False, bias=True)
    loss = eagle_loss(head, model, taught, passes)
    params, reports = task.train(model, taught, head.random_params(recipe.seed), loss)
    right = task.held_out(model, partial(_right, head, model, passes), taught, compute_params(params))
    arrays = dict(zip(head.parameters, as_written(params), strict=True))
    task.write(FILE, dict(published(head, arrays)), config, params, reports, right)
    return right


def head_config(target: ModelConfig) -> dict[str, Any]:
    """The fields of the `config.json` of a head for a model: a layer of the model's sizes."""
    sizes = {
        "vocab_size": target.vocab_size,
        "hidden_size": target.hidden_size,
        "intermediate_size": target.intermediate_size,
        "num_hidden_layers": 1,
        "num_attention_heads": target.num_heads,
        "num_key_value_heads": target.num_kv_heads,
        "head_dim": target.head_size,
        "max_position_embeddings": target.context,
    }
    fields = hf_config(sizes, 0)
    return {name: fields[name] for name in fields if name not in ("bos_token_id", "eos_token_id")} | {"bias": True}


def eagle_loss(head: EagleHead, model: Model, taught: Params, passes: int) -> Loss:
    """The mean over passes and tokens of how far the head is from the model, which stays as it is."""
    return Loss(partial(_loss, head, model, passes), taught)


def _loss(
    head: EagleHead, model: Model, passes: int, taught: Params, params: Params, tokens_BS: jax.Array
) -> jax.Array:
    features_TD, found = drafted(head, model, passes, taught, params, tokens_BS[:, :-1])
    _, head_VD, cap = model.head(taught, features_TD[:0])
    weights_T = jnp.full(len(features_TD), 1 / len(features_TD), jnp.float32)

    def one(expected_TD: jax.Array) -> jax.Array:
        apart_TD = jnp.abs(expected_TD.astype(jnp.float32) - features_TD.astype(jnp.float32))
        smooth_TD = jnp.where(apart_TD < 1, 0.5 * apart_TD**2, apart_TD - 0.5)
        heads = (expected_TD, head_VD, cap), (features_TD, head_VD, cap)
        nats = distillation_loss(*heads, weights_T, "forward-kl", chunk=CHUNK)
        return FEATURE * smooth_TD.mean() + TOKEN * nats

    return jnp.stack([one(expected_TD) for expected_TD in found]).mean()


def drafted(
    head: EagleHead, model: Model, passes: int, taught: Params, params: Params, tokens_BS: jax.Array
) -> tuple[jax.Array, list[jax.Array]]:
    """The model's features of each row's tokens, [T, D], and those that the head expects: in the first pass after the
    model's own, in the second after one that it expected in the first, and so on."""
    hidden_TD, _, _ = model.forward(taught, DenseRows(tokens_BS), (None,) * model.config.num_layers)
    features_TD = jax.lax.stop_gradient(model.head(taught, hidden_TD)[0])
    rows, state, found = DraftedRows(tokens_BS), (), [features_TD]
    for _ in range(passes):
        before_TD = _after_nothing(found[-1].reshape(*tokens_BS.shape, -1)).reshape(features_TD.shape)
        expected_TD, state = head.forward(params, model, taught, rows, before_TD, state)
        found.append(expected_TD)
    return features_TD, found[1:]


def _right(
    head: EagleHead, model: Model, passes: int, taught: Params, params: Params, tokens_BS: jax.Array
) -> list[jax.Array]:
    """Of each pass how often the likeliest token is the model's."""
    features_TD, found = drafted(head, model, passes, taught, params, tokens_BS[:, :-1])
    _, head_VD, _ = model.head(taught, features_TD[:0])

    def likeliest(features_TD: jax.Array) -> jax.Array:
        logits_TV = jnp.einsum("TD,VD->TV", features_TD, head_VD, preferred_element_type=jnp.float32)
        return jnp.argmax(jax.sharding.reshard(logits_TV, P(None, None)), axis=1)

    wanted_T = likeliest(features_TD)
    return [(likeliest(expected_TD) == wanted_T).mean() for expected_TD in found]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DraftedRows(DenseRows):
    """Rows that a head goes over several times. In pass j each token is drafted as the j-th after a text: it sees
    those of the passes before that come just before it, of each its last, and of the first pass all before these.

    The state of a layer is the keys and values of the passes so far, [B, S, K, H] each.
    """

    def attend(
        self, q_TKgH: jax.Array, k_TKH: jax.Array, v_TKH: jax.Array, state: Any, group: int, scores: Scores,
        sinks_Kg: jax.Array | None,
    ) -> tuple[jax.Array, Any]:  # fmt: skip
        rows, length = self.tokens_BS.shape

        def local(q_TKgH: jax.Array, *passes: tuple[jax.Array, jax.Array]) -> jax.Array:
            q, *passes_BSKH = jax.tree.map(lambda x: x.reshape(rows, length, *x.shape[1:]), (q_TKgH, *passes))
            return drafted_attention(q, passes_BSKH, scores.scale).reshape(q_TKgH.shape)

        passes, heads = (*state, (k_TKH, v_TKH)), P(None, TENSOR)
        specs = (heads, *((heads, heads),) * len(passes))
        return attend(local, specs, heads, q_TKgH, *passes), passes


def drafted_attention(q_BSKgH: jax.Array, passes: list[tuple[jax.Array, jax.Array]], scale: float) -> jax.Array:
    """Attention of the tokens of the last pass.

    Args:
        passes: keys and values of each, [B, S, K, H].
    """
    (first_BSKH, values_BSKH), drafts = passes[0], passes[1:][::-1]
    length, drafted = q_BSKgH.shape[1], len(drafts)
    scores = jnp.einsum("BSKgH,BsKH->BKgSs", q_BSKgH, first_BSKH, preferred_element_type=jnp.float32)
    seen_Ss = jnp.tri(length, k=-drafted, dtype=jnp.bool_)
    parts = [jnp.where(seen_Ss[None, None, None], scores, -jnp.inf)]
    for back, (k_BSKH, _) in enumerate(drafts):
        score = jnp.einsum("BSKgH,BSKH->BKgS", q_BSKgH, _later(k_BSKH, back), preferred_element_type=jnp.float32)
        there_S = jnp.arange(length) >= back
        parts.append(jnp.where(there_S[None, None, None], score, -jnp.inf)[..., None])
    weights = jax.nn.softmax(jnp.concatenate(parts, axis=-1) * scale, axis=-1).astype(values_BSKH.dtype)
    out_BSKgH = jnp.einsum("BKgSs,BsKH->BSKgH", weights[..., :length], values_BSKH)
    for back, (_, v_BSKH) in enumerate(drafts):
        weight_BSKg = jnp.moveaxis(weights[..., length + back], -1, 1)
        out_BSKgH += weight_BSKg[..., None] * _later(v_BSKH, back)[:, :, :, None]
    return out_BSKgH


def _later(x_BS: jax.Array, places: int) -> jax.Array:
    """Each token's moved to one that comes so many later."""
    return jnp.roll(x_BS, places, axis=1)


def _after_nothing(features_BSD: jax.Array) -> jax.Array:
    """The feature before each token: nothing before the first."""
    return jnp.pad(features_BSD[:, :-1], ((0, 0), (1, 0), (0, 0)))
