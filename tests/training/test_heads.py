"""Heads learn what comes after the next token, or the next features, and are read as they are written."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer import SamplingParams, checkpoint
from jaxinfer.decode.speculative import Eagle, Medusa
from jaxinfer.decode.speculative.medusa import FILE, read_heads
from jaxinfer.engine import Options
from jaxinfer.llm import LLM
from jaxinfer.training import beside
from jaxinfer.training.demo import fit, prepare
from jaxinfer.training.eagle import FEATURE, TOKEN, drafted, eagle_loss, train_eagle
from jaxinfer.training.medusa import DECAY, identities, medusa_loss, train_heads
from jaxinfer.training.train import DenseRows, Recipe
from tests.engine.eagle_heads import by_hand, nearly_right, write_head

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


@pytest.fixture(scope="module")
def trained_eagle(target, library_root, tmp_path_factory):
    folder = tmp_path_factory.mktemp("eagle") / "head"
    return folder, train_eagle(folder, target, RECIPE, passes=2, root=library_root)


def test_a_draft_head_learns_what_the_model_expects(trained_eagle):
    folder, right = trained_eagle
    log = json.loads((folder / "training_log.json").read_text())
    assert [report["step"] for report in log["reports"]] == [30, 60]
    assert log["reports"][1]["loss"] < 0.7 * log["reports"][0]["loss"]
    assert (log["target"], log["held_out_right"], log["recipe"]["row"]) == ("checkpoint", right, 16)
    assert len(right) == 2
    assert min(right) > 0.3  # a guess among 300 tokens is right once in 300


def test_what_was_trained_proposes(trained, trained_eagle, target):
    options = Options(max_num_seqs=1, max_num_batched_tokens=64, page_size=8, num_pages=9, always_speculate=True)
    params, prompts = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True), ["def add", "for name", "print("]

    def texts(llm: LLM) -> list[list[int]]:
        return [one.outputs[0].token_ids for one in llm.generate(prompts, params)]

    plain = texts(LLM(target))
    for method in (Medusa(trained[0], 6), Eagle(trained_eagle[0], 6, 3, 2)):
        proposing = LLM(target, options=replace(options, speculation=method))
        assert texts(proposing) == plain
        counters = proposing.engine.counters
        assert counters.accepted[0] > 0.3 * counters.drafts


def test_the_text_of_a_model_is_what_a_head_reads(target, library_root, tmp_path, monkeypatch):
    read = []
    monkeypatch.setattr(beside, "generate_stream", lambda model, params, *given: np.full(given[1], 7, np.uint16))
    monkeypatch.setattr(
        beside,
        "dispatches",
        lambda optimizer, state, loss, text_T, recipe: read.append(text_T) or [(1, state.params, 0)],
    )
    train_heads(tmp_path / "heads", target, RECIPE, heads=1, generated=5000, root=library_root)
    assert [text_T.tolist() for text_T in read] == [[7] * 5000]
    assert json.loads((tmp_path / "heads" / "training_log.json").read_text())["generated"] == 5000


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


@pytest.fixture(scope="module")
def draft_head(make_model, tmp_path_factory):
    """A model with random weights and a head for it, with its tensors."""
    model, tensors = make_model(), nearly_right(32, rest=0.5)
    folder = write_head(tmp_path_factory.mktemp("head"), tensors, 300)
    head = checkpoint.read_head(folder, model)
    params = checkpoint.head_params(folder, head)
    return model, head, params, tensors


def test_passes_draft_as_the_head_does(draft_head, random_params):
    """By hand: from a text on the head goes on with the features that it expected itself."""
    model, head, params, tensors = draft_head
    taught, tokens_BS = random_params(model), np.random.default_rng(0).integers(0, 300, (2, 9)).astype(np.int32)
    with jax.set_mesh(model.mesh):
        run = jax.jit(drafted, static_argnums=(0, 1, 2))
        features_TD, found = run(head, model, 3, taught, params, tokens_BS)
        embedded_BSD = np.asarray(model.embed(taught, jnp.asarray(tokens_BS.reshape(-1)))).reshape(2, 9, 32)
    features_BSD, *found = (np.asarray(one).reshape(2, 9, 32) for one in (features_TD, *found))
    for row in range(2):
        for place in (0, 2, 5, 8):
            for drafts in range(min(3, place + 1)):
                start = place - drafts  # the last token whose feature before it is the model's
                before = [np.zeros(32, np.float32), *features_BSD[row, :start]]
                for end in range(start, place + 1):
                    expected_TD, _ = by_hand(tensors, embedded_BSD[row, : end + 1], np.stack(before))
                    before.append(expected_TD[-1])
                np.testing.assert_allclose(found[drafts][row, place], before[-1], atol=2e-5)


def test_the_loss_is_of_features_and_of_what_they_mean(draft_head, random_params):
    model, head, params, _ = draft_head
    taught, tokens_BS = random_params(model), np.random.default_rng(0).integers(0, 300, (2, 10)).astype(np.int32)
    with jax.set_mesh(model.mesh):
        own_TD, found = jax.jit(drafted, static_argnums=(0, 1, 2))(head, model, 3, taught, params, tokens_BS[:, :-1])
        nats = float(jax.jit(eagle_loss(head, model, taught, 3))(params, jnp.asarray(tokens_BS)))
        _, head_VD, _ = model.head(taught, own_TD)
    expected = []
    for expected_TD in found:
        apart = np.abs(np.asarray(expected_TD) - np.asarray(own_TD))
        theirs, ours = (np.asarray(jax.nn.log_softmax(one @ head_VD.T)) for one in (own_TD, expected_TD))
        smooth = np.where(apart < 1, 0.5 * apart**2, apart - 0.5).mean()
        expected.append(FEATURE * smooth + TOKEN * (np.exp(theirs) * (theirs - ours)).sum(axis=1).mean())
    assert nats == pytest.approx(np.mean(expected), rel=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"heads": 0}, "heads = 0 must be at least 1"),
        ({"heads": 15}, "row is 16; it must be at least 17 for 15 heads"),
        ({"recipe": replace(RECIPE, batch=10_000)}, "batch is 10000; a stream of .* gives at most"),
        ({"passes": 0}, "passes = 0 must be at least 1"),
        ({"passes": 1, "generated": -1}, "generated = -1 must be at least 0"),
    ],
)
def test_a_wrong_argument_is_named_before_anything_is_computed(
    target, library_root, tmp_path, monkeypatch, arguments, message
):
    monkeypatch.setattr(beside, "Model", None)
    train = train_eagle if "passes" in arguments else train_heads
    with pytest.raises(ValueError, match=message):
        train(tmp_path / "output", target, root=library_root, **{"recipe": RECIPE} | arguments)
    assert not (tmp_path / "output").exists()
    with pytest.raises(ValueError, match="checkpoint is not empty; it must be absent or an empty folder"):
        train(target, target, RECIPE, root=library_root)
