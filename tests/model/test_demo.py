"""The embedded demo model: transformers and jaxinfer agree on it, as logits and as text."""

import numpy as np
import pytest
from scipy.special import logsumexp

from jaxinfer.decode.sampling_params import SamplingParams
from jaxinfer.engine import Options
from jaxinfer.llm import LLM
from tests.golden.load import load_demo
from tests.model.dense import run

NEW = 256


@pytest.fixture(scope="module")
def llm():
    """Its loops are optimized a little: their hundreds of steps take longer than their compilation."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("jaxinfer.decode.step.SIDE_BY_SIDE", {"xla_backend_optimization_level": 1})
        return LLM(dtype="float32", max_model_len=288, options=Options(max_num_seqs=32, steps_per_dispatch=32))


@pytest.fixture(scope="module")
def golden():
    return load_demo()


def test_logits(llm, golden):
    longest = max(len(prompt) for prompt in golden.prompts[: len(golden.logits)])
    for index, theirs in enumerate(golden.logits):
        prompt = golden.prompts[index]
        padded = np.pad(np.asarray(prompt, np.int32), (0, longest - len(prompt)))  # one program for all
        ours = run(llm.model, llm.engine.runner.params, padded).logits_TV[: len(prompt)]
        assert np.abs(ours[:, golden.columns] - theirs).max() < 1e-4 * golden.deviation
        assert np.abs(logsumexp(ours, axis=1) - golden.logsumexp[index]).max() < 1e-4 * golden.deviation


def test_greedy_text(llm, golden):
    params = SamplingParams(temperature=0.0, max_tokens=NEW, ignore_eos=True)
    outputs = llm.generate(golden.texts, params)
    assert golden.certain() == [len(sequence) for sequence in golden.sequences]  # no tie that rounding could turn
    for output, prompt, theirs in zip(outputs, golden.prompts, golden.sequences, strict=True):
        assert output.prompt_token_ids == prompt
        assert prompt + output.outputs[0].token_ids == theirs
        assert len(theirs) == len(prompt) + NEW
