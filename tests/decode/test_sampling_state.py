"""The sampler's state: what a batch needs, and what installing and counting change and leave alone."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.decode.sampling import MAX_EOS_IDS, Needs, SamplingState, count, empty, install, needs, pack
from jaxinfer.decode.sampling_params import SamplingParams
from tests.decode.rows import stacked

EOS = (2,)
install_jit = jax.jit(install)


@pytest.mark.parametrize(
    ("batch", "expected"),
    [
        ([], Needs("greedy", 0)),
        ([{"temperature": 0}], Needs("greedy", 0)),
        ([{"temperature": 0, "top_k": 5, "top_p": 0.5}], Needs("greedy", 0)),
        ([{"temperature": 0, "logprobs": 0}], Needs("greedy", 20)),
        ([{"temperature": 0}, {}], Needs("random", 0)),
        ([{"top_k": -1, "logprobs": 3}], Needs("random", 20)),
        *(
            ([{"temperature": 0}, asks], Needs("random", 0))
            for asks in (
                {"repetition_penalty": 1.1, "temperature": 0},
                {"presence_penalty": 1},
                {"frequency_penalty": -1},
                {"logit_bias": {1: 1.0}},
                {"min_tokens": 1, "temperature": 0, "top_p": 0.5},
            )
        ),
        *(
            ([{"temperature": 0}, {}, asks], Needs("full", 0))
            for asks in ({"top_k": 1}, {"top_p": 0.9}, {"min_p": 0.1})
        ),
    ],
)
def test_needs_are_the_least_that_serves_all(batch, expected):
    assert needs([SamplingParams(**fields) for fields in batch]) == expected


def test_installing_replaces_one_slot_and_nothing_else():
    vocab = 20
    everything = jnp.ones(3, jnp.bool_)
    before = empty(3, vocab)
    rows, slots_A = stacked([pack(SamplingParams(top_k=7), EOS, slot) for slot in range(3)]), jnp.arange(3)
    before = install_jit(before, slots_A, rows, slots_A[:, None], jnp.full((3, 1), -1, jnp.int32))
    before = count(before, jnp.array([1, 2, 3], jnp.int32), everything)
    params = SamplingParams(temperature=0.5, logit_bias={4: 2.0}, stop_token_ids=[8], seed=11)
    prompts_AT = jnp.array([[19, 0, 19, -1, -1], [7] * 5], jnp.int32)
    outputs_AT = jnp.array([[4, 6, 4, -1], [7] * 4], jnp.int32)
    rows = stacked([pack(params, EOS, 11), pack(SamplingParams(), EOS, 12)])
    after = install_jit(before, jnp.array([1, 3], jnp.int32), rows, prompts_AT, outputs_AT)  # 3 is no slot
    for name in (field.name for field in dataclasses.fields(SamplingState)):
        old, new = np.asarray(getattr(before, name)), np.asarray(getattr(after, name))
        assert old.dtype == new.dtype
        np.testing.assert_array_equal(new[[0, 2]], old[[0, 2]], err_msg=name)
    assert after.temperature_B[1] == 0.5
    assert after.top_k_B[1] == 0
    assert after.seed_B[1] == 11
    assert after.bias_ids_BI[1, 0] == 4
    assert (after.bias_ids_BI[1, 1:] == -1).all()
    np.testing.assert_array_equal(after.stop_ids_BZ[1, :3], [8, EOS[0], -1])
    assert {token: int(n) for token, n in enumerate(after.counts_BV[1]) if n} == {4: 2, 6: 1}
    np.testing.assert_array_equal(np.flatnonzero(after.prompt_BV[1]), [0, 19])


def test_only_active_slots_are_counted():
    state = empty(3, 5)
    for _ in range(2):
        state = count(state, jnp.array([4, 4, 0], jnp.int32), jnp.array([True, False, True]))
    np.testing.assert_array_equal(state.counts_BV, [[0, 0, 0, 0, 2], [0] * 5, [2, 0, 0, 0, 0]])


def test_too_many_end_of_sequence_tokens_are_refused():
    with pytest.raises(ValueError, match=r"eos_ids has 9 tokens; at most 8"):
        pack(SamplingParams(), range(MAX_EOS_IDS + 1), 0)
