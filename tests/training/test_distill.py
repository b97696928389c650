"""Divergences in chunks equal the dense ones, with their gradients, on any mesh and without the dense memory."""

from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from scipy.special import log_softmax

from jaxinfer.model import Model
from jaxinfer.parallel import make_mesh
from jaxinfer.training.distill import distillation_loss

KINDS = ("forward-kl", "reverse-kl", "jensen-shannon")
EPS = float(np.finfo(np.float32).eps)
# Log-probabilities are above -16, each the difference of two sums of a few roundings: right to some ulps of 16.
CLOSE = {"rtol": 16 * EPS, "atol": 64 * EPS}


def soft_cap(logits):
    return 3.0 * np.tanh(logits / 3.0) if isinstance(logits, np.ndarray) else 3.0 * jnp.tanh(logits / 3.0)


def same(logits):
    return logits


def problem(tokens=5, vocab=24, seed=0):
    """Hidden states and output embeddings of a student and of a wider teacher, and weights, one of them zero."""
    rng = np.random.default_rng(seed)
    shapes = (tokens, 4), (vocab, 4), (tokens, 6), (vocab, 6)
    arrays = [rng.normal(size=shape).astype(np.float32) for shape in shapes]
    weights_T = rng.uniform(0.5, 1.5, tokens).astype(np.float32)
    weights_T[2] = 0.0
    return arrays, weights_T


def dense(kind, arrays, weights_T, temperature=1.0, cap=same):
    """The definition, in float64."""
    student_TD, student_VD, teacher_TD, teacher_VD = (np.asarray(x, np.float64) for x in arrays)
    logq_TV = log_softmax(cap(student_TD @ student_VD.T) / temperature, axis=1)
    logp_TV = log_softmax(teacher_TD @ teacher_VD.T / temperature, axis=1)
    logm_TV = np.logaddexp(logp_TV, logq_TV) - np.log(2)

    def kl(one_TV, other_TV):
        return (np.exp(one_TV) * (one_TV - other_TV)).sum(axis=1)

    divergence_T = {
        "forward-kl": kl(logp_TV, logq_TV),
        "reverse-kl": kl(logq_TV, logp_TV),
        "jensen-shannon": (kl(logp_TV, logm_TV) + kl(logq_TV, logm_TV)) / 2,
    }[kind]
    return weights_T.astype(np.float64) @ divergence_T


def slopes(function, arrays, place, step=1e-5):
    """Central differences in float64 by one of the arrays: right to about step squared."""
    result = np.zeros(arrays[place].shape)
    for index in np.ndindex(result.shape):
        ends = []
        for sign in (-1, 1):
            moved = [np.asarray(x, np.float64).copy() for x in arrays]
            moved[place][index] += sign * step
            ends.append(function(moved))
        result[index] = (ends[1] - ends[0]) / (2 * step)
    return result


@cache
def program(kind, chunk, temperature, cap):
    """One for all tests whose arrays have the same shapes."""

    def loss(arrays, weights_T):
        student, teacher = (*arrays[:2], cap), (*arrays[2:], same)
        return distillation_loss(student, teacher, weights_T, kind, temperature=temperature, chunk=chunk)

    return jax.jit(jax.value_and_grad(loss))


def run(kind, arrays, weights_T, chunk=7, temperature=1.0, cap=same, tensor=1):
    """The loss, and its gradients by all four arrays."""
    mesh = make_mesh(tensor)
    with jax.set_mesh(mesh):
        specs = (P(), P("tensor"), P(), P("tensor"))
        placed = [jax.device_put(x, NamedSharding(mesh, spec)) for x, spec in zip(arrays, specs, strict=True)]
        value, gradients = program(kind, chunk, temperature, cap)(placed, weights_T)
        return np.asarray(value), [np.asarray(gradient) for gradient in gradients]


def pair(student, teacher):
    """The hidden states and output embeddings of two models, widened by zeros to the sizes of `problem`."""
    widths = 4, 4, 6, 6
    return [
        np.pad(x, ((0, 0), (0, width - x.shape[1]))) for x, width in zip([*student, *teacher], widths, strict=True)
    ]


