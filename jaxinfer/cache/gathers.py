"""Which attention copies keys and values out of their pages first, for those who predict its time."""

from __future__ import annotations

from pallas_kernels import dispatch


def gathers(implementation: str, ranks: int = 1) -> tuple[bool, bool]:
    """Whether the attention of the rectangle does, and that of the ragged prefill.

    Args:
        implementation: by its name in `pallas_kernels`. "auto" is what runs on this machine, whatever the input.
        ranks: devices that share every sequence: with several the prefill is XLA's on any machine.
    """
    name = dispatch.automatic()[0] if implementation == "auto" else implementation
    return name != dispatch.KERNEL, ranks > 1 or name not in (dispatch.KERNEL, dispatch.CUDNN)
