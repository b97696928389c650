"""Heads on the model's last hidden state guess the tokens after the next (Cai et al. 2024, "Medusa: Simple LLM
Inference Acceleration Framework with Multiple Decoding Heads", arXiv 2401.10774).

The hidden state after which the newest token was drawn is kept for each slot. The first head says what may follow that
token, the second what may follow then, whichever tokens are between: so their likeliest tokens make a tree. It costs
no pass of the model, and no cache.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from heapq import heappop, heappush
from pathlib import Path
from typing import Any, Self, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxinfer.decode.forward import Cache, Forward
from jaxinfer.decode.likeliest import likeliest
from jaxinfer.decode.sampling import Needs
from jaxinfer.decode.slots import SlotState
from jaxinfer.decode.speculative.method import OWN, Loader, Proposal, Speculation, Typical, check_drafts
from jaxinfer.decode.tree import Tree
from jaxinfer.model import Model, Params

FILE = "medusa_lm_head.safetensors"
_NAME = re.compile(r"(\d+)\.(\d+)\.(linear\.weight|linear\.bias|weight)")
# How often a head's likeliest token is right is taken to be FIRST for the first head, LATER times as often for each
# after it, and NEXT times as often for the token that comes next in likelihood: a rule of thumb, to choose a tree by.
FIRST, LATER, NEXT = 0.6, 0.8, 0.35

_TYPICAL = {f"typical_{name}": name for name in Typical._fields}


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Head:
    """One head: x + silu(x W^T + b) for each of its blocks, then logits; as arrays of any kind.

    Attributes:
        blocks: weight_DD and bias_D of each.
        output_VD: None takes the model's own.
    """

    blocks: tuple[tuple[jax.Array, jax.Array], ...]
    output_VD: jax.Array | None


@dataclass(frozen=True)
class Medusa(Speculation):
    """Proposes a tree of the likeliest tokens of each head.

    Attributes:
        checkpoint: a folder with the file FILE, or a Hugging Face id; None are the heads that ship for the demo model.
            Its tensors have the names of FasterDecoding's
            `medusa_lm_head.pt`: of head i the blocks `i.0.linear.weight`, `i.0.linear.bias`, `i.1.linear.weight` and
            so on, then the output matrix, `i.n.weight` with n blocks; without it the head has the model's own. Heads
            read the last hidden state after the model's final norm.
        num_speculative_tokens: nodes of the tree, 1..MOST_DRAFTS; see `sparse_tree`.
        typical: takes more of what is proposed, and changes the distribution of outputs that are drawn at random; None
            is exact.
        heads: once they are loaded.

    Raises:
        ValueError: a number is out of range.
    """

    checkpoint: str | Path | None = None
    num_speculative_tokens: int = 15
    typical: Typical | None = None
    heads: tuple[Head, ...] | None = field(default=None, repr=False, compare=False)

    def __post_init__(self):
        check_drafts(self.num_speculative_tokens)
        if self.typical is not None:
            self.typical.check()

    @classmethod
    def settings(cls) -> tuple[str, ...]:
        return (*super().settings(), *_TYPICAL)

    @classmethod
    def of(cls, *, typical: bool = False, **settings: Any) -> Self:
        """`typical` asks for typical acceptance, with `typical_epsilon` and `typical_delta`."""
        numbers = {name: settings.pop(name) for name in _TYPICAL if name in settings}
        if typical:
            settings["typical"] = Typical(**{_TYPICAL[name]: value for name, value in numbers.items()})
        elif numbers:
            name, value = numbers.popitem()
            raise ValueError(f"{name} = {value!r} has no use without typical")
        return super().of(**settings)

    def read(self, loader: Loader) -> Self:
        return replace(self, heads=read_heads(loader.tensors(self.checkpoint, FILE)))

    def shapes(self, model: Model) -> Iterable[Any]:
        return jax.tree.leaves(_shapes(self.heads, model))

    def placed(self, loader: Loader) -> Self:
        def put(array: Any, shape: Any) -> jax.Array:
            return jax.device_put(np.asarray(array).astype(shape.dtype), shape.sharding)

        return replace(self, heads=jax.tree.map(put, self.heads, _shapes(self.heads, loader.target)))

    def check(self, model: Model) -> None:
        if self.heads is None:
            raise ValueError(f"the heads {self.checkpoint or OWN} are not loaded; `LLM` loads them")
        D, V = model.config.hidden_size, model.config.vocab_size
        for index, head in enumerate(self.heads):
            found = [("linear.weight", weight_DD.shape, (D, D)) for weight_DD, _ in head.blocks]
            found += [("linear.bias", bias_D.shape, (D,)) for _, bias_D in head.blocks]
            if head.output_VD is not None:
                found.append(("weight", head.output_VD.shape, (V, D)))
            for name, shape, expected in found:
                if shape != expected:
                    raise ValueError(
                        f"head {index} of {self.checkpoint or OWN} has a {name} of shape {shape}; for this model, of "
                        f"hidden size {D} and {V} tokens, it must be {expected}"
                    )
        if (likeliest := 1 + max(max(path) for path in self.choices)) > V:
            raise ValueError(
                f"num_speculative_tokens = {self.num_speculative_tokens} makes a tree of the {likeliest} likeliest "
                f"tokens of a head; the model has {V}"
            )

    @cached_property
    def choices(self) -> tuple[tuple[int, ...], ...]:
        assert self.heads is not None
        return sparse_tree(len(self.heads), self.num_speculative_tokens)

    @property
    def tree(self) -> Tree:
        return self._tree

    @cached_property
    def _tree(self) -> Tree:
        return Tree(tuple(self.choices.index(path[:-1]) if path[:-1] else -1 for path in self.choices))

    @property
    def weights(self) -> Params:
        return jax.tree.leaves(self.heads)

    @property
    def outputs(self) -> int:
        """Of each head; its blocks are small beside that."""
        return self.tree.depth

    def memory(self, model: Model, slots: int) -> np.ndarray:
        """The hidden state after which the newest token of each slot was drawn, [B, D], before the final norm."""
        return np.zeros((slots, model.config.hidden_size), jnp.dtype(model.config.dtype))

    def remember(self, state: SlotState, shown_TE: jax.Array, rows_Bd: jax.Array, taken_B: jax.Array) -> jax.Array:
        newest_B1 = jnp.take_along_axis(rows_Bd, jnp.maximum(taken_B - 1, 0)[:, None], axis=1)
        return jnp.where((taken_B > 0)[:, None], shown_TE[newest_B1[:, 0]], state.memory)

    def propose(
        self, target: Forward, params: Params, needs: Needs, state: SlotState, cache: Cache
    ) -> tuple[Proposal, Cache]:
        heads = jax.tree.unflatten(jax.tree.structure(self.heads), target.others(params))
        normed_BD, head_VD, _ = target.model.head(target.own(params), state.memory)
        ranked = [
            _likeliest(head, normed_BD, head_VD, 1 + max(path[place] for path in self.choices if len(path) > place))
            for place, head in enumerate(heads[: self.tree.depth])
        ]
        return Proposal(jnp.stack([ranked[len(path) - 1][:, path[-1]] for path in self.choices], axis=1)), cache


def _likeliest(head: Head, normed_BD: jax.Array, own_VD: jax.Array, count: int) -> jax.Array:
    """The likeliest tokens by a head, int32 [B, count]."""
    logits_BV = head_logits(head, normed_BD, own_VD)
    return likeliest(jax.sharding.reshard(logits_BV, P(None, None)), count)[1]


def head_logits(head: Head, normed_TD: jax.Array, own_VD: jax.Array) -> jax.Array:
    """float32 [T, V], sharded over the vocabulary as the output matrix is.

    Args:
        normed_TD: the model's last hidden states, after its final norm.
        own_VD: the model's output matrix.
    """
    for weight_DD, bias_D in head.blocks:
        normed_TD = normed_TD + jax.nn.silu(jnp.einsum("TD,ED->TE", normed_TD, weight_DD) + bias_D[None])
    output_VD = own_VD if head.output_VD is None else head.output_VD
    return jnp.einsum("TD,VD->TV", normed_TD, output_VD, preferred_element_type=jnp.float32)


def sparse_tree(
    heads: int, nodes: int, *, first: float = FIRST, later: float = LATER, branches: int | None = None
) -> tuple[tuple[int, ...], ...]:
    """The `nodes` paths that are likeliest to be right (section 2.3.3 of the paper), by a rule of thumb for how good
    heads are. A path names of each head on it a token by its rank, 0 the likeliest; the paths to it come before it.

    Args:
        heads: tokens of the longest path.
        first, later: how often the likeliest token of the first head is right, and of each after it how many times as
            often.
        branches: tokens of one head after the same ones, at most.

    Raises:
        ValueError: there is no head, or no tree of so many nodes.
    """
    if heads < 1:
        raise ValueError(f"heads = {heads} must be at least 1")
    found: list[tuple[int, ...]] = []
    open_: list[tuple[float, tuple[int, ...]]] = [(-first, (0,))]
    while len(found) < nodes:
        if not open_:
            raise ValueError(
                f"num_speculative_tokens = {nodes} must be at most {len(found)}, the nodes of a tree of depth {heads} "
                f"with {branches} branches"
            )
        rate, path = heappop(open_)
        found.append(path)
        if branches is None or path[-1] + 1 < branches:
            heappush(open_, (rate * NEXT, (*path[:-1], path[-1] + 1)))
        if len(path) < heads:
            heappush(open_, (rate * first * later ** len(path), (*path, 0)))
    return tuple(found)


def read_heads(tensors: Mapping[str, np.ndarray]) -> tuple[Head, ...]:
    """Heads from the tensors of a file, by name; see `Medusa`.

    Raises:
        ValueError: a name is none of theirs, or one is missing.
    """
    parts: dict[int, dict[int, dict[str, np.ndarray]]] = {}
    for name, tensor in tensors.items():
        if (match := _NAME.fullmatch(name)) is None:
            raise ValueError(f"{FILE} has a tensor {name!r}; heads have 0.0.linear.weight, 0.1.weight and such")
        parts.setdefault(int(match[1]), {}).setdefault(int(match[2]), {})[match[3]] = tensor
    if sorted(parts) != list(range(len(parts))) or not parts:
        raise ValueError(f"{FILE} has the heads {sorted(parts)}; they must be numbered from 0 on")
    return tuple(_head(index, parts[index]) for index in range(len(parts)))


def _head(index: int, parts: dict[int, dict[str, np.ndarray]]) -> Head:
    places, block = sorted(parts), {"linear.weight", "linear.bias"}
    blocks = [parts[place] for place in places]
    output = blocks.pop() if blocks[-1].keys() == {"weight"} else {}
    if places != list(range(len(places))) or any(one.keys() != block for one in blocks):
        found = {place: sorted(parts[place]) for place in places}
        raise ValueError(
            f"head {index} of {FILE} has the parts {found}; it must have blocks of a linear.weight and a linear.bias, "
            "numbered from 0 on, and behind them one weight or none"
        )
    made: Any = tuple((one["linear.weight"], one["linear.bias"]) for one in blocks)
    return Head(made, cast(Any, output.get("weight")))


def _shapes(heads: tuple[Head, ...] | None, model: Model) -> tuple[Head, ...]:
    """Of the model's dtype on its devices, output matrices sharded over the vocabulary as the model's own is."""
    own = model.parameters.get("head_VD", model.parameters["embed.weight_VD"]).sharding
    whole, dtype = NamedSharding(model.mesh, P()), jnp.dtype(model.config.dtype)

    def shape(array: Any, sharding: Any) -> Any:
        return jax.ShapeDtypeStruct(array.shape, dtype, sharding=sharding)

    assert heads is not None
    return tuple(
        Head(
            tuple((shape(weight_DD, whole), shape(bias_D, whole)) for weight_DD, bias_D in head.blocks),
            None if head.output_VD is None else shape(head.output_VD, own),
        )
        for head in heads
    )
