"""Trees of proposed tokens: several ways in which a text may go on, verified in one step (Miao et al. 2023,
"SpecInfer", arXiv 2305.09781, section 4; Cai et al. 2024, "Medusa", arXiv 2401.10774, section 2.1.2).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer.decode.arguments import is_size

MOST_DRAFTS = 127  # the decode kernel takes 128 queries of a sequence


class Ancestry(NamedTuple):
    """What the trees of a step's slots mean; with a first axis of 1 where all have the same one, on the host.

    A step computes a row for the newest token of a slot, row 0, and one for each proposed token: node n is row n + 1.

    Attributes:
        parent_Bk: int32, the row of the token that each node follows.
        depth_BQ: int32, nodes of each row's path.
        seen_BQQ: bool, whether each row sees each: those on its path.
        rows_BQd: int32, each row's path, filled up with the row itself to the length of the longest.
    """

    parent_Bk: jax.Array | np.ndarray
    depth_BQ: jax.Array | np.ndarray
    seen_BQQ: jax.Array | np.ndarray
    rows_BQd: jax.Array | np.ndarray


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
            if not is_size(parent, -1, node - 1):
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
    def nodes(self) -> int:
        return len(self.parents)

    @cached_property
    def ancestry(self) -> Ancestry:
        parent_k = np.array(self.parents, np.int32) + 1
        return Ancestry(parent_k[None], self.depth_Q[None], self.seen_QQ[None], self.rows_Qd[None])

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


@dataclass(frozen=True)
class GrownTree:
    """Trees that are others for every slot and step (Li et al. 2024, "EAGLE-2", arXiv 2406.16858): a proposal says
    itself which node follows which. Their sizes are the same.

    Attributes:
        nodes: of each, 1..MOST_DRAFTS.
        depth: nodes of the longest path, at most.
    """

    nodes: int
    depth: int
    is_chain = False

    @property
    def beyond(self) -> int:
        """See `Tree`: any node may follow the newest token."""
        return self.nodes - 1

    def ancestry(self, parents_Bk: jax.Array) -> Ancestry:
        """
        Args:
            parents_Bk: int32, as `Tree.parents`.
        """
        row_1Q = jnp.arange(parents_Bk.shape[1] + 1, dtype=jnp.int32)[None]
        above_BQ = jnp.pad(parents_Bk + 1, ((0, 0), (1, 0)))  # the row above each; nothing is above row 0
        up = [jnp.broadcast_to(row_1Q, above_BQ.shape)]  # the row that is so many nodes above each
        for _ in range(self.depth):
            up.append(jnp.take_along_axis(above_BQ, up[-1], axis=1))
        up_BQd = jnp.stack(up, axis=2)
        depth_BQ = (up_BQd > 0).sum(axis=2, dtype=jnp.int32)
        back_BQd = depth_BQ[:, :, None] - jnp.arange(self.depth + 1, dtype=jnp.int32)[None, None]
        return Ancestry(
            parent_Bk=parents_Bk + 1,
            depth_BQ=depth_BQ,
            seen_BQQ=(up_BQd[..., None] == row_1Q[None, None]).any(axis=2),
            rows_BQd=jnp.take_along_axis(up_BQd, jnp.maximum(back_BQd, 0), axis=2),
        )
