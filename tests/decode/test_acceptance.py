"""Whatever a draft proposes, what is verified has the model's own distribution: of three tokens together."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from jaxinfer.decode import sampling
from jaxinfer.decode.slots import SlotState
from jaxinfer.decode.speculative import verify
from jaxinfer.decode.speculative.autoregressive import draft
from jaxinfer.parallel import make_mesh
from tests.decode.enumerated import (
    DRAFT_MODELS,
    MODEL_VV,
    REQUESTS,
    SLOTS,
    TOKENS,
    assert_uniform,
    joint,
    needs,
    outputs,
    probability,
    start,
)
from tests.decode.placed import placed
from tests.decode.tabled import TABLE

DRAFTS = 2


@pytest.fixture(autouse=True)
def one_device():
    with jax.set_mesh(make_mesh(1)):
        yield


def speculative_step(
    state: SlotState, model_VV, draft_VV, needs: sampling.Needs, coupled=False, lies=False, drafts=DRAFTS
):
    """A draft that lies says of what it drew that it was from a uniform distribution."""
    return _speculative_step(state, model_VV, draft_VV, lies, needs, coupled, drafts)


@partial(jax.jit, static_argnums=(4, 5, 6))
def _speculative_step(
    state: SlotState, model_VV, draft_VV, lies: jax.Array, needs: sampling.Needs, coupled: bool, drafts: int
):
    proposal, _ = draft(TABLE, [draft_VV], (), state, needs, drafts, catch_up=False, coupled=coupled)
    if not coupled:
        proposal = proposal._replace(kept_BkV=jnp.where(lies, 0.0, proposal.kept_BkV))
    tokens_BQ = jnp.concatenate([state.token_B[:, None], proposal.drafts_Bk], axis=1)
    return verify(state, model_VV[tokens_BQ.reshape(-1)], proposal, needs)[:3]


def test_outputs_have_the_distribution_of_the_model():
    """The probabilities of a chi-square are uniform over drafts and seeds. `test_exact_methods` says so of what
    filters and penalties leave."""
    params, found = REQUESTS["temperature"], []
    for tables in DRAFT_MODELS.values():
        step = lambda state, tables=tables: speculative_step(state, *tables, needs(params))  # noqa: E731
        expected_VVV = joint(tables[0], params)
        found += [probability(outputs(start(params, seed), step)[0], expected_VVV) for seed in range(4)]
    assert_uniform(found)


def test_how_many_tokens_are_proposed_changes_no_distribution():
    """Chosen by what was right before, in the same slots: the gate does so for a whole batch."""
    params, found, chosen = REQUESTS["filters and penalties"], [], set()

    class Adapting:
        drafts = 2

        def __init__(self, tables):
            self.tables = tables

        def __call__(self, state):
            state, sampled, emits_QB = speculative_step(state, *self.tables, needs(params), drafts=self.drafts)
            chosen.add(self.drafts)
            self.drafts = 1 + int(emits_QB[:, :3].sum()) % 3
            return state, sampled, emits_QB

    for name in ("random", "uniform", "deterministic"):
        tables = DRAFT_MODELS[name]
        expected_VVV = joint(tables[0], params)
        found += [probability(outputs(start(params, seed), Adapting(tables))[0], expected_VVV) for seed in range(4)]
    assert chosen == {1, 2, 3}
    assert_uniform(found)


def test_as_many_proposals_count_as_any_exact_rule_allows():
    """The overlap of both distributions, which is the chance of a proposal that follows a token."""
    params = REQUESTS["temperature"]
    model_VV, draft_VV = DRAFT_MODELS["random"]
    p_VV, q_VV = (scipy.special.softmax(table_VV / params.temperature, axis=1) for table_VV in (model_VV, draft_VV))
    overlap = np.minimum(p_VV, q_VV)
    first = overlap[0].sum()
    both = (overlap[0] * overlap.sum(axis=1)).sum()
    rates = {}
    for coupled in (False, True):
        _, _, emits_QB = speculative_step(start(params, 9), model_VV, draft_VV, needs(params), coupled)
        rates[coupled] = np.asarray(emits_QB[1:]).mean(axis=1)
    margin = 4 * np.sqrt(0.25 / SLOTS)
    np.testing.assert_allclose(rates[False], [first, both], atol=margin)
    # Coupled draws agree less often, at the least (1 - TV) / (1 + TV): Daliri et al. 2024, theorem 2.
    assert first / (2 - first) - margin < rates[True][0] < first


def test_a_draft_like_the_model_is_always_right():
    params = REQUESTS["filters and penalties"]
    step = lambda state: speculative_step(state, MODEL_VV, MODEL_VV, needs(params))  # noqa: E731
    assert outputs(start(params, 5), step)[1] == 1.0


def test_a_draft_that_lies_about_its_draws_is_found():
    """The tests above can fail: with probabilities that are not those of the draws, outputs are others."""
    params = REQUESTS["temperature"]
    model_VV, draft_VV = DRAFT_MODELS["random"]
    step = lambda state: speculative_step(state, model_VV, draft_VV, needs(params), lies=True)  # noqa: E731
    assert probability(outputs(start(params, 0), step)[0], joint(model_VV, params)) < 1e-6


def test_greedy_rows_take_what_is_likeliest():
    """Also beside others that draw."""
    params = REQUESTS["temperature"]
    greedy_B = np.arange(SLOTS) % 2 == 0
    temperature_B = np.where(greedy_B, 0, 1).astype(np.float32)
    state = start(params, 3)
    state = placed(replace(state, sampling=replace(state.sampling, temperature_B=temperature_B)))
    model_VV, draft_VV = DRAFT_MODELS["random"]
    found_BT, _ = outputs(state, lambda state: speculative_step(state, model_VV, draft_VV, needs(params)))
    expected, token = [], 0
    for _ in range(TOKENS):
        token = int(np.argmax(MODEL_VV[token]))
        expected.append(token)
    assert (found_BT[greedy_B] == expected).all()
    assert not (found_BT[~greedy_B] == expected).all()
