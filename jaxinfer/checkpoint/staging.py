"""Writes a folder all or nothing."""

from __future__ import annotations

import errno
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_ATTEMPTS, _PAUSE = 50, 0.1  # seconds between removals


@contextmanager
def staged(folder: Path, size: int) -> Iterator[Path]:
    """A folder beside `folder` to write into; it takes that name when the block ends, and vanishes when it fails.

    Args:
        folder: must not exist.
        size: bytes that will be written at least.

    Raises:
        ValueError: `folder` exists.
        OSError: its message names `folder`: the disk has less than `size` bytes left, or a write failed.
    """
    if folder.exists():
        raise ValueError(f"{folder} exists; checkpoints are written to a new folder")
    with _parents_of(folder):
        yield from _staged(folder, size)


def _staged(folder: Path, size: int) -> Iterator[Path]:
    if (free := shutil.disk_usage(folder.parent).free) < size:
        raise OSError(errno.ENOSPC, f"no space for a checkpoint of {size} bytes; {free} are free", str(folder))
    staging = folder.parent / f".{folder.name}.{uuid.uuid4().hex}"
    staging.mkdir()
    try:
        yield staging
        staging.rename(folder)
    except Exception as error:  # the writers raise ValueError and their own types for a write that failed
        number = error.errno if isinstance(error, OSError) else errno.EIO
        raise OSError(number, f"writing the checkpoint failed: {error}", str(folder)) from error
    finally:
        _remove(staging)


@contextmanager
def _parents_of(folder: Path) -> Iterator[None]:
    """Makes those that are missing, and removes them again where `folder` does not come to be."""
    made = [parent for parent in folder.parents if not parent.exists()]
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        if not folder.exists():
            for parent in made:
                with suppress(OSError):  # somebody else has put something there
                    parent.rmdir()


def _remove(folder: Path) -> None:
    """Removes what a failed write left, again while Orbax's threads that outlive the failure put files back."""
    for _ in range(_ATTEMPTS):
        if not folder.exists():
            return
        shutil.rmtree(folder, ignore_errors=True)
        time.sleep(_PAUSE)
