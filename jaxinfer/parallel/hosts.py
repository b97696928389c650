"""How processes on several hosts find each other.

The others come to the first one's address and say who they are and what they run. It answers when all are there, or
tells them what differs; so no process waits for one that will not come, longer than the timeout. Only then does
`jax.distributed` begin, which has all of its processes at once: one that misses another would be aborted by it. A
random token goes through its store, by which the connections are secured that the group keeps.
"""

from __future__ import annotations

import os
import secrets
import socket
import time
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import jax
import numpy as np
from jax.experimental.multihost_utils import process_allgather

from jaxinfer.parallel.group import SILENCE, Group, differences
from jaxinfer.parallel.wire import Wire, WireError

AUTO = "auto"
_HELLO = 5.0  # seconds that a caller has to say who it is
_RETRY = 0.2  # seconds between calls on a leader that does not listen yet
_TOKEN = "jaxinfer/token"
_LOOPBACK = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True)
class Place:
    """Where a process stands in its group.

    Attributes:
        host, port: of process 0, where the others come to.
        process, processes: which of how many this is.
    """

    host: str
    port: int
    process: int
    processes: int

    @property
    def address(self) -> str:
        return _address(self.host, self.port)


def _address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def join(
    coordinator: str = AUTO, num_processes: int | None = None, process_id: int | None = None, timeout: float = 300
) -> Group:
    """Makes this process one of a group, whose devices are then those of all. Comes before all other use of JAX.

    On CPUs each process has one device: XLA's collectives between CPUs cannot have two programs under way.

    Args:
        coordinator: HOST:PORT of process 0, by which the others reach it; `auto` takes it and what else is None from
            the cluster, as `jax.distributed` detects it (Slurm, Open MPI, Kubernetes, Cloud TPU).
        num_processes: of the group, at least 2.
        process_id: of this one, 0 for the first.
        timeout: seconds that the others may come later than this one.

    Raises:
        ValueError: an argument is wrong, the cluster is not detected, or another process differs in one of them or in
            its version; names both values.
        TimeoutError: process 0 or one of the others did not come.
    """
    place = find_place(coordinator, num_processes, process_id, timeout)
    wires, names, service = meet(place, timeout)
    _start_jax(place, service, coordinator == AUTO)
    token = _share_token(place)
    for other, wire in wires.items():
        follower = place.process or other
        directions = f"to {follower}", f"from {follower}"
        wire.secure(token, *(directions if place.process == 0 else directions[::-1]))
    return Group(place.process, place.processes, wires, names, timeout)


def find_place(coordinator: str, num_processes: int | None, process_id: int | None, timeout: float) -> Place:
    """Raises ValueError for an argument that is wrong, by its name, or missing where no cluster tells it."""
    if not 0 < timeout < float("inf"):
        raise ValueError(f"timeout = {timeout!r} must be seconds above 0")
    if coordinator == AUTO:
        coordinator, num_processes, process_id = _detect(num_processes, process_id, timeout)
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal() or not 1 <= int(port) <= 65535:
        raise ValueError(f"coordinator = {coordinator!r} must be HOST:PORT of process 0, or {AUTO}")
    if type(num_processes) is not int or num_processes < 2:
        raise ValueError(f"num_processes = {num_processes!r} must be an integer, at least 2")
    if type(process_id) is not int or not 0 <= process_id < num_processes:
        raise ValueError(f"process_id = {process_id!r} must be an integer in 0..{num_processes - 1}")
    return Place(host.strip("[]"), int(port), process_id, num_processes)


def _detect(num_processes: int | None, process_id: int | None, timeout: float) -> tuple[str, int, int]:
    # JAX gives what it detects to its own start alone, which would not let us meet first.
    from jax._src.clusters import ClusterEnv

    found = ClusterEnv.auto_detect_unset_distributed_params(None, num_processes, process_id, None, None, int(timeout))
    address, count, own, _ = found
    if address is None or count is None or own is None:
        raise ValueError(
            f"coordinator = {AUTO!r}: JAX detects no cluster here; give coordinator, num_processes and process_id"
        )
    return address, count, own


# --- meeting


def meet(place: Place, timeout: float) -> tuple[dict[int, Wire], dict[int, str], str]:
    """Waits until all processes are there.

    Returns:
        wires to the others, of the leader to all and of these to the leader, the names of their hosts, and where JAX's
        service will be.

    Raises:
        ValueError, TimeoutError: as `join`.
    """
    deadline = time.monotonic() + timeout
    return (_welcome if place.process == 0 else _call_on)(place, timeout, deadline)


def _hello(place: Place) -> dict[str, Any]:
    """Who a process is, and what must be the same in all."""
    facts = {"num_processes": str(place.processes)}
    facts |= {f"the version of {name}": version(name) for name in ("jaxinfer", "jax", "jaxlib")}
    return {"process": place.process, "host": socket.gethostname(), "facts": facts}


def _welcome(place: Place, timeout: float, deadline: float) -> tuple[dict[int, Wire], dict[int, str], str]:
    """The leader's part: waits for all others; their wires and hosts, and where JAX's service will be."""
    wires: dict[int, Wire] = {}
    names: dict[int, str] = {}
    with _listening(place) as listener:
        try:
            while len(wires) < place.processes - 1:
                listener.settimeout(max(deadline - time.monotonic(), 1e-3))
                connected, _ = listener.accept()
                wire = Wire(connected)
                if (came := _admit(place, wire, names)) is None:
                    wire.close()
                else:
                    wires[came] = wire
            service = _address(place.host, _free_port(place))
            for other, wire in wires.items():
                _say(wire, {"service": service}, f"process {other} on {names[other]}")
            return wires, names, service
        except (TimeoutError, ValueError) as error:
            problem, late = str(error), isinstance(error, TimeoutError)
            if late:
                missing = ", ".join(str(i) for i in range(1, place.processes) if i not in wires)
                problem = (
                    f"of num_processes = {place.processes} there came no process {missing} to process 0 at "
                    f"coordinator = {place.address} within {timeout:g} s"
                )
            for wire in wires.values():
                _refuse(wire, problem)
            raise (TimeoutError if late else ValueError)(problem) from None


