"""The micro-batches of a step write what the step writes, and each of their rows sees what it sees there."""

from typing import Any, cast

import jax
import numpy as np
import pytest

from jaxinfer.cache import View
from jaxinfer.decode.batch import Batch
from jaxinfer.decode.microbatches import divide

ROWS, COLUMNS = 16, 3


class Dividing:
    """A model that divides steps into so many."""

    def __init__(self, count: int):
        self.count, self.parts = count, 0

    def microbatches(self, rows: int, parts: int) -> int:
        self.parts = parts
        return self.count


def step_of(rng, slots: int, queries: int, chunks: list[int]) -> Batch:
    """Slots that decode, some of them idle, then chunks of texts; padding fills the rows."""
    integers = lambda *shape: rng.integers(1, 99, shape).astype(np.int32)  # noqa: E731
    starts_R1, lengths_R = np.zeros(1, np.int32), np.zeros(0, np.int32)
    if chunks:
        decoding = slots * queries
        starts_R1 = np.cumsum([0, decoding, *chunks], dtype=np.int32)
        lengths_R = np.array([0, *(chunk + rng.integers(0, 9) for chunk in chunks)], np.int32)
    lengths_B = integers(slots)
    lengths_B[::3] = 0
    view = View(
        integers(ROWS), integers(slots, COLUMNS), lengths_B, integers(len(lengths_R), COLUMNS), starts_R1, lengths_R,
        queries, integers(slots, queries, 1).astype(np.uint32) if queries > 1 else None,
    )  # fmt: skip
    return Batch(integers(ROWS), integers(ROWS), (view,))


def seen_by_rows(batch: Batch) -> list[tuple]:
    """What each row is, where it is written, and what it sees: of the rectangle or of a prompt, or neither."""
    (view,), rows = batch.views, []
    for row, (token, position) in enumerate(zip(batch.tokens_T, batch.positions_T, strict=True)):
        slot, place = divmod(row, view.queries)
        sight: tuple = ()
        if slot < len(view.decode_lengths_B) and view.decode_lengths_B[slot]:
            mask = () if view.tree_mask_BQW is None else tuple(view.tree_mask_BQW[slot, place].tolist())
            sight = (int(view.decode_lengths_B[slot]), place, *view.decode_tables_BJ[slot].tolist(), *mask)
        for chunk, length in enumerate(view.prefill_lengths_R):
            start, end = view.prefill_starts_R1[chunk : chunk + 2]
            if start <= row < end and length:
                sight += (int(length - (end - row) + 1), *view.prefill_tables_RJ[chunk].tolist())
        rows.append((int(token), int(position), int(view.write_T[row]), sight))
    return rows


@pytest.mark.parametrize(("slots", "queries", "chunks"), [
    (16, 1, []), (4, 4, []), (4, 1, [5, 1, 3]), (4, 1, []), (8, 1, [2, 6]), (0, 1, [9, 7]), (16, 1, [0, 0]),
])  # fmt: skip
@pytest.mark.parametrize("count", [1, 2, 4])
def test_rows_see_the_same(slots, queries, chunks, count):
    if not chunks and slots * queries < ROWS:
        chunks = [0]
    batch, model = step_of(np.random.default_rng(count), slots, queries, chunks), Dividing(count)
    divided = jax.tree.map(np.asarray, divide(batch, lambda part: part, cast(Any, model)))
    parts = [jax.tree.map(lambda leaf, at=at: leaf[at], divided) for at in range(count + 1)]
    assert model.parts == (ROWS if chunks else slots)
    assert [row for part in parts[:-1] for row in seen_by_rows(part)] == seen_by_rows(batch)
    assert not any(leaf.any() for leaf in jax.tree.leaves(parts[-1])), "an idle one writes to the null page alone"
