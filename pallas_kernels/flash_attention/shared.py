"""What the warpgroups of the prefill kernel share: the problem, its arrays, and the signals between them."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import NamedTuple

import jax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import hopper
from pallas_kernels.blockwise import Options
from pallas_kernels.flash_attention.config import CONSUMERS, Config

LOG2E = math.log2(math.e)


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
    """The arrays in global memory; queries and output are [T, N * H], keys and values [P * S, K * H]."""

    q: jax.Ref
    k: jax.Ref
    v: jax.Ref
    k_scales: jax.Ref | None  # [R, K, J * S]
    v_scales: jax.Ref | None
    table: jax.Ref
    tiles: jax.Ref  # the work list of schedule.py and its length
    tile_count: jax.Ref
    sinks: jax.Ref | None  # in units of log 2
    out: jax.Ref
    lse: jax.Ref  # [N, T]


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


class Signals(NamedTuple):
    turn: Signal  # to consumer i, in slot i: the tensor cores are yours
    cleaned: Signal  # to consumer i, in slot i: my half of the values is without NaN
    q_free: Signal  # to the producer: these queries, keys or values are no longer needed
    k_free: Signal
    v_free: Signal

    @classmethod
    def of(cls, config: Config, smem: dict) -> Signals:
        senders = (1, 1, CONSUMERS, CONSUMERS, CONSUMERS)
        if config.interpretable:
            return cls(*(Signal(n, smem[name]) for n, name in zip(senders, cls._fields, strict=True)))
        slots = (CONSUMERS, CONSUMERS, 1, config.stages, config.stages)
        first = (hopper.FIRST_BARRIER + sum(slots[:i]) for i in range(len(slots)))
        return cls(*map(Signal, senders, first))

    def of_memory(self, config: Config) -> list[tuple[Signal, int]]:
        """The signals that memory is free, each with the slots it has."""
        return [(self.q_free, 0), *itertools.product((self.k_free, self.v_free), range(config.stages))]
