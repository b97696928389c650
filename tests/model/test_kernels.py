"""Where a decode step of the model runs as kernels: lowered for a Hopper GPU at real shapes, and run on one."""

import functools
import re
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.cache.quantized import LARGEST
from jaxinfer.decode.layout import Layout
from jaxinfer.decode.sampling import Needs
from jaxinfer.decode.step import Programs
from jaxinfer.engine.step_input import lay_out
from jaxinfer.model import Model, ModelConfig, read_config, transformer
from jaxinfer.parallel import make_mesh
from pallas_kernels import dispatch
from pallas_kernels import lowered as once
from pallas_kernels.all_reduce import config as all_reduce_config
from tests.decode.paged import paged_logits
from tests.model.dense import run

MODELS = Path(__file__).parents[2] / "configs" / "models"
LAYERS = 2
# Llama-3-8B's weights as the kernel takes them, sharded over so many devices.
QKV = {1: "4096x6144", 2: "4096x3072"}
OUT = {1: "4096x4096", 2: "2048x4096"}
GATED = {1: "4096x2x14336", 2: "4096x2x7168"}
DOWN = {1: "14336x4096", 2: "7168x4096"}
# Of steps with prompts: the dtype of the cache, and more tokens than one launch takes, or than any kernel.
SOME, MANY = ("int8", 64), ("float8_e4m3fn", 128)


def two_layers(name: str = "llama-3-8b", **changes) -> ModelConfig:
    config = read_config(MODELS / name)
    return replace(config, layers=config.layers[:LAYERS], **changes)


@pytest.fixture
def hopper(monkeypatch):
    """The choice of an implementation as it is on a Hopper GPU, where a kernel is lowered once for all programs, and
    every layer written out to be counted."""
    monkeypatch.setattr(dispatch, "compute_capability", lambda: dispatch.HOPPER)
    monkeypatch.setattr(once, "_on_gpu", lambda: True)
    monkeypatch.setattr(transformer, "_run", transformer._run.__wrapped__)


@functools.cache
def lowered(
    config: ModelConfig, slots: int, cache_dtype: str = "bfloat16", prefill: int | None = None, tensor: int = 1,
    pipe: int = 1,
) -> str:  # fmt: skip
    """The loop over decode steps, or a step that prefills so many tokens beside the slots, for CUDA."""
    model = Model(config, make_mesh(tensor, pipe), context=64)
    programs = Programs(model, Layout(slots, 16, (slots + 1,) * len(model.config.windows), 64, cache_dtype))
    given = (list(model.parameters.values()), *programs.new_state())
    with jax.set_mesh(model.mesh):
        if prefill is None:
            slots_B, needs = np.arange(slots, dtype=np.int32), Needs("greedy", 0)
            traced = programs._loop.trace(*given, slots_B, steps=3, needs=needs, drafts=0)
        else:
            step = lay_out([], prefill, slots, [])
            traced = programs._step.trace(*given, step.packed(), **step.sizes)
    return traced.lower(lowering_platforms=("cuda",)).as_text()


def streamed(text: str) -> dict[str, list[int]]:
    """For each weight that a kernel streams, by its shape: the operands of every call."""
    found = {}
    for types in re.findall(r"call @streaming_matmul\w*\([^)]*\) : \(([^)]*)\)", text):
        operands = re.findall(r"tensor<([\dx]+)x\w+>", types)
        found.setdefault(operands[1], []).append(len(operands))
    return found


def rows(text: str) -> list[list[str]]:
    """The operands' shapes of every launch that a layer ends with."""
    calls = re.findall(r"call @streaming_mlp\w*\([^)]*\) : \(([^)]*)\)", text)
    return [re.findall(r"tensor<([\dx]+)x\w+>", types) for types in calls]


def finished(tokens: int) -> list[str]:
    """What a launch takes that a layer of Llama-3-8B ends with, sorted."""
    x = f"{tokens}x4096"
    return sorted([OUT[1], GATED[1], DOWN[1], x, x, "4096"])


def norms(text: str) -> int:
    return text.count("stablehlo.rsqrt")


@pytest.mark.parametrize("tokens", [1, 32])
def test_a_layer_is_two_launches_around_attention(hopper, tokens):
    """The only norm and product besides are those of the head."""
    text = lowered(two_layers(), tokens)
    assert streamed(text) == {QKV[1]: [3] * LAYERS}
    assert [sorted(shapes) for shapes in rows(text)] == [finished(tokens)] * LAYERS
    assert norms(text) == 1
    assert text.count("stablehlo.dot_general") == 1


def test_a_stage_of_a_pipe_runs_the_same_kernels(hopper):
    """Of its own layer, for a micro-batch: half of the slots."""
    text = lowered(two_layers(), 2, pipe=2)
    assert streamed(text) == {QKV[1]: [3]}
    assert [sorted(shapes) for shapes in rows(text)] == [finished(1)]


