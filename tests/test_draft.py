"""The draft that ships with the demo model."""

import json
import math

import pytest
from safetensors import safe_open

from jaxinfer import SamplingParams
from jaxinfer.decode.speculative import DraftModel
from jaxinfer.engine import Options
from jaxinfer.llm import DEMO, DRAFT, LLM
from tests.engine.tiny import tiny_folder
from tests.golden.load import load_demo

NEW = 32
GREEDY = SamplingParams(temperature=0.0, max_tokens=NEW, ignore_eos=True)


def test_it_is_what_its_log_says():
    log = json.loads((DRAFT / "training_log.json").read_text())
    with safe_open(DRAFT / "model.safetensors", "numpy") as file:
        counted = sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
    assert log["parameters"] == counted
    assert (log["teacher"], log["kind"]) == ("demo", "forward-kl")
    card = (DRAFT / "README.md").read_text()
    last = log["reports"][-1]
    for said in (
        f"{last['loss']:.3f} nats",
        f"{last['held_out_per_byte']:.3f} nats per byte",
        f"{last['step']:,} steps",
    ):
        assert said in card
    assert (DRAFT / "tokenizer.json").read_bytes() == (DEMO / "tokenizer.json").read_bytes()
    assert sum(path.stat().st_size for path in DRAFT.iterdir()) < 4e6


def test_what_it_proposes_is_often_right_and_changes_nothing():
    """The text is what transformers writes with the model alone."""
    options = Options(max_num_seqs=4, speculation=DraftModel(), always_speculate=True)
    llm, golden = LLM(dtype="float32", max_model_len=256, options=options), load_demo()
    for output, theirs in zip(llm.generate(golden.prompts[:4], GREEDY), golden.sequences, strict=False):
        assert output.prompt_token_ids + output.outputs[0].token_ids == theirs[: len(output.prompt_token_ids) + NEW]
    assert llm.engine.counters.accepted_by_position[0] > 0.3


def test_it_drafts_for_no_other_model(tmp_path_factory):
    folder = tiny_folder(tmp_path_factory.getbasetemp())
    with pytest.raises(ValueError, match=r"the tokenizer of .*draft differs from that of .* it must be the same"):
        LLM(folder, options=Options(max_num_seqs=1, speculation=DraftModel()))
