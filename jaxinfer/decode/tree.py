"""Trees of proposed tokens: several ways in which a text may go on, verified in one step (Miao et al. 2023,
"SpecInfer", arXiv 2305.09781, section 4; Cai et al. 2024, "Medusa", arXiv 2401.10774, section 2.1.2).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

MOST_DRAFTS = 127  # the decode kernel takes 128 queries of a sequence


@dataclass(frozen=True)
class Tree:
    """The shape of one, the same for every slot and step.

    A step computes a row for the newest token of a slot, row 0, and one for each proposed token: node n is row n + 1.
    The keys of rows are written one after the other; the place of a row in the text is its depth.

    Attributes:
        parents: of each node, another node that comes before it, or -1 for the newest token; 1..MOST_DRAFTS of them.

    Raises:
        ValueError: they are no tree.
    """

    parents: tuple[int, ...]

    def __post_init__(self):
        if not isinstance(self.parents, tuple) or not 1 <= len(self.parents) <= MOST_DRAFTS:
            raise ValueError(f"parents = {self.parents!r} must be a tuple of 1..{MOST_DRAFTS} nodes")
        for node, parent in enumerate(self.parents):
            if not isinstance(parent, int) or isinstance(parent, bool) or not -1 <= parent < node:
                raise ValueError(
                    f"parents[{node}] = {parent!r} must be -1, the newest token, or a node that comes before {node}"
                )

    @cached_property
    def paths(self) -> tuple[tuple[int, ...], ...]:
        """The rows from the newest token to each row, itself included."""
        paths: list[tuple[int, ...]] = [(0,)]
        for node, parent in enumerate(self.parents):
            paths.append((*paths[parent + 1], node + 1))
        return tuple(paths)

    @property
    def is_chain(self) -> bool:
        """Whether each token follows the one before: causal attention serves it, and accepted tokens are in place."""
        return self.parents == tuple(range(-1, len(self.parents) - 1))

    @cached_property
    def depth(self) -> int:
        """Nodes of the longest path."""
        return int(self.depth_Q.max())

    @cached_property
    def beyond(self) -> int:
        """How much farther the key of a node is written than its place in the text, at the most."""
        return int((np.arange(len(self.paths)) - self.depth_Q).max())

    @cached_property
    def depth_Q(self) -> np.ndarray:
        """int32, nodes of each row's path."""
        return np.array([len(path) - 1 for path in self.paths], np.int32)

    @cached_property
    def seen_QQ(self) -> np.ndarray:
        """Bool, whether each row sees each: those on its path."""
        return np.array([[row in path for row in range(len(self.paths))] for path in self.paths])

    @cached_property
    def rows_Qd(self) -> np.ndarray:
        """int32, each row's path, filled up with the row itself to the length of the longest."""
        return np.array([path + path[-1:] * (self.depth + 1 - len(path)) for path in self.paths], np.int32)