def _admit(place: Place, wire: Wire, names: dict[int, str]) -> int | None:
    """Which process has come; None for what is none of this group, which must not keep the others out.

    Raises:
        ValueError: it is one, but differs.
    """
    wire.patience(_HELLO)
    try:
        hello = wire.receive()
        other, host, facts = int(hello["process"]), str(hello["host"]), dict(hello["facts"])
    except (WireError, ValueError, TypeError, KeyError):
        return None
    if problem := differences(_hello(place)["facts"], facts, f"process {other} on {host}"):
        _refuse(wire, problem)
        raise ValueError(problem)
    if other in names or not 0 < other < place.processes:
        taken = f"is that of process {other} on {names[other]}" if other in names else "is that of the coordinator"
        _refuse(wire, f"process_id = {other} {taken}; each needs its own")
        return None
    names[other] = host
    return other


def _call_on(place: Place, timeout: float, deadline: float) -> tuple[dict[int, Wire], dict[int, str], str]:
    """The others' part: goes to the leader, and waits until all are there."""
    wire = Wire(_connect(place, timeout, deadline))
    wire.patience(deadline + _HELLO - time.monotonic())  # the leader's own deadline may be a little later
    try:
        wire.send(_hello(place))
        answer = wire.receive()
    except WireError as error:
        wire.close()
        raise TimeoutError(f"process 0 at coordinator = {place.address} {error} before all had come") from None
    if problem := answer.get("refused"):
        wire.close()
        raise ValueError(problem)
    return {0: wire}, {0: place.host}, answer["service"]


def _connect(place: Place, timeout: float, deadline: float) -> socket.socket:
    while True:
        try:
            return socket.create_connection((place.host, place.port), max(deadline - time.monotonic(), 1e-3))
        except OSError as error:
            if time.monotonic() + _RETRY > deadline:
                raise TimeoutError(
                    f"coordinator = {place.address} did not answer within {timeout:g} s ({error.strerror or error}); "
                    "process 0 must run there, and be reached from here"
                ) from None
        time.sleep(_RETRY)


def _listening(place: Place) -> socket.socket:
    """Raises ValueError where it cannot listen."""
    try:
        if place.host in _LOOPBACK:
            family = socket.AF_INET6 if place.host == "::1" else socket.AF_INET
            return socket.create_server((place.host, place.port), family=family)
        if socket.has_dualstack_ipv6():
            return socket.create_server(("", place.port), family=socket.AF_INET6, dualstack_ipv6=True)
        return socket.create_server(("", place.port))
    except OSError as error:
        raise ValueError(
            f"coordinator = {place.address}: process 0 cannot listen there: {error.strerror or error}"
        ) from None


def _free_port(place: Place) -> int:
    """For JAX's service."""
    host = place.host if place.host in _LOOPBACK else ""
    with socket.create_server((host, 0), family=socket.AF_INET6 if host == "::1" else socket.AF_INET) as free:
        return free.getsockname()[1]


def _say(wire: Wire, message: dict[str, str], named: str) -> None:
    try:
        wire.send(message)
    except WireError as error:
        raise ValueError(f"{named} {error} before all had come") from None


def _refuse(wire: Wire, problem: str) -> None:
    with suppress(WireError):  # it has gone itself
        wire.send({"refused": problem})
    wire.close()


# --- JAX


def _start_jax(place: Place, service: str, detected: bool) -> None:
    jax.config.update("jax_enable_preemption_service", False)  # it takes SIGTERM for itself
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # Two programs under way at once would deadlock in gloo: on a CPU they run one after the other, on one device.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    jax.config.update("jax_num_cpu_devices", 1)
    jax.distributed.initialize(
        service,
        place.processes,
        place.process,
        cluster_detection_method=None if detected else "deactivate",
        coordinator_bind_address=service if place.host in _LOOPBACK else None,
        initialization_timeout=int(SILENCE),
        heartbeat_timeout_seconds=int(2 * SILENCE),
        shutdown_timeout_seconds=int(SILENCE),
    )
    if os.environ.get("SLURM_STEP_TASKS_PER_NODE", "").partition("(")[0] == "1" and detected:
        # JAX takes one GPU for each task of Slurm; a task that is alone on its host has them all.
        jax.config.update("jax_cuda_visible_devices", "all")


def _share_token(place: Place) -> bytes:
    """A secret of the group's processes: whoever can reach JAX's store can read it, as all that JAX keeps there."""
    # There is no public way to the store.
    from jax._src.distributed import global_state

    assert global_state.client is not None
    if place.process == 0:
        token = secrets.token_hex(32)
        global_state.client.key_value_set(_TOKEN, token)
        return bytes.fromhex(token)
    return bytes.fromhex(global_state.client.blocking_key_value_get(_TOKEN, int(SILENCE * 1e3)))


def least(value: float) -> float:
    """The least that a process has of something, in whole MiB; all processes call this in the same order."""
    if jax.process_count() == 1:
        return value
    return float(np.min(process_allgather(np.int32(min(value, 2**50) // 2**20)))) * 2**20
