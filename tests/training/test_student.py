"""A student comes closer to its teacher, is a checkpoint that drafts for it, and is trained without dense logits."""

import json
import math
import re
from dataclasses import replace
from functools import partial
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.speculative.comparing import Shut
from jaxinfer import SamplingParams
from jaxinfer.decode.speculative import DraftModel
from jaxinfer.engine import Options
from jaxinfer.llm import LLM
from jaxinfer.model import Model, read_config
from jaxinfer.training import student
from jaxinfer.training.data import read_library, tokenize_library
from jaxinfer.training.demo import TOKENIZER_FILES, hf_config, prepare
from jaxinfer.training.distill import Kind
from jaxinfer.training.generated import generate_stream
from jaxinfer.training.student import distilled, student_sizes, train_student
from jaxinfer.training.train import Recipe, adamw, compiled_steps, initial_state, next_token

RECIPE = Recipe(steps=80, batch=8, row=1024, learning_rate=1e-2, report=20, weight_decay=0.1)
SMALL = {"layers": 1, "width": 64}


@pytest.fixture(scope="module")
def learnt(compiled_once, library_root, tmp_path_factory, sizes):
    """A folder and its reports: of a student of the text alone, whose teacher has a tokenizer and no weights."""
    root = tmp_path_factory.mktemp("learnt")
    prepare(root / "empty", library_root, vocab_size=sizes["vocab_size"])
    (root / "empty" / "config.json").write_text(json.dumps(hf_config(sizes, 0)))
    reports = train_student(root / "teacher", root / "empty", "cross-entropy", RECIPE, **SMALL, root=library_root)
    return root / "teacher", reports


@pytest.fixture(scope="module")
def teacher(learnt):
    """A checkpoint that knows the small library."""
    return learnt[0]


@pytest.fixture(scope="module")
def taught(teacher, library_root, tmp_path_factory):
    """The folder and the reports of a student of that teacher."""
    folder = tmp_path_factory.mktemp("taught") / "student"
    return folder, train_student(folder, teacher, "forward-kl", RECIPE, **SMALL, root=library_root)


def test_without_distillation_it_learns_the_text_and_no_teacher_is_loaded(learnt):
    _, reports = learnt
    assert reports[1].loss < 0.5 * reports[0].loss


def test_the_divergence_falls(taught):
    folder, reports = taught
    assert [report.step for report in reports] == [20, 40, 60, 80]
    assert 0.0 < reports[-1].loss < 0.8 * reports[0].loss
    log = json.loads((folder / "training_log.json").read_text())
    assert (log["teacher"], log["kind"], log["recipe"]["row"]) == ("teacher", "forward-kl", 16)
    assert log["reports"][-1]["loss"] == reports[-1].loss


def test_a_teacher_writes_what_it_draws_after_beginnings_of_the_library(teacher, library_root):
    llm = LLM(teacher, options=Options(max_num_seqs=4, max_num_batched_tokens=64, page_size=4, num_pages=17))
    library_T = tokenize_library(read_library(library_root), llm.tokenizer.backend).train_T
    params = llm.engine.runner.params
    stream_T = generate_stream(llm.model, params, library_T, tokens=50, seed=3)
    assert stream_T.dtype == library_T.dtype
    pieces, known = stream_T.reshape(4, 16).tolist(), library_T.tolist()
    begun = [piece[:4] for piece in pieces]
    assert all(any(known[at : at + 4] == piece for at in range(len(known))) for piece in begun)
    goes_on = [SamplingParams(max_tokens=12, ignore_eos=True, seed=3 + piece) for piece in range(4)]
    written = [output.outputs[0].token_ids for output in llm.generate(begun, goes_on)]
    assert [piece[4:] for piece in pieces] == [list(ids) for ids in written]
    for wrong, message in ((0, "tokens = 0 must be at least 1"), (1, "library_T has 3 tokens; a piece begins with 4")):
        with pytest.raises(ValueError, match=message):
            generate_stream(llm.model, params, library_T[:3], wrong)


