"""The one step, and the loop of it on the device.

A step is two programs or more, so that few are compiled: what the model does depends on the number of tokens, and what
the sampler does on what the requests need. Few rows of prompts have logits; where all are to be scored, one program
finishes their last layer, and one scores them, in tiles of one size. A loop of decode steps is one program: in single
steps an H100 decodes one sequence with 8 billion parameters 4 % slower, and with 600 million 20 %. A single step that
verifies proposals, in which the host has a say, is three programs: it checks what the first one proposes while the
second runs the model.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jax.stages import Lowered

from jaxinfer.cache import make_cache
from jaxinfer.decode import sampling, slots
from jaxinfer.decode.batch import Rows, StepInput, first_rows, make_batch, make_rectangle
from jaxinfer.decode.circulation import circulate
from jaxinfer.decode.forward import Cache, Forward
from jaxinfer.decode.layout import Layout, pools_of
from jaxinfer.decode.masking import masked
from jaxinfer.decode.masks import no_masks
from jaxinfer.decode.packing import unpacked
from jaxinfer.decode.prompt_logprobs import PromptLogprobs, prompt_logprobs
from jaxinfer.decode.sampling import Needs, Sampled
from jaxinfer.decode.sampling_params import MAX_LOGPROBS, SamplingParams
from jaxinfer.decode.slots import Admission, SlotState
from jaxinfer.decode.speculative import Observed, SpeculativeStep, remembering
from jaxinfer.model import Model, Params
from jaxinfer.parallel import row_axis, take_rows

VOCABULARY_CHUNK = 8192
SCORED = 64  # rows that one program gives log-probabilities, where the step has as many
ENTRIES = 256  # of page tables that one program writes
# In a layer's decode step three small kernels do not depend on each other: queries are rotated, keys and values
# written. To run them side by side saves 1 to 3 us of each layer at batches of 1, 16 and 64 (one H200).
SIDE_BY_SIDE = {"xla_gpu_command_buffer_scheduling_mode": "CONCURRENT"}
Part = Literal["propose", "drafted", "verify"]  # of a step whose proposals the host checks


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class StepOutput:
    """What the host reads of a program of n steps, late.

    Attributes:
        sampled: the choice for every step (leading axis n) and row: a slot, or in a loop of some slots one of these.
            A step that speculates has more places on that axis, one for each token that it may bring.
        emits_nW: rows whose token counts.
        prompt: log-probabilities of each row's next token in tiles of `SCORED`; empty where nobody asked for them.
    """

    sampled: Sampled
    emits_nW: jax.Array
    prompt: tuple[PromptLogprobs, ...]


class Programs:
    """The jitted programs of one model in one layout. Cache and slot state are donated to each and come back.

    Attributes:
        traces: how often each program was traced, by name; a warm engine adds none.
    """

    def __init__(self, model: Model, layout: Layout):
        self.model, self.layout, self.traces = model, layout, Counter[str]()
        method = layout.speculation
        taps, whole = ((), False) if method is None else (method.taps(model), method.observes)
        pages = layout.page_size, layout.cache_dtype, layout.attention
        self.forward = Forward(model, *pages, taps=taps, whole=whole and not taps)
        self._pools, donated = pools_of(model, layout.speculation), ("state", "cache")
        self._step = jax.jit(self._traced_step, static_argnames=("tokens", "decode"), donate_argnames=("cache",))
        self._sample = jax.jit(self._traced_sample, static_argnames=("needs",), donate_argnames=("state",))
        self._mask = jax.jit(self._traced_mask)
        self._finish = jax.jit(self._traced_finish)
        self._score = jax.jit(self._traced_score)
        self._loop = jax.jit(
            self._traced_loop, static_argnames=("steps", "needs", "drafts"), donate_argnames=donated,
            compiler_options=SIDE_BY_SIDE if self.side_by_side else None,
        )  # fmt: skip
        self._propose = jax.jit(self._traced_propose, static_argnames=("needs",), donate_argnames=("cache",))
        self._drafted = jax.jit(self._traced_drafted, donate_argnames=("cache",))
        self._verify = jax.jit(self._traced_verify, static_argnames=("needs",), donate_argnames=donated)
        self._admit = jax.jit(self._traced_admit, static_argnames=("form",), donate_argnames=("state",))
        self._extend = jax.jit(self._traced_extend, donate_argnames=("tables",))
        self._release = jax.jit(self._traced_release, donate_argnames=("state",))

    def new_state(self) -> tuple[SlotState, Cache]:
        """No request, and an empty cache; sharded as programs give them back, so that one compilation serves both."""
        model, layout = self.model, self.layout
        empty = slots.empty_slots(
            layout.slots, len(layout.num_pages), layout.pages_per_row, model.config.vocab_size, layout.text,
            layout.speculation and layout.speculation.memory(model, layout.slots),
        )  # fmt: skip
        whole = jax.tree.map(lambda array: NamedSharding(model.mesh, P(*[None] * array.ndim)), empty)
        state = jax.device_put(empty, whole)
        dtype, sizes = layout.cache_dtype, (layout.num_pages, layout.page_size)
        made = [
            make_cache(model.mesh, (pool.group,), *sizes, pool.kv_slots, pool.head_size, dtype, pool.stages)
            for pool in self._pools
        ]
        return state, tuple(pages for (pages,) in made)

    def step(
        self, params: Params, state: SlotState, cache: Cache, given: StepInput, targets_T: np.ndarray | None,
        needs: Needs, masks: Callable[[], np.ndarray] | None = None,
    ) -> tuple[SlotState, Cache, StepOutput]:  # fmt: skip
        """One step: a token for each slot that decodes, and a chunk of some prompts.

        Args:
            given: what runs. A program is compiled for each number of rows, and of those that may decode.
            targets_T: the token that follows each row's, to be given its log-probability; None scores nothing.
            needs: what the sampler must be able to do.
            masks: asked when the forward pass is on its way for the tokens that each slot may draw, as words of
                `jaxinfer.decode.masks`, [B, U]; None bars none.
        """
        prompt = []
        with jax.set_mesh(self.model.mesh):
            cache, logits_WV, rows, shown_WE, rest = self._step(params, state, cache, given.packed(), **given.sizes)
            if masks is not None:
                logits_WV = self._mask(logits_WV, masks())
            state, sampled, emits_nW = self._sample(state, logits_WV, rows, shown_WE, needs=needs)
            if targets_T is not None:
                targets = np.split(targets_T, range(SCORED, len(targets_T), SCORED))
                tiles = zip(self._finish(params, rest), targets, strict=True)
                prompt = [self._score(params, *tile) for tile in tiles]
        return state, cache, StepOutput(sampled, emits_nW, tuple(prompt))

    def lower_step(self, params: Params, state: SlotState, cache: Cache, given: StepInput) -> Lowered:
        """The model's part of `step`, not compiled yet. Once it is, `step` finds it."""
        with jax.set_mesh(self.model.mesh):
            return self._step.lower(params, state, cache, given.packed(), **given.sizes)

    def lower_finish(self, params: Params, state: SlotState, cache: Cache, given: StepInput) -> Lowered:
        """What finishes all rows of `step`, to be scored, not compiled yet. Once it is, `step` finds it."""
        with jax.set_mesh(self.model.mesh):
            *_, rest = self._step.eval_shape(params, state, cache, given.packed(), **given.sizes)
            return self._finish.lower(params, rest)

    def loop(
        self, params: Params, state: SlotState, cache: Cache, slots_B: np.ndarray, *, steps: int, needs: Needs,
        drafts: int = 0,
    ) -> tuple[SlotState, Cache, StepOutput]:  # fmt: skip
        """`steps` decode steps in one program.

        Args:
            slots_B: those that decode, one past the last slot pads. As many as there are stand for all in their order.
            drafts: how many proposed tokens may be right in each, one of the layout's `choices`; none decode plainly.
        """
        with jax.set_mesh(self.model.mesh):
            return self._loop(params, state, cache, slots_B, steps=steps, needs=needs, drafts=drafts)

    def lower_loop(
        self, params: Params, state: SlotState, cache: Cache, slots_B: np.ndarray, *, steps: int, needs: Needs,
        drafts: int = 0,
    ) -> Lowered:  # fmt: skip
        """`loop`, not compiled yet. Once it is, `loop` finds it."""
        with jax.set_mesh(self.model.mesh):
            return self._loop.lower(params, state, cache, slots_B, steps=steps, needs=needs, drafts=drafts)

    def verify(
        self, params: Params, state: SlotState, cache: Cache, slots_B: np.ndarray, needs: Needs,
        masks: Callable[[np.ndarray, np.ndarray], np.ndarray],
    ) -> tuple[SlotState, Cache, StepOutput]:  # fmt: skip
        """A decode step that proposes tokens and verifies them, by the layout's method.

        Args:
            slots_B: see `loop`.
            masks: asked when the forward pass is on its way for the tokens that may be drawn, as words of
                `jaxinfer.decode.masks`, [B x (k + 1), U]. It is given what is proposed; see
                `SpeculativeStep.on_host`.
        """
        with jax.set_mesh(self.model.mesh):
            proposal, cache = self._propose(params, state, cache, slots_B, needs=self._proposed_by(needs))
            for array in jax.tree.leaves(proposal._replace(kept_BkV=None)):
                array.copy_to_host_async()
            cache, *ran = self._drafted(params, state, cache, slots_B, proposal._replace(kept_BkV=None))
            words_WU = masks(*self._checked.on_host(proposal))
            return self._verify(state, cache, slots_B, proposal, *ran, words_WU, needs=needs)

    def lower_verify(
        self, part: Part, params: Params, state: SlotState, cache: Cache, slots_B: np.ndarray, needs: Needs
    ) -> Lowered:
        """One of the programs of `verify`, not compiled yet. Once it is, `verify` finds it."""
        with jax.set_mesh(self.model.mesh):
            propose = self._propose.lower(params, state, cache, slots_B, needs=self._proposed_by(needs))
            proposal, _ = propose.out_info
            if part == "propose":
                return propose
            drafted = self._drafted.lower(params, state, cache, slots_B, proposal._replace(kept_BkV=None))
            _, *ran = drafted.out_info
            if part == "drafted":
                return drafted
            words_WU = no_masks(*ran[0].shape)
            return self._verify.lower(state, cache, slots_B, proposal, *ran, words_WU, needs=needs)

    def admission(
        self, params: SamplingParams, pages: Sequence[Sequence[int]], prompt_ids: Sequence[int] = (),
        eos_ids: Sequence[int] = (), seed: int = 0, output_ids: Sequence[int] = (),
    ) -> Admission:  # fmt: skip
        """A request's row, on the host.

        Args:
            params: the request's parameters, valid for the model.
            pages: the request's pages in each cache group, in order, as far as they are known.
            prompt_ids: the prompt, which only the repetition penalty and speculation read.
            eos_ids, seed: see `sampling.pack`.
            output_ids: tokens of an output that goes on.
        """
        width = self.layout.pages_per_row
        # Whether a penalty reads tokens makes two widths, and two programs.
        reads_prompt = params.repetition_penalty != 1
        wide = reads_prompt or (len(output_ids) > 0 and params.penalized)

        def tokens(ids: Sequence[int]) -> np.ndarray:
            row = np.full(self.layout.max_tokens if wide else 1, -1, np.int32)
            row[: len(ids)] = ids
            return row

        text_T = None
        if self.layout.text is not None:
            text_T = np.zeros(self.layout.text, np.int32)
            text_T[: len(prompt_ids) + len(output_ids)] = [*prompt_ids, *output_ids]
        return Admission(
            tables=tuple(np.pad(np.asarray(group, np.int32), (0, width - len(group))) for group in pages),
            index=np.asarray(len(output_ids), np.int32),
            max_tokens=np.asarray(params.max_tokens, np.int32),
            sampling=sampling.pack(params, eos_ids, seed),
            prompt_T=tokens(prompt_ids if reads_prompt else ()),
            output_T=tokens(output_ids if wide else ()),
            text_T=text_T,
        )

    def admit(self, state: SlotState, rows: Mapping[int, Admission]) -> SlotState:
        """Gives slots to requests, whose rows are given by slot."""
        with jax.set_mesh(self.model.mesh):
            for some in slots.together(rows, self.layout.slots):
                state = self._admit(state, *some)
        return state

    def extend(self, state: SlotState, entries: Sequence[tuple[int, int, int, int]]) -> SlotState:
        """Writes entries of the page tables: cache group, slot, column and page of each."""
        tables = state.tables
        for first in range(0, len(entries), ENTRIES):
            part = entries[first : first + ENTRIES]
            entries_E4 = np.full((ENTRIES, 4), self.layout.slots, np.int32)
            entries_E4[: len(part)] = part
            with jax.set_mesh(self.model.mesh):
                tables = self._extend(tables, entries_E4)
        return replace(state, tables=tables)

    def release(self, state: SlotState, stopped: Sequence[int]) -> SlotState:
        """Stops slots."""
        slots_B = np.full(self.layout.slots, self.layout.slots, np.int32)
        slots_B[: len(stopped)] = stopped
        with jax.set_mesh(self.model.mesh):
            return self._release(state, slots_B)

    def _traced_step(self, params, state, cache, packed, *, tokens, decode):
        self.traces["step"] += 1
        given = StepInput.unpacked(packed, tokens, decode)
        batch, rows = make_batch(state, given, self.layout.page_size)
        ran = self.forward(params, cache, batch, rows.tokens_W)
        cache, shown_WE = ran.cache, None
        if self.layout.speculation is not None:
            step = Observed(batch, ran.shown_TE, first_rows(given, len(state.token_B)))
            cache = self.layout.speculation.observe(self.forward, params, state, step, cache)
        if state.memory is not None:
            shown_WE = ran.hidden_WD if ran.shown_TE is None else take_rows(ran.shown_TE, rows.tokens_W)
        return cache, ran.logits_WV, rows, shown_WE, ran.rest

    def _traced_mask(self, logits_WV, words_BU):
        self.traces["mask"] += 1
        return masked(logits_WV, words_BU)

    def _traced_sample(self, state, logits_WV, rows, shown_WE, *, needs):
        self.traces["sample"] += 1
        state, sampled = self._draw(state, logits_WV, rows, shown_WE, needs)
        return state, jax.tree.map(lambda array: array[None], sampled), rows.emits_W[None]

    def _traced_finish(self, params, rest):
        self.traces["finish"] += 1
        return _tiles(self.forward.hidden(params, rest))

    def _traced_score(self, params, hidden_TD, targets_T):
        self.traces["score"] += 1
        normed_TD, head_VD, cap = self.model.head(self.forward.own(params), hidden_TD)
        top = min(MAX_LOGPROBS, self.model.config.vocab_size)
        return prompt_logprobs(normed_TD, head_VD, targets_T, top, chunk=VOCABULARY_CHUNK, transform=cap)

    def _traced_loop(self, params, state, cache, slots_B, *, steps, needs, drafts):
        self.traces["loop"] += 1
        own = self._own(state, slots_B)
        if self.circulates and not drafts:
            draw = partial(self._draw, needs=needs)
            own, cache, (sampled, emits_nW) = circulate(self.forward, draw, params, own, cache, steps)
        else:
            body = partial(self._proposing, self._speculative(drafts)) if drafts else self._plain
            (own, cache), (sampled, emits_nW) = jax.lax.scan(partial(body, params, needs), (own, cache), length=steps)
        if drafts:
            places = steps * (1 + drafts)
            sampled, emits_nW = jax.tree.map(lambda x: x.reshape(places, *x.shape[2:]), (sampled, emits_nW))
        return self._with(state, slots_B, own, sampled, emits_nW), cache, StepOutput(sampled, emits_nW, ())

    def _traced_propose(self, params, state, cache, slots_B, *, needs):
        self.traces["propose"] += 1
        return self._checked.propose(params, needs, self._own(state, slots_B), cache)

    def _traced_drafted(self, params, state, cache, slots_B, proposal):
        self.traces["drafted"] += 1
        return self._checked.run(params, self._own(state, slots_B), cache, proposal)

    def _traced_verify(self, state, cache, slots_B, proposal, logits_WV, shown_TE, words_WU, *, needs):
        self.traces["verify"] += 1
        own, logits_WV = self._own(state, slots_B), masked(logits_WV, words_WU)
        own, cache, sampled, emits_dB = self._checked.take(needs, own, cache, proposal, logits_WV, shown_TE)
        return self._with(state, slots_B, own, sampled, emits_dB), cache, StepOutput(sampled, emits_dB, ())

    def _traced_admit(self, state, slots_A, packed_AU, form):
        self.traces["admit"] += 1
        return slots.admit(state, slots_A, jax.vmap(partial(unpacked, form=form))(packed_AU))

    def _traced_extend(self, tables, entries_E4):
        self.traces["extend"] += 1
        return slots.extend(tables, entries_E4)

    def _traced_release(self, state, slots_B):
        self.traces["release"] += 1
        return slots.release(state, slots_B)

    def _plain(self, params, needs: Needs, carry, _):
        """A step of a loop: a token for each slot that is active."""
        state, cache = carry
        batch, rows = make_rectangle(state, self.layout.page_size)
        ran = self.forward(params, cache, batch, rows.tokens_W)
        state, sampled = self._draw(state, ran.logits_WV, rows, ran.shown_TE, needs)
        return (state, ran.cache), (sampled, rows.emits_W)

    def _proposing(self, speculative: SpeculativeStep, params, needs: Needs, carry, _):
        """A step of a loop that verifies what it proposes."""
        state, cache = carry
        proposal, cache = speculative.propose(params, needs, state, cache)
        cache, logits_WV, shown_TE = speculative.run(params, state, cache, proposal)
        state, cache, sampled, emits_dB = speculative.take(needs, state, cache, proposal, logits_WV, shown_TE)
        return (state, cache), (sampled, emits_dB)

    def _speculative(self, drafts: int) -> SpeculativeStep:
        """That may find so many proposed tokens right, one of the layout's `choices`."""
        return SpeculativeStep(self.forward, self.layout.method(drafts), tuple(self._pools))

    @property
    def _checked(self) -> SpeculativeStep:
        """That of `verify`."""
        return self._speculative(self.layout.depth)

    def _proposed_by(self, needs: Needs) -> Needs:
        """What a program of proposals must be able to do: no more of these than the method has a use for."""
        assert self.layout.speculation is not None
        return needs if self.layout.speculation.draws else sampling.GREEDY

    @property
    def side_by_side(self) -> bool:
        """Whether kernels of a loop that do not depend on each other run at the same time.

        Not where two of them may be kernels that wait for all of their own blocks, which may not share the GPU: what a
        method of speculation runs need not depend on the model's, nor do sums over devices."""
        return self.layout.speculation is None and self.model.mesh.size == 1

    @property
    def circulates(self) -> bool:
        """Whether loops of plain steps keep a pipe filled between them. Not where a method is shown outputs of layers
        that lie in several stages, and so leave the pipe in several ticks."""
        return self.model.stages > 1 and not self.forward.taps

    def _own(self, state: SlotState, slots_B: jax.Array) -> SlotState:
        """Of the slots of a program without prompts."""
        return slots.taken(state, slots_B) if len(slots_B) < self.layout.slots else state

    def _with(
        self, state: SlotState, slots_B: jax.Array, own: SlotState, sampled: Sampled, emits_nB: jax.Array
    ) -> SlotState:
        """The state of all slots after a program of these."""
        if len(slots_B) == self.layout.slots:
            return own
        return slots.put_back(state, slots_B, own, sampled.tokens_W, emits_nB)

    @jax.named_scope("sampling")
    def _draw(
        self, state: SlotState, logits_WV: jax.Array, rows: Rows, shown_WE: jax.Array | None, needs: Needs
    ) -> tuple[SlotState, Sampled]:
        """The sampler's part.

        Args:
            shown_WE: of each slot's last row what a method of speculation is shown, where it may keep it.
        """
        if needs != sampling.GREEDY:
            logits_WV = jax.sharding.reshard(logits_WV, P(None, None))
        sampled = sampling.sample(logits_WV, state.sampling, state.index_B, needs)
        after = slots.advance(state, sampled, rows.emits_W, rows.lengths_W)
        row_W1, ran_W = jnp.arange(len(rows.lengths_W), dtype=jnp.int32)[:, None], rows.lengths_W > 0
        taken_W = ran_W.astype(jnp.int32)
        return remembering(self.layout.speculation, state, after, shown_WE, row_W1, taken_W), sampled


def _tiles(hidden_TD: jax.Array) -> tuple[jax.Array, ...]:
    """The rows of a step in their order, `SCORED` at a time, on every device."""
    whole_TD = hidden_TD
    if row_axis(hidden_TD) is not None:
        whole_TD = take_rows(hidden_TD, jnp.arange(hidden_TD.shape[0], dtype=jnp.int32))
    return tuple(whole_TD[at : at + SCORED] for at in range(0, whole_TD.shape[0], SCORED))
