"""Loading holds no second copy of the model on the host."""

import json
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxinfer.checkpoint import names
from jaxinfer.checkpoint.assembly import Assembly
from jaxinfer.model import Model, read_config
from jaxinfer.parallel import make_mesh

ROOT = Path(__file__).parents[2]
BEYOND = 250 * 10**6  # bytes that the host may need besides the model
CONFIG = {
    "vocab_size": 64000, "num_hidden_layers": 8,
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 1024, "intermediate_size": 4096,
    "num_attention_heads": 16, "num_key_value_heads": 8, "max_position_embeddings": 2048, "rms_norm_eps": 1e-5,
    "rope_theta": 1e4, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "hidden_act": "silu",
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A checkpoint of about 500 MB, half of it in two tensors: the same million random numbers over and over."""
    folder = tmp_path_factory.mktemp("large")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    model = Model(read_config(folder), make_mesh())
    rules = names.rules(model.config, model.parameters)
    numbers = np.random.default_rng(0).standard_normal(10**6, np.float32).astype(ml_dtypes.bfloat16)
    tensors = {}
    for path, leaf in model.parameters.items():
        shapes = Assembly.of(model.config, path, rules[path].form, leaf).sources
        for name, shape in zip(rules[path].names, shapes, strict=True):
            tensors[name] = np.resize(numbers, shape)
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's account of resident memory")
def test_resident_memory_grows_by_the_model_and_little_more(folder):
    devices = [1, 8]
    command = [sys.executable, "-m", "tests.checkpoint.measure_load", str(folder), *map(str, devices)]
    said = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT).stdout.splitlines()
    for count, line in zip(devices, said, strict=True):
        growth, size = map(int, line.split())
        assert size == pytest.approx(500e6, rel=0.05)
        assert size <= growth <= size + BEYOND, f"{(growth - size) / 1e6:.0f} MB beyond the model on {count} devices"
