"""The same logits on 1, 2, 4 and 8 devices, also where there are fewer KV heads than devices."""

import functools
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxinfer import checkpoint
from jaxinfer.cache import make_cache
from jaxinfer.decode.batch import StepInput, make_batch
from jaxinfer.decode.slots import empty_slots
from jaxinfer.model import Model, ModelConfig, Params, read_config
from jaxinfer.parallel import collectives, make_mesh
from pallas_kernels.all_reduce import config as all_reduce_config
from tests.model.random_params import random_params
from tests.model.rings import ring_from

PAGE, PAGES, CONTEXT = 4, 17, 32
SHAPE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": CONTEXT,
    "torch_dtype": "float32",
}
OLMO2 = SHAPE | {"architectures": ["Olmo2ForCausalLM"]}
GPT_OSS = SHAPE | {"architectures": ["GptOssForCausalLM"], "num_local_experts": 8, "num_experts_per_tok": 2,
                   "sliding_window": 5, "num_hidden_layers": 1}  # fmt: skip
PROMPTS = [[5, 9, 3, 7, 60, 1, 2, 33, 8], [11, 4, 44]]
ROWS = 16  # of a step: four are padding


def dense() -> tuple[dict, ModelConfig]:
    """Norms over all heads at once, whose KV heads are repeated with them, and a window on the first layer."""
    config = read_config(OLMO2)
    first, second = config.layers
    return OLMO2, replace(config, layers=(replace(first, window=5), second))


def mixture() -> tuple[dict, ModelConfig]:
    """Experts, sinks, biases, and a window on its only layer."""
    return GPT_OSS, read_config(GPT_OSS)


@dataclass(frozen=True)
class Published:
    """A checkpoint on disk, for every mesh to load."""

    folder: Path
    config: ModelConfig


@pytest.fixture(params=[dense, mixture])
def published(request, tmp_path_factory) -> Published:
    return publish(request.param, tmp_path_factory.getbasetemp() / "mesh")


@functools.cache
def publish(make: Callable[[], tuple[dict, ModelConfig]], root: Path) -> Published:
    fields, config = make()
    model = Model(config, make_mesh(1))
    arrays = dict(zip(model.parameters, random_params(model, 4), strict=True))
    rng = np.random.default_rng(5)
    for name, array in arrays.items():  # norms at one would hide which head a scale belongs to
        if name.endswith("scale_KgH"):
            arrays[name] = jnp.asarray(1 + 0.3 * rng.standard_normal(array.shape).astype(np.float32))
    folder = root / make.__name__
    checkpoint.export(folder, model, arrays, {"config.json": json.dumps(fields)}, 1 << 20)
    return Published(folder, config)


def logits_of_two_steps(published: Published, tensor: int, rows: int = ROWS) -> np.ndarray:
    """Of a ragged prefill of two prompts, and of a decode step of both: twice the program that can do either."""
    model = Model(published.config, make_mesh(tensor))
    return logits_of(model, lambda model, _: model.params(checkpoint.load(published.folder, model)), rows)


