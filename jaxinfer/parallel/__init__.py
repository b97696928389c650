"""Many devices: the mesh, and the helpers in which every collective of the model stands."""

from jaxinfer.parallel.collectives import attend, column_parallel, expert_parallel, row_parallel, whole
from jaxinfer.parallel.context import row_axis, spread, take_rows
from jaxinfer.parallel.mesh import CONTEXT, PIPE, TENSOR, make_mesh

__all__ = [
    "CONTEXT", "PIPE", "TENSOR", "attend", "column_parallel", "expert_parallel", "make_mesh", "row_axis",
    "row_parallel", "spread", "take_rows", "whole",
]  # fmt: skip
