"""`all_reduce` for Hopper, in one shot: every device writes its partial sums to all others, and adds up what it got.

A block has one row, a token's, and deals with the same block of the other devices alone: it puts its row into their
inboxes, counts a message in at each, waits until a message of each is there, and adds up. Devices are not in step. The
README shows why a device that is a launch ahead overwrites nothing, and why each counter is that of one sender.
"""

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.all_reduce.arguments import Arguments, Reduced
from pallas_kernels.all_reduce.config import MAX_HIDDEN, vector_size
from pallas_kernels.all_reduce.workspace import fresh_workspace
from pallas_kernels.dispatch import Refusal
from pallas_kernels.hopper import WARPGROUP

SECONDS = 30  # that a block waits for a message; then it ends the program, since one that never comes would hang it
# Waits for a count above zero and takes one off. What the sender wrote before its signal is then seen. The counter has
# one taker, this thread: nobody takes the count between its being seen and taken.
WAIT = f"""{{
    .reg .pred there, late; .reg .b32 count; .reg .b64 start, now;
    mov.u64 start, %globaltimer;
  AGAIN:
    ld.acquire.sys.global.u32 count, [$0];
    setp.ne.u32 there, count, 0;
    @there bra TAKE;
    mov.u64 now, %globaltimer;
    sub.u64 now, now, start;
    setp.gt.u64 late, now, {SECONDS * 10**9};
    @late trap;
    bra AGAIN;
  TAKE:
    red.relaxed.sys.global.add.u32 [$0], 0xffffffff;
}}"""


def unsupported(arguments: Arguments) -> Refusal | str | None:
    """Why the kernel cannot take these arguments; None if it can."""
    partial_TD, workspace = arguments.partial_TD, arguments.workspace
    if arguments.devices == 1:
        return f"the axis {arguments.axis!r} has one device, and no other to send to"
    if jax.process_count() > 1:
        return f"there are {jax.process_count()} processes, and the kernel reaches the memory of its own one's devices"
    if partial_TD.shape[1] % WARPGROUP or partial_TD.shape[1] > MAX_HIDDEN:
        return Refusal("partial.shape", partial_TD.shape, f"D a multiple of {WARPGROUP}, up to {MAX_HIDDEN}")
    if workspace is not None and workspace.rows < partial_TD.shape[0]:
        return Refusal("partial.shape", partial_TD.shape, f"at most {workspace.rows} tokens, the rows of workspace")
    return None


@jax.jit
def all_reduce(arguments: Arguments) -> Reduced:
    """See the public op; `unsupported` says what this one does not take."""
    partial_TD, workspace = arguments.partial_TD, arguments.workspace
    if workspace is None:
        T, D = partial_TD.shape
        workspace = fresh_workspace(arguments.axis, T, D, partial_TD.dtype)
    given = {
        "partial": partial_TD,
        "residual": arguments.residual_TD,
        "scale": arguments.norm_scale_D,
        "inbox": workspace.inbox,
        "counts": workspace.counts,
    }
    operands = {name: array for name, array in given.items() if array is not None}
    results = ["out"] if arguments.norm_scale_D is None else ["out", "normed"]

    def body(*refs: Any) -> None:
        absent = dict.fromkeys((*given, "normed"))
        _reduce_row(arguments, SimpleNamespace(**absent | dict(zip([*operands, *results], refs, strict=True))))

    run = plgpu.kernel(
        body,
        out_type=tuple(jax.ShapeDtypeStruct(partial_TD.shape, partial_TD.dtype) for _ in results),
        grid=partial_TD.shape[:1],
        grid_names=("row",),
        num_threads=1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(skip_device_barrier=not arguments.meets),
        kernel_name="all_reduce",
    )
    out_TD, *normed = run(*operands.values())
    return Reduced(out_TD, normed[0] if normed else None)


def _reduce_row(arguments: Arguments, refs: SimpleNamespace) -> None:
    """What a block does. All loads but those of messages are on their way before it waits."""
    D, devices = arguments.partial_TD.shape[1], arguments.devices
    vector = vector_size(D, arguments.partial_TD.dtype)
    load = partial(plgpu.load, layout=plgpu.Layout.WG_STRIDED((D,), vec_size=vector))
    row, turn = lax.axis_index("row"), refs.counts[lax.axis_index("row"), devices]
    _send(arguments, refs, load(refs.partial.at[row]), turn)
    sum_D = None if refs.residual is None else load(refs.residual.at[row]).astype(jnp.float32)
    scale_D = None if refs.scale is None else load(refs.scale).astype(jnp.float32)

    for peer in _others(arguments):
        _wait(refs.counts.at[row, peer])
    received_D = _total(load, refs.inbox.at[row, turn], devices)
    out_D = (received_D if sum_D is None else sum_D + received_D).astype(refs.out.dtype)
    refs.out[row] = out_D
    if scale_D is not None:
        x_D = out_D.astype(jnp.float32)
        factor = lax.rsqrt(jnp.sum(x_D * x_D) * (1 / D) + arguments.norm_eps)
        refs.normed[row] = (x_D * factor * scale_D).astype(refs.normed.dtype)
    refs.counts[row, devices] = 1 - turn


def _send(arguments: Arguments, refs: SimpleNamespace, mine_D: jax.Array, turn: jax.Array) -> None:
    """Puts the row into every inbox, its own too, so that all devices add the same numbers in the same order."""
    axis, row, me = arguments.axis, lax.axis_index("row"), lax.axis_index(arguments.axis)
    refs.inbox[row, turn, me] = mine_D
    for peer in _others(arguments):
        device: Any = {axis: peer}  # on the other axes of the mesh it is where this one is
        plgpu.remote_ref(refs.inbox, device)[row, turn, me] = mine_D
        _signal(plgpu.remote_ref(refs.counts.at[row, me], device))


def _others(arguments: Arguments) -> list[jax.Array]:
    """The other devices, the next one first: at any time each is sent to by one."""
    me, devices = lax.axis_index(arguments.axis), arguments.devices
    return [lax.rem(me + step, devices) for step in range(1, devices)]


def _total(load: Callable[[Any], jax.Array], messages: Any, devices: int) -> jax.Array:
    """In float32, in the order of the devices."""
    total_D = load(messages.at[0]).astype(jnp.float32)
    for device in range(1, devices):
        total_D += load(messages.at[device]).astype(jnp.float32)
    return total_D


def _signal(counter_ref: Any) -> None:
    """Adds one to a counter of any device; who waits for it sees what this warpgroup has written before."""

    def instruction(_, counter):
        utils.warpgroup_barrier()
        utils.SemaphoreRef(utils.memref_ptr(counter)).signal(1, memory_scope="sys")

    plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))(instruction)(counter_ref)


def _wait(counter_ref: Any) -> None:
    """Takes one off a counter of this device, as soon as there is one."""

    def instruction(_, counter):
        with utils.single_thread(scope=utils.ThreadSubset.WARPGROUP):
            utils.inline_ptx(WAIT, utils.memref_ptr(counter), has_side_effects=True)
        utils.warpgroup_barrier()

    plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))(instruction)(counter_ref)
