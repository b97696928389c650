"""A damaged or foreign checkpoint: an error that names file, tensor and shapes, and nothing on a device."""

import gc
import json
import re
import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxinfer import checkpoint
from jaxinfer.checkpoint import loading
from jaxinfer.model import Model, read_config
from jaxinfer.parallel import make_mesh

NORM, DOWN = "model.norm.weight", "model.layers.1.mlp.down_proj.weight"


def refused(folder, message):
    """Loading raises a ValueError that matches `message`, and leaves no array behind."""
    model = Model(read_config(folder), make_mesh(2))
    before = len(jax.live_arrays())
    with pytest.raises(ValueError, match=message) as caught:
        checkpoint.load(folder, model)
    assert len(jax.live_arrays()) == before
    return str(caught.value)


@pytest.fixture(autouse=True)
def no_collection():
    """What other tests have left in cycles must not go while arrays are counted."""
    gc.disable()
    yield
    gc.enable()


@pytest.fixture
def folder(publish):
    return publish("llama3")


@pytest.fixture
def rewrite(folder):
    """Writes the checkpoint again with some tensors replaced, or dropped where the value is None."""

    def change(**changed):
        tensors = load_file(folder / "model.safetensors") | changed
        save_file({name: x for name, x in tensors.items() if x is not None}, folder / "model.safetensors")

    return change


