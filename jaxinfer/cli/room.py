"""What a model and its cache take of a device's memory, told where that was too much."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from jaxinfer.cli.units import si
from jaxinfer.roofline import Precision, find_by_device, find_hardware, plan_memory

if TYPE_CHECKING:
    from jaxinfer.serve.messages import Setup


def memory_lines(setup: Setup, device: tuple[str, str, int]) -> Iterator[str]:
    """The plan: weights, cache, and what would fit.

    Args:
        device: its kind, its platform, and bytes of its memory.
    """
    from jaxinfer import checkpoint
    from jaxinfer.engine.memory import DEVICE_FRACTION, HOST_FRACTION, cache_room
    from jaxinfer.llm import DEMO
    from jaxinfer.model import read_config

    kind, platform, memory = device
    config = read_config(checkpoint.resolve(DEMO if setup.model is None else setup.model))
    context, sequences = setup.llm["max_model_len"] or config.context, setup.options["max_num_seqs"]
    dtype = setup.llm["dtype"] or config.dtype
    page_size, tensor = setup.options["page_size"], setup.llm["tensor_parallel_size"]
    ranks = setup.llm["context_parallel_size"]
    hardware = replace(find_by_device(kind) or find_hardware("h200"), memory=memory)  # of which memory alone counts
    plan = plan_memory(
        config, hardware, sequences, context, Precision.all_in(dtype, setup.options["cache_dtype"]),
        tensor, page_size, setup.options["max_num_batched_tokens"], DEVICE_FRACTION,
        pipeline_parallel=setup.llm["pipeline_parallel_size"], context_parallel=ranks,
    )  # fmt: skip
    room = max(0, cache_room(memory, plan.weights + plan.activations, platform))
    at_most = f"{HOST_FRACTION:.1%} for the cache" if platform == "cpu" else f"{DEVICE_FRACTION:.0%} for all of these"
    yield f"  memory of {kind}: {si(memory, 'B')}, at most {at_most}"
    yield f"  weights: {si(plan.weights, 'B')}; activations: {si(plan.activations, 'B')}"
    if (pages := setup.options["num_pages"]) is not None:
        tokens = pages * page_size * ranks
        yield f"  cache: {pages:,} pages of {page_size} tokens take {si(tokens * plan.per_token, 'B')}"
    else:
        yield f"  cache: {sequences} x {context:,} tokens take {si(sequences * plan.per_sequence, 'B')}"
    yield f"  left for the cache: {si(room, 'B')}"
    tokens = int(room // plan.per_token)
    if tokens < page_size:
        more = "use more devices (--tensor-parallel-size, --pipeline-parallel-size) or a smaller --dtype"
        yield f"  would fit: no cache at all; {more}"
        return
    yield f"  would fit: {tokens:,} tokens, which are {tokens // page_size // ranks:,} pages (--num-pages), or"
    yield f"  {tokens // context:,} sequences (--max-num-seqs) of {context:,} tokens (--max-model-len)"
