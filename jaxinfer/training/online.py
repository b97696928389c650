"""A draft model that keeps learning while it serves (Liu et al. 2023, "Online Speculative Decoding", arXiv
2310.07177).

Where a proposal was wrong, the model's own token stands in the output: it says what the draft should have proposed,
and costs nothing. Texts with such places wait in a buffer. A step of training takes some between two programs of the
engine, and the next program drafts with the new weights; the host waits for neither. So acceptance follows the
traffic.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.stages import Compiled

from jaxinfer.decode.arguments import check_size
from jaxinfer.decode.speculative import DraftModel
from jaxinfer.engine import Engine, Update
from jaxinfer.engine.memory import NoRoomError, is_out_of_memory
from jaxinfer.model import Model, Params
from jaxinfer.training.train import TrainState, check_attention, descend, initial_state, token_losses


class OnlineDraft:
    """Trains an engine's draft model on what the engine tells. The engine counts the steps, as `draft_updates`."""

    def __init__(
        self, engine: Engine, *, learning_rate: float = 1e-4, interval: int = 16, batch: int = 8, row: int = 256,
        buffer: int = 256,
    ):  # fmt: skip
        """
        Args:
            engine: one whose speculation is a `DraftModel` of full attention.
            learning_rate: of Adam (Kingma & Ba 2014).
            interval: steps of the engine from one of training to the next, at least: each holds up answers a little.
            batch: texts of one step of training.
            row: tokens that each text has at most, the newest ones.
            buffer: texts that wait at most; the oldest are forgotten.

        Raises:
            ValueError: the engine has no draft model or several processes, or an argument is out of range.
            NoRoomError: a step of training does not fit beside the cache.
        """
        method = engine.options.speculation
        if not isinstance(method, DraftModel) or method.model is None:
            raise ValueError(f"the engine's speculation is {method!r}; it must be a DraftModel, which can learn")
        if (processes := jax.process_count()) > 1:
            raise ValueError(f"a draft model learns in an engine of one process; here are {processes}")
        check_attention("the draft model", method.model.config)
        for name, value, least in (
            ("interval", interval, 1), ("batch", batch, 1), ("row", row, 2), ("buffer", buffer, batch)
        ):  # fmt: skip
            check_size(name, value, least)
        if not learning_rate > 0:
            raise ValueError(f"learning_rate = {learning_rate!r} must be above 0")
        self._engine, self._batch, self._row = engine, batch, min(row, method.model.context)
        self._interval, self._since = interval, 0  # steps of the engine since the last of training
        self._texts: dict[int, list[int]] = {}  # of requests that run
        self._wrong: dict[int, list[int]] = {}  # where in them the draft was
        self._buffer: deque[tuple[list[int], list[int]]] = deque(maxlen=buffer)
        self._mesh = method.model.mesh
        try:
            self._learn, self._state = self._tried(method.model, method.weights, learning_rate)
        except jax.errors.JaxRuntimeError as error:
            if not is_out_of_memory(error):
                raise
            raise NoRoomError(f"no room beside the cache to train the draft; use fewer pages: {error}") from error

    def see(self, updates: Iterable[Update]) -> None:
        """Takes what a step of the engine brought, and makes a step of training when there is enough."""
        for update in updates:
            name = update.request.id
            text = self._texts.setdefault(name, list(update.request.prompt_ids))
            self._wrong.setdefault(name, []).extend(len(text) + place for place in update.corrected)
            text += update.tokens
            if update.finish_reason is not None:
                self._keep(self._texts.pop(name), self._wrong.pop(name))
        for name in self._texts.keys() - self._engine.scheduler.sequences.keys():  # dropped by their callers
            del self._texts[name], self._wrong[name]
        self._since += 1
        if self._since >= self._interval and len(self._buffer) >= self._batch:
            self.learn()

    def learn(self) -> jax.Array:
        """One step of training with the oldest texts that wait, and the engine's next programs draft with what it
        brought.

        Returns:
            nats of a corrected token, before; on the device, for whoever wants to wait.

        Raises:
            ValueError: no text waits.
        """
        if not self._buffer:
            raise ValueError("no text with a wrong proposal waits")
        self._since = 0
        tokens_BS, wrong_BS = self._no_texts()
        for row in range(min(self._batch, len(self._buffer))):
            text, wrong = self._buffer.popleft()
            tokens_BS[row, : len(text)] = text
            wrong_BS[row, wrong] = 1
        with jax.set_mesh(self._mesh):
            self._state, weights, nats = self._learn(self._state, tokens_BS, wrong_BS)
        self._engine.draft_with(weights)
        return nats

    def _tried(self, model: Model, weights: Params, learning_rate: float) -> tuple[Compiled, TrainState]:
        """A step of training, and what the first one begins with. The step has run once, without effect: nobody waits
        for the compiler later, and there is memory for it."""
        optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(learning_rate))
        learn = jax.jit(partial(_learned, model, optimizer), donate_argnums=0)
        tokens_BS, wrong_BS = self._no_texts()

        def first() -> TrainState:
            return initial_state([jnp.array(weight, jnp.float32) for weight in weights], optimizer)  # copies

        with jax.set_mesh(self._mesh):
            compiled = learn.lower(state := first(), tokens_BS, wrong_BS).compile()
            jax.block_until_ready(compiled(state, tokens_BS, wrong_BS + 1))
            return compiled, first()

    def _no_texts(self) -> tuple[np.ndarray, np.ndarray]:
        """Room for the tokens of a step, and for where proposals of them were wrong."""
        shape = self._batch, self._row
        return np.zeros(shape, np.int32), np.zeros(shape, np.float32)

    def _keep(self, text: list[int], wrong: list[int]) -> None:
        """Puts the end of a text in the buffer, where a proposal was wrong in it."""
        first = max(len(text) - self._row, 0)
        wrong = [place - first for place in wrong if place > first]  # what comes first is not predicted
        if wrong:
            self._buffer.append((text[first:], wrong))


def _learned(
    model: Model, optimizer: optax.GradientTransformation, state: TrainState, tokens_BS: jax.Array, wrong_BS: jax.Array
) -> tuple[TrainState, Params, jax.Array]:
    """The state after a step, the weights as the model computes with them, and the loss before."""

    def as_computed(params: Params) -> Params:
        return [param.astype(leaf.dtype) for param, leaf in zip(params, model.parameters.values(), strict=True)]

    def loss(params: Params) -> jax.Array:
        return jnp.sum(token_losses(model, as_computed(params), tokens_BS) * wrong_BS[:, 1:]) / jnp.sum(wrong_BS)

    state, nats = descend(optimizer, state, loss)
    return state, as_computed(state.params), nats
