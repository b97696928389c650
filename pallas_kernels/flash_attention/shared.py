"""What the warpgroups of the prefill kernel share: the problem, its arrays, and the signals between them."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import hopper
from pallas_kernels.blockwise import Options
from pallas_kernels.flash_attention.config import CONSUMERS, ITEM_NUMBERS, Config


@dataclass(frozen=True)
class Problem:
    """What is known when the kernel is traced."""

    query_heads: int
    kv_heads: int
    head_size: int
    page_size: int
    quantized: bool
    options: Options
    config: Config

    # Registers of a thread: the 128 threads of every warpgroup share 65,536.
    @property
    def producer_registers(self) -> int:
        return 56 if self.quantized else 40

    @property
    def consumer_registers(self) -> int:
        return 224 if self.quantized else 232


class Refs(NamedTuple):
    """The arrays in global memory; queries are [T, N * H], keys and values [P * S, K * H]. The output has T rows for
    each part of the keys."""

    q: jax.Ref
    k: jax.Ref
    v: jax.Ref
    k_scales: jax.Ref | None  # [P * K * S]
    v_scales: jax.Ref | None
    table: jax.Ref
    tiles: jax.Ref  # the work list of schedule.py and its length
    tile_count: jax.Ref
    next_item: jax.Ref  # a zero, on which the blocks count the items that are taken; every launch leaves it at zero
    sinks: jax.Ref | None  # in units of log 2
    out: jax.Ref
    lse: jax.Ref  # [N, T for each part]


@dataclass(frozen=True)
class Signal:
    """`senders` warpgroups each say that something is done; one warpgroup waits for all of them."""

    senders: int
    barrier: jax.Ref | int  # an int is the number of a named barrier

    def send(self, slot: int | jax.Array = 0) -> None:
        if isinstance(self.barrier, int):
            hopper.arrive(self.barrier + slot, (self.senders + 1) * hopper.WARPGROUP)
        else:
            plgpu.barrier_arrive(self.barrier.at[slot])

    def wait(self, slot: int | jax.Array = 0) -> None:
        if isinstance(self.barrier, int):
            hopper.wait(self.barrier + slot, (self.senders + 1) * hopper.WARPGROUP)
        else:
            plgpu.barrier_wait(self.barrier.at[slot])


@dataclass(frozen=True)
class Meeting:
    """All consumers wait until each of them is there. None can come twice before another has come once, as it could
    with a signal for each, where one that is slow between its send and its wait would miss the first of two."""

    barrier: Any  # a reference, or the number of a named barrier

    def meet(self) -> None:
        if isinstance(self.barrier, int):
            hopper.wait(self.barrier, CONSUMERS * hopper.WARPGROUP)
        else:
            plgpu.barrier_arrive(self.barrier)
            plgpu.barrier_wait(self.barrier)


@dataclass(frozen=True)
class Items:
    """The numbers of the items that a block works on: first its own, then whichever block is free takes the next.

    The producer takes a number when all that it has to bring for an item is on its way, so that nobody waits for it,
    and leaves it in shared memory for the consumers. When it puts one where another was, it has waited for the queries
    of that item to be free.
    """

    block: jax.Array
    blocks: int
    total: jax.Array
    counter: jax.Ref  # in device memory
    numbers: jax.Ref  # float32, which are exact up to 2^24 items: 16 million tokens of 128 heads
    full: jax.Ref
    dealt: bool  # in turn: the interpreter cannot count

    def take(self, nth: int | jax.Array) -> jax.Array:
        """The number of the block's nth item, above 0; no less than `total` if there is none."""

        def count(slot):
            # As many are taken as there are items, since a block stops at the first that is too large: the counter
            # ends where it began.
            hopper.take_number(self.counter.at[0], self.total - 1, self.numbers.at[slot])
            plgpu.barrier_arrive(self.full.at[slot])

        return self._number(nth, count)

    def read(self, nth: int | jax.Array) -> jax.Array:
        """The same, for a consumer."""
        return self._number(nth, lambda slot: plgpu.barrier_wait(self.full.at[slot]))

    def _number(self, nth: int | jax.Array, prepare: Callable[[jax.Array], None]) -> jax.Array:
        if self.dealt:
            return self.block + nth * self.blocks
        slot = lax.rem(jnp.int32(nth), jnp.int32(ITEM_NUMBERS))
        prepare(slot)
        return self.blocks + self.numbers[slot].astype(jnp.int32)


class Signals(NamedTuple):
    turn: Signal  # to consumer i, in slot i: the tensor cores are yours
    cleaned: Meeting  # my half of the values is without NaN
    q_free: Signal  # to the producer: these queries, keys or values are no longer needed
    k_free: Signal
    v_free: Signal

    @classmethod
    def of(cls, config: Config, smem: dict) -> Signals:
        if config.interpretable:
            barriers = [smem[name] for name in cls._fields]
        else:
            slots = (CONSUMERS, 1, 1, config.stages, config.stages)
            barriers = [hopper.FIRST_BARRIER + sum(slots[:i]) for i in range(len(slots))]
        turn, cleaned, *free = barriers
        return cls(Signal(1, turn), Meeting(cleaned), *(Signal(CONSUMERS, barrier) for barrier in free))

    def of_memory(self, config: Config) -> list[tuple[Signal, int]]:
        """The signals that memory is free, each with the slots it has."""
        return [(self.q_free, 0), *itertools.product((self.k_free, self.v_free), range(config.stages))]
