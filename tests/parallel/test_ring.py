"""Products under which tokens go round a ring: they are those of all tokens, and nothing makes them wait."""

import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import Literal
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks.collective_matmul import overlaps
from jaxinfer.parallel import TENSOR, goes_round, make_mesh, ring
from jaxinfer.quantize import contract, gated_silu, mlp_ring, project
from tests.decode.test_compiled import MEETING
from tests.model.rings import ring_from

T, D, F = 16, 24, 32
DEVICES = [2, 4, 8]


def on_devices(count: int, function: Callable[..., jax.Array], out_spec: P, *given: tuple[Any, P]) -> jax.Array:
    mesh, specs = make_mesh(count), tuple(spec for _, spec in given)
    mapped = jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=out_spec, check_vma=False)
    return jax.jit(mapped)(*(jax.device_put(array, NamedSharding(mesh, spec)) for array, spec in given))


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


@pytest.mark.parametrize("count", [1, *DEVICES])
def test_tokens_come_round_to_the_columns_and_leave_from_the_rows(count):
    x_TD, w_DF = random(T, D), random(D, F, seed=1)
    gathered = on_devices(
        count, lambda x, w: ring.in_order(ring.gather(lambda part: part @ w, x)), P(None, TENSOR),
        (x_TD, P(TENSOR)), (w_DF, P(None, TENSOR)),
    )  # fmt: skip
    np.testing.assert_allclose(gathered, x_TD @ w_DF, atol=1e-5)
    scattered = on_devices(
        count, lambda x, w: ring.scatter(lambda part: part @ w, ring.parts_of(x)), P(TENSOR),
        (x_TD, P(None, TENSOR)), (w_DF, P(TENSOR)),
    )  # fmt: skip
    np.testing.assert_allclose(scattered, x_TD @ w_DF, atol=1e-5)


@pytest.mark.parametrize("count", DEVICES)
def test_parts_come_from_the_devices_before(count):
    owner_T = np.repeat(np.arange(count), T // count)
    parts = on_devices(
        count, lambda x: jnp.stack([part[0] for part in ring.gather(lambda part: part, x)]), P(TENSOR),
        (owner_T, P(TENSOR)),
    )  # fmt: skip
    assert np.asarray(parts).reshape(count, count).tolist() == [
        [(rank - nth) % count for nth in range(count)] for rank in range(count)
    ]
    again = on_devices(count, lambda x: ring.in_order(ring.parts_of(x))[None], P(TENSOR), (owner_T, P()))
    np.testing.assert_array_equal(again, np.stack([owner_T] * count))


def test_a_sum_is_rounded_after_each_device_and_ends_where_it_stays():
    count = 4
    terms = jnp.asarray(random(count, T), jnp.bfloat16)
    found = on_devices(
        count, lambda x: ring.scatter(lambda part: part, ring.parts_of(x[0])), P(TENSOR), (terms, P(TENSOR))
    )  # fmt: skip
    parts = np.asarray(terms).reshape(count, count, -1)  # of every device, the part of each
    for rank in range(count):
        first, *others = (parts[(rank + 1 + nth) % count, rank] for nth in range(count))
        for term in others:
            first = first + term
        np.testing.assert_array_equal(np.asarray(found).reshape(count, -1)[rank], first)


def needs(jaxpr, primitive: str) -> dict[int, set[int]]:
    """For each equation of the primitive, by its place, the places of all that it needs, directly or not."""
    made, needed = {}, {}
    for place, equation in enumerate(jaxpr.eqns):
        sources = {made[name] for name in equation.invars if not isinstance(name, Literal) and name in made}
        needed[place] = sources.union(*(needed[source] for source in sources))
        made |= dict.fromkeys(equation.outvars, place)
    return {place: needed[place] for place, equation in enumerate(jaxpr.eqns) if equation.primitive.name == primitive}


def traced(function: Callable[..., jax.Array], count: int, *given: tuple[tuple[int, ...], P]):
    mesh, specs = make_mesh(count), tuple(spec for _, spec in given)
    mapped = jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=P(TENSOR), check_vma=False)
    arrays = [jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec)) for shape, spec in given]
    (equation,) = jax.make_jaxpr(mapped)(*arrays).eqns
    return equation.params["jaxpr"]


ROUNDS = {
    "gather": (lambda x, w: ring.gather(lambda part: part @ w, x)[-1], P(TENSOR), P(None, TENSOR)),
    "scatter": (lambda x, w: ring.scatter(lambda part: part @ w, ring.parts_of(x)), P(None, TENSOR), P(TENSOR)),
}


@pytest.mark.parametrize("which", ROUNDS)
@pytest.mark.parametrize("count", DEVICES)
def test_a_message_and_a_product_do_not_wait_for_each_other(which, count):
    """Products run one after the other; each message but those of earlier steps may be under way during one."""
    function, x_spec, w_spec = ROUNDS[which]
    jaxpr = traced(function, count, ((T, D), x_spec), ((D, F), w_spec))
    products, messages = needs(jaxpr, "dot_general"), needs(jaxpr, "ppermute")
    assert (len(products), len(messages)) == (count, count - 1)
    for earlier, later in zip(list(products)[:-1], list(products)[1:], strict=True):
        assert earlier in products[later]
    # The product that a message is sent under: of the same step where tokens come, of the next where sums leave.
    hiding = list(products)[:-1] if which == "gather" else list(products)[1:]
    for message, product in zip(messages, hiding, strict=True):
        assert product not in messages[message]
        assert message not in products[product]