@pytest.fixture
def sharded(folder):
    """The checkpoint in two files with an index; gives the index, and a function that writes it."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    halves = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, held in halves.items():
        save_file({name: tensors[name] for name in held}, folder / file)

    def write(index):
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))

    weight_map = {name: file for file, held in halves.items() for name in held}
    write({"weight_map": weight_map})
    return weight_map, write


def test_missing_tensor(folder, rewrite):
    rewrite(**{DOWN: None})
    refused(folder, rf"{re.escape(str(folder))}: tensor '{DOWN}' of shape \(64, 96\) is missing")


def test_unexpected_tensor(folder, rewrite):
    rewrite(**{"model.layers.9.extra": np.zeros((2, 3), np.float32)})
    refused(folder, r"model\.safetensors: tensor 'model\.layers\.9\.extra' of shape \(2, 3\) is unexpected")


def test_misshapen_tensor(folder, rewrite):
    rewrite(**{DOWN: np.zeros((96, 64), np.float32)})
    refused(folder, rf"model\.safetensors: tensor '{DOWN}' has shape \(96, 64\); expected \(64, 96\)")


def test_quantized_tensor(folder, rewrite):
    rewrite(**{DOWN: np.zeros((64, 96), np.int8)})
    refused(folder, rf"tensor '{DOWN}' has dtype I8; expected one of \['BF16', 'F16', 'F32'\]")


def test_all_problems_are_listed_and_their_number_is_bounded(folder, rewrite):
    rewrite(**{f"extra.{i}": np.zeros((), np.float32) for i in range(20)})
    lines = refused(folder, "unexpected").splitlines()
    assert len(lines) == 9
    assert lines[-1] == "and 12 more"


def test_known_tables_are_no_weights(folder, rewrite):
    rewrite(**{"model.layers.0.self_attn.rotary_emb.inv_freq": np.zeros((8,), np.float32)})
    checkpoint.load(folder, Model(read_config(folder), make_mesh()))


def test_no_weights(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    refused(folder, "holds neither model.safetensors nor model.safetensors.index.json")


@pytest.mark.parametrize("kept", [0.0, 0.001, 0.5, 0.999])
def test_truncated_file(folder, kept):
    file = folder / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * kept)])
    message = r"model\.safetensors is truncated"
    if kept > 0.1:  # the header is whole, the data is not
        message += r": tensor '.*', F32 of shape \(.*\), ends at byte \d+; the file has \d+"
    refused(folder, message)


@pytest.mark.parametrize("header", [b"not json", b"[]", b'{"a": 1}', b'{"a": {"dtype": "F32", "shape": [2]}}'])
def test_corrupt_header(folder, header):
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
    refused(folder, r"model\.safetensors is corrupt")


def test_byte_range_that_does_not_fit_the_shape(folder):
    header = json.dumps({NORM: {"dtype": "F32", "shape": [64], "data_offsets": [0, 8]}}).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
    refused(folder, rf"tensor '{NORM}', F32 of shape \(64,\), takes 256 bytes; its place has 8")


@pytest.mark.parametrize(
    ("places", "size", "message"),
    [
        ([(0, 8), (4, 12)], 12, r"tensor 'b' is at byte \d+4; tensor 'a' ends at \d+8"),
        ([(0, 8), (0, 8)], 8, r"tensor 'b' is at byte \d+0; tensor 'a' ends at \d+8"),
        ([(0, 8), (12, 20)], 20, r"tensor 'b' is at byte \d+2; tensor 'a' ends at \d+8"),
        ([(12, 20), (4, 12)], 20, r"tensor 'b' is at byte \d+4; the header ends at \d+0"),
        ([(0, 8), (8, 16)], 19, r"the end of the file is at byte \d+9; tensor 'b' ends at \d+6"),
    ],
)
def test_byte_ranges_that_overlap_or_leave_a_gap(folder, places, size, message):
    entries = {
        name: {"dtype": "F32", "shape": [2], "data_offsets": place} for name, place in zip("ab", places, strict=True)
    }
    header = json.dumps(entries).encode()
    header += b" " * (-(len(header) + 8) % 100)  # so that the last digits of the bytes are those of the ranges
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(size))
    refused(folder, rf"model\.safetensors is corrupt: {message}")


def test_an_index_places_every_tensor(folder, sharded):
    model = Model(read_config(folder), make_mesh())
    assert checkpoint.load(folder, model).keys() == model.parameters.keys()


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ([], "holds list; expected a JSON object"),
        ({}, "weight_map is None"),
        ({"weight_map": {NORM: "../a.safetensors"}}, "is placed in '../a.safetensors'; expected a file of the same"),
        ({"weight_map": {NORM: "c.safetensors"}}, rf"c\.safetensors is missing; .* places tensor '{NORM}' there"),
    ],
)
def test_bad_index(folder, sharded, index, message):
    sharded[1](index)
    refused(folder, message)


def test_index_that_is_not_json(folder, sharded):
    (folder / "model.safetensors.index.json").write_text("{")
    refused(folder, r"model\.safetensors\.index\.json is corrupt")


def test_tensor_in_another_file_than_the_index_says(folder, sharded):
    weight_map, write = sharded
    other = {"a.safetensors": "b.safetensors", "b.safetensors": "a.safetensors"}[weight_map[NORM]]
    write({"weight_map": weight_map | {NORM: other}})
    refused(folder, rf"{other} lacks the tensor '{NORM}'")


def test_tensor_in_two_files(folder, sharded):
    save_file(load_file(folder / "a.safetensors") | load_file(folder / "b.safetensors"), folder / "b.safetensors")
    refused(folder, "stands in two files")


@pytest.mark.parametrize("name", [NORM, DOWN, "model.layers.0.self_attn.k_proj.weight"])
def test_damaged_bytes_of_a_shard_are_named(folder, sharded, damage, name):
    file = folder / sharded[0][name]
    array = load_file(file)[name]
    assert damage(folder, array) == file
    message = f"{file} is corrupt: tensor '{name}' of shape {array.shape} is not finite: it holds NaN or infinity"
    assert refused(folder, "not finite") == message


def test_a_damaged_expert_is_named(publish, damage):
    folder = publish("mixtral")
    file = folder / "model.safetensors"
    name = "model.layers.1.block_sparse_moe.experts.2.w2.weight"
    damage(folder, load_file(file)[name])
    assert refused(folder, rf"^{file} is corrupt: tensor '{name}' ").count("tensor") == 2  # and the file's own name


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_single_value_that_is_not_finite(folder, rewrite, value):
    down = load_file(folder / "model.safetensors")[DOWN].copy()
    down[-1, -1] = value
    rewrite(**{DOWN: down})
    refused(folder, rf"tensor '{DOWN}' .* is not finite")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_one_value_that_is_not_finite_is_found(dtype):
    x = jnp.full((1000, 1000), jnp.finfo(dtype).max, dtype)
    assert loading._all_finite(x)
    assert not any(loading._all_finite(x.at[500, 7].set(value)) for value in (np.nan, np.inf, -np.inf))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_looking_for_what_is_not_finite_needs_no_memory(dtype):
    x = jnp.ones((1000, 1000), dtype)
    assert loading._all_finite.lower(x).compile().memory_analysis().temp_size_in_bytes < 1000


def test_many_tensors_that_are_not_finite(folder, rewrite):
    tensors = load_file(folder / "model.safetensors")
    rewrite(**{name: np.full_like(array, np.nan) for name, array in tensors.items()})
    assert re.fullmatch(r"and \d+ more", refused(folder, "not finite").splitlines()[-1])


def test_values_that_the_dtype_of_the_model_cannot_hold(folder, rewrite):
    largest = np.full_like(load_file(folder / "model.safetensors")[NORM], np.finfo(np.float32).max)
    rewrite(**{NORM: largest})
    config = read_config(folder)
    with pytest.raises(ValueError, match=rf"'{NORM}': parameter .* is not finite: .* too large for bfloat16"):
        checkpoint.load(folder, Model(config, make_mesh(2), dtype="bfloat16"))


@pytest.mark.parametrize("tensor", [1, 2, 4])
def test_extreme_finite_values_load_as_they_are(folder, rewrite, tensor):
    norm = load_file(folder / "model.safetensors")[NORM].copy()
    limits = np.finfo(np.float32)
    norm[:5] = limits.max, limits.min, limits.smallest_subnormal, -0.0, 0.0
    rewrite(**{NORM: norm})
    arrays = checkpoint.load(folder, Model(read_config(folder), make_mesh(tensor), dtype="float32"))
    assert np.asarray(arrays["final_norm.scale_D"]).tobytes() == norm.tobytes()
