"""Ticks of a pipe by program, and what a stage's cache takes."""

import pytest

from jaxinfer.decode.layout import Layout
from jaxinfer.decode.speculative import PromptLookup
from jaxinfer.decode.step import Programs
from jaxinfer.engine.memory import fitting_pages
from jaxinfer.engine.pipe import ticks_of_loop, ticks_of_step
from jaxinfer.model import Model, read_config
from jaxinfer.parallel import make_mesh, pipeline
from tests.engine.tiny import CONFIG

ALIKE = read_config(CONFIG | {"layer_types": ["full_attention"] * 2})


def programs_on(stages: int) -> Programs:
    layout = Layout(8, 8, (9,), 64, "float32", speculation=PromptLookup(3))
    return Programs(Model(ALIKE, make_mesh(pipe=stages)), layout)


def test_ticks_of_programs(monkeypatch):
    """Of steps with prompts (m + p - 1), of plain decode steps n m + p - 1, of those that verify n (m + p - 1)."""
    monkeypatch.setattr(pipeline, "FEW_ROWS", 16)
    piped = programs_on(2)
    assert ticks_of_step(piped, 64) == (4 + 1, 4)
    assert ticks_of_loop(piped, 8, 5, 0) == (5 * 2 + 1, 5 * 2)
    assert ticks_of_loop(piped, 1, 5, 0) == (5 * 2, 5)  # one sequence is in one stage at a time
    assert ticks_of_loop(piped, 8, 5, 3) == (5 * (2 + 1), 5 * 2)  # 32 rows
    alone = programs_on(1)
    assert ticks_of_step(alone, 64) == ticks_of_loop(alone, 8, 5, 0) == (0, 0)


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_a_stage_has_room_for_the_pages_of_its_own_layers(dtype):
    alone, piped = (fitting_pages(Model(ALIKE, make_mesh(pipe=stages)), 16, dtype, (10**12,)) for stages in (1, 2))
    assert piped[0] in (2 * alone[0], 2 * alone[0] + 1)
