"""Greedy decoding with proposals is plain greedy decoding: token for token, in float32, by every method."""

import json
from dataclasses import replace

import numpy as np
import pytest

from benchmarks.speculative.methods import shaped
from jaxinfer.decode.sampling_params import SamplingParams
from jaxinfer.decode.speculative import METHODS
from jaxinfer.engine import Engine, Request
from jaxinfer.model import Model, Params, read_config
from jaxinfer.parallel import make_mesh
from tests.engine.tiny import CONFIG, ONE_LAYER, OPTIONS, one_rectangle
from tests.model.random_params import random_params

PROMPTS, NEW, VOCABULARY = 50, 12, 104
PAGES = 21  # too few for four texts, so short as they are
SIZES = {"lookahead": 7, "medusa": 6, "eagle": 6}  # of trees; chains have 3


def prompts() -> list[tuple[int, ...]]:
    """Of all lengths up to two chunks; every other one repeats itself."""
    rng = np.random.default_rng(0)
    drawn = [rng.integers(0, VOCABULARY, int(rng.integers(1, 70))).tolist() for _ in range(PROMPTS)]
    return [(*(ids[: len(ids) // 3 + 1] * 3 if place % 2 else ids),) for place, ids in enumerate(drawn)]


def written(engine: Engine, together: int) -> list[list[int]]:
    """What follows each prompt, so many of them asked for at once."""
    params = SamplingParams(temperature=0.0, max_tokens=NEW, ignore_eos=True)
    texts: list[list[int]] = [[] for _ in range(PROMPTS)]
    for first in range(0, PROMPTS, together):
        for number, ids in enumerate(prompts()[first : first + together], first):
            engine.add(Request(number, ids, params, (), 0))
        while engine.busy:
            for update in engine.step():
                texts[update.request.id] += update.tokens
    return texts


@pytest.fixture(scope="module")
def model() -> Model:
    config = read_config({**CONFIG, "max_position_embeddings": 128})
    assert (config.vocab_size, config.dtype) == (VOCABULARY, "float32")
    return Model(config, make_mesh(1))


@pytest.fixture(scope="module")
def params(model) -> Params:
    return random_params(model, 0)


@pytest.fixture(scope="module")
def plain(model, params) -> list[list[int]]:
    with one_rectangle():
        texts = written(Engine(model, params, replace(OPTIONS, num_pages=None)), PROMPTS)
    assert len({tuple(text) for text in texts}) > PROMPTS // 2
    return texts


@pytest.mark.parametrize("name", METHODS)
def test_fifty_prompts_alone_and_together(name, model, params, plain, tmp_path, monkeypatch):
    """Together four run at a time, prompts in chunks beside them, from a pool that is too small for all."""
    (tmp_path / "config.json").write_text(json.dumps(ONE_LAYER))
    monkeypatch.setattr(Model, "random_params", lambda model, seed=0: random_params(model, seed))
    (method,) = shaped(name, [SIZES.get(name, 3)], str(tmp_path), model)
    options = replace(OPTIONS, num_pages=PAGES, speculation=method, always_speculate=True)
    with one_rectangle():
        engine = Engine(model, params, options)
        assert written(engine, 1) == plain
        drafts = engine.counters.drafts
        assert written(engine, PROMPTS) == plain
    assert 0 < drafts < engine.counters.drafts
    assert engine.counters.preemptions > 0
