"""A mixture of experts against its definition, however few or many tokens run and wherever the experts lie."""

import functools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import expit, softmax

from jaxinfer.model import Model, moe, read_config
from jaxinfer.model.moe import FEW_CHOICES, LARGEST_TILE, SMALLEST_TILE, MoE, run_few, run_grouped
from jaxinfer.parallel import make_mesh
from jaxinfer.quantize import einsum, reduce_einsum
from tests.model.dense import run
from tests.model.random_params import random_params

EXPERTS, CHOICES, HIDDEN, INNER, TOKENS = 8, 2, 12, 10, 5
SHAPE = {
    "vocab_size": 16,
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 4,
    "num_local_experts": EXPERTS,
    "num_experts_per_tok": CHOICES,
    "torch_dtype": "float32",
}
CONFIGS = {
    "mixtral": read_config(SHAPE | {"architectures": ["MixtralForCausalLM"], "sliding_window": None}),
    "gpt_oss": read_config(SHAPE | {"architectures": ["GptOssForCausalLM"], "swiglu_limit": 1.0}),
}
# Sums of at most 12 products of numbers of size 1, in float32, in two layers and over the choices.
CLOSE = {"rtol": 0, "atol": 1e-5}


def problem(name: str, experts_TX: np.ndarray | None = None, experts: int = EXPERTS):
    rng = np.random.default_rng(3)
    normal = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
    stacks = {"up": normal(experts, HIDDEN, 2, INNER) * 0.3, "down": normal(experts, INNER, HIDDEN) * 0.3}
    if name == "gpt_oss":
        stacks |= {"up_bias": normal(experts, 2, INNER), "down_bias": normal(experts, HIDDEN)}
    if experts_TX is None:  # expert 6 is never chosen, 0 by every token
        rest = np.stack([rng.permutation([1, 2, 3, 4, 5, 7])[: CHOICES - 1] for _ in range(TOKENS)])
        experts_TX = np.concatenate([np.zeros((TOKENS, 1)), rest], axis=1).astype(np.int32)
    tokens, choices = experts_TX.shape
    return stacks, normal(tokens, HIDDEN), softmax(normal(tokens, choices), axis=1), experts_TX


def routed(tokens: int, choices: int, experts: int) -> np.ndarray:
    """Different experts for each token, any of them."""
    rng = np.random.default_rng(tokens)
    return np.stack([rng.permutation(experts)[:choices] for _ in range(tokens)]).astype(np.int32)


def defined(name: str, stacks, x_TD, weights_TX, experts_TX) -> np.ndarray:
    """One expert for one token at a time, in float64."""
    out_TD = np.zeros(x_TD.shape)
    for token, chosen in np.ndindex(experts_TX.shape):
        of = {key: stack[experts_TX[token, chosen]].astype(np.float64) for key, stack in stacks.items()}
        gate, up = np.einsum("d,dcf->cf", x_TD[token], of["up"]) + of.get("up_bias", 0.0)
        if name == "gpt_oss":
            gate, up = np.minimum(gate, 1.0), np.clip(up, -1.0, 1.0) + 1
            inner = gate * expit(1.702 * gate) * up
        else:
            inner = gate * expit(gate) * up
        out_TD[token] += weights_TX[token, chosen] * (inner @ of["down"] + of.get("down_bias", 0.0))
    return out_TD


@functools.cache
def jitted(compute, name: str):
    return jax.jit(partial(compute, CONFIGS[name], 0))


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("compute", [run_few, run_grouped])
def test_both_ways_follow_the_definition(name, compute):
    given = problem(name)
    found = jitted(compute, name)(*given)
    np.testing.assert_allclose(found, defined(name, *given), **CLOSE)


ROUTES = {  # how many experts there are, and which of them each token chose
    "one token": (EXPERTS, routed(1, 2, EXPERTS)),
    "all on the first expert": (EXPERTS, np.full((300, 1), 0, np.int32)),
    "all on the last expert": (EXPERTS, np.full((300, 1), EXPERTS - 1, np.int32)),
    "one expert, the largest tile filled": (1, np.full((2 * LARGEST_TILE, 1), 0, np.int32)),
    "whole tiles": (4, np.tile(np.arange(4, dtype=np.int32), 16)[:, None]),
    "every expert for every token": (EXPERTS, routed(17, EXPERTS, EXPERTS)),
    "most experts without tokens": (64, routed(9, 2, 64)),
    "many tokens": (16, routed(75, 4, 16)),
}


@pytest.mark.parametrize(("dtype", "roundings", "route"), [
    *(("float32", 0, route) for route in ROUTES),  # where a row goes does not depend on its dtype
    *(("bfloat16", 8, route) for route in ("one token", "every expert for every token", "many tokens")),
])  # fmt: skip
def test_grouped_rows_follow_the_definition(dtype, roundings, route):
    """In bfloat16 two products, two biases, three steps of the activation and the sum round, each by 2**-8 at most."""
    experts, experts_TX = ROUTES[route]
    stacks, x_TD, weights_TX, _ = problem("gpt_oss", experts_TX, experts)
    given = [*jax.tree.map(lambda a: a.astype(dtype), (stacks, x_TD)), weights_TX, experts_TX]
    found = jitted(run_grouped, "gpt_oss")(*given)
    assert found.dtype == dtype
    expected = defined("gpt_oss", *jax.tree.map(lambda a: a.astype(np.float64), given[:2]), *given[2:])
    bound = CLOSE["atol"] + roundings * 2.0**-8 * np.abs(expected).max()
    np.testing.assert_allclose(np.asarray(found, np.float64), expected, rtol=0, atol=bound)