@pytest.mark.parametrize(
    ("kind", "temperature", "cap"), [*((kind, 1.0, same) for kind in KINDS), ("jensen-shannon", 1.7, soft_cap)]
)
def test_loss_and_gradients_are_those_of_the_dense_definition(kind, temperature, cap):
    arrays, weights_T = problem()
    loss, gradients = run(kind, arrays, weights_T, temperature=temperature, cap=cap)

    def exact(moved):
        return dense(kind, moved, weights_T, temperature, cap)

    np.testing.assert_allclose(loss, exact(arrays), **CLOSE)
    for place in (0, 1):
        np.testing.assert_allclose(gradients[place], slopes(exact, arrays, place), **CLOSE)
    assert not gradients[2].any()  # the teacher has none
    assert not gradients[3].any()


def test_in_bfloat16_the_gradients_alone_are_rounded_and_once():
    arrays, weights_T = problem()
    arrays = [array.astype(jnp.bfloat16) for array in arrays]
    loss, gradients = run("jensen-shannon", arrays, weights_T)

    def exact(moved):
        return dense("jensen-shannon", moved, weights_T)

    np.testing.assert_allclose(loss, exact(arrays), **CLOSE)
    for place in (0, 1):
        assert gradients[place].dtype == jnp.bfloat16
        rounded = {"rtol": 2.0**-8 + CLOSE["rtol"], "atol": CLOSE["atol"]}
        np.testing.assert_allclose(gradients[place].astype(np.float64), slopes(exact, arrays, place), **rounded)


def test_the_heads_of_models_are_taken_as_they_are(make_model, random_params, sizes):
    """Sharded, and with a soft cap at the student's end: as the dense definition of the models' own logits."""
    teacher = make_model(tensor=2)
    student = Model(replace(teacher.config, final_soft_cap=1.5), teacher.mesh)
    params, taught = random_params(student), random_params(teacher, seed=1)
    hidden_TD = jnp.asarray(np.random.default_rng(2).normal(size=(6, sizes["hidden_size"])), jnp.float32)
    weights_T = jnp.full(6, 1 / 6, jnp.float32)

    def chunked(params):
        heads = student.head(params, hidden_TD), teacher.head(taught, hidden_TD)
        return distillation_loss(*heads, weights_T, "forward-kl", chunk=64)

    def whole(params):
        pairs = (student, params), (teacher, taught)
        logq_TV, logp_TV = (jax.nn.log_softmax(model.logits(by, hidden_TD)) for model, by in pairs)
        return jnp.sum(jnp.exp(logp_TV) * (logp_TV - logq_TV) * weights_T[:, None])

    with jax.set_mesh(teacher.mesh):
        (loss, by), (expected, by_expected) = (jax.jit(jax.value_and_grad(f))(params) for f in (chunked, whole))
    np.testing.assert_allclose(loss, expected, **CLOSE)
    for gradient, other in zip(by, by_expected, strict=True):
        np.testing.assert_allclose(np.asarray(gradient), np.asarray(other), **CLOSE)
    assert sum(bool(np.asarray(gradient).any()) for gradient in by) == 2  # the embedding and the last norm


@pytest.mark.parametrize(
    ("kind", "chunk", "tensor"), [("forward-kl", 1, 1), ("reverse-kl", 5, 2), ("jensen-shannon", 1000, 2)]
)
def test_neither_chunk_nor_devices_matter(kind, chunk, tensor):
    arrays, weights_T = problem()
    loss, gradients = run(kind, arrays, weights_T, chunk, tensor=tensor)
    expected, expected_gradients = run(kind, arrays, weights_T)
    np.testing.assert_allclose(loss, expected, **CLOSE)
    for gradient, other in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(gradient, other, **CLOSE)


