"""Published checkpoints of every family, loaded on one device and on several, and written again."""

import json
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxinfer import checkpoint
from jaxinfer.checkpoint import huggingface, slots
from jaxinfer.model import Model, read_config
from jaxinfer.model.families import FAMILIES
from jaxinfer.parallel import make_mesh
from tests.golden.load import cases, load
from tests.golden.weights import write_checkpoint

BY_ARCHITECTURE = {load(case).config["architectures"][0]: case for case in reversed(cases())}
MULTIMODAL = "Gemma3ForConditionalGeneration"
# Between them these have every form, and one, two and four KV heads: an `Assembly` knows no more of a family.
EVERY_FORM = ("gpt_oss", "olmoe", "starcoder2", "phi3", "llama2", "falcon")


def test_every_family_is_covered():
    assert BY_ARCHITECTURE.keys() | {MULTIMODAL} == FAMILIES.keys()


@dataclass(frozen=True)
class Published:
    """A checkpoint as it would be published, and its parameters on one device."""

    case: str
    folder: Path
    model: Model
    arrays: dict[str, jax.Array]


@pytest.fixture(scope="module", params=BY_ARCHITECTURE.values())
def published(request, tmp_path_factory) -> Published:
    folder = tmp_path_factory.mktemp(request.param)
    write_checkpoint(folder, load(request.param))
    model = Model(read_config(folder), make_mesh())
    return Published(request.param, folder, model, checkpoint.load(folder, model))


def test_a_checkpoint_loads_and_is_written_again_bit_for_bit(published, tmp_path):
    model, arrays = published.model, published.arrays
    checkpoint.export(tmp_path / "again", model, arrays, {}, shard_bytes=1 << 16)
    index = json.loads((tmp_path / "again/model.safetensors.index.json").read_text())["weight_map"]
    stored = load_file(published.folder / "model.safetensors")
    assert index.keys() == stored.keys()
    shards = {file: load_file(tmp_path / "again" / file) for file in set(index.values())}
    assert len(shards) > 1
    for name, tensor in stored.items():
        np.testing.assert_array_equal(shards[index[name]][name], tensor, strict=True)
    again = checkpoint.load(tmp_path / "again", model)
    assert all(np.array_equal(again[path], array) for path, array in arrays.items())


def test_devices_hold_the_same_bits_as_one(published):
    """Two for each KV head, as most have it, and as many as KV heads."""
    for tensor in (4, 2) if published.case in EVERY_FORM else (4,):
        many = Model(published.model.config, make_mesh(tensor))
        arrays = checkpoint.load(published.folder, many)
        for path, leaf in many.parameters.items():
            array = arrays[path]
            assert (array.shape, array.dtype, array.sharding) == (leaf.shape, leaf.dtype, leaf.sharding)
            repeats = slots.repeats(path, array.shape, many.config.num_kv_heads)
            whole = slots.gather(path, np.asarray(array), repeats)
            np.testing.assert_array_equal(whole, published.arrays[path], err_msg=path)


@pytest.mark.parametrize("tensor", [1, 4])
def test_tensors_read_shard_by_shard_are_the_same_and_independent_of_the_file(tensor, publish, monkeypatch):
    folder = publish("mixtral")
    model = Model(read_config(folder), make_mesh(tensor))
    expected = checkpoint.load(folder, model)
    monkeypatch.setattr(huggingface, "_LARGE", 0)
    arrays = checkpoint.load(folder, model)
    with (folder / "model.safetensors").open("r+b") as file:
        file.write(bytes(file.seek(0, 2) - file.seek(0)))
    for path, array in expected.items():
        assert arrays[path].sharding == array.sharding
        np.testing.assert_array_equal(arrays[path], array, err_msg=path)


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model."])
def test_the_language_model_of_a_multimodal_checkpoint_is_found(prefix, publish):
    folder = publish("gemma3")
    text = json.loads((folder / "config.json").read_text())
    model = Model(read_config(text), make_mesh())
    expected = checkpoint.load(folder, model)

    tensors = load_file(folder / "model.safetensors")
    renamed = {prefix + name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    ignored = {name: np.zeros((2, 2), np.float32) for name in ("vision_tower.x.weight", "multi_modal_projector.y")}
    save_file(renamed | ignored, folder / "model.safetensors")
    config = {"architectures": [MULTIMODAL], "model_type": "gemma3", "text_config": text}
    arrays = checkpoint.load(folder, Model(read_config(config), make_mesh()))
    assert all(np.array_equal(arrays[path], array) for path, array in expected.items())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_weights_are_cast_once_to_the_dtype_asked_for(dtype, publish):
    folder = publish("llama3")
    config = read_config(folder)
    exact = checkpoint.load(folder, Model(config, make_mesh()))
    cast = checkpoint.load(folder, Model(config, make_mesh(2), dtype=dtype))
    for path, array in exact.items():
        np.testing.assert_array_equal(cast[path], np.asarray(array).astype(dtype), strict=True)
