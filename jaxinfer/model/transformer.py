"""The one transformer. Every family is a configuration of it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from jaxinfer.model.attention import Attends, Attention
from jaxinfer.model.config import ModelConfig
from jaxinfer.model.mlp import MLP
from jaxinfer.model.moe import MoE
from jaxinfer.model.norm import Norm
from jaxinfer.model.parameter import Shapes
from jaxinfer.model.rope import tables
from jaxinfer.parallel import all_tokens, look_up, meeting, row_axis, shares_work, take_rows
from jaxinfer.quantize import einsum, output_and_gated_mlp
from pallas_kernels.all_reduce import Workspace, in_order


class Embedding(nnx.Module):
    """Token embeddings, sharded over the vocabulary."""

    def __init__(self, config: ModelConfig, shapes: Shapes):
        self.scale, self.in_order = config.embedding_scale, in_order(shapes.mesh)
        self.weight_VD = shapes.vocabulary(config.vocab_size, config.hidden_size)

    def __call__(self, tokens_T: jax.Array) -> jax.Array:
        return self._scaled(self.weight_VD[...].at[tokens_T].get(out_sharding=P(row_axis(tokens_T), None)))

    def start(self, tokens_T: jax.Array) -> tuple[jax.Array, Workspace | None]:
        """What enters the first layer of a step; and where the sums of its layers meet, as `look_up` gives both."""
        if not shares_work():
            return self(tokens_T), None
        x_TD, workspace = look_up(self.weight_VD[...], tokens_T, self.in_order)
        return self._scaled(x_TD), workspace

    def _scaled(self, x_TD: jax.Array) -> jax.Array:
        return x_TD if self.scale == 1.0 else x_TD * jnp.asarray(self.scale, x_TD.dtype)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Unfinished:
    """Tokens within a layer, behind its attention. The rest of it is of each token for itself.

    Attributes:
        heads_TM: the outputs of all heads in a row.
        x_TD: what entered the layer.
    """

    heads_TM: jax.Array
    x_TD: jax.Array

    def take(self, rows_W: jax.Array) -> Unfinished:
        """Some of them, on every device that has a part of their heads."""
        return Unfinished(take_rows(self.heads_TM, rows_W), take_rows(self.x_TD, rows_W))


class Layer(nnx.Module):
    """Attention and MLP, each added to the residual stream x_TD; the norms stand where the config has them.

    In two parts, so that of the last layer's tokens those alone need the second one whose outputs are wanted.
    """

    def __init__(self, config: ModelConfig, index: int, shapes: Shapes):
        self.config, moe = config, config.layers[index].moe
        self.attention = Attention(config, index, shapes)
        self.mlp = MLP(config, shapes) if moe is None else MoE(config, moe, shapes)
        self.attention_norm = Norm(config, shapes) if config.pre_norm else None
        self.mlp_norm = Norm(config, shapes) if config.pre_norm and not config.parallel_block else None
        self.attention_post_norm = Norm(config, shapes) if config.post_norm else None
        self.mlp_post_norm = Norm(config, shapes) if config.post_norm else None

    def __call__(self, x_TD: jax.Array, batch: Attends, state: Any, rope) -> tuple[jax.Array, Any]:
        unfinished, state = self.attend(x_TD, batch, state, rope)
        return self.finish(unfinished), state

    def attend(self, x_TD: jax.Array, batch: Attends, state: Any, rope) -> tuple[Unfinished, Any]:
        """As far as tokens see each other, and the new state."""
        heads_TM, state = self.attention.heads(x_TD, batch, state, rope, self.attention_norm)
        return Unfinished(heads_TM, x_TD), state

    def finish(self, unfinished: Unfinished) -> jax.Array:
        """What leaves the layer."""
        heads_TM, x_TD = unfinished.heads_TM, unfinished.x_TD
        if self.config.parallel_block:
            return self._parallel(heads_TM, x_TD)
        if (finished_TD := self._at_once(heads_TM, x_TD)) is not None:
            return finished_TD
        attended_TD = self.attention.output(heads_TM, self._residual(x_TD), x_TD)
        x_TD = _added(x_TD, attended_TD, self.attention_post_norm)
        return _added(x_TD, self.mlp(x_TD, self.mlp_norm, self._residual(x_TD)), self.mlp_post_norm)

    def _at_once(self, heads_TM: jax.Array, x_TD: jax.Array) -> jax.Array | None:
        """The layer from its heads on, where one kernel does all of that."""
        attention, mlp, config = self.attention, self.mlp, self.config
        plain = not (config.post_norm or config.o_bias or config.mlp_bias) and config.activation == "silu"
        if not (plain and isinstance(mlp, MLP) and config.gated_mlp and self.mlp_norm is not None):
            return None
        o_MD, up_DcF, down_FD = attention.o_MD[...], mlp.up_DcF[...], mlp.down_FD[...]
        return output_and_gated_mlp(heads_TM, o_MD, x_TD, self.mlp_norm, up_DcF, down_FD)

    def _residual(self, x_TD: jax.Array) -> jax.Array | None:
        """What a half adds to its result itself: nothing where a norm stands between the two."""
        return None if self.config.post_norm else x_TD

    def _parallel(self, heads_TM: jax.Array, x_TD: jax.Array) -> jax.Array:
        """Falcon: the MLP reads what attention does, normed by the same norm."""
        return x_TD + self.attention.output(heads_TM, None, x_TD) + self.mlp(x_TD, self.attention_norm)


def _added(x_TD: jax.Array, y_TD: jax.Array, post_norm: Norm | None) -> jax.Array:
    return y_TD if post_norm is None else x_TD + post_norm(y_TD)


# Jitted, so that layers which differ in nothing but their weights are traced and lowered once. XLA inlines the calls.
@partial(jax.jit, static_argnums=0)
def _run(
    graph: nnx.GraphDef[Layer], params: nnx.State, workspace: Workspace | None, x_TD: jax.Array, batch: Attends,
    state: Any, rope: Any,
):  # fmt: skip
    with meeting(workspace):
        return nnx.merge(graph, params)(x_TD, batch, state, rope)


class Transformer(nnx.Module):
    """Built abstractly: its parameters are shapes with shardings until `Model` is given values for them.

    Where a pipe divides its layers among stages, `layers` are those of one stage, with the parameters of all."""

    def __init__(self, config: ModelConfig, shapes: Shapes, context: int):
        self.config, self.context = config, context
        self.embed = Embedding(config, shapes)
        self.layers = nnx.List([Layer(config, index, shapes.layer) for index in range(shapes.per_stage)])
        self.final_norm = Norm(config, shapes)
        head = (config.vocab_size, config.hidden_size)
        self.head_VD = None if config.tied_embeddings else shapes.vocabulary(*head)

    def forward(self, batch: Attends, cache: tuple[Any, ...], layers: int, taps: tuple[int, ...]):
        """Runs the first `layers` layers; see `Model.forward`."""
        graphs, weights = self.split(layers)
        x_TD, workspace = self.embed.start(batch.tokens_T)
        return self.run(graphs, weights, x_TD, batch, cache, taps, workspace)

    def forward_rows(
        self, batch: Attends, cache: tuple[Any, ...], layers: int, taps: tuple[int, ...], rows_W: jax.Array
    ):
        """See `Model.forward_rows`."""
        graphs, weights = self.split(layers - 1)
        x_TD, workspace = self.embed.start(batch.tokens_T)
        x_TD, tapped, states = self._through(graphs, weights, x_TD, batch, cache, taps, workspace)
        last, index = self.layers[layers - 1], layers - 1
        rope = tables(self.config.layers[index].rope, batch.positions_T, self.context)
        unfinished, state = last.attend(x_TD, batch, cache[index], rope)
        with meeting(workspace):
            hidden_WD = last.finish(unfinished.take(rows_W))
        return hidden_WD, unfinished, tapped, (*states[:index], state, *states[layers:])

    def finish(self, unfinished: Unfinished, layers: int) -> jax.Array:
        """See `Model.finish`."""
        return all_tokens(self.layers[layers - 1].finish(unfinished))

    def split(self, layers: int) -> tuple[tuple[nnx.GraphDef[Layer], ...], tuple[nnx.State, ...]]:
        """The first `layers` layers apart from their weights."""
        parts = [nnx.split(layer) for layer in self.layers[:layers]]
        return tuple(graph for graph, _ in parts), tuple(weights for _, weights in parts)

    def run(
        self, graphs: tuple[nnx.GraphDef[Layer], ...], weights: tuple[nnx.State, ...], x_TD: jax.Array, batch: Attends,
        cache: tuple[Any, ...], taps: tuple[int, ...], workspace: Workspace | None = None,
    ):  # fmt: skip
        """x_TD through layers from `split`, with what leaves those of `taps`, and the new states."""
        x_TD, tapped, states = self._through(graphs, weights, x_TD, batch, cache, taps, workspace)
        return all_tokens(x_TD), tapped, states

    def _through(
        self, graphs: tuple[nnx.GraphDef[Layer], ...], weights: tuple[nnx.State, ...], x_TD: jax.Array, batch: Attends,
        cache: tuple[Any, ...], taps: tuple[int, ...], workspace: Workspace | None,
    ):  # fmt: skip
        """`run`, but x_TD as it leaves the last of the layers: each device may have its part of the tokens.

        The loop is unrolled: a scan copies the weights.
        """
        ropes = {
            rope: tables(rope, batch.positions_T, self.context)
            for rope in dict.fromkeys(layer.rope for layer in self.config.layers[: len(graphs)])
        }
        states, tapped = list(cache), {}
        for index, (graph, params) in enumerate(zip(graphs, weights, strict=True)):
            rope = ropes[self.config.layers[index].rope]
            x_TD, states[index] = _run(graph, params, workspace, x_TD, batch, states[index], rope)
            if index in taps:
                tapped[index] = all_tokens(x_TD)
        return x_TD, tuple(tapped[index] for index in taps), tuple(states)

    def logits(self, hidden_WD: jax.Array) -> jax.Array:
        """float32 logits, sharded over the vocabulary."""
        normed_WD = self.normalize(hidden_WD)
        with jax.named_scope("head"):
            return self.cap(einsum("WD,VD->WV", normed_WD, self.head(), jnp.dtype(jnp.float32)))

    def normalize(self, hidden_WD: jax.Array) -> jax.Array:
        return self.final_norm(hidden_WD)

    def head(self) -> jax.Array:
        return self.embed.weight_VD[...] if self.head_VD is None else self.head_VD[...]

    def cap(self, logits: jax.Array) -> jax.Array:
        """Gemma 2's soft cap, where the config has one."""
        cap = self.config.final_soft_cap
        return logits if cap is None else jnp.tanh(logits / cap) * cap
