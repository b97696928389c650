"""Many devices: the mesh, and the helpers in which every collective of the model stands."""

from jaxinfer.parallel.collectives import attend, column_parallel, expert_parallel, row_parallel, whole
from jaxinfer.parallel.group import Group
from jaxinfer.parallel.hosts import join, least
from jaxinfer.parallel.mesh import PIPE, TENSOR, make_mesh

__all__ = [
    "PIPE", "TENSOR", "Group", "attend", "column_parallel", "expert_parallel", "join", "least", "make_mesh",
    "row_parallel", "whole",
]  # fmt: skip
