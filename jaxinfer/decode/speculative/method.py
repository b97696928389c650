"""What a method of speculation is."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, NamedTuple, Self, cast

import jax
import numpy as np

from jaxinfer.decode.arguments import check_size, is_number
from jaxinfer.decode.batch import Batch
from jaxinfer.decode.forward import Cache, Forward
from jaxinfer.decode.sampling import Needs
from jaxinfer.decode.slots import SlotState
from jaxinfer.decode.tree import MOST_DRAFTS, GrownTree, Tree
from jaxinfer.model import EagleHead, Model, ModelConfig, Params

OWN = "the demo model's own"  # heads without another name, in errors


class Proposal(NamedTuple):
    """Tokens that may follow the newest one of each slot; any for a slot that is not active.

    Attributes:
        drafts_Bk: int32; of a tree its nodes.
        kept_BkV: where the tokens were drawn and not chosen for certain, what with: see `sampling.kept`.
        parents_Bk: int32, of a grown tree which node each follows, as `Tree.parents`.
    """

    drafts_Bk: jax.Array
    kept_BkV: jax.Array | None = None
    parents_Bk: jax.Array | None = None


class Typical(NamedTuple):
    """Typical acceptance (Cai et al. 2024, "Medusa", arXiv 2401.10774, section 2.3.1): of a request that is drawn at
    random a proposed token counts where the model gives it a probability above min(epsilon, delta exp(-H)), with H the
    entropy in nats of what is drawn from. More tokens count, and outputs no longer have the model's distribution.
    """

    epsilon: float = 0.09
    delta: float = 0.3

    def check(self) -> None:
        """
        Raises:
            ValueError: one of the two is not above 0 and at most 1.
        """
        for name, value in self._asdict().items():
            if not is_number(value) or not 0 < value <= 1:
                raise ValueError(f"typical.{name} = {value!r} must be a number above 0, at most 1")


class Pool(NamedTuple):
    """The keys and values of one layer that a method has beside the model's: in pages of the same numbers.

    Attributes:
        group: the cache group of the model whose pages they are.
        kv_slots, kv_slots_per_device, head_size: see `Model`.
        stages: that have a layer each, in the same pages of their own devices.
    """

    group: int
    kv_slots: int
    kv_slots_per_device: int
    head_size: int
    stages: int = 1


class Pass(NamedTuple):
    """A forward pass over all slots that decode.

    Attributes:
        config: of the layers that run.
        queries: of each slot; the last one of them has logits.
    """

    config: ModelConfig
    queries: int = 1


class Loader(NamedTuple):
    """What a method gets its weights with.

    Attributes:
        target: the model that is to be served.
        model: gives the model of a checkpoint, a folder or a Hugging Face id, for the mesh, context and tokenizer of
            the target; for None the demo model's own draft.
        params: reads the weights of that model from the same checkpoint.
        tensors: gives the tensors of a file of a checkpoint, by name, on the host and not read yet; for None those of
            the demo model's own heads.
        head: gives the head of EAGLE of a checkpoint, for the target; for None the demo model's own.
        head_params: reads its weights from the same checkpoint.
        check_room: holds weights that are yet to be placed, as shapes with their shardings, to the memory that the
            devices have beside those of the target.
    """

    target: Model
    model: Callable[[str | Path | None], Model]
    params: Callable[[str | Path | None, Model], Params]
    tensors: Callable[[str | Path | None, str], dict[str, np.ndarray]]
    head: Callable[[str | Path | None], EagleHead]
    head_params: Callable[[str | Path | None, EagleHead], Params]
    check_room: Callable[[Iterable[Any]], None]


class Observed(NamedTuple):
    """A step with prompts in it, after the model's own pass.

    Attributes:
        batch: its tokens.
        shown_TE: what of them a method is shown, see `Speculation.taps`; may be None for one that does not observe it.
        first_B: the first row of every slot; one past the last row for a slot that has none.
    """

    batch: Batch
    shown_TE: jax.Array | None
    first_B: jax.Array


class Speculation:
    """A method with its settings. Here are the answers of one that needs nothing but the slots.

    Attributes:
        num_speculative_tokens: k, proposed for each sequence in each step, 1..MOST_DRAFTS.
        adapts: whether it proposes any number of tokens, one after the other: see `fewer`.
        reads_text: whether the slots keep their text.
        shares_sequences: whether it is built for devices that share sequences, whose pages are dealt out to them.
        observes: whether `observe` reads `shown_TE`, and so has a use for hidden states of all tokens of a prompt.
        draws: whether what it proposes depends on what requests need of the sampler.
        typical: how proposed tokens count that are likely enough; None for those alone that are drawn.
    """

    num_speculative_tokens: int
    adapts = False
    reads_text = False
    shares_sequences = False
    observes = False
    draws = False
    typical: Typical | None = None

    @classmethod
    def settings(cls) -> tuple[str, ...]:
        """Names of what `of` takes: fields of a method, but for what is loaded, which is no part of comparisons."""
        names = [one.name for one in fields(cast(Any, cls)) if one.compare]
        return tuple("draft_model" if name == "checkpoint" else name for name in names)

    @classmethod
    def of(cls, **settings: Any) -> Self:
        """A method with settings as commands name them.

        Raises:
            ValueError: one of them is out of range, or has no use beside another.
        """
        if "draft_model" in settings:
            settings["checkpoint"] = settings.pop("draft_model")
        return cls(**settings)

    @property
    def tree(self) -> Tree | GrownTree | None:
        """Of `num_speculative_tokens` nodes: which of them follow which. None where each follows the one before."""
        return None

    def fewer(self, count: int) -> Self:
        """The same method with `count` tokens in a proposal, at most `num_speculative_tokens`. Only of one that
        adapts: steps of any of the two may follow each other."""
        assert self.adapts, self
        return replace(cast(Any, self), num_speculative_tokens=count)

    def loaded(self, loader: Loader) -> Self:
        """With the weights that it names.

        Raises:
            FileNotFoundError, ValueError: they are not there, or not as they must be, or there is no room for them; or
                as `check`.
        """
        method = self.read(loader)
        method.check(loader.target)
        loader.check_room(method.shapes(loader.target))
        return method.placed(loader)

    def read(self, loader: Loader) -> Self:
        """With what `check` must know of the weights that it names."""
        return self

    def shapes(self, model: Model) -> Iterable[Any]:
        """Shapes, dtypes and shardings of the weights that it names, before they are placed."""
        return ()

    def placed(self, loader: Loader) -> Self:
        """With the weights themselves, on the devices of the target."""
        return self

    def check(self, model: Model) -> None:
        """
        Raises:
            ValueError: the method cannot propose for this model.
        """

    @property
    def weights(self) -> Params:
        """Arrays that programs get behind the parameters of the model."""
        return []

    def passes(self, model: Model) -> list[Pass]:
        """What runs for a proposal, one after the other; the predicted time of it is the method's cost."""
        return []

    @property
    def outputs(self) -> int:
        """Products with a matrix as large as the model's head, for all slots that decode, that a proposal takes beside
        its `passes`."""
        return 0

    def pools(self, model: Model) -> list[Pool]:
        """Layers that the cache has behind those of the model."""
        return []

    def memory(self, model: Model, slots: int) -> Any:
        """What it keeps for every slot between steps, in `SlotState.memory`, at first: a pytree of host arrays whose
        first axis is the slots, or None."""
        return None

    def taps(self, model: Model) -> tuple[int, ...]:
        """Layers of the model whose outputs the method is shown, side by side; none for the last hidden states, before
        the final norm."""
        return ()

    def remember(self, state: SlotState, shown_TE: jax.Array, rows_Bd: jax.Array, taken_B: jax.Array) -> Any:
        """The memory after a step of any kind. Only of a method that has one.

        Args:
            state: of the slots before the step. Of one that was not active a part of its prompt was computed, if any.
            shown_TE: of the step's rows what the method is shown; see `taps`.
            rows_Bd: the rows of each slot, one after the other in its text: of what was proposed the path that was
                taken, of a part of a prompt the last one.
            taken_B: how many of them count; a slot of which none does must keep what it has.
        """
        return state.memory

    def learn(self, memory: Any, tokens_BQ: jax.Array, drawn_BQ: jax.Array, taken_B: jax.Array) -> Any:
        """The memory after a step with proposals, once `remember` was asked. Only of a method that has one.

        Args:
            tokens_BQ: int32, the tokens of the step, k + 1 of each slot: its newest one before the step, and those
                that were proposed.
            drawn_BQ: int32, what was drawn after each of them, whether it counts or not.
            taken_B: int32, how many tokens each slot took; one that took none must keep what it has.
        """
        return memory

    def propose(
        self, target: Forward, params: Params, needs: Needs, state: SlotState, cache: Cache
    ) -> tuple[Proposal, Cache]:
        """What a step of a loop proposes.

        Args:
            target: the model.
            params: its parameters, and the method's `weights`.
            needs: of the slots that decode.
            cache: the layers of the model, and the method's `pools`.
        """
        raise NotImplementedError

    def observe(self, target: Forward, params: Params, state: SlotState, step: Observed, cache: Cache) -> Cache:
        """The cache after a step with prompts in it, of which the method may want to keep keys and values too.

        Args:
            state: of the slots before the step.
        """
        return cache


