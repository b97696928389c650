"""What the engine asks of constraints, without a device."""

from copy import copy
from types import SimpleNamespace

import numpy as np
import pytest

from jaxinfer.decode.masks import allows, no_masks
from jaxinfer.engine.constraints import Constraints
from tests.engine.fake import VOCABULARY, Chain, first_allowed

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
    words_WU, failed = Constraints(None).masks([*rows, *others], VOCABULARY, *given)
    assert not failed
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


class Panic(BaseException):
    """What compiled code may raise: no Exception."""


class Broken(Chain):
    """One whose `method` raises when it has taken `after` tokens."""

    def __init__(self, method: str, error: BaseException, after: int = 0):
        super().__init__()
        self.method, self.error, self.left = method, error, after

    def fail(self, method: str) -> None:
        if method == self.method and self.left <= 0:
            raise self.error

    def mask(self):
        self.fail("mask")
        return super().mask()

    def accept(self, token):
        self.fail("accept")
        self.left -= 1
        super().accept(token)

    def copy(self):
        self.fail("copy")
        return copy(self)


@pytest.mark.parametrize("error", [ZeroDivisionError("planted"), Panic("planted")])
@pytest.mark.parametrize(("method", "after"), [("mask", 0), ("mask", 1), ("accept", 0), ("copy", 0)])
def test_a_constraint_that_raises_costs_nobody_else_a_mask(error, method, after):
    """At its first mask, or at one after a proposed token."""
    ((free_U,), drafts_Bk) = no_masks(1, VOCABULARY), np.zeros((20, 2), np.int32)
    for row in range(20):
        drafts_Bk[row, 0] = first_allowed(0, Chain(seen=row if row != 11 else 0).mask())
    parents_Bk = np.broadcast_to(np.array([-1, 0], np.int32), drafts_Bk.shape)
    rows = [(row, drawing(Chain(seen=row))) for row in range(20)]
    given = VOCABULARY, drafts_Bk, parents_Bk
    expected_WU, _ = Constraints(None).masks(rows, *given)
    rows[11] = 11, drawing(Broken(method, error, after))
    words_WU, failed = Constraints(None).masks(rows, *given)
    assert failed == [(rows[11][1], error)]
    for row, (words_QU, expected_QU) in enumerate(
        zip(words_WU.reshape(20, 3, -1), expected_WU.reshape(20, 3, -1), strict=True)
    ):
        np.testing.assert_array_equal(words_QU, [free_U] * 3 if row == 11 else expected_QU)
