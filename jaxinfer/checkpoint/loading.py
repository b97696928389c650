"""Loads parameters one group after the other, whatever they are stored as.

A store says which tensors it has and by which rule each parameter is made of them; here they are checked against the
model before anything is read, then read and assembled.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.multihost_utils import process_allgather

from jaxinfer.checkpoint.assembly import Assembly
from jaxinfer.checkpoint.files import DTYPES, Tensor
from jaxinfer.checkpoint.names import Rule
from jaxinfer.model import Network

# Bytes of weights on their way to the devices at once; the host holds about three copies of them for a moment.
IN_FLIGHT = 32 << 20
_REPORTED = 8  # problems that one error lists


@dataclass(frozen=True)
class Planned:
    """A parameter to load: what it is made of, and how."""

    path: str
    assembly: Assembly
    tensors: tuple[Tensor, ...]

    @cached_property
    def size(self) -> int:
        """Bytes that the devices read, together: a tensor that each of them reads whole counts for each."""
        return sum(
            math.prod(sharding.shard_shape(tensor.shape)) * DTYPES[tensor.dtype].itemsize * sharding.num_devices
            for tensor, sharding in zip(self.tensors, self.assembly.reading, strict=True)
        )

    def wanted(self) -> Iterator[tuple[Tensor, jax.ShapeDtypeStruct]]:
        """Every tensor with the shape, dtype and sharding to read it with."""
        for tensor, sharding in zip(self.tensors, self.assembly.reading, strict=True):
            yield tensor, jax.ShapeDtypeStruct(tensor.shape, DTYPES[tensor.dtype], sharding=sharding)


def plan(
    store: Path, found: Mapping[str, Tensor], rules: Mapping[str, Rule], model: Network, stored_dtypes: bool
) -> list[Planned]:
    """The parameters of `model`, checked against the tensors of a store.

    Args:
        found: the tensors of `store` by the names that the rules use.
        rules: the rule of every parameter, by its path.
        stored_dtypes: keep the dtypes of the store instead of casting to the model's.

    Raises:
        ValueError: lists the tensors that are missing, unexpected, misshapen or of an unsupported dtype, with their
            file and the shapes expected and found.
    """
    planned, problems = [], []
    for path, leaf in model.stored.items():
        rule = rules[path]
        assembly = Assembly.of(model.config, path, rule.form, leaf)
        wrong = list(_problems(store, found, dict(zip(rule.names, assembly.sources, strict=True))))
        problems += wrong
        if not wrong:
            planned.append(Planned(path, assembly, tuple(found[name] for name in rule.names)))
    expected = {name for rule in rules.values() for name in rule.names}
    problems += [
        f"{tensor.file}: tensor {tensor.name!r} of shape {tensor.shape} is unexpected: "
        f"{model.config.architecture} has no such weight with this config"
        for name, tensor in found.items()
        if name not in expected
    ]
    if problems:
        _refuse(problems[:_REPORTED], len(problems))
    return [_as_stored(parameter) for parameter in planned] if stored_dtypes else planned


def _problems(store: Path, found: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]]) -> Iterator[str]:
    for name, shape in expected.items():
        tensor = found.get(name)
        if tensor is None:
            yield f"{store}: tensor {name!r} of shape {shape} is missing"
        elif tensor.shape != shape:
            yield f"{tensor.file}: tensor {tensor.name!r} has shape {tensor.shape}; expected {shape}"
        elif tensor.dtype not in DTYPES:
            yield f"{tensor.file}: tensor {tensor.name!r} has dtype {tensor.dtype}; expected one of {list(DTYPES)}"


def _refuse(problems: list[str], count: int) -> NoReturn:
    """Raises an error of the first of `count` problems."""
    rest = count - len(problems)
    raise ValueError("\n".join([*problems, f"and {rest} more"] if rest else problems))


def _as_stored(parameter: Planned) -> Planned:
    """With the one dtype that holds every value of the parameter's tensors exactly."""
    dtype = jnp.result_type(*(DTYPES[tensor.dtype] for tensor in parameter.tensors))
    return replace(parameter, assembly=replace(parameter.assembly, dtype=dtype))


