"""Logits of every token of one text, from a cache in pages that is filled as an engine fills it."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer.decode.batch import StepInput, make_batch, make_rectangle
from jaxinfer.decode.layout import Layout
from jaxinfer.decode.sampling_params import SamplingParams
from jaxinfer.decode.step import Programs
from jaxinfer.model import Model, Params
from jaxinfer.parallel import take_rows

CHUNK = 24


def paged_logits(
    model: Model, params: Params, tokens_T: np.ndarray, cache_dtype: str, *, decoded: int = 5, page_size: int = 16,
    attention: str = "auto", chunk: int = CHUNK,
) -> np.ndarray:  # fmt: skip
    """logits_TV in float32: the text is prefilled in chunks, but for the last `decoded` tokens, which come one by
    one. Its pages are in no order."""
    columns, groups, ranks = -(-len(tokens_T) // page_size), len(model.config.windows), model.ranks
    here = 1 + -(-columns // ranks)  # pages of a rank, its null page included
    layout = Layout(1, page_size, (ranks * here,) * groups, len(tokens_T), cache_dtype, attention, ranks=ranks)
    programs = Programs(model, layout)
    state, cache = programs.new_state()
    pages = [_dealt(np.random.default_rng(group), columns, ranks, here) for group in range(groups)]
    state = programs.admit(state, {0: programs.admission(SamplingParams(), pages)})

    @partial(jax.jit, static_argnames="tokens", donate_argnames="cache")
    def step(params, state, cache, packed, tokens):
        if tokens:
            batch, rows = make_batch(state, StepInput.unpacked(packed, tokens, 0), page_size)
        else:
            batch, rows = make_rectangle(state, page_size)
        ran = programs.forward(params, cache, batch, rows.tokens_W)
        hidden_TD = programs.forward.hidden(params, ran.rest)
        return model.logits(params, take_rows(hidden_TD, jnp.arange(len(hidden_TD), dtype=jnp.int32))), ran.cache

    found, prompt = [], len(tokens_T) - decoded
    integers = lambda *values: np.array(values, np.int32)  # noqa: E731
    with jax.set_mesh(model.mesh):
        for start in range(0, prompt, chunk):
            own = tokens_T[start : min(start + chunk, prompt)]
            padded, end = np.pad(own, (0, chunk - len(own))), start + len(own)
            given = StepInput(padded, integers(), integers(0, len(own)), integers(0), integers(end), integers(0))
            logits_TV, cache = step(params, state, cache, given.packed(), chunk)
            found.append(np.asarray(logits_TV, np.float32)[: len(own)])
        for position in range(prompt, len(tokens_T)):
            now = {"token_B": tokens_T[position], "length_B": position, "active_B": True}
            state = replace(state, **{name: jnp.full_like(getattr(state, name), value) for name, value in now.items()})
            logits_TV, cache = step(params, state, cache, integers(), 0)
            found.append(np.asarray(logits_TV, np.float32))
    return np.concatenate(found)


def _dealt(rng: np.random.Generator, columns: int, ranks: int, here: int) -> list[int]:
    """Page j of a sequence on rank j mod c, in any order there; each rank has a null page of its own."""
    own = rng.permuted(np.tile(np.arange(1, here), (ranks, 1)), axis=1)
    return [
        int(rank * here + own[rank, place]) for place, rank in (divmod(column, ranks) for column in range(columns))
    ]
