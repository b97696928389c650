"""How large an engine's device state is, and how many pages the cache may have."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from jaxinfer.cache import page_bytes
from jaxinfer.decode.layout import Layout, pools_of
from jaxinfer.decode.speculative import Speculation, beyond_of
from jaxinfer.engine.options import Options
from jaxinfer.machine import device_memory
from jaxinfer.model import Model
from jaxinfer.parallel import least
from jaxinfer.roofline import most_pages

DEVICE_FRACTION = 0.9  # of a device's memory that weights and cache may take; steps need the rest
HOST_FRACTION = 1 / 8  # of the host's memory that the cache may take where the device is the host


class NoRoomError(ValueError):
    """The weights leave no room for a cache, or these none for what is to run beside them."""


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error of the device says so."""
    return "RESOURCE_EXHAUSTED" in str(error) or "out of memory" in str(error).lower()


def make_layout(model: Model, options: Options) -> Layout:
    """The sizes of an engine's device state: as many pages as are asked for, or as every slot could use, if they fit.

    Raises:
        NoRoomError: they do not fit, or not even two pages of each group.
    """
    dtype, windows = options.cache_dtype or model.config.dtype, model.config.windows
    if options.num_pages is not None:
        check_pages(model, options.page_size, dtype, options.num_pages, options.speculation)
        each = (options.num_pages,) * len(windows)
    else:
        ahead = max(options.max_num_batched_tokens, options.most_ahead)
        tokens = model.context + beyond_of(options.speculation)
        longest = [most_pages(tokens, options.page_size, window, ahead) for window in windows]
        wanted = tuple(options.max_num_seqs * -(-pages // model.ranks) + 1 for pages in longest)
        each = fitting_pages(model, options.page_size, dtype, wanted, options.speculation)
    return Layout(
        slots=options.max_num_seqs,
        page_size=options.page_size,
        num_pages=tuple(model.ranks * pages for pages in each),
        max_tokens=model.context,
        cache_dtype=dtype,
        speculation=options.speculation,
        adaptive=options.adaptive_speculation,
        ranks=model.ranks,
    )


def fitting_pages(
    model: Model, page_size: int, dtype: str, wanted: tuple[int, ...], speculation: Speculation | None = None
) -> tuple[int, ...]:
    """Pages of every cache group on each device, the null page included, that fit beside what is there already.

    Groups have equally many, but none has more than is wanted: the others can use what it leaves.

    Args:
        wanted: pages of every group that would be enough.
        speculation: may keep keys and values of its own.

    Raises:
        NoRoomError: not even two pages of each fit.
    """
    sizes = [0] * len(wanted)
    for pool in pools_of(model, speculation):
        sizes[pool.group] += page_bytes(page_size, pool.kv_slots_per_device, pool.head_size, dtype)
    room = least(min(_room(device) for device in model.mesh.local_devices))
    pages = share_room(room, sizes, wanted)
    if min(pages) < 2:
        raise NoRoomError(
            f"the devices have {room / 1e9:.2f} GB left for the cache, and a page of {page_size} tokens takes "
            f"{sum(sizes) / 1e9:.4f} GB; at least 2 must fit"
        )
    return pages


def check_weights(model: Model, beside: Iterable[Any]) -> None:
    """Holds the weights of a model, and those of what drafts beside it if it has any, to what the devices have, before
    any are there.

    Raises:
        NoRoomError: they do not fit.
    """
    ours, theirs = weight_bytes(model.parameters.values()), weight_bytes(beside)
    room = min(_weights_room(device) for device in model.mesh.local_devices)
    if theirs and ours + theirs > room:
        raise NoRoomError(
            f"the weights of the model take {ours / 1e9:.2f} GB of each device and those of the draft beside it "
            f"{theirs / 1e9:.2f} GB; there are {room / 1e9:.2f} GB for both: a smaller draft may fit, or more devices"
        )


def weight_bytes(leaves: Iterable[Any]) -> int:
    """Bytes on each device of weights, by their shapes, dtypes and shardings."""
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)


def check_pages(
    model: Model, page_size: int, dtype: str, num_pages: int, speculation: Speculation | None = None
) -> None:
    """Holds pages that were asked for to what fits.

    Raises:
        NoRoomError: they do not fit.
    """
    groups = len(model.config.windows)
    most = min(fitting_pages(model, page_size, dtype, (num_pages,) * groups, speculation))
    if num_pages > most:
        raise NoRoomError(
            f"num_pages = {num_pages} must be in 2..{most}, which fit beside the weights, {page_size} tokens each"
        )


def share_room(room: float, sizes: list[int], wanted: tuple[int, ...]) -> tuple[int, ...]:
    """Equally many things of every kind, but no more than wanted, that fill the room.

    Args:
        room: bytes.
        sizes: bytes of one thing of each kind.
        wanted: things of each kind that would be enough.
    """
    counts = [0] * len(sizes)
    left = sorted(range(len(sizes)), key=lambda kind: wanted[kind])
    while left:
        equally = int(room // sum(sizes[kind] for kind in left))
        kind = left.pop(0)
        counts[kind] = min(wanted[kind], equally)
        room -= counts[kind] * sizes[kind]
    return tuple(counts)


def memory_of(device) -> int:
    """Bytes that programs can have on a device; its share, where it is the host."""
    stats = device.memory_stats()
    return device_memory(stats) // (device.client.device_count() if stats is None else 1)


def cache_room(memory: float, used: float, platform: str) -> float:
    """Bytes of a device that the cache may take.

    Args:
        memory: all that programs can have there.
        used: by weights and whatever else; of no account where the device is the host, which counts nothing.
    """
    return HOST_FRACTION * memory if platform == "cpu" else DEVICE_FRACTION * memory - used


def _weights_room(device) -> float:
    """Bytes of a device that weights may take; the host, where it is the device, has no part of its own for them."""
    used = (device.memory_stats() or {}).get("bytes_in_use", 0)
    return memory_of(device) * (1 if device.platform == "cpu" else DEVICE_FRACTION) - used


def _room(device) -> float:
    return cache_room(memory_of(device), (device.memory_stats() or {}).get("bytes_in_use", 0), device.platform)
