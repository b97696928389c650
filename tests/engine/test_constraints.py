"""What the engine asks of constraints, without a device."""

from types import SimpleNamespace

import numpy as np
import pytest

from jaxinfer.decode.masks import allows, no_masks
from jaxinfer.engine.constraints import Constraints
from tests.engine.fake import VOCABULARY, Chain

STOP = 7
CHAIN, TREE = (-1, 0, 1, 2, 3), (-1, 0, -1, 0, 3, 2, 4, 1)


def drawing(constraint: Chain | None, finished: bool = False) -> SimpleNamespace:
    return SimpleNamespace(constraint=constraint, finished=finished, request=SimpleNamespace(stop_ids={STOP}))


@pytest.mark.parametrize("parents", [(), CHAIN, TREE])
def test_each_draw_has_the_mask_of_its_path(parents):
    """As if the constraint had taken the path, and nothing else. Behind a token that may not come, and one that ends
    the output, nothing is barred; and neither is for who has no constraint, or has ended."""
    rng, slots = np.random.default_rng(0), 60
    drafts_Bk = rng.integers(0, VOCABULARY, (slots, len(parents)), np.int32)
    drafts_Bk[rng.random(drafts_Bk.shape) < 0.1] = STOP
    constraints = {row: Chain(seen=row) for row in range(0, slots, 2)}
    others = [(1, drawing(None)), (3, drawing(Chain(seen=3), finished=True))]
    rows = [(row, drawing(constraint)) for row, constraint in constraints.items()]
    given = drafts_Bk, np.broadcast_to(np.array(parents, np.int32), drafts_Bk.shape)
    words_WU = Constraints(None).masks([*rows, *others], VOCABULARY, *given)
    (free_U,) = no_masks(1, VOCABULARY)
    reached = 0
    for row, words_QU in enumerate(words_WU.reshape(slots, 1 + len(parents), -1)):
        known = {-1: Chain(seen=row)} if row in constraints else {}
        for node, words_U in enumerate(words_QU, -1):
            if node >= 0 and parents[node] in known and drafts_Bk[row, node] != STOP:
                before = known[parents[node]]
                if allows(before.mask(), drafts_Bk[row, node]):
                    known[node] = before.copy()
                    known[node].accept(int(drafts_Bk[row, node]))
            np.testing.assert_array_equal(words_U, known[node].mask() if node in known else free_U)
        reached += len(known)
    assert len(constraints) < reached < len(constraints) * (1 + len(parents)) or not parents
    assert all(constraint == Chain(seen=row) for row, constraint in constraints.items())