@pytest.mark.parametrize(("tokens", "experts"), [(48, 4), (48, 96), (100, 8)])
def test_grouped_rows_multiply_their_own_experts_alone(tokens, experts, monkeypatch):
    """Of the products that run, at most half are padding, plus the smallest tile of each expert that is chosen."""
    multiplied = []

    def counted(spec, x, w, **options):
        jax.debug.callback(lambda: multiplied.append(x.shape[0] * w.size))
        return einsum(spec, x, w, **options)

    monkeypatch.setattr(moe, "einsum", counted)
    given = problem("gpt_oss", routed(tokens, CHOICES, experts), experts)
    jax.jit(partial(run_grouped, CONFIGS["gpt_oss"], 0))(*given)
    jax.effects_barrier()
    one_expert = HIDDEN * 2 * INNER + INNER * HIDDEN
    needed, used = given[-1].size * one_expert, np.unique(given[-1]).size
    assert needed <= sum(multiplied) <= 2 * needed + used * SMALLEST_TILE * one_expert


def test_grouped_rows_take_no_more_memory_with_more_experts():
    """The weights of one expert and the rows, but no rows of every expert; per expert only its few counters."""

    def temporary(experts):
        given = problem("gpt_oss", routed(64, CHOICES, 4), experts)
        compiled = jax.jit(partial(run_grouped, CONFIGS["gpt_oss"], 0)).lower(*given).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    counters = 16 * np.dtype(np.int32).itemsize
    assert temporary(128) <= temporary(4) + 128 * counters


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_multiplying_and_adding_is_einsum(dtype):
    """Both sum in float32; a 16-bit result may be rounded to either neighbour."""
    rng = np.random.default_rng(0)
    x_TD, w_DcF = (jnp.asarray(rng.standard_normal(shape).astype(dtype)) for shape in ((1, 24), (24, 2, 40)))
    found, expected = (f("TD,DcF->TcF", x_TD, w_DcF) for f in (reduce_einsum, einsum))
    assert found.dtype == dtype
    assert found.shape == (1, 2, 40)
    rounding = float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(
        np.asarray(found, np.float32), np.asarray(expected, np.float32), rtol=rounding, atol=24 * 1e-6
    )


def test_few_tokens_read_their_own_experts_alone():
    stacks, *rest = problem("gpt_oss")
    unread = np.setdiff1d(np.arange(EXPERTS), rest[-1])
    assert 6 in unread
    poisoned = {key: stack.copy() for key, stack in stacks.items()}
    for stack in poisoned.values():
        stack[unread] = np.nan
    few = jitted(run_few, "gpt_oss")
    np.testing.assert_array_equal(few(poisoned, *rest), few(stacks, *rest))


@pytest.mark.parametrize("compute", [run_few, run_grouped])
def test_devices_add_up_to_the_whole(compute):
    """Each device sums its own experts; experts of other devices add nothing, whatever stands there."""
    stacks, *rest = problem("gpt_oss")
    part = jax.jit(partial(compute, CONFIGS["gpt_oss"]))
    halves = [
        part(first, {key: stack[first : first + EXPERTS // 2] for key, stack in stacks.items()}, *rest)
        for first in (np.int32(0), np.int32(EXPERTS // 2))
    ]
    np.testing.assert_allclose(halves[0] + halves[1], defined("gpt_oss", stacks, *rest), **CLOSE)


def test_few_tokens_cost_nothing_where_their_experts_are_not():
    """A branch for each choice, and no product outside of one."""
    stacks, *rest = problem("gpt_oss")
    half = {key: stack[: EXPERTS // 2] for key, stack in stacks.items()}
    text = jax.jit(partial(run_few, CONFIGS["gpt_oss"])).lower(np.int32(0), half, *rest).as_text()
    assert text.count("stablehlo.case") == rest[-1].size


def test_sharded_experts_equal_whole_ones():
    """Few tokens and many: each way is one of them. A token's logits depend on none behind it."""
    config, tokens_T = CONFIGS["gpt_oss"], np.arange(FEW_CHOICES // CHOICES + 1, dtype=np.int32)
    alone, sharded = Model(config, make_mesh(1)), Model(config, make_mesh(4))
    params = random_params(alone, 2)
    placed = [
        jax.device_put(array, leaf.sharding) for array, leaf in zip(params, sharded.parameters.values(), strict=True)
    ]
    expected_TV = run(alone, params, tokens_T).logits_TV
    for count in (2, len(tokens_T)):
        np.testing.assert_allclose(run(sharded, placed, tokens_T[:count]).logits_TV, expected_TV[:count], **CLOSE)


def test_the_router_takes_the_likeliest_experts():
    """Softmax over all, the largest kept, and their weights brought to a sum of one where the config says so."""
    model = Model(CONFIGS["mixtral"], make_mesh(1))
    params = dict(zip(model.parameters, random_params(model, 1), strict=True))
    x_TD = np.random.default_rng(0).standard_normal((TOKENS, HIDDEN)).astype(np.float32)
    probs_TE = softmax(x_TD @ np.asarray(params["layers.0.mlp.router_DE"]), axis=1)
    expected_TX = np.argsort(-probs_TE, axis=1)[:, :CHOICES]
    router = model._module(list(params.values())).layers[0].mlp
    assert isinstance(router, MoE)
    with jax.set_mesh(model.mesh):
        weights_TX, experts_TX = router._route(jnp.asarray(x_TD))
    np.testing.assert_array_equal(experts_TX, expected_TX)
    kept_TX = np.take_along_axis(probs_TE, expected_TX, axis=1)
    np.testing.assert_allclose(weights_TX, kept_TX / kept_TX.sum(axis=1, keepdims=True), rtol=1e-5)
