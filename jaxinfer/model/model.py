"""A model apart from its weights: what `jax.jit` closes over, and what it takes as arguments."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, Float32, Int32

from jaxinfer.model import pipelined
from jaxinfer.model.attention import Attends
from jaxinfer.model.config import ModelConfig
from jaxinfer.model.parameter import Shapes
from jaxinfer.model.transformer import Transformer, Unfinished
from jaxinfer.parallel import CONTEXT, PIPE
from jaxinfer.parallel.pipeline import BatchOf, Round, empty, join, microbatches, of_stage, part

Params = list[jax.Array]


class Network:
    """A Flax module on one mesh, apart from its weights.

    The module is split once, here. Its parameters travel as a flat list of arrays, in the order of `parameters`, so
    that a jitted step pays nothing for the module tree.

    Attributes:
        config: what is computed, with `dtype` the one the weights are held in.
        mesh: the devices.
        context: positions that are served, prompt and output together; it fixes dynamic and LongRoPE scaling.
        ranks: devices that share a sequence.
        kv_slots, kv_slots_per_device: KV heads, repeated where there are more devices, in all and on each.
        tensor: devices that share every layer.
        stages: of the pipe that the layers are divided among; 1 where every device has all of them.
        per_stage: layers that a device has.
        parameters: shape, dtype and sharding of every parameter, by its path, such as `layers.0.mlp.down_FD`. With
            several stages, a parameter of the first one's layers holds those of the others' layers too.
        stored: the same of every layer's own parameters, as checkpoints have them, on the devices of its stage.
    """

    def __init__(
        self, config: ModelConfig, mesh: Mesh, context: int | None, dtype: str | None,
        build: Callable[[ModelConfig, Shapes, int], nnx.Module], stages: int = 1,
    ):  # fmt: skip
        """
        Raises:
            ValueError: the mesh does not divide the model.
        """
        self.config = replace(config, dtype=dtype or config.dtype)
        self.mesh, self.context = mesh, context or config.context
        self.ranks = mesh.shape[CONTEXT]
        shapes = Shapes(self.config, mesh, stages)
        shapes.check()
        self.tensor, self.stages, self.per_stage = shapes.tensor, stages, shapes.per_stage
        self.kv_slots, self.kv_slots_per_device = shapes.kv_slots, shapes.kv_slots // shapes.tensor
        self._graph, state = nnx.split(build(self.config, shapes, self.context))
        leaves, self._tree = jax.tree_util.tree_flatten_with_path(state)
        self.parameters: dict[str, jax.ShapeDtypeStruct] = {_name(path): leaf for path, leaf in leaves}
        self.stored = dict(item for path in self.parameters for item in self._of_stages(path).items())

    def params(self, arrays: Mapping[str, jax.Array]) -> Params:
        """Arrays by path, as the flat list that `forward` takes."""
        return [arrays[name] for name in self.parameters]

    def joined(self, arrays: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        """Arrays of `parameters`, of those of `stored`. Nothing is copied."""
        joined = {}
        for path, leaf in self.parameters.items():
            parts = [arrays[name] for name in self._of_stages(path)]
            joined[path] = parts[0] if len(parts) == 1 else join(leaf, parts)
        return joined

    def parted(self, arrays: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
        """The inverse of `joined`."""
        for path in self.parameters:
            own = self._of_stages(path)
            yield from ((name, arrays[path] if len(own) == 1 else part(arrays[path], own[name])) for name in own)

    def _of_stages(self, path: str) -> dict[str, jax.ShapeDtypeStruct]:
        """What of `stored` a parameter holds, stage by stage."""
        leaf = self.parameters[path]
        if self.stages == 1 or not path.startswith("layers."):
            return {path: leaf}
        _, index, rest = path.split(".", 2)
        return {
            f"layers.{int(index) + stage * self.per_stage}.{rest}": of_stage(leaf, stage, self.stages)
            for stage in range(self.stages)
        }

    def random_params(self, seed: int = 0) -> Params:
        """Random normal weights, for tests and benchmarks, drawn on the devices that hold them."""
        keys = jax.random.split(jax.random.key(seed), len(self.parameters))
        named = zip(self.parameters.items(), keys, strict=True)
        with jax.set_mesh(self.mesh):
            return [_draw(name, leaf, key, len(self._of_stages(name))) for (name, leaf), key in named]

    def _module(self, params: Sequence[jax.Array]) -> Any:
        return nnx.merge(self._graph, jax.tree_util.tree_unflatten(self._tree, params))


class Model(Network):
    """One transformer on one mesh."""

    def __init__(
        self, config: ModelConfig, mesh: Mesh, context: int | None = None, dtype: str | None = None,
        pipelined: bool = True,
    ):  # fmt: skip
        """
        Args:
            pipelined: its layers are divided among the stages of the mesh. Else all of them have every layer, and do
                the same: a small model that drafts would wait for a pipe longer than it computes.

        Raises:
            ValueError: the mesh does not divide the model.
        """
        super().__init__(config, mesh, context, dtype, Transformer, mesh.shape[PIPE] if pipelined else 1)

    def forward(
        self, params: Sequence[jax.Array], batch: Attends, cache: tuple[Any, ...], layers: int | None = None,
        taps: tuple[int, ...] = (),
    ) -> tuple[Float[Array, "T D"], tuple[Float[Array, "T D"], ...], tuple[Any, ...]]:  # fmt: skip
        """Hidden states of a step's tokens, before the final norm.

        Args:
            params: from `params`, `random_params` or a checkpoint.
            batch: the tokens, their positions, and how they attend.
            cache: one state per layer.
            layers: how many of the first layers to run, all by default. Fewer are a model too (early exit).
            taps: layers whose output is wanted besides.

        Returns:
            hidden_TD; the tapped hidden states, in the order of `taps`; the cache with the new states.
        """
        assert self.stages == 1, "a pipe takes micro-batches: see `forward_in_stages`"
        return self._module(params).forward(batch, cache, self.config.num_layers if layers is None else layers, taps)

    def forward_rows(
        self, params: Sequence[jax.Array], batch: Attends, cache: tuple[Any, ...], rows_W: Int32[Array, "W"],
        layers: int | None = None, taps: tuple[int, ...] = (),
    ) -> tuple[Float[Array, "W D"], Unfinished, tuple[Float[Array, "T D"], ...], tuple[Any, ...]]:  # fmt: skip
        """`forward` where the hidden states of few of many tokens are wanted, as of a prompt that of its last one:
        what follows the last layer's attention is computed of these alone. Its keys and values are those of all.

        Args:
            rows_W: which tokens.
            taps: layers before the last one.

        Returns:
            hidden_WD; all tokens as `finish` takes them; the tapped hidden states; the cache with the new states.
        """
        count = self.config.num_layers if layers is None else layers
        assert self.stages == 1, "a pipe takes micro-batches: see `forward_in_stages`"
        assert max(taps, default=-1) < count - 1, (taps, count)
        return self._module(params).forward_rows(batch, cache, count, taps, rows_W)

    def finish(
        self, params: Sequence[jax.Array], unfinished: Unfinished, layers: int | None = None
    ) -> Float[Array, "T D"]:
        """The hidden states, as of `forward`, of what `forward_rows` with so many layers left unfinished."""
        return self._module(params).finish(unfinished, self.config.num_layers if layers is None else layers)

    def forward_in_stages(
        self, params: Sequence[jax.Array], batches: Attends, cache: tuple[Any, ...], layers: int | None = None,
        taps: tuple[int, ...] = (),
    ) -> tuple[Float[Array, "T D"], tuple[Float[Array, "T D"], ...], tuple[Any, ...]]:  # fmt: skip
        """`forward` through the stages of a pipe.

        Args:
            batches: micro-batches that follow each other, with a leading axis of m + 1; the last is the idle one, see
                `jaxinfer.parallel.pipeline.run`.
            cache: one state for each layer of a stage, of all stages.
        """
        return pipelined.forward(self._module(params), self.stages, batches, cache, layers, taps)

    def advance(
        self, params: Sequence[jax.Array], x_ptD: jax.Array, tokens_t: Int32[Array, "t"], batch_of: BatchOf, told: Any,
        cache: tuple[Any, ...],
    ) -> tuple[jax.Array, Float[Array, "t D"], tuple[Any, ...]]:  # fmt: skip
        """One tick of a pipe that does not drain; see `jaxinfer.parallel.pipeline.advance`.

        Args:
            x_ptD: from `empty_pipe`, or the tick before.
            tokens_t: of the micro-batch that enters the first stage.

        Returns:
            x_ptD for the next tick; hidden states that leave the last stage; the cache with the new states.
        """
        return pipelined.advance(self._module(params), x_ptD, tokens_t, batch_of, told, cache)

    def empty_pipe(self, rows: int) -> jax.Array:
        """What stages have before the first tick, of micro-batches of so many rows."""
        return empty(self.stages, rows, self.config.hidden_size, jnp.dtype(self.config.dtype))

    def rounds(self, rows: int, count: int) -> Round:
        """How micro-batches of so many rows together go through a pipe that does not drain, so many times."""
        return Round.of(rows, self.stages, count)

    def microbatches(self, rows: int, parts: int) -> int:
        """Into how many micro-batches a step of so many rows is divided, which fall into so many equal parts."""
        return microbatches(rows, parts, self.stages)

    def logits(self, params: Sequence[jax.Array], hidden_WD: Float[Array, "W D"]) -> Float32[Array, "W V"]:
        """Logits of hidden states from `forward`, whatever layer they left."""
        return self._module(params).logits(hidden_WD)

    def embed(self, params: Sequence[jax.Array], tokens_T: Int32[Array, "T"]) -> Float[Array, "T D"]:
        """What enters the first layer for these tokens."""
        return self._module(params).embed(tokens_T)

    def head(
        self, params: Sequence[jax.Array], hidden_WD: Float[Array, "W D"]
    ) -> tuple[Float[Array, "W D"], Float[Array, "V D"], Callable[[jax.Array], jax.Array]]:
        """The pieces of `logits` for callers that go over the vocabulary in chunks.

        Returns:
            the normed hidden states; head_VD; and the function that turns raw products into logits.
        """
        module = self._module(params)
        return module.normalize(hidden_WD), module.head(), module.cap

    def _module(self, params: Sequence[jax.Array]) -> Transformer:
        return super()._module(params)


def _name(path: tuple[Any, ...]) -> str:
    """`layers.0.mlp.down_FD` from the path of a leaf, which ends in the variable's own `value`."""
    keys = [str(getattr(entry, "key", getattr(entry, "name", ""))) for entry in path]
    return ".".join(key for key in keys if key not in ("", "value"))


