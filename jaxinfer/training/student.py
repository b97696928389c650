"""A student: a small model that learns to say what a larger one would, so as to draft for it (Zhou et al. 2023,
"DistillSpec: Improving Speculative Decoding via Knowledge Distillation", arXiv 2310.08461).

It reads the demo model's text, cut and ordered as there, and has the teacher's vocabulary and tokenizer.
"""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import tokenizers

from jaxinfer import checkpoint
from jaxinfer.model import Model, ModelConfig, Params, read_config
from jaxinfer.parallel import make_mesh
from jaxinfer.training.data import end_of_text, read_library, tokenize_library
from jaxinfer.training.demo import (
    TOKENIZER_FILES,
    check_output,
    hf_config,
    print_report,
    training_log,
    write_checkpoint,
)  # fmt: skip
from jaxinfer.training.distill import Head, Kind, distillation_loss
from jaxinfer.training.generated import check_text, generate_stream
from jaxinfer.training.train import DenseRows, Loss, Recipe, Report, check_attention, next_token, train

# A divergence from the teacher, or the text alone: the same draft without distillation.
Objective = Literal["cross-entropy", Kind]
HEAD_SIZE = 64
CHUNK = 1024  # tokens of vocabulary whose logits exist at a time


def train_student(
    output: Path, teacher: Path, kind: Objective, recipe: Recipe, *, layers: int = 3, width: int = 320,
    generated: int = 0, root: Path | None = None,
) -> list[Report]:  # fmt: skip
    """Trains a student on one device and writes it to `output`, in bfloat16 and Hugging Face layout.

    By default it has 4.4 million parameters, 9 MB, for a vocabulary of 4,096.

    Args:
      output: absent or an empty folder.
      teacher: folder of a checkpoint whose tokenizer has the token that ends a document of our text.
      kind: what is made smaller, "cross-entropy" or a kind of `distillation_loss`, in nats a token.
      recipe: whose row is cut to the teacher's context.
      layers, width: of the student; the width is a multiple of the head size, 64.
      generated: tokens that the teacher writes, for the student to read in the place of the library; 0 for none.
      root: the standard library, by default the interpreter's.

    Raises:
      ValueError: an argument is out of range, or the teacher cannot be one; before anything is computed.
    """
    check_output(output)
    if kind not in get_args(Objective):
        raise ValueError(f"kind = {kind!r} must be one of {', '.join(get_args(Objective))}")
    theirs = read_config(teacher)
    check_attention(f"the teacher {teacher}", theirs)
    tokenizer = teacher_tokenizer(teacher)
    config = hf_config(student_sizes(theirs, layers, width), end_of_text(tokenizer))
    data = tokenize_library(read_library(root), tokenizer)
    recipe = recipe.within(theirs.context)
    check_text(data.train_T, generated, recipe)

    student = Model(read_config(config), make_mesh(devices=jax.devices()[:1]), dtype="float32")
    loss = next_token(student)
    if generated or kind != "cross-entropy":
        model = Model(theirs, student.mesh)
        taught = model.params(checkpoint.load(teacher, model))
        loss = loss if kind == "cross-entropy" else distilled(student, model, taught, kind)
        if generated:
            data = replace(data, train_T=generate_stream(model, taught, data.train_T, generated, recipe.seed))
    params, reports = train(student, student.random_params(recipe.seed), data, recipe, print_report, loss)
    log = training_log(params, recipe, reports, teacher=teacher.name, kind=kind, generated=generated)
    if output.exists():
        output.rmdir()  # empty: the checkpoint takes its place when it is whole
    write_checkpoint(output, student, params, config, teacher, **{"training_log.json": log})
    return reports


def teacher_tokenizer(teacher: Path) -> tokenizers.Tokenizer:
    """That of a checkpoint; a ValueError where it has none."""
    if missing := [name for name in TOKENIZER_FILES if not (teacher / name).is_file()]:
        raise ValueError(f"teacher = {str(teacher)!r} has no {' and no '.join(missing)}, which the student shares")
    return tokenizers.Tokenizer.from_file(str(teacher / TOKENIZER_FILES[0]))


def student_sizes(teacher: ModelConfig, layers: int, width: int) -> dict[str, int]:
    """The sizes of a student, for `hf_config`: one KV head, and an MLP of 8/3 of the width.

    Raises:
      ValueError: `layers` is below 1, or `width` is no multiple of the head size.
    """
    if layers < 1:
        raise ValueError(f"layers = {layers} must be at least 1")
    if width < 1 or width % HEAD_SIZE:
        raise ValueError(f"width = {width} must be a positive multiple of {HEAD_SIZE}, the size of a head")
    return {
        "vocab_size": teacher.vocab_size,
        "hidden_size": width,
        "intermediate_size": HEAD_SIZE * round(8 * width / (3 * HEAD_SIZE)),
        "num_hidden_layers": layers,
        "num_attention_heads": width // HEAD_SIZE,
        "num_key_value_heads": 1,
        "head_dim": HEAD_SIZE,
        "max_position_embeddings": teacher.context,
    }


def distilled(student: Model, teacher: Model, taught: Params, kind: Kind, chunk: int = CHUNK) -> Loss:
    """The mean over positions of a divergence from the teacher, whose parameters `taught` are."""
    return Loss(partial(_distilled, student, teacher, kind, chunk), taught)


def _distilled(
    student: Model, teacher: Model, kind: Kind, chunk: int, taught: Params, params: Params, tokens_BS: jax.Array
) -> jax.Array:
    rows = DenseRows(tokens_BS[:, :-1])
    weights_T = jnp.full(rows.tokens_BS.size, 1 / rows.tokens_BS.size, jnp.float32)
    heads = _head(student, params, rows), _head(teacher, taught, rows)
    return distillation_loss(*heads, weights_T, kind, chunk=chunk)


def _head(model: Model, params: Params, rows: DenseRows) -> Head:
    hidden_TD, _, _ = model.forward(params, rows, (None,) * model.config.num_layers)
    return model.head(params, hidden_TD)
