"""A model over one sequence without a cache: plain attention over all tokens, for tests of everything else."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from jaxinfer.model import Model, Params
from jaxinfer.model.attention import Scores


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Dense:
    """What the model needs of a step (`jaxinfer.model.attention.Attends`), with every score written out.

    The state of a layer counts how often it ran.
    """

    tokens_T: jax.Array

    @property
    def positions_T(self) -> jax.Array:
        return jnp.arange(self.tokens_T.shape[0], dtype=jnp.int32)

    def attend(self, q_TKgH, k_TKH, v_TKH, state: Any, group: int, scores: Scores, sinks_Kg):
        scores_KgTU = jnp.einsum("TKgH,UKH->KgTU", q_TKgH, k_TKH) * scores.scale
        if scores.soft_cap is not None:
            scores_KgTU = jnp.tanh(scores_KgTU / scores.soft_cap) * scores.soft_cap
        distance_TU = self.positions_T[:, None] - self.positions_T[None, :]
        seen_TU = (distance_TU >= 0) & (distance_TU < (scores.window or self.tokens_T.shape[0]))
        scores_KgTU = jnp.where(seen_TU[None, None], scores_KgTU, -jnp.inf)
        shares_KgTU = jnp.exp(scores_KgTU - scores_KgTU.max(axis=-1, keepdims=True))
        total_KgT1 = shares_KgTU.sum(axis=-1, keepdims=True)
        if sinks_Kg is not None:
            total_KgT1 += jnp.exp(sinks_Kg[:, :, None, None] - scores_KgTU.max(axis=-1, keepdims=True))
        return jnp.einsum("KgTU,UKH->TKgH", shares_KgTU / total_KgT1, v_TKH), state + 1


@dataclass(frozen=True)
class Found:
    """Host arrays of one run."""

    hidden_TD: np.ndarray
    logits_TV: np.ndarray
    taps: tuple[np.ndarray, ...]


def run(model: Model, params: Params, tokens_T: np.ndarray, **options) -> Found:
    """Hidden states, logits and taps of all tokens; `options` are those of `Model.forward`."""
    with jax.set_mesh(model.mesh):
        return Found(*jax.device_get(_whole(model, params, jnp.asarray(tokens_T), **options)))


@partial(jax.jit, static_argnums=0, static_argnames=("layers", "taps"))
def _whole(model: Model, params: Params, tokens_T: jax.Array, **options):
    cache = (jnp.zeros(3, jnp.float32),) * model.config.num_layers
    hidden_TD, taps, _ = model.forward(params, Dense(tokens_T), cache, **options)
    return hidden_TD, jax.sharding.reshard(model.logits(params, hidden_TD), P(None, None)), taps
