"""The cross tells what agrees from what is refused and what fails."""

import re

import numpy as np
import pytest

from tests.cross import __main__ as command
from tests.cross import checks
from tests.cross.checks import small_steps
from tests.cross.setups import FAMILIES, METHODS, Sizes, meshes

BOTH = Sizes(pipe=2, context=2)  # not built


def test_all_meshes_are_tried_once():
    tried = list(meshes())
    assert len(tried) == len(set(tried)) == 19
    assert {sizes.pipe * sizes.tensor * sizes.context for sizes in tried} == {2, 4, 8}
    assert str(BOTH) == "pipe 2 x context 2"


def test_what_tells_most_comes_first():
    order = command.ordered(list(command.CHECKS), list(FAMILIES))
    assert sorted(order) == sorted((check, family) for check in ("logits", *METHODS) for family in FAMILIES)
    assert {check for check, _ in order[: 2 * len(FAMILIES)]} == {"logits", "plain"}


def test_what_agrees_what_is_refused_and_what_fails(tmp_path, monkeypatch):
    with small_steps():
        (record, worst), failures = command.cross(tmp_path, "qwen3", "logits", [Sizes(tensor=2), BOTH])
        assert (record.case, record.implementation, record.value, record.samples) == ("logits", "qwen3", 1, 2)
        assert worst.value <= checks.TOLERANCE
        (refused,) = failures
        assert re.match(r"pipe 2 x context 2: refused: mesh axis pipe has 2 stages and axis context", refused.reason)

        alone = checks.logits_alone(checks.written(tmp_path, "qwen3", 2))
        monkeypatch.setattr(checks, "logits_of", lambda folder, sizes: alone + np.float32(2e-4))
        (record,), (failed,) = command.cross(tmp_path, "qwen3", "logits", [Sizes(tensor=2)])
    assert record.value == 0
    assert failed.reason == "tensor 2: failed: AssertionError: logits differ by 0.0002"


def test_texts_are_compared_token_for_token(tmp_path, monkeypatch):
    monkeypatch.setattr(checks, "written", lambda root, family, layers: root)
    monkeypatch.setattr(checks, "texts_alone", lambda folder: [[1, 2], [3, 4]])
    monkeypatch.setattr(checks, "texts_of", lambda folder, sizes, method: [[1, 2], [3, 4 + (sizes.tensor > 2)]])
    (record,), (failed,) = command.cross(tmp_path, "qwen3", "lookup", [Sizes(tensor=2), Sizes(tensor=4)])
    assert (record.case, record.value) == ("text by lookup", 1)
    assert failed.reason == "tensor 4: failed: AssertionError: a text is [3, 5], on one device [3, 4]"


def test_a_method_that_is_not_built_for_a_mesh_is_refused(tmp_path):
    folder = checks.written(tmp_path, "llama", 2)
    with small_steps(), pytest.raises(checks.RefusedError, match="Medusa is not built for context_parallel_size = 2"):
        checks.texts_of(folder, Sizes(context=2), METHODS["medusa"])
