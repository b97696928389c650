"""The same logits on 1, 2, 4 and 8 devices, also where there are fewer KV heads than devices."""

import json
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
from jaxinfer.decode.batch import Prefill, make_batch, no_prefill
from jaxinfer.decode.slots import empty_slots
from jaxinfer.model import Model, ModelConfig, read_config
from jaxinfer.parallel import make_mesh

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
                   "sliding_window": 5}  # fmt: skip
PROMPTS = [[5, 9, 3, 7, 60, 1, 2, 33, 8], [11, 4, 44]]


def dense() -> tuple[dict, ModelConfig]:
    """Norms over all heads at once, whose KV heads are repeated with them, and a window on the first layer."""
    config = read_config(OLMO2)
    first, second = config.layers
    return OLMO2, replace(config, layers=(replace(first, window=5), second))


def mixture() -> tuple[dict, ModelConfig]:
    """Experts, sinks, biases, and alternating windows."""
    return GPT_OSS, read_config(GPT_OSS)


@dataclass(frozen=True)
class Published:
    """A checkpoint on disk, for every mesh to load."""

    folder: Path
    config: ModelConfig


@pytest.fixture(scope="module", params=[dense, mixture])
def published(request, tmp_path_factory) -> Published:
    fields, config = request.param()
    model = Model(config, make_mesh(1))
    arrays = dict(zip(model.parameters, model.random_params(4), strict=True))
    rng = np.random.default_rng(5)
    for name, array in arrays.items():  # norms at one would hide which head a scale belongs to
        if name.endswith("scale_KgH"):
            arrays[name] = jnp.asarray(1 + 0.3 * rng.standard_normal(array.shape).astype(np.float32))
    folder = tmp_path_factory.mktemp(request.param.__name__) / "checkpoint"
    checkpoint.export(folder, model, arrays, {"config.json": json.dumps(fields)}, 1 << 20)
    return Published(folder, config)


def logits_of_two_steps(published: Published, tensor: int) -> np.ndarray:
    """Of a ragged prefill of two prompts, and of a decode step of both."""
    model = Model(published.config, make_mesh(tensor))
    params = model.params(checkpoint.load(published.folder, model))
    groups = tuple(model.config.group(layer) for layer in range(model.config.num_layers))
    num_pages = (PAGES,) * len(model.config.windows)
    with jax.set_mesh(model.mesh):
        cache = make_cache(model.mesh, groups, num_pages, PAGE, model.kv_slots, model.config.head_size, "float32")
        cache = jax.tree.map(lambda array: jnp.full_like(array, jnp.nan), cache)
        return np.asarray(jax.jit(partial(_two_steps, model))(params, cache))


def _two_steps(model: Model, params, cache):
    lengths = [len(prompt) for prompt in PROMPTS]
    integers = partial(jnp.asarray, dtype=jnp.int32)
    slots = empty_slots(len(PROMPTS), len(model.config.windows), CONTEXT // PAGE, model.config.vocab_size)
    table_BJ = integers([[7, 2, 9, 12, 0, 0, 0, 0], [3, 5, 0, 0, 0, 0, 0, 0]])
    slots = replace(slots, tables=(table_BJ,) * len(slots.tables))
    tokens = [*PROMPTS[0], *PROMPTS[1], 0]  # one of padding
    starts = integers([0, lengths[0], sum(lengths)])
    prefill = Prefill(integers(tokens), starts, integers([0, 1]), integers(lengths), integers([1, 1]))
    batch, _ = make_batch(slots, 0, prefill, PAGE)
    first_TD, _, cache = model.forward(params, batch, cache)

    decoding = replace(slots, token_B=integers([21, 22]), length_B=integers(lengths), active_B=jnp.ones(2, jnp.bool_))
    batch, _ = make_batch(decoding, 2, no_prefill(), PAGE)
    second_TD, _, _ = model.forward(params, batch, cache)
    hidden_TD = jnp.concatenate([first_TD[: sum(lengths)], second_TD])
    return jax.sharding.reshard(model.logits(params, hidden_TD), P(None, None))


@pytest.fixture(scope="module")
def alone(published) -> np.ndarray:
    return logits_of_two_steps(published, 1)


@pytest.mark.parametrize("tensor", [2, 4, 8])
def test_logits_do_not_depend_on_the_mesh(published, alone, tensor):
    assert np.isfinite(alone).all()
    assert alone.std() > 0.3
    np.testing.assert_allclose(logits_of_two_steps(published, tensor), alone, rtol=0, atol=1e-5)


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
