"""Training of a language model over dense rows: next-token loss by default, AdamW, many steps a dispatch.

Master weights and optimizer state are float32; the model computes in bfloat16.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from time import perf_counter
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import PartitionSpec as P

from jaxinfer.model import Model, ModelConfig, Params
from jaxinfer.model.attention import Scores
from jaxinfer.parallel import TENSOR, attend
from jaxinfer.training.data import TokenData, epochs, held_out_rows

# (params as the model computes with them, tokens_BS of S tokens a row) to what a step makes smaller. A pytree: arrays
# that it holds, such as another model's weights, are arguments of the compiled program.
Loss = jax.tree_util.Partial


@dataclass(frozen=True)
class Recipe:
    """How long and how fast: counts of steps, rows and tokens, and AdamW's rates (Loshchilov & Hutter 2019)."""

    steps: int = 2400
    batch: int = 32  # rows of one step
    row: int = 1024  # tokens that a row predicts
    learning_rate: float = 2e-3  # at its peak; it falls along a cosine to a tenth
    warmup: float = 0.05  # part of the steps in which the rate rises to its peak
    # Twenty times the usual: over ten passes of 8 million tokens, 0.1 left 0.758 nats a held-out byte, 1 left 0.707
    # and 2 left 0.690 (Kim et al. 2025, "Pre-training under infinite compute", on such repeated data).
    weight_decay: float = 2.0
    report: int = 200  # steps of one dispatch, each of which ends with a line of the log
    seed: int = 0

    def __post_init__(self):
        for name in ("steps", "batch", "row", "report"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if not 0 <= self.warmup < 1:
            raise ValueError(f"warmup is {self.warmup}; it must be in [0, 1)")

    def within(self, context: int) -> Self:
        """This recipe, with rows of at most `context` tokens."""
        return replace(self, row=min(self.row, context))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """Master weights, in the order of `Model.parameters`, and what the optimizer keeps; both float32."""

    params: Params
    optimizer: optax.OptState


@dataclass(frozen=True)
class Report:
    """One line of the log: means over the steps since the last one, and the held-out text's loss now.

    `loss` is what is trained on; the other two are of the next token, in nats: `held_out_loss` per token, and
    `held_out_per_byte` per byte, which does not depend on the tokenizer.
    """

    step: int
    tokens: int
    seconds: float
    learning_rate: float
    loss: float
    held_out_loss: float
    held_out_per_byte: float


def check_attention(name: str, config: ModelConfig) -> None:
    """A ValueError for a model that `DenseRows` cannot run; `name` is its subject."""
    if config.windows != (None,) or config.attention_soft_cap is not None or config.sinks:
        raise ValueError(
            f"{name} has attention windows {config.windows}, soft cap {config.attention_soft_cap} and sinks "
            f"{config.sinks}; only full attention without either is trained"
        )


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DenseRows:
    """B rows of S tokens, flattened, that see the tokens before them in their row: attention without a cache."""

    tokens_BS: jax.Array

    @property
    def tokens_T(self) -> jax.Array:
        return self.tokens_BS.reshape(-1)

    @property
    def positions_T(self) -> jax.Array:
        rows, length = self.tokens_BS.shape
        return jnp.tile(jnp.arange(length, dtype=jnp.int32), rows)

    def attend(
        self, q_TKgH: jax.Array, k_TKH: jax.Array, v_TKH: jax.Array, state: Any, group: int, scores: Scores,
        sinks_Kg: jax.Array | None,
    ) -> tuple[jax.Array, Any]:  # fmt: skip
        """See `jaxinfer.model.attention.Attends`; `state` is handed through."""
        if scores.window is not None or scores.soft_cap is not None or sinks_Kg is not None:
            raise ValueError(f"{scores} with sinks {sinks_Kg is not None}: only full attention is trained")
        rows, length = self.tokens_BS.shape

        def local(q_TKgH: jax.Array, k_TKH: jax.Array, v_TKH: jax.Array) -> jax.Array:
            q, k, v = (x.reshape(rows, length, *x.shape[1:]) for x in (q_TKgH, k_TKH, v_TKH))
            return causal_attention(q, k, v, scores.scale).reshape(q_TKgH.shape)

        heads = P(None, TENSOR)
        return attend(local, (heads, heads, heads), heads, q_TKgH, k_TKH, v_TKH), state


def causal_attention(q_BSKgH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, scale: float) -> jax.Array:
    """Plain attention, its scores kept for the gradient: memory grows with the square of S."""
    length = q_BSKgH.shape[1]
    seen_Ss = jnp.tri(length, dtype=jnp.bool_)
    scores = jnp.einsum("BSKgH,BsKH->BKgSs", q_BSKgH, k_BSKH, preferred_element_type=jnp.float32) * scale
    weights = jax.nn.softmax(jnp.where(seen_Ss[None, None, None], scores, -jnp.inf), axis=-1)
    return jnp.einsum("BKgSs,BsKH->BSKgH", weights.astype(v_BSKH.dtype), v_BSKH)


def token_losses(model: Model, params: Params, tokens_BS: jax.Array) -> jax.Array:
    """Nats of each next token, [B, S - 1], for `tokens_BS` of S tokens a row."""
    inputs_BS, targets_BS = tokens_BS[:, :-1], tokens_BS[:, 1:]
    batch, cache = DenseRows(inputs_BS), (None,) * model.config.num_layers
    hidden_TD, _, _ = model.forward(params, batch, cache)
    return cross_entropy(model.logits(params, hidden_TD), targets_BS.reshape(-1)).reshape(targets_BS.shape)


def cross_entropy(logits_TV: jax.Array, targets_T: jax.Array) -> jax.Array:
    """Nats of each target, [T]."""
    # A comparison, not a gather: the vocabulary may be sharded.
    chosen_TV = jnp.arange(logits_TV.shape[1], dtype=jnp.int32)[None, :] == targets_T[:, None]
    target_T = jnp.sum(jnp.where(chosen_TV, logits_TV, 0.0), axis=1)
    return jax.nn.logsumexp(logits_TV, axis=1) - target_T


def compute_params(params: Params) -> Params:
    """The weights as the model computes with them, and as a checkpoint keeps them."""
    return [param.astype(jnp.bfloat16) for param in params]


def adamw(recipe: Recipe) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """AdamW with the second moment of Brown et al. 2020 (appendix B); norms are not decayed."""
    peak, warmup = recipe.learning_rate, int(recipe.warmup * recipe.steps)
    schedule = optax.warmup_cosine_decay_schedule(0.0, peak, warmup, recipe.steps, end_value=0.1 * peak)
    optimizer = optax.adamw(schedule, b1=0.9, b2=0.95, weight_decay=recipe.weight_decay, mask=_are_matrices)
    return optax.chain(optax.clip_by_global_norm(1.0), optimizer), schedule


def _are_matrices(params: Params) -> list[bool]:
    return [param.ndim > 1 for param in params]


def next_token(model: Model) -> Loss:
    """Mean nats of the next token."""
    return Loss(partial(_next_token, model))


def _next_token(model: Model, params: Params, tokens_BS: jax.Array) -> jax.Array:
    return token_losses(model, params, tokens_BS).mean()


def train(
    model: Model, params: Params, data: TokenData, recipe: Recipe, watch: Callable[[Report], None],
    loss: Loss | None = None,
) -> tuple[Params, list[Report]]:  # fmt: skip
    """Trains a model.

    Args:
      params: where training begins, such as random weights; their memory is reused.
      watch: called with each report, one every `recipe.report` steps.
      loss: what is trained on, in nats; `next_token` by default.

    Returns:
      the master weights, and all reports.

    Raises:
      ValueError: the text is shorter than one batch, or the model's context than a row.
    """
    if recipe.row > model.context:
        raise ValueError(f"row is {recipe.row}; it must be at most the model's context, {model.context}")
    optimizer, schedule = adamw(recipe)
    held_out = held_out_rows(data.held_out_T, recipe.row, min(recipe.batch, 8))
    evaluate = _compiled_evaluation(model)
    loss = next_token(model) if loss is None else loss
    reports: list[Report] = []
    with jax.set_mesh(model.mesh):
        state, train_T = initial_state(params, optimizer), jax.device_put(data.train_T)
        begin = perf_counter()
        for step, params, trained in dispatches(optimizer, state, loss, train_T, recipe):
            nats = float(evaluate(params, *held_out))
            report = Report(
                step=step,
                tokens=step * recipe.batch * recipe.row,
                seconds=perf_counter() - begin,
                learning_rate=float(np.asarray(schedule(step - 1))),
                loss=trained,
                held_out_loss=nats / (len(data.held_out_T) - 1),
                held_out_per_byte=nats / data.held_out_bytes,
            )
            watch(report)
            reports.append(report)
    return params, reports


def initial_state(params: Params, optimizer: optax.GradientTransformation) -> TrainState:
    """Master weights of some weights, and what the optimizer begins with."""
    params = [param.astype(jnp.float32) for param in params]
    with jax.numpy_dtype_promotion("standard"):  # optax mixes dtypes
        return TrainState(params, jax.jit(optimizer.init)(params))


def descend(
    optimizer: optax.GradientTransformation, state: TrainState, loss: Callable[[Params], jax.Array]
) -> tuple[TrainState, jax.Array]:
    """One step of training: the state after it, and the loss of the master weights before."""
    value, gradients = jax.value_and_grad(loss)(state.params)
    with jax.numpy_dtype_promotion("standard"):  # optax mixes dtypes
        updates, kept = optimizer.update(gradients, state.optimizer, state.params)
        params = jax.tree.map(jnp.add, state.params, updates)
    return TrainState(params, kept), value


def dispatches(
    optimizer: optax.GradientTransformation, state: TrainState, loss: Loss, stream_T: jax.Array, recipe: Recipe
) -> Iterator[tuple[int, Params, float]]:
    """Trains on rows of a text. After each dispatch: the steps so far, the master weights, whose memory the next one
    reuses, and the mean loss of the steps of that dispatch.

    Raises:
      ValueError: the text is shorter than one batch.
    """
    starts = epochs(len(stream_T), recipe.row, recipe.batch, np.random.default_rng(recipe.seed))
    run = compiled_steps(optimizer, recipe.row)
    for first in range(0, recipe.steps, recipe.report):
        step = min(first + recipe.report, recipe.steps)
        state, losses_I = run(state, loss, stream_T, np.stack(list(islice(starts, step - first))))
        yield step, state.params, float(losses_I.mean())


def compiled_steps(optimizer: optax.GradientTransformation, row: int) -> Any:
    """The jitted (state, loss, stream_T, starts_IB) to (state, losses_I): one step for each I, in one dispatch."""

    def run(state: TrainState, loss: Loss, stream_T: jax.Array, starts_IB: jax.Array) -> tuple[TrainState, jax.Array]:
        def step(state: TrainState, starts_B: jax.Array) -> tuple[TrainState, jax.Array]:
            index_BS = starts_B[:, None] + jnp.arange(row + 1, dtype=jnp.int32)[None, :]
            tokens_BS = stream_T[index_BS].astype(jnp.int32)
            return descend(optimizer, state, lambda params: loss(compute_params(params), tokens_BS))

        return jax.lax.scan(step, state, starts_IB)

    return jax.jit(run, donate_argnums=0)


def _compiled_evaluation(model: Model) -> Callable[..., jax.Array]:
    """(params, rows_IBS, counted_IBS) to the sum of nats over what counts."""

    def evaluate(params: Params, rows_IBS: jax.Array, counted_IBS: jax.Array) -> jax.Array:
        def step(nats: jax.Array, part: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
            tokens_BS, counted_BS = part
            losses_BS = token_losses(model, compute_params(params), tokens_BS)
            return nats + jnp.sum(jnp.where(counted_BS, losses_BS, 0.0)), None

        return jax.lax.scan(step, jnp.zeros((), jnp.float32), (rows_IBS, counted_IBS))[0]

    return jax.jit(evaluate)
