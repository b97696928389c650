"""An engine whose layers are divided among the stages of a pipe writes what one device writes."""

from dataclasses import replace
from pathlib import Path

import pytest

from jaxinfer.decode.sampling_params import SamplingParams
from jaxinfer.decode.speculative import DraftModel, PromptLookup
from jaxinfer.llm import LLM
from jaxinfer.parallel import pipeline
from tests.engine.test_speculation import Alternating, answers
from tests.engine.tiny import CONFIG, ONE_LAYER, OPTIONS, assert_clean, drawing_alike, write_checkpoint

FIELDS = CONFIG | {"layer_types": ["full_attention"] * 2}
PROMPTS = ["abcabcabcab", "the cat sat on the mat, and the dog sat on the cat", "x", "0123456789" * 7, "!?", "zz"]
GREEDY = SamplingParams(temperature=0.0, ignore_eos=True)
PARAMS = [replace(GREEDY, max_tokens=count) for count in (21, 9, 14, 5, 12)]
PARAMS.append(SamplingParams(temperature=0.8, seed=5, max_tokens=11, logprobs=3, prompt_logprobs=2))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("alike") / "model", FIELDS)


def written(folder: Path, **parallel) -> tuple[LLM, list]:
    """Six requests in four slots: prompts in chunks, beside which others decode, then loops of all slots."""
    llm = drawing_alike(LLM(folder, **parallel))
    if parallel["options"].speculation is not None:
        llm.engine.gate = llm.engine.scheduler.gate = Alternating(llm.engine.layout)
    told = answers(llm, PROMPTS, PARAMS)
    assert_clean(llm)
    return llm, told


@pytest.mark.parametrize(("method", "dtype", "tensor"), [("lookup", "float32", 2), ("draft", "int8", 1)])
def test_stages_write_what_one_device_writes(one_rectangle, folder, tmp_path, monkeypatch, method, dtype, tensor):
    """Steps that propose and verify, and between them loops of plain steps that go round the pipe; a quantized cache,
    and a draft that every stage has whole."""
    monkeypatch.setattr(pipeline, "FEW_ROWS", 16)
    options = replace(OPTIONS, cache_dtype=dtype)
    _, alone = written(folder, options=options)
    speculation = PromptLookup(3)
    if method == "draft":
        speculation = DraftModel(write_checkpoint(tmp_path / "draft", ONE_LAYER), 3, coupled=True)
    options = replace(options, speculation=speculation)
    llm, told = written(folder, options=options, pipeline_parallel_size=2, tensor_parallel_size=tensor)
    assert told == alone
    counters = llm.engine.counters
    assert counters.drafts > 0
    assert 0 < counters.bubble < 0.5, "half of the time would idle without micro-batches"