def test_the_text_of_a_teacher_is_what_a_student_reads(teacher, library_root, tmp_path, monkeypatch):
    read = {}
    monkeypatch.setattr(student, "generate_stream", lambda model, params, *given: np.full(given[1], 7, np.uint16))
    monkeypatch.setattr(student, "train", lambda model, params, data, *_: read.update(data=data) or (params, []))
    train_student(tmp_path / "a", teacher, "forward-kl", RECIPE, **SMALL, generated=5000, root=library_root)
    assert read["data"].train_T.tolist() == [7] * 5000
    assert json.loads((tmp_path / "a" / "training_log.json").read_text())["generated"] == 5000
    with pytest.raises(ValueError, match="generated = -1 must be at least 0"):
        train_student(tmp_path / "b", teacher, "forward-kl", RECIPE, **SMALL, generated=-1, root=library_root)


def test_the_student_is_a_model_and_drafts_for_its_teacher(taught, teacher):
    """The teacher is a student too: as a model it writes the text that it writes with the other's proposals."""
    folder, _ = taught
    for name in TOKENIZER_FILES:
        assert (folder / name).read_text() == (teacher / name).read_text()
    options = Options(max_num_seqs=1, max_num_batched_tokens=64, page_size=8, num_pages=5)
    params = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
    llm = LLM(teacher, options=replace(options, speculation=DraftModel(folder, 2), always_speculate=True))
    counters, prompts = llm.engine.counters, ["def add", "for name", "print("]

    def texts():
        return [output.outputs[0].token_ids for output in llm.generate(prompts, params)]

    drafted, drafts = texts(), counters.drafts
    llm.engine.scheduler.gate = Shut(llm.engine.layout)
    assert texts() == drafted
    assert [len(text) for text in drafted] == [8, 8, 8]
    assert counters.drafts == drafts  # none without them
    assert counters.accepted[0] > 0.3 * counters.drafts  # a guess among 300 tokens is right once in 300


def dense_shapes(loss, model, batch, row):
    """Shapes in the step of training, before XLA makes them fewer, that hold logits of all its tokens."""
    recipe = Recipe(steps=2, batch=batch, row=row)
    optimizer, _ = adamw(recipe)
    with jax.set_mesh(model.mesh):
        state = jax.eval_shape(partial(initial_state, optimizer=optimizer), [*model.parameters.values()])
        inputs = jax.ShapeDtypeStruct((200,), jnp.uint16), jax.ShapeDtypeStruct((1, batch), jnp.int32)
        text = compiled_steps(optimizer, row).lower(state, loss, *inputs).as_text()
    shapes = {tuple(map(int, dims.split("x")[:-1])) for dims in re.findall(r"tensor<([\dx]+x)[a-z]+\d+>", text)}
    size = batch * row * model.config.vocab_size
    vocab = model.config.vocab_size
    return {dims for dims in shapes if math.prod(dims) == size or (vocab in dims and math.prod(dims) >= size)}


def test_a_step_of_distillation_holds_no_logits_of_all_tokens(make_model):
    source = make_model()
    config = read_config(hf_config(student_sizes(source.config, **SMALL), 0))
    model = Model(config, source.mesh, dtype="float32")
    for kind in get_args(Kind):
        loss = distilled(model, source, [*source.parameters.values()], kind, chunk=128)
        assert not dense_shapes(loss, model, 16, 16)
    assert dense_shapes(next_token(model), model, 16, 16)  # which the plain loss does


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "kl"}, "kind = 'kl' must be one of cross-entropy, forward-kl"),
        ({"layers": 0}, "layers = 0 must be at least 1"),
        ({"width": 96}, "width = 96 must be a positive multiple of 64"),
        ({"recipe": replace(RECIPE, batch=10_000)}, "batch is 10000; a stream of .* gives at most"),
    ],
)
def test_a_wrong_argument_is_named_before_anything_is_computed(
    teacher, library_root, tmp_path, monkeypatch, arguments, message
):
    monkeypatch.setattr(student, "Model", None)
    given = {"kind": "forward-kl", "recipe": RECIPE} | SMALL | arguments
    with pytest.raises(ValueError, match=message):
        train_student(tmp_path / "output", teacher, root=library_root, **given)
    assert not (tmp_path / "output").exists()
    with pytest.raises(ValueError, match="teacher is not empty; it must be absent or an empty folder"):
        train_student(teacher, teacher, root=library_root, **given)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, r"has no tokenizer\.json and no tokenizer_config\.json, which the student shares"),
        ({"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 8}, r"windows \(8,\)"),
    ],
)
def test_what_cannot_teach_is_refused(teacher, tmp_path, fields, message):
    config = json.loads((teacher / "config.json").read_text()) | fields
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        train_student(tmp_path / "output", tmp_path, "forward-kl", RECIPE)