def drafts_of(speculation: Speculation | None) -> int:
    """Tokens that a decode step proposes for each slot: none without a method."""
    return 0 if speculation is None else speculation.num_speculative_tokens


def tree_of(speculation: Speculation | None) -> Tree | GrownTree | None:
    """The tree that a method proposes; None for a chain, and without a method.

    Raises:
        ValueError: it has not as many nodes as the method proposes tokens.
    """
    if speculation is None or (tree := speculation.tree) is None:
        return None
    if (nodes := tree.nodes) != (count := speculation.num_speculative_tokens):
        raise ValueError(f"tree has {nodes} nodes; it must have num_speculative_tokens = {count}")
    return None if tree.is_chain else tree


def depth_of(speculation: Speculation | None) -> int:
    """Proposed tokens of a slot that a decode step may find to be right."""
    return drafts_of(speculation) if (tree := tree_of(speculation)) is None else tree.depth


def beyond_of(speculation: Speculation | None) -> int:
    """Tokens by which a slot needs more room for proposals than for the longest text that they may bring."""
    return 0 if (tree := tree_of(speculation)) is None else tree.beyond


def check_ranks(speculation: Speculation, model: Model) -> None:
    """
    Raises:
        ValueError: several devices share the sequences of the model, and the method is not made for that.
    """
    if model.ranks > 1 and not (speculation.shares_sequences and tree_of(speculation) is None):
        name = type(speculation).__name__
        raise ValueError(
            f"speculation = {name} is not built for context_parallel_size = {model.ranks}; PromptLookup is, "
            "and plain decoding"
        )


def group_of(window: int | None, windows: tuple[int | None, ...]) -> int | None:
    """The smallest of a model's windows that holds what is seen through `window`, by its place; None if none does."""
    wide = {group: math.inf if held is None else held for group, held in enumerate(windows)}
    enough = [group for group, held in wide.items() if held >= (math.inf if window is None else window)]
    return min(enough, key=wide.__getitem__, default=None)


def check_drafts(count: object) -> None:
    """
    Raises:
        ValueError: it is no number of tokens that can be proposed.
    """
    check_size("num_speculative_tokens", count, 1, MOST_DRAFTS)
