"""What kernels have of Hopper: its sizes, and instructions that Pallas does not expose.

The interpreter cannot run the instructions. Named barriers: a CUDA block has 16, in which warpgroups meet by one of
them. An mbarrier instead counts every thread's arrival in shared memory (PTX ISA, `bar`).
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import vector

SHARED_BYTES = 227 * 1024  # the most shared memory that a block can have
BUFFER_ALIGNMENT = 1024  # bytes, of every buffer in it, as Mosaic GPU places them
# What both attention kernels take.
HEAD_SIZES = (64, 96, 128, 256)
DTYPES = ("bfloat16", "float16")
QUANTIZED_DTYPES = ("int8", "float8_e4m3fn")  # of pages
WARPGROUP = 128  # threads
FIRST_BARRIER = 5  # 0 is the block's own, 1 to 4 are those that Mosaic GPU gives to warpgroups
BARRIERS = 16


def buffer_bytes(shape: Sequence[int], dtype: Any) -> int:
    """Of the shared memory that a buffer takes."""
    return math.ceil(math.prod(shape) * jnp.dtype(dtype).itemsize / BUFFER_ALIGNMENT) * BUFFER_ALIGNMENT


def arrive(barrier: int | jax.Array, threads: int) -> None:
    """Counts this warpgroup in and goes on; the barrier opens when `threads` are there."""
    _at_barrier("arrive", barrier, threads)


def wait(barrier: int | jax.Array, threads: int) -> None:
    """Counts this warpgroup in and waits until `threads` are there."""
    _at_barrier("sync", barrier, threads)


def _at_barrier(operation: str, barrier: int | jax.Array, threads: int) -> None:
    def instruction(_, number):
        utils.inline_ptx(f"bar.{operation} $0, {threads};", number.registers.item(), convergent=True)

    plgpu.inline_mgpu(arg_types=(plgpu.Layout.WG_SPLAT,))(instruction)(barrier)


def complete(x: jax.Array, layout: Any = plgpu.Layout.WG_SPLAT) -> None:
    """What stands before this in the program, what makes `x` above all, stays before what stands after it.

    The assembler moves a wait for wgmma up past arithmetic that does not need its results, and the two no longer
    overlap; and it moves the arrival at a barrier down. It moves nothing over a branch: here is one that depends on
    `x`, of 32 bits, and is never taken.
    """

    def instruction(_, x):
        registers = [word for register in x.registers.flat for word in _words(register)]
        mix = "".join(f"xor.b32 x, x, ${i}; " for i in range(1, len(registers)))
        never = "setp.eq.u32 p, x, 0x7fc17fc1; @p nanosleep.u32 0;"  # and if it ever is, it does nothing
        utils.inline_ptx(f"{{ .reg .b32 x; .reg .pred p; mov.b32 x, $0; {mix}{never} }}", *registers)

    plgpu.inline_mgpu(arg_types=(layout,))(instruction)(x)


def _words(register: ir.Value) -> list[ir.Value]:
    """A register of Mosaic GPU, which may be a vector, as registers of 32 bits."""
    i32 = ir.IntegerType.get_signless(32)
    if not isinstance(register.type, ir.VectorType):
        return [utils.bitcast(register, i32)]
    (length,) = register.type.shape
    return [utils.bitcast(vector.extract(register, [], [i]), i32) for i in range(length)]


def store_in_rows(x: jax.Array, ref: Any, layout: Any = plgpu.Layout.WGMMA) -> None:
    """Writes to shared memory in plain rows: what is not said to be in tiles may still be, as Mosaic GPU likes.

    Threads of a warp may meet in a bank of it.
    """

    def instruction(_, x, ref):
        x.store_untiled(ref, optimized=False)

    plgpu.inline_mgpu(arg_types=(layout, plgpu.RefType()))(instruction)(x, ref)


def signal(counter_ref: Any) -> None:
    """Adds one to a counter in device memory; who waits for it sees what this warpgroup has written before."""

    def instruction(_, counter):
        utils.warpgroup_barrier()
        utils.SemaphoreRef(utils.memref_ptr(counter)).signal(1, memory_scope="gpu")

    plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))(instruction)(counter_ref)


def wait_for(counter_ref: Any, count: int | jax.Array, *, take: bool = True) -> None:
    """Waits until a counter that began at zero has had `count` signals.

    Takes them off again, so that the next launch finds a zero; without `take`, others may wait for them too.
    """

    def instruction(_, counter, count):
        semaphore = utils.SemaphoreRef(utils.memref_ptr(counter))
        semaphore.wait(count.registers.item(), decrement=take, memory_scope="gpu")

    plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.Layout.WG_SPLAT))(instruction)(counter_ref, count)


def take_number(counter_ref: Any, last: int | jax.Array, target_ref: Any) -> None:
    """Puts the next number of a counter in device memory into shared memory, as a float32 that this warpgroup sees.

    The numbers that all who ask are given, each once, are 0, 1, ..., last, 0, 1, ...
    """

    def instruction(_, counter, last, target):
        take = (
            "{ .reg .b32 number; .reg .f32 x; @$3 atom.global.inc.u32 number, [$0], $1; "
            "@$3 cvt.rn.f32.u32 x, number; @$3 st.shared.f32 [$2], x; }"
        )
        pointers = [utils.memref_ptr(ref) for ref in (counter, target)]
        one = utils.single_thread_predicate(utils.ThreadSubset.WARPGROUP)
        utils.inline_ptx(take, pointers[0], last.registers.item(), pointers[1], one, has_side_effects=True)
        utils.warpgroup_barrier()

    types = plgpu.RefType(), plgpu.Layout.WG_SPLAT, plgpu.RefType()
    plgpu.inline_mgpu(arg_types=types)(instruction)(counter_ref, last, target_ref)


def meet(counter_ref: Any, blocks: int) -> None:
    """Waits until `blocks` blocks, all of the launch, are here; each then sees what the others have written before.

    They must all be on the card at once. `counter_ref` is a zero in device memory, which stays at `blocks`.
    """
    _fence_copies()
    signal(counter_ref)
    wait_for(counter_ref, blocks, take=False)
    _fence_copies()


def _fence_copies() -> None:
    """Orders what TMA copied and what instructions read and write."""

    def instruction(_):
        utils.inline_ptx("fence.proxy.async.global;", has_side_effects=True)

    plgpu.inline_mgpu()(instruction)()