def logits_of(model: Model, make_params: Callable[[Model, int], Params], rows: int = ROWS) -> np.ndarray:
    params = make_params(model, 4)
    groups = tuple(model.config.group(layer) for layer in range(model.config.num_layers))
    windows = len(model.config.windows)
    cache = make_cache(
        model.mesh, groups, (PAGES,) * windows, PAGE, model.kv_slots, model.config.head_size, model.config.dtype
    )  # fmt: skip
    cache = jax.tree.map(lambda array: jnp.full_like(array, jnp.nan), cache)
    table_BJ = np.array([[7, 2, 9, 12, 0, 0, 0, 0], [3, 5, 0, 0, 0, 0, 0, 0]], np.int32)
    idle = empty_slots(len(PROMPTS), windows, CONTEXT // PAGE, model.config.vocab_size)
    idle = replace(idle, tables=(jnp.asarray(table_BJ),) * windows)
    lengths = np.array([len(prompt) for prompt in PROMPTS], np.int32)
    decoding = replace(idle, token_B=np.array([21, 22], np.int32), length_B=lengths, active_B=np.ones(2, np.bool_))

    tokens = np.array([*PROMPTS[0], *PROMPTS[1]], np.int32)
    tokens = np.pad(tokens, (0, rows - len(tokens)))
    starts, slots = np.cumsum([0, *lengths], dtype=np.int32), np.arange(2, dtype=np.int32)
    prompts = StepInput(tokens, slots + 2, starts, slots, lengths, np.ones(2, np.int32))
    both = StepInput(0 * tokens, slots, 0 * starts + 2, slots + 2, 0 * lengths, 0 * slots)
    with jax.set_mesh(model.mesh):
        first_WV, cache = _step(model, rows, params, cache, idle, prompts.packed())
        second_WV, _ = _step(model, rows, params, cache, decoding, both.packed())
    return np.concatenate([np.asarray(first_WV)[: sum(lengths)], np.asarray(second_WV)[:2]])


@partial(jax.jit, static_argnums=(0, 1))
def _step(model: Model, rows: int, params, cache, slots, packed):
    batch, _ = make_batch(slots, StepInput.unpacked(packed, rows, len(PROMPTS)), PAGE)
    hidden_TD, _, cache = model.forward(params, batch, cache)
    return jax.sharding.reshard(model.logits(params, hidden_TD), P(None, None)), cache


@pytest.fixture
def alone(published) -> np.ndarray:
    return on_one_device(published)


@functools.cache
def on_one_device(published: Published) -> np.ndarray:
    return logits_of_two_steps(published, 1)


@pytest.mark.parametrize("tensor", [2, 4, 8])
def test_logits_do_not_depend_on_the_mesh(published, alone, tensor):
    assert np.isfinite(alone).all()
    assert alone.std() > 0.3
    np.testing.assert_allclose(logits_of_two_steps(published, tensor), alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize("tensor", [2, 8])
def test_devices_that_share_the_tokens_give_the_same_logits(monkeypatch, published, alone, tensor):
    monkeypatch.setattr(collectives, "MANY_TOKENS", ROWS)
    np.testing.assert_allclose(logits_of_two_steps(published, tensor), alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("published", "tensor", "rows"),
    [(dense, 2, ROWS), (dense, 8, ROWS), (dense, 2, ROWS - 1), (mixture, 4, ROWS)],
    indirect=["published"],
)
def test_tokens_that_go_round_a_ring_give_the_same_logits(published, alone, tensor, rows):
    """An odd number of them is on all devices, and does not."""
    with ring_from(rows):
        found = logits_of_two_steps(published, tensor, rows)
    np.testing.assert_allclose(found, alone, rtol=0, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("layers", [2, 8])
def test_gpus_that_share_a_model_give_the_logits_of_one(layers):
    """With the kernel that adds up, without it, and in a ring, in bfloat16: each layer rounds, and errors add up like
    noise."""
    if len(jax.devices()) < 2:
        pytest.skip("needs two GPUs")
    sizes = {"hidden_size": 512, "intermediate_size": 1024, "head_dim": 64, "num_hidden_layers": layers}
    config = read_config(OLMO2 | sizes | {"architectures": ["LlamaForCausalLM"], "torch_dtype": "bfloat16"})
    found = {}
    for name, tensor, largest in (("one", 1, 0), ("kernel", 2, 2**20), ("again", 2, 2**20), ("psum", 2, 0)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(all_reduce_config, "LARGEST_MESSAGE", largest)
            found[name] = logits_of(Model(config, make_mesh(tensor)), random_params)
    with ring_from(ROWS):
        found["ring"] = logits_of(Model(config, make_mesh(2)), random_params)
    error = {name: np.sqrt(np.mean((logits - found["one"]) ** 2)) for name, logits in found.items()}
    assert max(error["kernel"], error["ring"]) < 1.5 * error["psum"] < 0.1 * found["one"].std()
    np.testing.assert_array_equal(found["kernel"], found["again"])


@pytest.mark.parametrize(("change", "tensor", "named"), [
    ({"vocab_size": 66}, 4, ["vocab_size", "66", "4", "[1, 2]"]),
    ({"num_attention_heads": 6, "num_key_value_heads": 2}, 4, ["num_heads", "6", "4"]),
    ({"intermediate_size": 50}, 4, ["intermediate_size", "50", "4"]),
    ({"num_attention_heads": 24, "num_key_value_heads": 3}, 8, ["num_kv_heads", "3", "8"]),
    ({"num_attention_heads": 24, "num_key_value_heads": 12}, 8, ["KV heads", "12", "8"]),
    ({"num_attention_heads": 12, "vocab_size": 66}, 3, ["num_kv_heads", "2", "3", "[1, 2] would"]),
])  # fmt: skip
def test_a_mesh_that_does_not_divide_the_model(change, tensor, named):
    config = read_config(OLMO2 | change)
    with pytest.raises(ValueError, match="tensor") as error:
        Model(config, make_mesh(tensor))
    assert [word for word in named if word not in str(error.value)] == []


def test_a_mesh_that_does_not_divide_the_experts():
    with pytest.raises(ValueError, match=r"tensor has 8 devices.*num_experts.*12"):
        Model(read_config(GPT_OSS | {"num_local_experts": 12}), make_mesh(8))


def test_a_mesh_that_does_not_exist():
    with pytest.raises(ValueError, match=r"needs 16 devices; there are 8"):
        make_mesh(16)
    with pytest.raises(ValueError, match=r"tensor has size 0"):
        make_mesh(0)
