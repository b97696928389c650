"""Which attention copies keys and values out of their pages first, for those who predict its time."""

from __future__ import annotations

from pallas_kernels import dispatch


def gathers(implementation: str) -> tuple[bool, bool]:
    """Whether the attention of the rectangle does, and that of the ragged prefill.

    Args:
        implementation: by its name in `pallas_kernels`. "auto" is what runs on this machine, whatever the input.
    """
    name = dispatch.automatic()[0] if implementation == "auto" else implementation
    return name != dispatch.KERNEL, name not in (dispatch.KERNEL, dispatch.CUDNN)
