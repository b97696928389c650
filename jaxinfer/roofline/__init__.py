"""The limit of the hardware for a model: what a step costs, how long it must take, what fits in memory.

    config = read_config("configs/models/llama-3-8b")
    step = decode_step(config, batch=1, context=1024)
    step.limit(find_hardware("h200"))             # seconds at the least
    step.fraction(find_hardware("h200"), 4.4e-3)  # what a measured step made of the machine

Plain arithmetic: nothing here touches a device or a checkpoint. All costs and sizes are those of one device. Tensor
parallelism is an argument of everything; `make_plan` knows all axes of a `Mesh`, and `propose` finds the best one.
"""

from jaxinfer.roofline.attention import Attended, Attention
from jaxinfer.roofline.cost import Cost, Work
from jaxinfer.roofline.hardware import DATASHEETS, MEASURED, Hardware, find_by_device, find_hardware
from jaxinfer.roofline.memory import (
    MemoryPlan,
    activation_memory,
    most_pages,
    page_bytes,
    plan_memory,
    sequence_bytes,
    weight_memory,
)
from jaxinfer.roofline.mesh import Mesh, Share
from jaxinfer.roofline.mixed import StepTimes
from jaxinfer.roofline.pipeline import Pipeline
from jaxinfer.roofline.plan import Goal, Plan, Proposal, make_plan, propose
from jaxinfer.roofline.precision import Precision
from jaxinfer.roofline.shapes import parameters
from jaxinfer.roofline.speculation import Verification, independent, tokens_per_step, verification
from jaxinfer.roofline.step import compute_bound_batch, decode_step, experts_touched, prefill
from jaxinfer.roofline.workload import workload_limit

__all__ = [
    "DATASHEETS",
    "MEASURED",
    "Attended",
    "Attention",
    "Cost",
    "Goal",
    "Hardware",
    "MemoryPlan",
    "Mesh",
    "Pipeline",
    "Plan",
    "Precision",
    "Proposal",
    "Share",
    "StepTimes",
    "Verification",
    "Work",
    "activation_memory",
    "compute_bound_batch",
    "decode_step",
    "experts_touched",
    "find_by_device",
    "find_hardware",
    "independent",
    "make_plan",
    "most_pages",
    "page_bytes",
    "parameters",
    "plan_memory",
    "prefill",
    "propose",
    "sequence_bytes",
    "tokens_per_step",
    "verification",
    "weight_memory",
    "workload_limit",
]
