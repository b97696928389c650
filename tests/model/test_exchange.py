"""Tokens that go to the devices of their experts come back with the same sums, whatever the routing."""

import re
from functools import partial

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxinfer.model.moe import run_grouped
from jaxinfer.parallel import TENSOR, exchange_experts, make_mesh
from jaxinfer.parallel.exchange import HEADROOM, WORTHWHILE, exchanges_tokens, visited
from tests.model.test_moe import CHOICES, CLOSE, CONFIGS, EXPERTS, HIDDEN, defined, problem, routed

TOKENS = 32
ROUTES = {
    "even": routed(TOKENS, CHOICES, EXPERTS),
    "all to the same two": np.full((TOKENS, CHOICES), (0, 1), np.int32),
    "all to the first and the last": np.full((TOKENS, CHOICES), (EXPERTS - 1, 0), np.int32),
    "one device's tokens to one": np.where(np.arange(TOKENS)[:, None] < TOKENS // 4, (2, 3), routed(TOKENS, 2, 8)),
}


def exchanged(name: str, devices: int, residual: bool, stacks, x_TD, weights_TX, experts_TX):
    mesh = make_mesh(devices)
    place = lambda tree: jax.device_put(tree, NamedSharding(mesh, P(TENSOR)))  # noqa: E731
    rows = map(place, (x_TD, weights_TX.astype(np.float32), experts_TX.astype(np.int32)))
    with jax.set_mesh(mesh):
        run = jax.jit(partial(exchange_experts, partial(run_grouped, CONFIGS[name])))
        return run(place(stacks), place(x_TD) if residual else None, *rows)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(("name", "devices", "residual"), [("mixtral", 4, True), ("gpt_oss", 8, False)])
def test_every_token_comes_back_with_all_of_its_experts(name, devices, residual, route):
    stacks, x_TD, weights_TX, experts_TX = problem(name, ROUTES[route])
    result = exchanged(name, devices, residual, stacks, x_TD, weights_TX, experts_TX)
    assert result.sharding.spec[0] == TENSOR
    expected = defined(name, stacks, x_TD, weights_TX, experts_TX) + (x_TD if residual else 0.0)
    np.testing.assert_allclose(np.asarray(result), expected, **CLOSE)


@pytest.mark.parametrize(("experts", "choices", "devices"), [(8, 2, 2), (8, 2, 8), (128, 8, 4), (6, 6, 3)])
def test_the_part_of_the_tokens_that_a_device_is_sent(experts, choices, devices):
    """Against counting: which of many random choices have an expert below `experts / devices`."""
    rng, draws = np.random.default_rng(0), 4000
    chosen = rng.permuted(np.tile(np.arange(experts), (draws, 1)), axis=1)[:, :choices]
    counted = (chosen < experts // devices).any(axis=1).mean()
    assert abs(visited(experts, choices, devices) - counted) < 5 * 0.5 / draws**0.5


def test_skewed_routing_takes_more_than_a_round():
    """Else the tests above would not show that a second one brings the rest."""
    each = TOKENS // 4
    assert HEADROOM * each * visited(EXPERTS, CHOICES, 4) < each - 1


def test_tokens_are_exchanged_where_that_is_less_than_all_of_them():
    with jax.set_mesh(make_mesh(8)):
        spread = jax.ShapeDtypeStruct((64, HIDDEN), np.float32, sharding=NamedSharding(make_mesh(8), P(TENSOR, None)))
        whole = jax.ShapeDtypeStruct((64, HIDDEN), np.float32, sharding=NamedSharding(make_mesh(8), P(None, None)))
        found = []
        jax.eval_shape(lambda x: found.append(exchanges_tokens(x, 8, 2)) or x, spread)
        jax.eval_shape(lambda x: found.append(exchanges_tokens(x, 8, 8)) or x, spread)
        jax.eval_shape(lambda x: found.append(exchanges_tokens(x, 8, 2)) or x, whole)
    assert found == [True, False, False]
    assert visited(8, 2, 8) < WORTHWHILE < visited(8, 8, 8) == 1


def test_a_round_is_three_ways_there_and_one_back():
    stacks, x_TD, weights_TX, experts_TX = problem("mixtral", ROUTES["even"])
    mesh = make_mesh(4)
    place = lambda tree: jax.device_put(tree, NamedSharding(mesh, P(TENSOR)))  # noqa: E731
    given = [place(array) for array in (stacks, x_TD, x_TD, weights_TX.astype(np.float32), experts_TX)]
    with jax.set_mesh(mesh):
        run = jax.jit(partial(exchange_experts, partial(run_grouped, CONFIGS["mixtral"])))
        text = run.lower(*given).compile().as_text()
    kinds = r" (all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)(?:-start)?\("
    assert sorted(re.findall(kinds, text)) == ["all-reduce", *["all-to-all"] * 4]  # the one agrees on the rounds
