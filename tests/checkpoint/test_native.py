"""Our own checkpoint: any mesh restores it to the bits that the published one gives."""

import errno
import json
import re
import resource
import shutil
from collections import namedtuple
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from jaxinfer import checkpoint
from jaxinfer.checkpoint import huggingface, loading, native, staging
from jaxinfer.model import Model, read_config
from jaxinfer.parallel import make_mesh
from tests.golden.load import load
from tests.golden.weights import write_checkpoint


def same(arrays, expected):
    assert arrays.keys() == expected.keys()
    for path, array in arrays.items():
        assert array.sharding == expected[path].sharding
        np.testing.assert_array_equal(array, expected[path], strict=True, err_msg=path)


@pytest.mark.parametrize("prefix", ["", "./", "../here/"])
def test_paths_may_be_relative(publish, tmp_path, monkeypatch, prefix):
    source, mesh = publish("qwen2"), make_mesh()
    here = tmp_path / "here"
    here.mkdir()
    source.rename(here / "qwen2")
    monkeypatch.chdir(here)
    checkpoint.convert(Path(f"{prefix}qwen2"), Path(f"{prefix}ours"), mesh)
    assert left_in(here) == ["ours", "qwen2"]
    model = Model(read_config(here / "ours"), mesh)
    expected = checkpoint.load(here / "qwen2", model)
    for folder in ("ours", "qwen2"):
        same(checkpoint.load(f"{prefix}{folder}", model), expected)


