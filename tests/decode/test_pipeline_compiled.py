"""What a step and a loop compile to in a pipe: layers move nothing large, and stages meet point to point."""

import math
import re
from collections import Counter
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import pytest

from jaxinfer.decode import sampling
from jaxinfer.decode.layout import Layout
from jaxinfer.decode.speculative import PromptLookup, Speculation
from jaxinfer.decode.step import Programs
from jaxinfer.engine.step_input import lay_out
from jaxinfer.model import Model, read_config
from jaxinfer.parallel import make_mesh, pipeline
from tests.decode.test_compiled import CONTEXT, MEETING, ODD, PAGE, SLOTS, TOKENS, moved

LAYERS, STAGES = 4, 2
# Sizes that no other axis has, so that a shape tells what an array is.
FIELDS = ODD | {
    "num_attention_heads": 20, "num_key_value_heads": 4, "num_hidden_layers": LAYERS,
    "layer_types": ["sliding_attention", "full_attention"] * 2, "intermediate_size": 68,
    "hidden_size": 46,
}  # fmt: skip


@dataclass(frozen=True)
class Compiled:
    state: Any
    cache: Any
    weights: list
    executable: jax.stages.Compiled

    @property
    def text(self) -> str:
        return self.executable.as_text()


def compiled(which: str, dtype: str, speculation: Speculation | None = None, num_pages: int = 29) -> Compiled:
    """Of two stages of two devices each, with several micro-batches."""
    model = Model(read_config(FIELDS), make_mesh(tensor=2, pipe=STAGES))
    programs = Programs(model, Layout(SLOTS, PAGE, (num_pages,) * 2, CONTEXT, dtype, speculation=speculation))
    given = ([*model.parameters.values()], *programs.new_state())
    with jax.set_mesh(model.mesh):
        if which == "step":
            step = lay_out([], TOKENS, SLOTS, [])
            lowered = programs._step.lower(*given, step.packed(), **step.sizes)
        else:
            slots_B, drafts = np.arange(SLOTS, dtype=np.int32), 0 if speculation is None else 3
            lowered = programs._loop.lower(*given, slots_B, steps=3, needs=sampling.GREEDY, drafts=drafts)
        return Compiled(given[1], given[2], given[0], lowered.compile())


CASES = [("step", "int8", None), ("loop", "float32", None), ("loop", "float32", PromptLookup(3))]


@pytest.fixture(scope="module", params=CASES, ids=["step", "circulating", "verifying"])
def program(request) -> tuple[tuple, Compiled]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "FEW_ROWS", 16)
        return request.param, compiled(*request.param)


def test_neither_cache_nor_weights_are_moved(program):
    """As one device holds them: those of one layer."""
    _, found = program
    matrices = [leaf for leaf in found.weights if len(leaf.shape) > 1]
    held = [leaf.sharding.shard_shape(leaf.shape) for leaf in (*matrices, *jax.tree.leaves(found.cache))]
    assert moved(found.text, set(map(math.prod, held))) == []


def test_the_cache_is_updated_in_place(program):
    (which, dtype, _), found = program
    leaves = jax.tree.leaves(found.cache)
    assert len(leaves) == (2 if dtype == "float32" else 4) * LAYERS // STAGES
    updated = leaves if which == "step" else [*leaves, *jax.tree.leaves(found.state)]
    assert len(re.findall(r"\{\d+\}: \(\d+, \{\}", found.text.splitlines()[0])) == len(updated)


def test_temporary_memory_does_not_grow_with_the_pool(program):
    (which, *rest), found = program
    if which == "step":  # one of them tells enough
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(pipeline, "FEW_ROWS", 16)
            grown = compiled(which, *rest, num_pages=2900)
        small, large = (each.executable.memory_analysis().temp_size_in_bytes for each in (found, grown))
        assert small == large


def test_stages_meet_point_to_point(program):
    """In the region of the pipe: two sums over the devices of a stage for each of its layers, one send to the next
    stage in a tick, and one of what leaves the last stage to the other. Outside, the embedding of a vocabulary that
    all devices share is summed, and the logits are gathered."""
    (which, *_), found = program
    inside, outside = Counter(), Counter()
    for line in found.text.splitlines():
        if meeting := re.search(MEETING, line):
            region = inside if re.search(r'op_name="[^"]*(psum|ppermute)', line) else outside
            region[meeting[1]] += 1
            if meeting[1] == "all-reduce" and region is inside:
                assert re.search(r"\{'tensor'\}|replica_groups=\{\{0,1\},\{2,3\}\}", line), line
    assert inside == {"all-reduce": 2 * LAYERS // STAGES, "collective-permute": 2}
    assert outside == {"all-reduce": 1} | ({} if which == "step" else {"all-gather": 1})
