"""Every rotary scaling against a definition of its own, written from the papers in float64."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.model import read_config, rope
from jaxinfer.model.rope import Rope

THETA, DIM, ORIGINAL = 10000.0, 16, 64
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 32,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": ORIGINAL,
    "rope_theta": THETA,
}
SHORT, LONG = [1.0 + i / 10 for i in range(DIM // 2)], [2.0 + i for i in range(DIM // 2)]
SCALINGS = {
    "none": None,
    "linear": {"type": "linear", "factor": 4.0},
    "dynamic": {"type": "dynamic", "factor": 3.0},
    "llama3": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": ORIGINAL},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": ORIGINAL},
    "longrope": {"type": "longrope", "short_factor": SHORT, "long_factor": LONG, "factor": 4.0,
                 "original_max_position_embeddings": ORIGINAL},
}  # fmt: skip


def angle(i: int, theta: float = THETA) -> float:
    """Radians per position of pair i (RoFormer, section 3.2.2)."""
    return theta ** (-2 * i / DIM)


def defined(name: str, context: int) -> tuple[list[float], float]:
    """Frequencies and the factor of cos and sin, one pair of components at a time."""
    pairs = range(DIM // 2)
    if name == "none":
        return [angle(i) for i in pairs], 1.0
    if name == "linear":
        return [angle(i) / 4.0 for i in pairs], 1.0
    if name == "dynamic":
        stretch = max(context, ORIGINAL) / ORIGINAL
        theta = THETA * (3.0 * stretch - 2.0) ** (DIM / (DIM - 2))
        return [angle(i, theta) for i in pairs], 1.0
    if name == "llama3":
        return [_llama3(angle(i)) for i in pairs], 1.0
    if name == "yarn":
        return [_yarn(i) for i in pairs], 0.1 * math.log(4.0) + 1.0
    factors = LONG if context > ORIGINAL else SHORT
    return [angle(i) / factors[i] for i in pairs], math.sqrt(1 + math.log(4.0) / math.log(ORIGINAL))


def _llama3(frequency: float) -> float:
    wavelength = 2 * math.pi / frequency
    if wavelength < ORIGINAL / 4.0:
        return frequency
    if wavelength > ORIGINAL / 1.0:
        return frequency / 8.0
    smooth = (ORIGINAL / wavelength - 1.0) / (4.0 - 1.0)
    return (1 - smooth) * frequency / 8.0 + smooth * frequency


def _yarn(i: int) -> float:
    """NTK-by-parts (YaRN, section 3.2), with the ramp over dimensions as in its published code."""
    turns = lambda count: DIM * math.log(ORIGINAL / (2 * math.pi * count)) / (2 * math.log(THETA))  # noqa: E731
    low, high = max(math.floor(turns(32)), 0), min(math.ceil(turns(1)), DIM - 1)
    interpolated = min(max((i - low) / (high - low), 0.0), 1.0)
    return angle(i) * (interpolated / 4.0 + 1 - interpolated)


def read(name: str, **fields) -> Rope:
    return read_config(CONFIG | {"rope_scaling": SCALINGS[name]} | fields).layers[0].rope


@pytest.mark.parametrize("context", [ORIGINAL, 4 * ORIGINAL])
@pytest.mark.parametrize("name", SCALINGS)
def test_frequencies_follow_the_definition(name, context):
    frequencies, factor = read(name).frequencies(context)
    expected, expected_factor = defined(name, context)
    # float32 powers: a few roundings each.
    np.testing.assert_allclose(frequencies, expected, rtol=2e-6)
    assert factor == pytest.approx(expected_factor, rel=1e-12)


def test_the_definitions_differ():
    """Else one formula could stand in for another unnoticed."""
    distinct = {tuple(defined(name, context)[0]) for name in SCALINGS for context in (ORIGINAL, 4 * ORIGINAL)}
    # LongRoPE and dynamic scaling have two regimes each; within the original context the latter does nothing.
    assert len(distinct) == len(SCALINGS) + 1


@pytest.mark.parametrize(("given", "factor"), [
    ({"attention_factor": 1.5}, 1.5),
    ({"mscale": 1.0, "mscale_all_dim": 0.5}, (0.1 * math.log(4.0) + 1) / (0.05 * math.log(4.0) + 1)),
    ({"factor": 1.0}, 1.0),
])  # fmt: skip
def test_yarn_scales_attention_as_told(given, factor):
    rope_scaling = SCALINGS["yarn"] | given
    assert read("yarn", rope_scaling=rope_scaling).frequencies(ORIGINAL)[1] == pytest.approx(factor, rel=1e-12)


def test_both_spellings_are_one_rope():
    """`rope_theta` with `rope_scaling`, and the `rope_parameters` that newer files hold."""
    newer = {key: value for key, value in CONFIG.items() if key != "rope_theta"}
    newer["rope_parameters"] = SCALINGS["llama3"] | {"rope_theta": THETA}
    assert read_config(newer).layers[0].rope == read("llama3")


def test_rotation_turns_pairs_of_components():
    """Component i and i + r turn together, by position x frequency."""
    positions_T = np.array([0, 1, 5, 1000], np.int32)
    x_TNH = np.random.default_rng(0).standard_normal((4, 3, DIM)).astype(np.float32)
    cos_Tr, sin_Tr = rope.tables(Rope(THETA, DIM), jnp.asarray(positions_T), ORIGINAL)
    turned_TNH = np.asarray(rope.rotate(jnp.asarray(x_TNH), cos_Tr, sin_Tr))
    complex_TNr = (x_TNH[..., : DIM // 2] + 1j * x_TNH[..., DIM // 2 :]).astype(np.complex128)
    angle_Tr = positions_T[:, None] * np.array([angle(i) for i in range(DIM // 2)])
    expected_TNr = complex_TNr * np.exp(1j * angle_Tr)[:, None]
    # An angle of 1000 radians is known to 1000 x 2**-24 of rounding in the frequency and as much in the product.
    close = {"rtol": 0, "atol": 4 * 3 * 1000 * 2.0**-23}
    np.testing.assert_allclose(turned_TNH[..., : DIM // 2], expected_TNr.real, **close)
    np.testing.assert_allclose(turned_TNH[..., DIM // 2 :], expected_TNr.imag, **close)
    np.testing.assert_array_equal(turned_TNH[0], x_TNH[0])


@pytest.mark.parametrize("share", [0.5, 0.25])
def test_partial_rotation_leaves_the_rest_alone(share):
    partial = read("none", partial_rotary_factor=share)
    assert partial.dim == DIM * share
    x_TKgH = jax.random.normal(jax.random.key(0), (3, 2, 2, DIM))
    turned = rope.rotate(x_TKgH, *rope.tables(partial, jnp.arange(1, 4, dtype=jnp.int32), ORIGINAL))
    np.testing.assert_array_equal(turned[..., partial.dim :], x_TKgH[..., partial.dim :])
    whole = rope.rotate(x_TKgH[..., : partial.dim], *rope.tables(partial, jnp.arange(1, 4, dtype=jnp.int32), ORIGINAL))
    np.testing.assert_array_equal(turned[..., : partial.dim], whole)
    assert np.abs(np.asarray(turned - x_TKgH))[..., : partial.dim].max() > 0.1