def left_in(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A published checkpoint whose config asks for another dtype than its weights have, and ours of it."""
    root = tmp_path_factory.mktemp("pair")
    source = root / "qwen2"
    source.mkdir()
    write_checkpoint(source, load("qwen2"))
    (source / "tokenizer.json").write_text("{}")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"torch_dtype": "bfloat16"}))
    checkpoint.convert(source, root / "ours", make_mesh())
    return root


@pytest.fixture
def converted(pair, tmp_path):
    """A copy of the pair, which a test may damage."""
    return shutil.copytree(pair / "qwen2", tmp_path / "qwen2"), shutil.copytree(pair / "ours", tmp_path / "ours")


@pytest.mark.parametrize(("tensor", "dtype"), [(1, "bfloat16"), (2, "float32"), (4, "bfloat16")])
def test_restoring_equals_loading(converted, tensor, dtype):
    source, ours = converted
    model = Model(read_config(ours), make_mesh(tensor), dtype=dtype)
    same(checkpoint.load(ours, model), checkpoint.load(source, model))


def test_a_parameter_may_be_larger_than_what_is_under_way_at_once(publish, tmp_path, monkeypatch):
    for module in (native, loading, huggingface):
        monkeypatch.setattr(module, "IN_FLIGHT", 1000)
    source, mesh = publish("qwen2"), make_mesh(2)
    checkpoint.convert(source, tmp_path / "ours", mesh)
    model = Model(read_config(source), mesh)
    same(checkpoint.load(tmp_path / "ours", model), checkpoint.load(source, model))


@pytest.mark.parametrize("case", ["olmo2", "mixtral"])
def test_repeated_kv_heads_are_stored_once(case, publish, tmp_path):
    source = publish(case)
    wide = Model(read_config(source), make_mesh(4))
    checkpoint.save(tmp_path / "ours", wide, checkpoint.load(source, wide), source)
    narrow = Model(wide.config, make_mesh(2))
    same(checkpoint.load(tmp_path / "ours", narrow), checkpoint.load(source, narrow))


def test_config_and_tokenizer_stand_beside(converted):
    assert left_in(converted[1]) == ["config.json", "parameters", "parameters.json", "tokenizer.json"]


def test_a_checkpoint_of_another_model_is_refused(converted, publish):
    model = Model(read_config(publish("llama3_1")), make_mesh())
    with pytest.raises(ValueError, match=r"qkv_bias_KgH' of shape \(.*\) is unexpected"):
        checkpoint.load(converted[1], model)


def refused(ours, message):
    with pytest.raises(ValueError, match=message):
        checkpoint.load(ours, Model(read_config(ours), make_mesh()))


def test_a_truncated_or_missing_file_is_named(converted):
    _, ours = converted
    largest = max((ours / "parameters").rglob("*"), key=lambda path: path.stat().st_size)
    size = largest.stat().st_size
    largest.write_bytes(largest.read_bytes()[:100])
    refused(ours, f"{largest} has 100 bytes; expected {size} bytes")
    largest.unlink()
    refused(ours, f"{largest} is missing; expected {size} bytes")
    (ours / "parameters.json").unlink()
    refused(ours, f"{ours}/parameters.json is missing")


def test_corrupt_metadata_is_named(converted):
    _, ours = converted
    metadata = next(ours.rglob("_METADATA"))
    metadata.write_bytes(b"x" * metadata.stat().st_size)
    refused(ours, f"{ours}/parameters cannot be read: .+")


@pytest.mark.parametrize("devices", [1, 2])
def test_damaged_bytes_of_a_parameter_are_named(converted, damage, devices):
    source, ours = converted
    model = Model(read_config(ours), make_mesh(devices), dtype="float32")
    arrays = checkpoint.load(ours, model)
    path = max(arrays, key=lambda path: arrays[path].nbytes)
    shape = arrays[path].shape
    damage(ours / "parameters", np.asarray(arrays[path]))
    message = (
        rf"^{ours}/parameters is corrupt: tensor '{re.escape(path)}' of shape {re.escape(str(shape))} is not finite"
    )
    with pytest.raises(ValueError, match=message):
        checkpoint.load(ours, model)
    checkpoint.load(source, model)


def test_an_existing_folder_is_kept(converted):
    source, ours = converted
    with pytest.raises(ValueError, match="exists"):
        checkpoint.convert(source, ours, make_mesh())
    checkpoint.load(ours, Model(read_config(ours), make_mesh()))


def test_our_own_layout_is_not_converted_again(converted, tmp_path):
    _, ours = converted
    with pytest.raises(ValueError, match=f"{ours} is in our own layout already; expected the folder of a Hugging"):
        checkpoint.convert(ours, tmp_path / "again", make_mesh())
    assert left_in(tmp_path) == ["ours", "qwen2"]


@pytest.fixture
def full_disk(monkeypatch):
    usage = namedtuple("usage", ["total", "used", "free"])
    monkeypatch.setattr(staging.shutil, "disk_usage", lambda path: usage(10**9, 10**9, 1000))


def test_no_disk_space_is_found_before_writing(publish, tmp_path, full_disk):
    source = publish("qwen2")
    with pytest.raises(OSError, match=r"no space for a checkpoint of \d+ bytes; 1000 are free.*ours") as caught:
        checkpoint.convert(source, tmp_path / "new" / "sub" / "ours", make_mesh())
    assert caught.value.errno == errno.ENOSPC
    assert left_in(tmp_path) == ["qwen2"]


@contextmanager
def files_end_at(size):
    """The system refuses to write a file beyond `size` bytes, as it does on a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("writer", ["save", "export"])
def test_a_write_that_fails_midway_leaves_nothing(writer, publish, tmp_path):
    source = publish("qwen2")
    model = Model(read_config(source), make_mesh())
    arrays = checkpoint.load(source, model)
    write = {
        "save": lambda: checkpoint.save(tmp_path / "ours", model, arrays, source),
        "export": lambda: checkpoint.export(tmp_path / "ours", model, arrays, {"config.json": "{}"}, 1 << 20),
    }[writer]
    half = sum(array.nbytes for array in arrays.values()) // 2
    with (
        files_end_at(half),
        pytest.raises(OSError, match=r"(?s)writing the checkpoint failed: .*File too large.*ours'"),
    ):
        write()
    assert left_in(tmp_path) == ["qwen2"]


def test_an_interrupted_write_leaves_nothing(publish, tmp_path, monkeypatch):
    source = publish("qwen2")

    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(native, "_stored", interrupt)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.convert(source, tmp_path / "ours", make_mesh())
    assert left_in(tmp_path) == ["qwen2"]