def load(planned: Iterable[Planned], read: Callable[[list[Planned]], dict[str, jax.Array]]) -> dict[str, jax.Array]:
    """The planned parameters by path, all of them finite.

    The largest come first: what a parameter needs for a moment beside itself then falls where the least is held.

    Args:
        read: gives the tensors of some parameters by their names in the store.

    Raises:
        ValueError: lists the tensors that hold NaN or infinity, with their file, and the parameters of another dtype
            than their tensors that cannot hold them.
    """
    arrays: dict[str, jax.Array] = {}
    finite: list[jax.Array] = []
    ordered = sorted(planned, key=lambda parameter: parameter.size, reverse=True)
    for group in _grouped(ordered):
        made = _make(group, read)
        finite += map(_all_finite, made.values())
        jax.block_until_ready(list(made.values()))
        arrays |= made
        del made
    # The devices know as they go what is finite; the host asks once.
    good = _told(finite)
    if wrong := [parameter for parameter, is_finite in zip(ordered, good, strict=True) if not is_finite]:
        arrays.clear()  # reading the wrong ones again needs room
        finite.clear()
        _refuse([_not_finite(parameter, read) for parameter in wrong[:_REPORTED]], len(wrong))
    return arrays


def _make(group: list[Planned], read: Callable[[list[Planned]], dict[str, jax.Array]]) -> dict[str, jax.Array]:
    tensors = read(group)
    return {
        parameter.path: parameter.assembly([tensors.pop(tensor.name) for tensor in parameter.tensors])
        for parameter in group
    }


def _told(finite: list[jax.Array]) -> list[bool]:
    """Flags that are the same on all devices that hold one. With several processes, some may hold none of a flag."""
    if jax.process_count() == 1:
        return jax.device_get(finite)
    own = [not flag.addressable_shards or bool(flag.addressable_shards[0].data) for flag in finite]
    return process_allgather(np.array(own)).all(axis=0).tolist()


@jax.jit
def _all_finite(x: jax.Array) -> jax.Array:
    """Whether no element is NaN or infinite, on every device of `x`: each looks through the shard that it holds.

    Zero times a finite number is zero, times any other NaN. XLA's CPU backend fuses this sum, except of float16; of
    `isfinite` it would first write as many booleans, and its fast maximum loses NaN.
    """
    return jnp.sum(x * 0, dtype=jnp.float32) == 0


def _not_finite(parameter: Planned, read: Callable[[list[Planned]], dict[str, jax.Array]]) -> str:
    """Which of the parameter's tensors hold NaN or infinity; they are read again, for no one keeps them."""
    if jax.process_count() > 1:  # of which each has read a part
        return f"parameter {parameter.path!r} is not finite: {_named(parameter)}"
    read_again = read([parameter])
    bad = [tensor for tensor in parameter.tensors if not _all_finite(read_again[tensor.name])]
    if bad:
        return "\n".join(
            f"{tensor.file} is corrupt: tensor {tensor.name!r} of shape {tensor.shape} is not finite: "
            "it holds NaN or infinity"
            for tensor in bad
        )
    too_large = f"its values are too large for {parameter.assembly.dtype}"
    return f"{_named(parameter)}: parameter {parameter.path!r} is not finite: {too_large}"


def _named(parameter: Planned) -> str:
    return ", ".join(f"{tensor.file}: tensor {tensor.name!r}" for tensor in parameter.tensors)


def _grouped(planned: Iterable[Planned]) -> Iterator[list[Planned]]:
    """Parameters that are under way together, at least one."""
    group: list[Planned] = []
    size = 0
    for parameter in planned:
        if group and size + parameter.size > IN_FLIGHT:
            yield group
            group, size = [], 0
        group.append(parameter)
        size += parameter.size
    if group:
        yield group
