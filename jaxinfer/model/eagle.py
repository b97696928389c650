"""The draft head of EAGLE (Li et al. 2024, "EAGLE: Speculative Sampling Requires Rethinking Feature Uncertainty",
arXiv 2401.15077): one layer that says the model's next feature, of a token and the feature before it.

A feature is the model's hidden state after its final norm, which its output matrix makes logits of.
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
from jaxinfer.model.parameter import Shapes
from jaxinfer.model.reader import parse
from jaxinfer.model.rope import tables
from jaxinfer.model.transformer import Embedding, Layer
from jaxinfer.quantize import project

ARCHITECTURE = "EagleHead"


class _Head(nnx.Module):
    """Built abstractly, as the transformer is."""

    def __init__(self, config: ModelConfig, shapes: Shapes, context: int, *, embeds: bool, bias: bool):
        self.config, self.context = config, context
        self.embed = Embedding(config, shapes) if embeds else None
        self.fc_ED = shapes.param((2 * config.hidden_size, config.hidden_size))
        self.fc_bias_D = shapes.param((config.hidden_size,)) if bias else None
        layer = Layer(config, 0, shapes)
        layer.attention_norm = None
        self.layers = nnx.List([layer])

    def __call__(self, embedded_TD: jax.Array, features_TD: jax.Array, batch: Attends, state: Any):
        bias_D = None if self.fc_bias_D is None else self.fc_bias_D[...]
        x_TD = project("TE,ED->TD", jnp.concatenate([embedded_TD, features_TD], axis=1), self.fc_ED[...], bias_D)
        return self.layers[0](x_TD, batch, state, tables(self.config.layers[0].rope, batch.positions_T, self.context))


class EagleHead(Network):
    """One head on the mesh of its model, with the model's context and dtype.

    Attributes:
        embeds: whether it has token embeddings of its own, and not the model's.
    """

    def __init__(self, config: ModelConfig, target: Model, *, embeds: bool, bias: bool):
        """
        Args:
            config: from `read_eagle_config`.
            embeds: see the attribute.
            bias: whether its first product, `fc`, has one.

        Raises:
            ValueError: the mesh does not divide the head.
        """
        build = partial(_Head, embeds=embeds, bias=bias)
        super().__init__(config, target.mesh, target.context, target.config.dtype, build)
        self.embeds = embeds

    def forward(
        self, params: Sequence[jax.Array], target: Model, own: Sequence[jax.Array], batch: Attends,
        features_TD: jax.Array, state: Any,
    ) -> tuple[jax.Array, Any]:  # fmt: skip
        """The features that it expects of a step's tokens.

        Args:
            params: of the head.
            target, own: its model, with the model's parameters.
            batch: the tokens, their positions, and how they attend.
            features_TD: of each token the feature before it, the model's or one that a head expected.
            state: of the one layer.

        Returns:
            features_TD of the tokens, and the layer's new state.
        """
        module = self._module(params)
        embedded_TD = module.embed(batch.tokens_T) if self.embeds else target.embed(own, batch.tokens_T)
        return module(embedded_TD, features_TD, batch, state)


def read_eagle_config(source: str | Path | dict[str, Any]) -> ModelConfig:
    """The description of a head from its published `config.json`, that of a model of one layer.

    Raises:
        FileNotFoundError, ValueError: as `read_config`; or the model is none that a head can be.
    """
    fields = source if isinstance(source, dict) else parse(Path(source))
    # Whether `fc` has one; the tensors say it, too.
    config = read_config({name: value for name, value in fields.items() if name != "bias"})
    if config.architecture != "LlamaForCausalLM" or config.num_layers != 1:
        raise ValueError(
            f"config.json: a head of {config.num_layers} layers of {config.architecture}; expected 1 layer of "
            "LlamaForCausalLM"
        )
    return replace(config, architecture=ARCHITECTURE)