def test_the_name_of_a_kernel_is_the_same_in_every_process(hopper):
    """It names the file in which the kernel is kept: nothing of it is an address."""
    lowered(two_layers(), 1)
    lowered(two_layers(), 4, *SOME)
    names = {repr(full) for full in once._lowered}
    assert {full[0][0] for full in once._lowered} == {"flash_attention", "flash_decoding", "streaming_matmul"}
    assert not [name for name in names if " at 0x" in name]


def test_with_more_tokens_a_layer_is_four_products_and_nothing_around_them(hopper):
    """x, w, and the norm's scale or the residual. The last one is finished for a row of each slot, in one launch."""
    text = lowered(two_layers(), 4, *SOME)
    assert streamed(text) == {QKV[1]: [3] * LAYERS} | {shape[1]: [3] * (LAYERS - 1) for shape in (OUT, GATED, DOWN)}
    assert [sorted(shapes) for shapes in rows(text)] == [finished(4)]
    assert norms(text) == 1
    assert text.count("stablehlo.dot_general") == 1


def test_where_xla_was_faster_it_runs(hopper):
    """A norm between a product and the sum that follows keeps the products apart."""
    text = lowered(two_layers(post_norm=True), 16)
    assert rows(text) == []
    assert OUT[1] not in streamed(text)
    assert text.count("stablehlo.dot_general") == 1 + LAYERS


def test_many_tokens_are_left_to_xla(hopper):
    """But for what is left of the last layer once a row of each slot is picked."""
    text = lowered(two_layers(), 4, *MANY)
    assert streamed(text) == {}
    assert [sorted(shapes) for shapes in rows(text)] == [finished(4)]
    assert norms(text) == 2 * LAYERS


def test_other_dtypes_are_left_to_xla(hopper):
    text = lowered(two_layers(dtype="float32"), 1)
    assert streamed(text) == {}
    assert rows(text) == []
    assert norms(text) == 1 + 2 * LAYERS


@pytest.mark.parametrize("tensor", [1, 2])
def test_a_prompt_is_products_of_many_tokens(hopper, tensor):
    """The gate is part of its product, and on one device so are the residuals, which on two are added to the sum.

    The last layer is finished for 128 rows, one of each slot: enough tiles for the widest product alone.
    """
    text = lowered(two_layers(), 128, prefill=1920, tensor=tensor)
    found = {}
    for types in re.findall(r"call @tiled_matmul\w*\([^)]*\) : \(([^)]*)\)", text):
        operands = re.findall(r"tensor<([\dx]+)x\w+>", types)
        found.setdefault(operands[1], []).append(len(operands))
    others, summed = LAYERS - 1, 3 if tensor == 1 else 2
    assert found == {
        QKV[tensor]: [2] * LAYERS, GATED[tensor]: [2] * LAYERS,
        OUT[tensor]: [summed] * others, DOWN[tensor]: [summed] * others,
    }  # fmt: skip
    assert streamed(text) == {}


@pytest.mark.parametrize(
    "changes",
    [{"norm": "layer"}, {"norm_bias": True}, {"norm_offset": 1.0}],
    ids=lambda changes: next(iter(changes)),
)
def test_a_norm_that_no_kernel_has_stands_before_the_product(hopper, changes):
    text = lowered(two_layers(**changes), 1)
    assert norms(text) == 1 + 2 * LAYERS
    assert streamed(text) == {
        QKV[1]: [2] * LAYERS, GATED[1]: [2] * LAYERS, OUT[1]: [3] * LAYERS, DOWN[1]: [3] * LAYERS
    }  # fmt: skip


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "swiglu_clamped"])
def test_an_activation_that_no_kernel_has_follows_the_product(hopper, activation):
    """Both halves are then columns of one product."""
    found = streamed(lowered(two_layers(activation=activation), 1))
    assert GATED[1] not in found
    assert found["4096x28672"] == [3] * LAYERS


def test_a_norm_after_a_half_keeps_the_residual_out_of_the_product(hopper):
    found = streamed(lowered(two_layers(post_norm=True), 1))
    assert found[OUT[1]] == found[DOWN[1]] == [2] * LAYERS


def test_on_two_devices_the_kernel_that_sums_adds_the_residual(hopper, monkeypatch):
    """The embedding's is the first: all devices meet before it, and before none of the others."""
    monkeypatch.setattr(all_reduce_config, "LARGEST_MESSAGE", 8192)
    text = lowered(two_layers(), 1, tensor=2)
    norms_taken_in, no_residual = [3] * LAYERS, [2] * LAYERS
    assert streamed(text) == {
        QKV[2]: norms_taken_in, GATED[2]: norms_taken_in, OUT[2]: no_residual, DOWN[2]: no_residual
    }  # fmt: skip
    assert norms(text) == 1
    assert text.count('"stablehlo.all_reduce"') == 0
    row, space = "tensor<1x4096xbf16>", "tensor<1x2x2x4096xbf16>, tensor<1x3xi32>"
    calls = re.findall(r"call @all_reduce\w*\([^)]*\) : \(([^)]*)\)", text)
    assert calls == [f"{row}, {space}", *[f"{row}, {row}, {space}"] * 2 * LAYERS]
    meets = re.findall(
        r"skip_device_barrier = (\w+), use_custom_barrier = false, uses_xla_collective_metadata = true", text
    )
    assert sorted(meets) == ["false", "true"]  # of the two kernels that these are calls of