def test_no_sum_is_the_last_part_of_a_product():
    """It could not begin before what it is added to is there."""
    function, x_spec, w_spec = ROUNDS["scatter"]
    jaxpr = traced(function, 4, ((T, D), x_spec), ((D, F), w_spec))
    made = {name: equation.primitive.name for equation in jaxpr.eqns for name in equation.outvars}
    sums = [equation for equation in jaxpr.eqns if equation.primitive.name == "add" and equation.invars[0] in made]
    operands = [sorted(made[name] for name in equation.invars) for equation in sums if equation.outvars[0].aval.ndim]
    assert operands == [["optimization_barrier", "ppermute"]] * 3


class Halved:
    """A norm that no kernel takes in."""

    rms = None

    def __call__(self, x_TD: jax.Array) -> jax.Array:
        return x_TD / 2


X, RESIDUAL = (random(T, D), P(TENSOR, None)), (random(T, D, seed=1), P(TENSOR, None))
QKV, QKV_BIAS = (random(D, 8, 3, 4, seed=2), P(None, TENSOR)), (random(8, 3, 4, seed=3), P(TENSOR))
UP, UP_BIAS = (random(D, 2, F, seed=4), P(None, None, TENSOR)), (random(2, F, seed=5), P(None, TENSOR))
DOWN, DOWN_BIAS = (random(F, D, seed=6), P(TENSOR, None)), (random(D, seed=7), P(None))
INNER = random(T, F, seed=8), P(None, TENSOR)


def silu(up_TcF: np.ndarray) -> np.ndarray:
    return up_TcF[:, 0] / (1 + np.exp(-up_TcF[:, 0])) * up_TcF[:, 1]


def activate(up_TcF: jax.Array) -> jax.Array:
    return jax.nn.silu(up_TcF[:, 0]) * up_TcF[:, 1]


PRODUCTS = {
    "project": (
        lambda x, w, bias: project("TD,DKgH->TKgH", x, w, bias, Halved()), [X, QKV, QKV_BIAS],
        lambda x, w, bias: np.tensordot(x / 2, w, 1) + bias,
    ),
    "gated": (
        lambda x, w, bias: gated_silu(x, w, bias, Halved()), [X, UP, UP_BIAS],
        lambda x, w, bias: silu(np.tensordot(x / 2, w, 1) + bias),
    ),
    "contract": (
        lambda residual, x, w, bias: contract("TF,FD->TD", x, w, bias, residual, residual),
        [RESIDUAL, INNER, DOWN, DOWN_BIAS],
        lambda residual, x, w, bias: residual + x @ w + bias,
    ),
    "mlp": (
        lambda x, residual, *w: mlp_ring(activate, x, w[:2], w[2:], Halved(), residual),
        [X, RESIDUAL, UP, UP_BIAS, DOWN, DOWN_BIAS],
        lambda x, residual, up, bias, down, last: residual + silu(np.tensordot(x / 2, up, 1) + bias) @ down + last,
    ),
    "mlp without biases": (
        lambda x, up, down: mlp_ring(activate, x, (up, None), (down, None), None, None), [X, UP, DOWN],
        lambda x, up, down: silu(np.tensordot(x, up, 1)) @ down,
    ),
}  # fmt: skip


@pytest.mark.parametrize("which", PRODUCTS)
@pytest.mark.parametrize("count", DEVICES)
def test_products_of_a_layer_in_a_ring(which, count):
    """With norm, biases and residual, as one device has them; and with messages alone."""
    function, given, expected = PRODUCTS[which]
    mesh = make_mesh(count)
    with ring_from(T), jax.set_mesh(mesh):
        arrays = [jax.device_put(array, NamedSharding(mesh, spec)) for array, spec in given]
        assert goes_round(arrays[0])
        program = jax.jit(function).lower(*arrays).compile()
    rounds = 2 if which.startswith("mlp") else 1
    assert Counter(re.findall(MEETING, program.as_text() or "")) == {"collective-permute": rounds * (count - 1)}
    np.testing.assert_allclose(program(*arrays), expected(*(array for array, _ in given)), rtol=1e-5, atol=1e-4)


@pytest.mark.gpu
def test_messages_are_under_way_while_products_run():
    """As XLA schedules them, without options."""
    count = len(jax.devices())
    if count < 2:
        pytest.skip("needs two GPUs")
    mesh, hidden, inner = make_mesh(count), 1024, 4096
    shapes = ((count * 1024, hidden), P(TENSOR, None)), ((hidden, 2, inner), UP[1]), ((inner, hidden), DOWN[1])
    given = [jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(mesh, spec)) for shape, spec in shapes]
    with ring_from(T), jax.set_mesh(mesh):
        text = jax.jit(PRODUCTS["mlp without biases"][0]).lower(*given).compile().as_text()
    assert overlaps(text or "") == (2 * (count - 1), 2 * (count - 1))
