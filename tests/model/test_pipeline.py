"""The same logits from layers that are divided among the stages of a pipe, and loaded straight into them."""

import json
import re
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxinfer import checkpoint
from jaxinfer.decode.batch import StepInput, make_batch
from jaxinfer.decode.forward import Forward
from jaxinfer.decode.layout import Layout
from jaxinfer.decode.sampling_params import SamplingParams
from jaxinfer.decode.step import Programs
from jaxinfer.model import Model, read_config
from jaxinfer.parallel import make_mesh, pipeline
from tests.decode.paged import paged_logits
from tests.model.random_params import random_params

TOKENS_T = np.random.default_rng(0).integers(0, 64, 43).astype(np.int32)
SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 8,
    "head_dim": 8, "max_position_embeddings": 64, "torch_dtype": "float32",
}  # fmt: skip
# Norms over all heads at once, and a KV head that two devices of a stage have both; sinks, biases and windows; a
# window on every other layer.
DENSE = SIZES | {"architectures": ["Olmo2ForCausalLM"], "num_key_value_heads": 1}
SPARSE = SIZES | {
    "architectures": ["GptOssForCausalLM"], "num_key_value_heads": 2, "num_local_experts": 8, "num_experts_per_tok": 2,
    "sliding_window": 5, "num_hidden_layers": 2, "layer_types": ["sliding_attention"] * 2,
}  # fmt: skip
WINDOW = SIZES | {
    "architectures": ["MistralForCausalLM"], "num_key_value_heads": 2, "sliding_window": 7,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}  # fmt: skip


def write(folder: Path, fields: dict) -> Path:
    model = Model(read_config(fields), make_mesh())
    arrays = dict(zip(model.parameters, random_params(model, 4), strict=True))
    checkpoint.export(folder, model, arrays, {"config.json": json.dumps(fields)}, 1 << 20)
    return folder


def logits_of(folder: Path, pipe: int = 1, tensor: int = 1) -> np.ndarray:
    """Of every token of a text that comes in chunks, which are divided, and at last in single tokens."""
    model = Model(read_config(folder), make_mesh(tensor, pipe))
    return paged_logits(model, model.params(checkpoint.load(folder, model)), TOKENS_T, "float32", decoded=2)


@pytest.mark.parametrize(
    ("fields", "pipe", "tensor"), [(DENSE, 4, 2), (SPARSE, 2, 2), (WINDOW, 2, 1)], ids=["dense", "sparse", "window"]
)
def test_logits_do_not_depend_on_the_stages(fields, pipe, tensor, tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "FEW_ROWS", 6)
    folder = write(tmp_path / "model", fields)
    alone = logits_of(folder)
    assert alone.std() > 0.3
    np.testing.assert_allclose(logits_of(folder, pipe, tensor), alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize("layers", [None, 3, 1])
def test_outputs_of_layers_leave_the_pipe_where_they_are(layers, monkeypatch):
    """And with the first layers alone, whatever stage they end in."""
    monkeypatch.setattr(pipeline, "FEW_ROWS", 4)
    alone, divided = (Model(read_config(WINDOW), make_mesh(pipe=pipe)) for pipe in (1, 2))
    params = random_params(alone, 5)
    taps = tuple(tap for tap in (2, 0) if tap < (layers or 4))
    found = outputs(alone, params, layers, taps)
    parts = dict(zip(alone.parameters, params, strict=True))
    placed = {path: jax.device_put(parts[path], leaf.sharding) for path, leaf in divided.stored.items()}
    for ours, theirs in zip(
        outputs(divided, divided.params(divided.joined(placed)), layers, taps), found, strict=True
    ):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)


def outputs(model: Model, params: list, layers: int | None, taps: tuple[int, ...]) -> tuple[np.ndarray, ...]:
    """Hidden states behind the last layer that runs, and behind some others, of two prompts in one step."""
    programs = Programs(model, Layout(2, 8, (9, 9), 64, "float32"))
    state, cache = programs.new_state()
    for slot, pages in enumerate(([3, 5], [7, 1])):
        state = programs.admit(state, {slot: programs.admission(SamplingParams(), [pages] * 2)})
    integers = lambda *values: np.array(values, np.int32)  # noqa: E731
    given = StepInput(TOKENS_T[:16], integers(), integers(0, 9, 14), integers(0, 1), integers(9, 5), integers(1, 1))
    forward = Forward(model, 8, "float32", "auto", layers, taps=taps)

    @jax.jit
    def step(params, state, cache):
        batch, rows = make_batch(state, given, 8)
        ran = forward(params, cache, batch, rows.tokens_W)
        return forward.hidden(params, ran.rest), ran.shown_TE

    with jax.set_mesh(model.mesh):
        return tuple(np.asarray(array)[:14] for array in step(params, state, cache))


def test_a_checkpoint_is_restored_under_another_mesh(tmp_path):
    """Written by one device, read by eight, and written by these; every layer by the devices of its stage alone."""
    source = write(tmp_path / "published", DENSE)
    checkpoint.convert(source, tmp_path / "ours", make_mesh())
    model = Model(read_config(source), make_mesh(2, 4))
    loaded = checkpoint.load(tmp_path / "ours", model)
    assert {path: (array.shape, array.sharding) for path, array in loaded.items()} == {
        path: (leaf.shape, leaf.sharding) for path, leaf in model.parameters.items()
    }
    checkpoint.save(tmp_path / "theirs", model, loaded, source)
    checkpoint.export(tmp_path / "again", model, loaded, {"config.json": json.dumps(DENSE)}, 1 << 20)
    alone = Model(read_config(source), make_mesh())
    expected, *others = (checkpoint.load(tmp_path / name, alone) for name in ("published", "theirs", "again"))
    for other in others:
        jax.tree.map(np.testing.assert_array_equal, other, expected)


@pytest.mark.parametrize(("change", "pipe", "told"), [
    ({}, 3, "axis pipe has 3 stages, which does not divide num_layers 4; [1, 2] would fit"),
    ({"layer_types": ["sliding_attention", *["full_attention"] * 3]}, 2,
     "which run one program, but layer 2 is not as layer 0, of another stage; [1] would fit"),
])  # fmt: skip
def test_a_model_that_cannot_be_divided(change, pipe, told):
    with pytest.raises(ValueError, match=re.escape(told)):
        Model(read_config(WINDOW | change), make_mesh(pipe=pipe))


@pytest.mark.parametrize(("vocabulary", "axes"), [(64, ("pipe", "tensor")), (66, "tensor")])
def test_all_devices_share_a_vocabulary_that_they_divide(vocabulary, axes):
    model = Model(read_config(DENSE | {"vocab_size": vocabulary}), make_mesh(tensor=2, pipe=2))
    embedding, head = (model.parameters[path].sharding for path in ("embed.weight_VD", "head_VD"))
    assert embedding.spec == head.spec == P(axes, None)


def test_random_weights_are_drawn_for_one_layer():
    """The deviation of a matrix is that of one stage's, not that of all of them on one axis."""
    model = Model(read_config(DENSE), make_mesh(pipe=4))
    drawn = dict(zip(model.parameters, model.random_params(), strict=True))
    assert np.std(drawn["layers.0.mlp.up_DcF"]) == pytest.approx(32**-0.5, rel=0.05)