def _draw(name: str, leaf: jax.ShapeDtypeStruct, key: jax.Array, stages: int) -> jax.Array:
    first, *rest = leaf.shape
    if (deviation := random_deviation(name, (first // stages, *rest))) is None:
        return jnp.ones(leaf.shape, leaf.dtype, device=leaf.sharding)
    return _normal(leaf.shape, leaf.dtype, leaf.sharding)(key, deviation)


def random_deviation(name: str, shape: tuple[int, ...]) -> float | None:
    """The standard deviation of a random parameter: None for norms, which stand at one; small for biases and sinks;
    for matrices the one that gives their output unit variance."""
    last = name.rsplit(".", 1)[-1]
    if last.startswith("scale"):
        return None
    if "bias" in last or "sinks" in last:
        return 0.1
    # The contracted axis is the last one of [V, D], the second one of experts, the first one of all others.
    contracted = {"weight_VD": -1, "head_VD": -1, "up_EDcF": 1, "down_EFD": 1}.get(last, 0)
    return shape[contracted] ** -0.5


@functools.cache
def _normal(shape: tuple[int, ...], dtype: jnp.dtype, sharding: jax.sharding.Sharding):
    """A compiled draw; layers share it."""
    draw = lambda key, std: (jax.random.normal(key, shape) * std).astype(dtype)  # noqa: E731
    return jax.jit(draw, out_shardings=sharding)