def test_experts_are_left_to_xla(hopper):
    """They take the norm as it is; attention's two products do not."""
    text = lowered(two_layers("mixtral-8x7b"), 1)
    assert streamed(text) == {QKV[1]: [3] * LAYERS, OUT[1]: [3] * LAYERS}
    assert norms(text) == 1 + LAYERS


@pytest.mark.parametrize(("name", "tensor"), [("llama-3-8b", 1), ("llama-3-8b", 2), ("gemma-2-9b", 2)])
def test_layers_share_the_schedule_of_attention(hopper, name, tensor):
    """One for each cache group of a step, made for what each device holds."""
    config = two_layers(name, dtype="bfloat16")
    if name == "gemma-2-9b":
        config = replace(config, layers=2 * config.layers)
        assert len(config.windows) == 2
    text = lowered(config, 1, tensor=tensor)
    assert len(re.findall(r"call @make_schedule", text)) == len(config.windows)
    assert len(re.findall(r"call @_launch", text)) == len(config.layers)


def test_xla_needs_no_schedule(monkeypatch):
    monkeypatch.setattr(dispatch, "compute_capability", lambda: None)
    assert "make_schedule" not in lowered.__wrapped__(two_layers(), 4)


@pytest.mark.parametrize(("dtype", "prefill"), [SOME, MANY])
def test_both_attention_kernels_read_8_bit_pages(hopper, dtype, prefill):
    """In the step of a whole model."""
    text = lowered(two_layers(), 4, dtype, prefill)
    operands = r"\(tensor<[\dx]+xbf16>, tensor<5x16x8x128x(\w+)>, tensor<5x16x8x128x(\w+)>, tensor<5x8x16xf32>"
    element = {"int8": "i8", "float8_e4m3fn": "f8E4M3FN"}[dtype]
    decoding, prefilling = (
        re.findall(rf"call @{name}\([^)]*\) : {operands}", text) for name in ("_launch", "flash_attention")
    )
    assert decoding == prefilling == [(element, element)] * LAYERS
    assert len(re.findall(r"call @make_schedule", text)) == 1


def logits_error(model: Model, params: list[jax.Array], tokens_T: np.ndarray, exact_TV: np.ndarray) -> float:
    """Root mean square."""
    logits_TV = run(model, params, tokens_T).logits_TV
    return float(np.sqrt(np.mean((logits_TV.astype(np.float64) - exact_TV) ** 2)))


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 16, 64])
def test_on_a_gpu_logits_are_as_exact_as_those_of_xla(monkeypatch, tokens):
    """The error beside float32: the kernels round where XLA does, or less often; a tenth is left to chance."""
    config, mesh = two_layers(), make_mesh()
    model, exact_model = Model(config, mesh, context=64), Model(config, mesh, context=64, dtype="float32")
    params = model.random_params(1)
    tokens_T = np.random.default_rng(2).integers(0, config.vocab_size, tokens).astype(np.int32)
    exact_TV = run(exact_model, [param.astype(jnp.float32) for param in params], tokens_T).logits_TV.astype(np.float64)

    launched = []
    automatic = dispatch.automatic
    monkeypatch.setattr(dispatch, "automatic", lambda refusals: launched.append(automatic(refusals)) or launched[-1])
    by_kernels = logits_error(model, params, tokens_T, exact_TV)
    assert dispatch.KERNEL in {name for name, _ in launched}
    monkeypatch.setattr(dispatch, "automatic", lambda refusals: (dispatch.FALLBACK, "a test"))
    by_xla = logits_error(model, params, tokens_T, exact_TV)
    assert by_kernels <= 1.1 * by_xla


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", LARGEST)
def test_on_a_gpu_8_bit_pages_cost_the_kernels_no_more_than_xla(dtype):
    """A text prefilled in chunks and decoded; both round keys and values alike, and XLA the dequantized ones again."""
    config, mesh = two_layers(), make_mesh()
    model, exact_model = Model(config, mesh, context=256), Model(config, mesh, context=256, dtype="float32")
    params = model.random_params(1)
    tokens_T = np.random.default_rng(2).integers(0, config.vocab_size, 200).astype(np.int32)
    exact_TV = run(exact_model, [param.astype(jnp.float32) for param in params], tokens_T).logits_TV.astype(np.float64)

    def error(attention: str) -> float:
        logits_TV = paged_logits(model, params, tokens_T, dtype, attention=attention)
        return float(np.sqrt(np.mean((logits_TV - exact_TV) ** 2)))

    assert error(dispatch.KERNEL) <= 1.1 * error(dispatch.FALLBACK)