def test_a_position_of_weight_zero_is_dropped_whatever_it_holds():
    arrays, weights_T = problem()
    expected, expected_gradients = run("jensen-shannon", arrays, weights_T)
    arrays[0][2], arrays[2][2] = np.nan, np.nan
    loss, gradients = run("jensen-shannon", arrays, weights_T)
    np.testing.assert_array_equal(loss, expected)
    np.testing.assert_array_equal(gradients[0][2], 0.0)
    for gradient, other in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_array_equal(gradient, other)


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_has_no_distance_from_itself(kind):
    arrays, weights_T = problem()
    loss, gradients = run(kind, pair(arrays[:2], arrays[:2]), weights_T)
    np.testing.assert_allclose(loss, 0.0, atol=CLOSE["atol"])
    for gradient in gradients:
        np.testing.assert_allclose(gradient, 0.0, atol=CLOSE["atol"])


def test_jensen_shannon_is_symmetric_and_at_most_log_2():
    (student_TD, student_VD, teacher_TD, teacher_VD), weights_T = problem()
    models = (student_TD, student_VD), (teacher_TD[:, :4], teacher_VD[:, :4])
    one, _ = run("jensen-shannon", pair(*models), weights_T)
    other, _ = run("jensen-shannon", pair(*reversed(models)), weights_T)
    np.testing.assert_allclose(one, other, **CLOSE)
    # Disjoint models, by logits of 400 on other tokens: probabilities, and their logarithm's terms, underflow.
    far_TD, (student_VD, teacher_VD) = np.full((5, 1), 20, np.float32), np.zeros((2, 24, 1), np.float32)
    student_VD[3], teacher_VD[20] = 20, 20
    bound = np.log(2) * weights_T.sum()
    loss, gradients = run("jensen-shannon", pair((far_TD, student_VD), (far_TD, teacher_VD)), weights_T)
    np.testing.assert_allclose(loss, bound, rtol=16 * EPS)
    assert all(np.isfinite(gradient).all() for gradient in gradients)
    assert 0.0 < one < bound


def test_memory_does_not_grow_with_tokens_times_vocabulary():
    tokens, vocab, size, chunk = 256, 1024, 4, 128

    def temporary(vocab):
        def loss(student_TD, student_VD, teacher_TD, teacher_VD, weights_T):
            student, teacher = (student_TD, student_VD, same), (teacher_TD, teacher_VD, same)
            return distillation_loss(student, teacher, weights_T, "jensen-shannon", chunk=chunk)

        shapes = (tokens, size), (vocab, size), (tokens, size), (vocab, size), (tokens,)
        with jax.set_mesh(make_mesh(1)):
            arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
            compiled = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(*arrays).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    # An array of [T, V] would grow by 64 times as much as one of the output embedding's size, which may be there.
    assert temporary(8 * vocab) - temporary(vocab) <= 7 * vocab * size * 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "kl"}, "kind is 'kl'; .* forward-kl"),
        ({"temperature": 0.0}, r"temperature is 0\.0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"chunk": 0}, "chunk is 0"),
        ({"teacher_VD": (25, 6)}, "teacher has 25 tokens of vocabulary; the student has 24"),
        ({"teacher_TD": (4, 6)}, "teacher has 4 positions; the student has 5"),
        ({"weights_T": (5, 1)}, r"weights_T has shape \(5, 1\)"),
    ],
)
def test_a_wrong_argument_is_named(changes, message):
    sizes = {"teacher_TD": (5, 6), "teacher_VD": (24, 6), "weights_T": (5,)}
    given = {"kind": "forward-kl", "temperature": 1.0, "chunk": 8} | sizes | changes
    student = jnp.zeros((5, 4)), jnp.zeros((24, 4)), same
    teacher = jnp.zeros(given["teacher_TD"]), jnp.zeros(given["teacher_VD"]), same
    with pytest.raises(ValueError, match=message):
        distillation_loss(
            student, teacher, jnp.ones(given["weights_T"]), given["kind"],
            temperature=given["temperature"], chunk=given["chunk"],
        )  # fmt: skip
