"""What the programs compile to where devices share sequences: exactly the collectives that are meant, and in place."""

import re
from collections import Counter

import jax
import pytest

from jaxinfer.decode.speculative import PromptLookup
from tests.decode.test_compiled import EVEN, FULL, LAYERS, compiled, meetings_of, moved

# What decodes meets once more in a layer than without ranks, where the results of all are merged. With prompts keys
# and values go round in a ring, and queries with what they have found in another; the rows that decode are brought
# together before they are attended to, and once those that have logits.
TENSOR = {"all-reduce": 2 * LAYERS + 1}


@pytest.mark.parametrize(
    ("which", "meetings"),
    [
        ("loop", {"all-gather": LAYERS + 1}),
        ("drafted", {"all-gather": LAYERS}),
        ("step", {"collective-permute": (2 + 3) * LAYERS, "all-reduce": LAYERS + 1, "all-gather": LAYERS}),
    ],
)
def test_devices_meet_where_it_is_meant(which, meetings):
    method = PromptLookup(3) if which == "drafted" else None
    found = meetings_of(compiled(which, EVEN, tensor=2, ranks=2, speculation=method))
    assert found == Counter(TENSOR) + Counter(meetings)


@pytest.mark.parametrize(("which", "dtype"), [("step", "int8"), ("loop", "float32")])
def test_pages_are_written_in_place(which, dtype):
    """Also those that are written while keys go round."""
    found = compiled(which, FULL, ranks=2, cache_dtype=dtype)
    leaves = jax.tree.leaves(found.cache)
    assert moved(found.text, {array.size // 2 for array in leaves}) == []
    given = len(leaves) + (len(jax.tree.leaves(found.state)) if which == "loop" else 0)
    assert len(re.findall(r"\{\d+\}: \(\d+, \{\}", found.text.splitlines()[0])) == given
