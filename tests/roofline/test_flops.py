"""FLOPs of the cost model against those that XLA counts in the model's own forward."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxinfer.model.config import ModelConfig
from jaxinfer.model.model import Model
from jaxinfer.parallel import TENSOR, make_mesh
from jaxinfer.roofline.step import decode_step, prefill
from tests.roofline.small import small

MODELS = {
    "grouped heads": small(dtype="float32"),
    "one head per query": small(dtype="float32", num_kv_heads=8, tied_embeddings=True),
    "plain MLP, biases": small(
        dtype="float32", gated_mlp=False, activation="gelu", norm="layer", norm_bias=True, qkv_bias=True
    ),
    "four norms": small(dtype="float32", post_norm=True, qk_norm="head"),
    "parallel block": small(dtype="float32", num_kv_heads=1, parallel_block=True, gated_mlp=False, activation="gelu"),
}


@dataclass(frozen=True)
class Tokens:
    """The tokens of a step; a subclass says how they attend, without loops."""

    tokens_T: jax.Array
    positions_T: jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class FullPrompt(Tokens):
    def attend(self, q_TKgH, k_TKH, v_TKH, state, group, scores, sinks_Kg):
        """Every query times every key, then a mask."""
        seen_TS = self.positions_T[:, None] >= self.positions_T[None, :]
        scores_KgTS = jnp.einsum("TKgH,SKH->KgTS", q_TKgH, k_TKH)
        weights_KgTS = jax.nn.softmax(jnp.where(seen_TS[None, None], scores_KgTS, -1e30))
        return jnp.einsum("KgTS,SKH->TKgH", weights_KgTS, v_TKH), state


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class CausalPrompt(Tokens):
    def attend(self, q_TKgH, k_TKH, v_TKH, state, group, scores, sinks_Kg):
        """Every query times the keys up to its own, one query after the other."""
        rows = []
        for i in range(q_TKgH.shape[0]):
            weights_KgS = jax.nn.softmax(jnp.einsum("KgH,SKH->KgS", q_TKgH[i], k_TKH[: i + 1]))
            rows.append(jnp.einsum("KgS,SKH->KgH", weights_KgS, v_TKH[: i + 1]))
        return jnp.stack(rows), state


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Decode(Tokens):
    def attend(self, q_TKgH, k_TKH, v_TKH, state, group, scores, sinks_Kg):
        """One query of each sequence times all its keys, which lie in one piece, the new one among them."""
        keys_BSKH, values_BSKH = state
        weights_BKgS = jax.nn.softmax(jnp.einsum("BKgH,BSKH->BKgS", q_TKgH, keys_BSKH))
        return jnp.einsum("BKgS,BSKH->BKgH", weights_BKgS, values_BSKH), state


def xla_flops(config: ModelConfig, batch_type: type, tokens: int, rows: int, context: int = 1) -> float:
    """What XLA counts in the model's forward and the logits of its last rows, or of all; nothing is run."""
    model = Model(config, make_mesh())
    tokens_T = jax.ShapeDtypeStruct((tokens,), jnp.int32, sharding=NamedSharding(model.mesh, P()))
    keys_shape = (tokens, context, config.num_kv_heads, config.head_size)
    heads = NamedSharding(model.mesh, P(None, None, TENSOR))
    keys_BSKH = jax.ShapeDtypeStruct(keys_shape, jnp.float32, sharding=heads)
    cache = ((keys_BSKH, keys_BSKH),) * config.num_layers

    def step(params, batch, cache):
        if rows == tokens:
            hidden_WD, *_ = model.forward(params, batch, cache)
        else:
            hidden_WD, *_ = model.forward_rows(
                params, batch, cache, jnp.arange(tokens - rows, tokens, dtype=jnp.int32)
            )
        return model.logits(params, hidden_WD)

    with jax.set_mesh(model.mesh):
        lowered = jax.jit(step).lower(list(model.parameters.values()), batch_type(tokens_T, tokens_T), cache)
        return lowered.cost_analysis()["flops"]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("batch_type", "counting"), [(FullPrompt, "full"), (CausalPrompt, "causal")])
def test_prefill_flops_are_those_that_xla_counts(name, batch_type, counting):
    config, tokens = MODELS[name], 64
    counted = xla_flops(config, batch_type, tokens, rows=1)
    assert prefill(config, tokens, counting=counting).flops == pytest.approx(counted, rel=0.05)


@pytest.mark.parametrize("name", MODELS)
def test_the_two_countings_of_attention_lie_further_apart_than_the_tolerance(name):
    causal, full = (prefill(MODELS[name], 64, counting=counting).flops for counting in ("causal", "full"))
    assert full > 1.1 * causal


@pytest.mark.parametrize("name", MODELS)
def test_decode_flops_are_those_that_xla_counts(name):
    config, batch, context = MODELS[name], 4, 96
    counted = xla_flops(config, Decode, batch, rows=batch, context=context)
    assert decode_step(config, batch, context).flops == pytest.approx(counted, rel=0.05)
