"""The draft heads of EAGLE (Li et al. 2024, "EAGLE: Speculative Sampling Requires Rethinking Feature Uncertainty",
arXiv 2401.15077; Li et al. 2025, "EAGLE-3: Scaling up Inference Acceleration of Large Language Models via
Training-Time Test", arXiv 2503.01840): one layer that says the model's next feature, of a token and the feature before
it.

A feature of EAGLE-1 and 2 is the model's hidden state after its final norm, which its output matrix makes logits of.
Published heads have `fc.weight`, perhaps with `fc.bias`, which makes the layer's input of embedding and feature, and
`layers.0`, a layer of Llama without `input_layernorm`.

One of EAGLE-3 is made by `fc.weight` of the outputs of three layers, a low one, a middle one and a high one. The
attention of `midlayer` reads the embedding and the feature side by side, each with a norm of its own, and the feature
alone goes on. The head has a `norm` and an output matrix, `lm_head.weight`, perhaps of fewer tokens than the model:
`d2t` says how far the id of each is from its id in the model.

Both have `embed_tokens.weight`, or the model's embeddings.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxinfer.model.attention import Attends
from jaxinfer.model.config import ModelConfig
from jaxinfer.model.families import read_config
from jaxinfer.model.model import Model, Network
from jaxinfer.model.norm import Norm
from jaxinfer.model.parameter import Shapes
from jaxinfer.model.reader import parse
from jaxinfer.model.rope import tables
from jaxinfer.model.transformer import Embedding, Layer
from jaxinfer.parallel import TENSOR
from jaxinfer.quantize import einsum, project

FIRST, THIRD = "EagleHead", "Eagle3Head"
LAYERS = 4  # of a model whose low, middle and high layers are read


class _Head(nnx.Module):
    """Built abstractly, as the transformer is."""

    def __init__(self, config: ModelConfig, shapes: Shapes, context: int, *, embeds: bool, bias: bool, inputs: int):
        self.config, self.context = config, context
        self.embed = Embedding(config, shapes) if embeds else None
        self.fc_ED = shapes.param((inputs * config.hidden_size, config.hidden_size))
        self.fc_bias_D = shapes.param((config.hidden_size,)) if bias else None
        layer = Layer(config, 0, shapes)
        layer.attention_norm = None
        self.layers = nnx.List([layer])

    def fc(self, x_TE: jax.Array) -> jax.Array:
        return project("TE,ED->TD", x_TE, self.fc_ED[...], None if self.fc_bias_D is None else self.fc_bias_D[...])

    def rope(self, batch: Attends) -> tuple[jax.Array, jax.Array]:
        return tables(self.config.layers[0].rope, batch.positions_T, self.context)


class _First(_Head):
    """Of EAGLE-1 and 2."""

    def __init__(self, config: ModelConfig, shapes: Shapes, context: int, *, embeds: bool, bias: bool):
        super().__init__(config, shapes, context, embeds=embeds, bias=bias, inputs=2)

    def __call__(self, embedded_TD: jax.Array, features_TD: jax.Array, batch: Attends, state: Any):
        x_TD = self.fc(jnp.concatenate([embedded_TD, features_TD], axis=1))
        return self.layers[0](x_TD, batch, state, self.rope(batch))


class _Third(_Head):
    """Of EAGLE-3."""

    def __init__(self, config: ModelConfig, shapes: Shapes, context: int, *, embeds: bool, bias: bool, tokens: int):
        super().__init__(config, shapes, context, embeds=embeds, bias=bias, inputs=3)
        self.embed_norm, self.feature_norm = Norm(config, shapes), Norm(config, shapes)
        self.final_norm = Norm(config, shapes)
        self.head_VD = shapes.param((tokens, config.hidden_size), (TENSOR,))
        attention = self.layers[0].attention
        _, *heads = attention.qkv_DKgH.get_value().shape
        attention.qkv_DKgH = shapes.param((2 * config.hidden_size, *heads), (None, TENSOR))

    def __call__(self, embedded_TD: jax.Array, features_TD: jax.Array, batch: Attends, state: Any):
        layer = self.layers[0]
        x_TE = jnp.concatenate([self.embed_norm(embedded_TD), self.feature_norm(features_TD)], axis=1)
        heads_TM, state = layer.attention.heads(x_TE, batch, state, self.rope(batch))
        x_TD = layer.attention.output(heads_TM, features_TD)
        return layer.mlp(x_TD, layer.mlp_norm, x_TD), state

    def logits(self, features_TD: jax.Array) -> jax.Array:
        return einsum("TD,VD->TV", self.final_norm(features_TD), self.head_VD[...], jnp.dtype(jnp.float32))


class EagleHead(Network):
    """One head on the mesh of its model, with the model's context and dtype.

    Its parameters are those of `parameters`, and behind them `d2t`, int32, where it has one.

    Attributes:
        embeds: whether it has token embeddings of its own, and not the model's.
        maps: whether it has a `d2t`.
    """

    def __init__(
        self, config: ModelConfig, target: Model, *, embeds: bool, bias: bool, tokens: int | None = None,
        maps: bool = False,
    ):  # fmt: skip
        """
        Args:
            config: from `read_eagle_config`; its layer sees no more keys than the widest of the model's.
            embeds, maps: see the attributes.
            bias: whether its first product, `fc`, has one.
            tokens: of its own output matrix, which makes it one of EAGLE-3.

        Raises:
            ValueError: the mesh does not divide the head, or the model has too few layers for it.
        """
        build = partial(_First, embeds=embeds, bias=bias)
        if tokens is not None:
            if (layers := target.config.num_layers) < LAYERS:
                raise ValueError(
                    f"a head of EAGLE-3 reads three layers of a model of {LAYERS} or more, not of {layers}"
                )
            build = partial(_Third, embeds=embeds, bias=bias, tokens=tokens)
            config = replace(config, architecture=THIRD)
        config = config.within(target.config.windows)
        super().__init__(config, target.mesh, target.context, target.config.dtype, build)
        self.embeds, self.maps, self._third = embeds, maps, tokens is not None

    def taps(self, target: Model) -> tuple[int, ...]:
        """The layers whose outputs features are made of; none for the last hidden states."""
        layers = target.config.num_layers
        return (1, layers // 2 - 1, layers - 4) if self._third else ()

    def features(
        self, params: Sequence[jax.Array], target: Model, own: Sequence[jax.Array], shown_TE: jax.Array
    ) -> jax.Array:
        """The model's features, [T, D], of the outputs of `taps` side by side, or of the last hidden states.

        Args:
            params: of the head.
            target, own: its model, with the model's parameters.
        """
        return self._own(params).fc(shown_TE) if self._third else target.head(own, shown_TE)[0]

    def forward(
        self, params: Sequence[jax.Array], target: Model, own: Sequence[jax.Array], batch: Attends,
        features_TD: jax.Array, state: Any,
    ) -> tuple[jax.Array, Any]:  # fmt: skip
        """The features that it expects of a step's tokens.

        Args:
            params, target, own: as for `features`.
            batch: the tokens, their positions, and how they attend.
            features_TD: of each token the feature before it, the model's or one that a head expected.
            state: of the one layer.

        Returns:
            features_TD of the tokens, and the layer's new state.
        """
        module = self._own(params)
        embedded_TD = module.embed(batch.tokens_T) if self.embeds else target.embed(own, batch.tokens_T)
        return module(embedded_TD, features_TD, batch, state)

    def logits(
        self, params: Sequence[jax.Array], target: Model, own: Sequence[jax.Array], features_TD: jax.Array
    ) -> jax.Array:
        """float32 logits of features that it expects, sharded over its own vocabulary or the model's; the rest as for
        `features`."""
        if self._third:
            return self._own(params).logits(features_TD)
        _, head_VD, cap = target.head(own, features_TD[:0])
        return cap(einsum("TD,VD->TV", features_TD, head_VD, jnp.dtype(jnp.float32)))

    def tokens(self, params: Sequence[jax.Array], ids: jax.Array) -> jax.Array:
        """The model's tokens of the head's own."""
        return ids + params[len(self.parameters)][ids] if self.maps else ids

    def _own(self, params: Sequence[jax.Array]) -> Any:
        return self._module(params[: len(self.parameters)])


def read_eagle_config(source: str | Path | dict[str, Any]) -> ModelConfig:
    """The description of a head from its published `config.json`, that of a model of one layer.

    Raises:
        FileNotFoundError, ValueError: as `read_config`; or the model is none that a head can be.
    """
    fields = source if isinstance(source, dict) else parse(Path(source))
    if fields.get("architectures") == ["LlamaForCausalLMEagle3"]:
        fields = fields | {"architectures": ["LlamaForCausalLM"]}
    # The tensors say as well whether `fc` has a bias, and how many tokens the output matrix has.
    config = read_config({name: value for name, value in fields.items() if name not in ("bias", "draft_vocab_size")})
    if config.architecture != "LlamaForCausalLM" or config.num_layers != 1:
        raise ValueError(
            f"config.json: a head of {config.num_layers} layers of {config.architecture}; expected 1 layer of "
            "LlamaForCausalLM"
        )
    return replace(config, architecture=FIRST)
