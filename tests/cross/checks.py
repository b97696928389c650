"""One family on one mesh, against the same on one device: logits in float32, and greedy text through the engine."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from unittest import mock

import jax.numpy as jnp
import numpy as np

from jaxinfer import checkpoint
from jaxinfer.decode.sampling_params import SamplingParams
from jaxinfer.decode.speculative import Speculation
from jaxinfer.engine import Engine, Options, Request
from jaxinfer.model import Model, read_config
from jaxinfer.parallel import collectives, make_mesh, pipeline
from tests.cross.setups import FAMILIES, METHODS, Sizes, loader
from tests.decode.paged import paged_logits
from tests.engine.fake import run
from tests.engine.tiny import one_rectangle
from tests.model.random_params import random_params

TOLERANCE = 1e-5
NEW = 14  # tokens of each text
# Rows of a chunk of prompts: two blocks of them for each of eight devices that share a sequence.
ROWS, PAGE = 32, 4
RNG = np.random.default_rng(0)
TEXT_T = RNG.integers(0, 72, 53).astype(np.int32)
PROMPTS = [RNG.integers(0, 72, 29).tolist(), [5, 6, 7] * 6 + [5], [9], RNG.integers(0, 72, 17).tolist()]
OPTIONS = Options(
    max_num_seqs=4,
    max_num_batched_tokens=64,
    page_size=PAGE,
    num_pages=99,
    steps_per_dispatch=4,
    always_speculate=True,
)


class RefusedError(Exception):
    """A set-up that is not built, as its error says."""


@contextmanager
def small_steps() -> Iterator[None]:
    """Few rows go the ways of many: a pipe divides them into micro-batches, and devices of the axis `tensor` share
    them. Few programs are compiled."""
    with (
        mock.patch.object(pipeline, "FEW_ROWS", 8),
        mock.patch.object(collectives, "MANY_TOKENS", ROWS),
        one_rectangle(),
    ):
        yield


@cache
def written(root: Path, family: str, layers: int) -> Path:
    """A checkpoint below `root`, in float32, with no norm at one."""
    fields = FAMILIES[family].config(layers)
    model = Model(read_config(fields), make_mesh(1))
    arrays, rng = dict(zip(model.parameters, random_params(model, 4), strict=True)), np.random.default_rng(5)
    for name, array in arrays.items():
        if "scale" in name:
            arrays[name] = jnp.asarray(1 + 0.3 * rng.standard_normal(array.shape).astype(np.float32))
    folder = root / f"{family} {layers}"
    checkpoint.export(folder, model, arrays, {"config.json": json.dumps(fields)}, 1 << 20)
    return folder


@cache
def logits_alone(folder: Path) -> np.ndarray:
    """Of one device."""
    alone = logits_of(folder, Sizes())
    if not (np.isfinite(alone).all() and alone.std() > 0.3):
        raise AssertionError(f"the logits of one device say nothing: their deviation is {alone.std()}")
    return alone


@cache
def texts_alone(folder: Path) -> list[list[int]]:
    """Of one device, decoded plainly."""
    return texts_of(folder, Sizes(), None)


def logits_of(folder: Path, sizes: Sizes) -> np.ndarray:
    """Of every token of a text that comes in chunks, and at last in single tokens."""
    model = built(folder, sizes)
    arrays = checkpoint.load(folder, model)
    return paged_logits(model, model.params(arrays), TEXT_T, "float32", decoded=3, page_size=PAGE, chunk=ROWS)


def texts_of(folder: Path, sizes: Sizes, method: Speculation | None) -> list[list[int]]:
    """Greedy, of four requests at once."""
    model = built(folder, sizes)
    params = model.params(checkpoint.load(folder, model))
    try:
        if method is not None:
            given = loader(model, folder, sizes)
            method = method.read(given).placed(given)
        engine = Engine(model, params, replace(OPTIONS, speculation=method))
    except ValueError as error:
        raise RefusedError(str(error)) from error
    greedy = SamplingParams(temperature=0.0, max_tokens=NEW, ignore_eos=True)
    for number, prompt in enumerate(PROMPTS):
        engine.add(Request(number, tuple(prompt), greedy, (), 0))
    told: dict = {}
    run(engine, told)
    if method is not None and not engine.counters.drafts:
        raise AssertionError("nothing was proposed")
    return [told[number][0] for number in range(len(PROMPTS))]


def built(folder: Path, sizes: Sizes) -> Model:
    try:
        return sizes.model(folder)
    except ValueError as error:
        raise RefusedError(str(error)) from error


def difference(root: Path, family: str, sizes: Sizes) -> float:
    """The largest of all logits from those of one device.

    Raises:
        RefusedError: the set-up is not built.
        AssertionError: it is more than `TOLERANCE`.
    """
    folder = written(root, family, FAMILIES[family].layers(sizes.pipe))
    found = np.abs(logits_of(folder, sizes) - logits_alone(folder)).max()
    if not found <= TOLERANCE:
        raise AssertionError(f"logits differ by {found:.2g}")
    return float(found)


def same_texts(root: Path, family: str, sizes: Sizes, method: str) -> int:
    """Tokens of the texts, which are those of plain decoding on one device.

    Raises:
        RefusedError: the set-up is not built.
        AssertionError: they are others.
    """
    folder = written(root, family, FAMILIES[family].layers(sizes.pipe))
    found, alone = texts_of(folder, sizes, METHODS[method]), texts_alone(folder)
    if found != alone:
        ours, theirs = next(pair for pair in zip(found, alone, strict=True) if pair[0] != pair[1])
        raise AssertionError(f"a text is {ours}, on one device {theirs}")
    return sum(map(len, found))
