"""A standard library in miniature, and a model small enough to train in a test."""

import functools

import jax
import numpy as np
import pytest

from jaxinfer.model import Model, read_config
from jaxinfer.parallel import make_mesh
from jaxinfer.training import student
from jaxinfer.training import train as training
from jaxinfer.training.data import HELD_OUT
from jaxinfer.training.demo import hf_config

SIZES = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 16,
}
SOURCE = "def add(a, b):\n    return a + b\n\n\nfor name in names:\n    print(add(name, 1))\n"


@pytest.fixture(scope="session")
def sizes():
    return SIZES


@pytest.fixture(scope="module")
def library_root(tmp_path_factory):
    """Every module repeats a few lines, so that a small model learns them in a few steps."""
    root = tmp_path_factory.mktemp("library")
    names = [*HELD_OUT, *(f"test/test_{name}" for name in HELD_OUT), *(f"module{i}.py" for i in range(8))]
    names += ["json/decoder.py", "site-packages/other.py", "encodings/utf_8.py", "config-3.12/build.py"]
    names += ["test/bad_coding.py", "html/entities.py", "_sysconfigdata_linux.py"]
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f'"""{name}"""\n' + SOURCE * 3)
    (root / "test/latin.py").write_bytes('x = "é"\n'.encode("latin-1"))
    (root / "empty.py").write_text("\n")
    return root


@pytest.fixture(scope="session")
def make_model(sizes):
    @functools.cache
    def make(tensor=1):
        return Model(read_config(hf_config(sizes, 0)), make_mesh(tensor), dtype="float32")

    return make


@pytest.fixture(scope="session")
def random_params():
    """Drawn on the host, where nothing is compiled: norms around one, the rest of unit output variance."""

    def draw(model, seed=0):
        rng = np.random.default_rng(seed)
        params = []
        for leaf in model.parameters.values():
            noise = rng.normal(size=leaf.shape) * (sum(leaf.shape) - 1) ** -0.5
            value = (noise if len(leaf.shape) > 1 else 1 + noise).astype(np.float32)
            params.append(jax.device_put(value, leaf.sharding))
        return params

    return draw


@pytest.fixture(scope="module")
def compiled_once(random_params):
    """What is trained alike in a module runs the same programs, from weights that are drawn on the host."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("adamw", "next_token", "compiled_steps", "_compiled_evaluation"):
            patch.setattr(training, name, functools.cache(getattr(training, name)))
        patch.setattr(Model, "random_params", random_params)
        patch.setattr(student, "Model", functools.cache(Model))
        yield
