"""The draft and the heads that ship with the demo model."""

import json
import math

import jax
import pytest
from safetensors import safe_open

from benchmarks.record import RESULTS, parts
from benchmarks.speculative.acceptance import RIGHT
from jaxinfer import SamplingParams, checkpoint
from jaxinfer.checkpoint import huggingface
from jaxinfer.decode.speculative import DraftModel, Eagle, EarlyExit, Medusa
from jaxinfer.engine import Options, memory
from jaxinfer.llm import DEMO, DRAFT, EAGLE, LLM, MEDUSA
from jaxinfer.model import Model, read_config
from jaxinfer.parallel import make_mesh
from tests.engine.tiny import one_rectangle, tiny_folder
from tests.golden.load import load_demo

NEW, NAMES = 32, ["draft", "medusa", "eagle"]
GREEDY = SamplingParams(temperature=0.0, max_tokens=NEW, ignore_eos=True)


@pytest.mark.parametrize("folder", [DRAFT, MEDUSA, EAGLE], ids=lambda folder: folder.name)
def test_it_is_what_its_log_says(folder):
    log, card = json.loads((folder / "training_log.json").read_text()), (folder / "README.md").read_text()
    (tensors,) = folder.glob("*.safetensors")
    with safe_open(tensors, "numpy") as file:
        counted = sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
    assert log["parameters"] == counted
    last, said = log["reports"][-1], [f"{log['reports'][-1]['step']:,} steps"]
    if folder == DRAFT:
        assert (log["teacher"], log["kind"]) == ("demo", "forward-kl")
        said += [f"{last['loss']:.3f} nats", f"{last['held_out_per_byte']:.3f} nats per byte"]
        assert (DRAFT / "tokenizer.json").read_bytes() == (DEMO / "tokenizer.json").read_bytes()
    else:
        assert log["target"] == "demo"
        said += [", ".join(f"{100 * one:.1f}" for one in log["held_out_right"])]
    assert [words for words in said if words not in card] == []


def test_the_demo_model_is_small():
    shards = [path.stat().st_size for path in DEMO.glob("*.safetensors")]
    assert max(shards) < 15e6
    assert sum(shards) < 24e6


def test_all_that_drafts_is_small():
    assert sum(path.stat().st_size for folder in (DRAFT, MEDUSA, EAGLE) for path in folder.iterdir()) < 15e6


def test_what_was_distilled_is_right_more_often_than_what_learnt_the_text():
    """By 0.1 at the least of the tokens that follow right ones, as it was measured, than the same draft that learnt
    the text until it began to get worse at what it had not read."""
    (found,) = RESULTS.glob("h100*/speculative.json")
    right: dict[str, float] = {}
    for part in parts(json.loads(found.read_text())):
        for record in part["records"]:
            if record["metric"] == RIGHT:
                right.setdefault(record["case"], record["value"])  # the newest comes first
    for temperature in ("0", "1"):
        distilled, alone = (right[f"demo drafted by {name} T={temperature}"] for name in ("draft", "ce"))
        assert distilled - alone >= 10


@pytest.mark.parametrize(("method", "right"), [(DraftModel(), 0.3), (Medusa(), 0.3), (Eagle(), 0.3)], ids=NAMES)
def test_what_it_proposes_is_often_right_and_changes_nothing(method, right):
    """The text is what transformers writes with the model alone."""
    options = Options(max_num_seqs=4, max_num_batched_tokens=128, speculation=method, always_speculate=True)
    llm, golden = LLM(dtype="float32", max_model_len=256, options=options), load_demo()
    with one_rectangle():
        outputs = llm.generate(golden.prompts[:4], GREEDY)
    for output, theirs in zip(outputs, golden.sequences, strict=False):
        assert output.prompt_token_ids + output.outputs[0].token_ids == theirs[: len(output.prompt_token_ids) + NEW]
    assert llm.engine.counters.accepted_by_position[0] > right


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (DraftModel(), r"the tokenizer of .*draft differs from that of .* it must be the same"),
        (
            Medusa(),
            r"head 0 of the demo model's own has a linear\.weight of shape \(384, 384\); for this model, of hidden ",
        ),
        (Eagle(), "384"),
        (EarlyExit(exit_layers=9), "exit_layers = 9 must be fewer than the model's 2 layers"),
    ],
    ids=[*NAMES, "early-exit"],
)
def test_a_method_for_another_model_is_refused_before_any_weights_are_read(
    method, message, tmp_path_factory, monkeypatch
):
    folder = tiny_folder(tmp_path_factory.getbasetemp())
    monkeypatch.setattr(checkpoint, "load", lambda *_: pytest.fail("weights are read"))
    with pytest.raises(ValueError, match=message):
        LLM(folder, options=Options(max_num_seqs=1, speculation=method))


@pytest.mark.parametrize("method", [DraftModel(), Medusa(), Eagle()], ids=NAMES)
def test_weights_without_room_beside_the_model_are_refused_before_any_are_read(method, monkeypatch):
    """By the same check, whatever drafts."""
    model = Model(read_config(DEMO), make_mesh(1))
    room = memory.weight_bytes(model.parameters.values()) + 1000
    monkeypatch.setattr(memory, "memory_of", lambda device: room)
    monkeypatch.setattr(huggingface, "load", lambda *_: pytest.fail("weights are read"))
    monkeypatch.setattr(jax, "device_put", lambda *_: pytest.fail("weights are placed"))
    with pytest.raises(memory.NoRoomError, match=r"those of the draft beside it \d.* there are 0\.02 GB for both"):
        LLM(options=Options(max_num_seqs=1, speculation=method))
