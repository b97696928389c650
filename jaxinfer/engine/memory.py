"""How many pages the cache may have."""

from __future__ import annotations

from jaxinfer.cache import page_bytes
from jaxinfer.machine import host_memory
from jaxinfer.model import Model

DEVICE_FRACTION = 0.9  # of a device's memory that weights and cache may take; steps need the rest
HOST_FRACTION = 1 / 8  # of the host's memory that the cache may take where the device is the host


class NoRoomError(ValueError):
    """The weights leave no room for a cache."""


def fitting_pages(model: Model, page_size: int, dtype: str) -> int:
    """Pages of every cache group, the null page included, that fit beside what is on the devices already.

    Raises:
        NoRoomError: not even one page does.
    """
    per_page = model.config.num_layers * page_bytes(
        page_size, model.kv_slots_per_device, model.config.head_size, dtype
    )
    room = min(_room(device) for device in model.mesh.local_devices)
    pages = int(room // per_page)
    if pages < 2:
        raise NoRoomError(
            f"the devices have {room / 1e9:.2f} GB left for the cache, and a page of {page_size} tokens takes "
            f"{per_page / 1e9:.4f} GB; at least 2 must fit"
        )
    return pages


def _room(device) -> float:
    stats = device.memory_stats()
    if stats is None:  # the CPU backend counts nothing
        return HOST_FRACTION * host_memory() / device.client.device_count()
    return DEVICE_FRACTION * stats["bytes_limit"] - stats["bytes_in_use"]
