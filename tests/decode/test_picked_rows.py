"""Of a prompt's last layer, what follows attention is computed of the rows alone whose logits are wanted; and these
are the same."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxinfer.decode.batch import StepInput, make_batch
from jaxinfer.decode.forward import Forward, Ran
from jaxinfer.decode.layout import Layout
from jaxinfer.decode.step import Programs
from jaxinfer.engine.step_input import lay_out
from jaxinfer.model import Model, ModelConfig, MoEConfig
from jaxinfer.parallel import collectives, make_mesh
from tests.model.random_params import random_params
from tests.roofline.small import small, sparse, windowed

PAGE, COLUMNS, SLOTS, ROWS = 4, 16, 3, 64
ONE = windowed(None)
FAMILIES = {
    "dense": small(dtype="float32"),
    "norms after both halves": small(dtype="float32", layers=ONE, post_norm=True),
    "parallel block": small(dtype="float32", layers=ONE, parallel_block=True, gated_mlp=False, norm="layer"),
    "experts": small(dtype="float32", layers=sparse(MoEConfig(8, 2, 96))[1:]),
}
CASES = {
    **{name: (config, {}) for name, config in FAMILIES.items()},
    "dense, tensor 4": (FAMILIES["dense"], {"tensor": 4}),
    "experts, tensor 4": (FAMILIES["experts"], {"tensor": 4}),
    "dense, context 2 of tensor 2": (small(dtype="float32", layers=ONE), {"tensor": 2, "context": 2}),
}


def programs_of(config: ModelConfig, slots: int = SLOTS, **mesh: int) -> Programs:
    model = Model(config, make_mesh(**mesh), context=PAGE * COLUMNS)
    pages = model.ranks * (1 + slots * COLUMNS)
    windows = len(model.config.windows)
    return Programs(model, Layout(slots, PAGE, (pages,) * windows, PAGE * COLUMNS, "float32", ranks=model.ranks))


def run(programs: Programs, forward: Forward) -> tuple[Ran, jax.Array]:
    """A step of a slot that decodes and two chunks, the second of which starts behind tokens of zeros; and the hidden
    states of all rows."""
    rng, vocab = np.random.default_rng(1), programs.model.config.vocab_size
    params, (state, cache) = random_params(programs.model, 2), programs.new_state()
    integers = lambda *values: np.array(values, np.int32)  # noqa: E731
    own = 1 + np.arange(SLOTS * COLUMNS, dtype=np.int32).reshape(SLOTS, COLUMNS)
    state = replace(
        state,
        tables=tuple(jnp.asarray(own) for _ in state.tables),
        token_B=jnp.full(SLOTS, 7, jnp.int32),
        length_B=jnp.array([0, 20, 0], jnp.int32),
        active_B=jnp.array([False, True, False]),
    )
    tokens_T = rng.integers(0, vocab, ROWS).astype(np.int32)
    given = StepInput(
        tokens_T, integers(1), integers(1, 30, 49), integers(2, 0), integers(29, 24), integers(1, 1)
    )  # fmt: skip

    @jax.jit
    def step(params, state, cache):
        batch, rows = make_batch(state, given, PAGE)
        ran = forward(params, cache, batch, rows.tokens_W)
        logits_WV, hidden_TD = ran.logits_WV, forward.hidden(params, ran.rest)
        rest = jax.tree.map(lambda array: jax.sharding.reshard(array, P()), (logits_WV, ran.hidden_WD, hidden_TD))
        return *rest, ran.cache

    with jax.set_mesh(programs.model.mesh):
        return jax.device_get(step(params, state, cache))


@pytest.mark.parametrize(("config", "mesh"), CASES.values(), ids=CASES)
def test_picked_rows_are_those_of_the_whole_step(config, mesh, monkeypatch):
    """With as many tokens as several devices of the axis `tensor` share between products."""
    monkeypatch.setattr(collectives, "MANY_TOKENS", ROWS)
    programs = programs_of(config, **mesh)
    picked, whole = (run(programs, one) for one in (programs.forward, replace(programs.forward, whole=True)))
    assert len(picked[1]) == SLOTS
    for ours, theirs in zip(jax.tree.leaves(picked), jax.tree.leaves(whole), strict=True):
        # Sums of float32 products of size 1 in another order.
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-5 * max(1, np.abs(theirs).max()))


@pytest.mark.parametrize("slots", [1, 8])
def test_what_follows_the_last_attention_is_computed_of_one_row_for_each_slot(slots):
    """By XLA's count of the model's part of a step: two operations for each weight and row."""
    programs = programs_of(small(dtype="float32", intermediate_size=400), slots)
    config, given = programs.model.config, lay_out([], ROWS, slots)
    weights = config.hidden_size * (config.num_heads * config.head_size + 3 * config.intermediate_size)
    counted = []
    for whole in (True, False):
        programs = Programs(programs.model, programs.layout)
        programs.forward = replace(programs.forward, whole=whole)
        lowered = programs.lower_step(list(programs.model.parameters.values()), *programs.new_state(), given)
        counted.append(lowered.cost_analysis()["flops"])
    assert counted[0] - counted[1] == pytest.approx(2 * (ROWS - slots) * weights, rel=0.02)
