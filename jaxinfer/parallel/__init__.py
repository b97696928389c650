"""Many devices: the mesh, and the helpers in which every collective of the model stands."""

from jaxinfer.parallel.collectives import (
    all_tokens,
    attend,
    column_parallel,
    column_parallel_ring,
    expert_parallel,
    goes_round,
    look_up,
    meeting,
    round_trip,
    row_parallel,
    shares_work,
    whole,
)
from jaxinfer.parallel.context import deal_rows, row_axis, take_rows
from jaxinfer.parallel.exchange import exchange_experts, exchanges_tokens
from jaxinfer.parallel.group import Group
from jaxinfer.parallel.hosts import join, least
from jaxinfer.parallel.mesh import CONTEXT, PIPE, TENSOR, make_mesh

__all__ = [
    "CONTEXT",
    "PIPE",
    "TENSOR",
    "Group",
    "all_tokens",
    "attend",
    "column_parallel",
    "column_parallel_ring",
    "deal_rows",
    "exchange_experts",
    "exchanges_tokens",
    "expert_parallel",
    "goes_round",
    "join",
    "least",
    "look_up",
    "make_mesh",
    "meeting",
    "round_trip",
    "row_axis",
    "row_parallel",
    "shares_work",
    "take_rows",
    "whole",
]
