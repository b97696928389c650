"""The same logits where devices share sequences: of prompts in chunks, beside what decodes, and of drafted tokens."""

from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jaxinfer.cache import make_cache
from jaxinfer.decode.batch import StepInput, make_batch, make_drafted
from jaxinfer.decode.slots import empty_slots
from jaxinfer.model import Model, ModelConfig, read_config
from jaxinfer.parallel import CONTEXT, make_mesh, take_rows
from tests.model.random_params import random_params
from tests.model.test_mesh import GPT_OSS, OLMO2, SHAPE

PAGE, COLUMNS, SLOTS, ROWS = 3, 12, 3, 32
QWEN = SHAPE | {"architectures": ["Qwen3ForCausalLM"], "num_hidden_layers": 1}


def windows() -> ModelConfig:
    """A window that ends within a page on the first layer, norms over all heads at once, KV heads repeated by 2."""
    config = read_config(OLMO2)
    return replace(config, layers=(replace(config.layers[0], window=7), config.layers[1]))


CONFIGS = {"dense": lambda: read_config(QWEN), "mixture": lambda: read_config(GPT_OSS), "window": windows}


@dataclass(frozen=True)
class Step:
    """Slots that decode a token each, and chunks of prompts by their slots: where each begins, and its tokens."""

    decoding: tuple[int, ...] = ()
    chunks: tuple[tuple[int, int, list[int]], ...] = ()


TEXTS = np.random.default_rng(0).integers(1, 64, (SLOTS, 36)).tolist()
STEPS = [
    Step(chunks=((0, 0, TEXTS[0][:14]),)),
    Step(chunks=((0, 14, TEXTS[0][14:20]), (1, 0, TEXTS[1][:2]))),
    Step(decoding=(0, 1)),
    Step(decoding=(1, 0), chunks=((2, 0, TEXTS[2][:26]),)),
    Step(decoding=(0,), chunks=((2, 26, TEXTS[2][26:29]), (1, 3, TEXTS[1][3:4]))),
]
DRAFTED = 4  # tokens of the last step, for each slot


def tables(ranks: int, windows: int) -> tuple[jax.Array, ...]:
    """Page j of a sequence on rank j mod c, in any order there."""
    here = SLOTS * COLUMNS + 1
    table_BJ = np.zeros((SLOTS, COLUMNS), np.int32)
    for rank in range(ranks):
        shape = table_BJ[:, rank::ranks].shape
        own = np.random.default_rng(rank).permutation(here - 1)[: np.prod(shape)]
        table_BJ[:, rank::ranks] = rank * here + 1 + own.reshape(shape)
    return (jnp.asarray(table_BJ),) * windows


def laid_out(step: Step, lengths: np.ndarray) -> StepInput:
    tokens = np.zeros(ROWS, np.int32)
    row, count = len(step.decoding), len(step.chunks)
    starts, slots, ends = np.full(SLOTS + 1, row, np.int32), np.full(SLOTS, SLOTS, np.int32), np.zeros(SLOTS, np.int32)
    for index, (slot, first, chunk) in enumerate(step.chunks):
        tokens[row : row + len(chunk)] = chunk
        row += len(chunk)
        slots[index], ends[index], starts[index + 1 :] = slot, first + len(chunk), row
    decoding = np.array([*step.decoding, *[SLOTS] * (SLOTS - len(step.decoding))], np.int32)
    assert count <= SLOTS
    return StepInput(tokens, decoding, starts, slots, ends, np.ones(SLOTS, np.int32))


@partial(jax.jit, static_argnums=0)
def _step(model: Model, params, cache, slots, packed):
    batch, _ = make_batch(slots, StepInput.unpacked(packed, ROWS, SLOTS), PAGE)
    hidden_TD, _, cache = model.forward(params, batch, cache)
    rows = take_rows(hidden_TD, jnp.arange(ROWS, dtype=jnp.int32))
    return jax.sharding.reshard(model.logits(params, rows), P(None, None)), cache


@partial(jax.jit, static_argnums=0)
def _drafted(model: Model, params, cache, slots, drafts):
    hidden_TD, _, cache = model.forward(params, make_drafted(slots, drafts, PAGE), cache)
    return jax.sharding.reshard(model.logits(params, hidden_TD), P(None, None)), cache


def logits_of_all_steps(config: ModelConfig, mesh: Mesh, cache_dtype: str = "float32") -> list[np.ndarray]:
    """Of every row that counts. The cache holds NaN wherever nothing was written."""
    model, ranks = Model(config, mesh), mesh.shape[CONTEXT]
    params, groups = random_params(model, 4), len(config.windows)
    layers = tuple(config.group(layer) for layer in range(config.num_layers))
    pages = (ranks * (SLOTS * COLUMNS + 1),) * groups
    cache = make_cache(mesh, layers, pages, PAGE, model.kv_slots, config.head_size, cache_dtype)
    if cache_dtype == "float32":
        cache = jax.tree.map(lambda array: jnp.full_like(array, jnp.nan), cache)
    lengths, found = np.zeros(SLOTS, np.int32), []
    idle = replace(
        empty_slots(SLOTS, groups, COLUMNS, config.vocab_size), tables=tables(ranks, groups),
        active_B=np.ones(SLOTS, np.bool_),
    )  # fmt: skip
    with jax.set_mesh(mesh):
        for step in STEPS:
            newest = np.array([text[length] for text, length in zip(TEXTS, lengths, strict=True)], np.int32)
            slots = replace(idle, token_B=newest, length_B=lengths.copy())
            logits_WV, cache = _step(model, params, cache, slots, laid_out(step, lengths).packed())
            lengths[list(step.decoding)] += 1
            for slot, first, chunk in step.chunks:
                lengths[slot] = first + len(chunk)
            rows = len(step.decoding) + sum(len(chunk) for *_, chunk in step.chunks)
            found.append(np.asarray(logits_WV)[:rows])
        texts = [text[length : length + DRAFTED] for text, length in zip(TEXTS, lengths, strict=True)]
        tokens = np.array(texts, np.int32)
        slots = replace(idle, token_B=tokens[:, 0], length_B=lengths, active_B=np.array([True, False, True]))
        logits_WV, cache = _drafted(model, params, cache, slots, tokens[:, 1:])
        found.append(np.asarray(logits_WV).reshape(SLOTS, DRAFTED, -1)[[0, 2]])
    return found


# By kind of model the meshes that cover all sizes and pairs: tensor and context.
COVERING = {"dense": [(1, 4)], "mixture": [(2, 2)], "window": [(1, 2)]}


@pytest.mark.parametrize("kind", CONFIGS)
def test_logits_do_not_depend_on_who_shares_a_sequence(kind):
    config = CONFIGS[kind]()
    alone = logits_of_all_steps(config, make_mesh())
    for tensor, context in COVERING[kind]:
        found = logits_of_all_steps(config, make_mesh(tensor, context=context))
        assert_same(found, alone)


def assert_same(found: list[np.ndarray], alone: list[np.ndarray]) -> None:
    for here, there in zip(found, alone, strict=True):
        assert there.std() > 0.3
        np.testing.assert_allclose(here, there, rtol=0, atol=1e-5)
