"""Heads learn what comes after the next token, and are read as they are written."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer import SamplingParams, checkpoint
from jaxinfer.decode.speculative import Medusa
from jaxinfer.decode.speculative.medusa import FILE, read_heads
from jaxinfer.engine import Options
from jaxinfer.llm import LLM
from jaxinfer.training import heads as room
from jaxinfer.training.demo import fit, prepare
from jaxinfer.training.heads import DECAY, identities, medusa_loss, train_heads
from jaxinfer.training.train import DenseRows, Recipe

RECIPE = Recipe(steps=60, batch=8, row=1024, learning_rate=1e-2, report=30, weight_decay=0.0)


@pytest.fixture(scope="module")
def target(library_root, tmp_path_factory, sizes):
    """A checkpoint that knows the small library."""
    work = tmp_path_factory.mktemp("target")
    prepare(work, library_root, vocab_size=sizes["vocab_size"])
    fit(work, replace(RECIPE, row=16, steps=80, weight_decay=0.1), sizes | {"num_hidden_layers": 1})
    return work / "checkpoint"


@pytest.fixture(scope="module")
def trained(target, library_root, tmp_path_factory):
    folder = tmp_path_factory.mktemp("heads") / "heads"
    return folder, train_heads(folder, target, RECIPE, heads=2, root=library_root)


def test_heads_learn_what_comes_after_the_next_token(trained):
    folder, right = trained
    log = json.loads((folder / "training_log.json").read_text())
    assert [report["step"] for report in log["reports"]] == [30, 60]
    assert log["reports"][1]["loss"] < 0.7 * log["reports"][0]["loss"]
    assert (log["target"], log["held_out_right"], log["recipe"]["row"]) == ("checkpoint", right, 16)
    assert min(right) > 0.3  # a guess among 300 tokens is right once in 300
    heads = read_heads(checkpoint.tensors(folder, FILE))
    assert [len(head.blocks) for head in heads] == [1, 1]
    assert not any(head.output_VD for head in heads)
    assert json.loads((folder / "config.json").read_text())["medusa_num_heads"] == 2


def test_what_was_trained_proposes(trained, target):
    options = Options(max_num_seqs=1, max_num_batched_tokens=64, page_size=8, num_pages=9, always_speculate=True)
    params, prompts = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True), ["def add", "for name", "print("]
    proposing = LLM(target, options=replace(options, speculation=Medusa(trained[0], 6)))
    texts = [[one.outputs[0].token_ids for one in llm.generate(prompts, params)] for llm in (proposing, LLM(target))]
    assert texts[0] == texts[1]
    counters = proposing.engine.counters
    assert counters.accepted[0] > 0.3 * counters.drafts


def test_the_loss_is_that_of_later_tokens(make_model, random_params):
    """By hand, of heads that are the model's own: what the model says next, held against what stands later."""
    model = make_model()
    taught, tokens_BS = random_params(model), np.random.default_rng(0).integers(0, 300, (2, 9)).astype(np.int32)
    with jax.set_mesh(model.mesh):
        hidden_TD, _, _ = model.forward(taught, DenseRows(jnp.asarray(tokens_BS[:, :-1])), (None,))
        logprobs = np.asarray(jax.nn.log_softmax(model.logits(taught, hidden_TD))).reshape(2, 8, -1)
        found = medusa_loss(model, taught)(identities(model, 3), jnp.asarray(tokens_BS))
    expected = 0.0
    for head in range(3):
        told = [-logprobs[row, at, tokens_BS[row, at + 2 + head]] for row in range(2) for at in range(7 - head)]
        expected += DECAY**head * np.mean(told)
    assert float(found) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"heads": 0}, "heads = 0 must be at least 1"),
        ({"heads": 15}, "row is 16; it must be at least 17 for 15 heads"),
        ({"recipe": replace(RECIPE, batch=10_000)}, "batch is 10000; a stream of .* gives at most"),
    ],
)
def test_a_wrong_argument_is_named_before_anything_is_computed(
    target, library_root, tmp_path, monkeypatch, arguments, message
):
    monkeypatch.setattr(room, "Model", None)
    given = {"recipe": RECIPE} | arguments
    with pytest.raises(ValueError, match=message):
        train_heads(tmp_path / "output", target, root=library_root, **given)
    assert not (tmp_path / "output").exists()
    with pytest.raises(ValueError, match="checkpoint is not empty; it must be absent or an empty folder"):
        train_heads(target, target, root=library_root, **given)
