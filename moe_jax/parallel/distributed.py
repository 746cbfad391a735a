"""Several processes as one machine: start-up, arrays across processes, detection of a lost process.

The runtime of JAX (``jax.distributed``, gloo on CPU) connects the processes. It also detects a lost
process, but only after a while, and aborts with a stack trace. ``Watchdog`` detects within a second
that a process died, and within ``patience`` that it fell silent (a machine or a cable lost), and ends
the others with a sentence that says what happened and what to do.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

EXIT_CODE = 3  # of a process that ends because another is lost

_BEAT, _BYE = b"b", b"q"
_SECONDS_BETWEEN_BEATS = 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Group:
    """The place of this process among the others.

    Args:
        coordinator: ``HOST:PORT`` of process 0, reachable from all.
        processes: number of processes.
        process_id: index of this one, from 0.

    Raises:
        ValueError: an id outside of the group, or an address without port.
    """

    coordinator: str
    processes: int
    process_id: int

    def __post_init__(self) -> None:
        host, _, port = self.coordinator.rpartition(":")
        if not host or not port.isdigit():
            raise ValueError(
                f"coordinator: expected HOST:PORT of process 0, got {self.coordinator!r}. "
                "Give the same address to every process, e.g. 127.0.0.1:7890."
            )
        if not 0 <= self.process_id < self.processes:
            raise ValueError(
                f"process_id: expected 0 <= process_id < processes={self.processes}, got "
                f"{self.process_id}. Number the processes from 0."
            )

    @property
    def host(self) -> str:
        """The host of ``coordinator``, without its port."""
        return self.coordinator.rpartition(":")[0].strip("[]")


@contextlib.contextmanager
def process_group(
    group: Group, *, patience: float = 20.0, start_timeout: float = 60.0, hint: str = ""
) -> Iterator[None]:
    """Inside, ``jax.devices()`` are those of all processes, and a lost process ends this one.

    Enter it before anything touches a device. A process that leaves by an exception makes the others
    end too, since they could only wait for it.

    Args:
        group: this process's place.
        patience: seconds of silence after which a process counts as lost.
        start_timeout: seconds to wait for the others at the start.
        hint: what the message of a loss should advise, e.g. how to resume.

    Raises:
        TimeoutError: not all processes arrived.
    """
    local = group.host in ("127.0.0.1", "localhost", "::1")
    try:
        jax.distributed.initialize(
            group.coordinator,
            group.processes,
            group.process_id,
            initialization_timeout=round(start_timeout),
            # Behind the watchdog, so that its message comes first.
            heartbeat_timeout_seconds=max(10, round(3 * patience)),
            shutdown_timeout_seconds=max(5, round(patience)),
            coordinator_bind_address=group.coordinator if local else None,
        )
    except RuntimeError as error:
        raise TimeoutError(
            f"process {group.process_id}: expected {group.processes} processes at "
            f"{group.coordinator} within {start_timeout:g} s, got: {error}. Start them all with the "
            "same coordinator and number of processes, and look for the one that failed."
        ) from error
    watchdog = Watchdog(group, patience=patience, hint=hint)
    try:
        yield
        barrier("moe_jax: end")
    except BaseException:
        # A collective fails when its partner dies. The watchdog knows which; let it speak.
        time.sleep(2.0 * _SECONDS_BETWEEN_BEATS)
        watchdog.close(_BEAT)
        raise
    watchdog.close(_BYE)
    jax.distributed.shutdown()


class Watchdog:
    """A thread that keeps a connection between process 0 and every other, and notices its end.

    Args:
        group: this process's place. Every process must make its watchdog, at the same time.
        patience: seconds of silence after which a process counts as lost.
        hint: advice for the message.
        on_loss: called with the message, from the thread; by default it is printed to standard error
            and this process ends with ``EXIT_CODE``. There is no way on: the main thread may wait in
            a collective for ever.
    """

    def __init__(
        self,
        group: Group,
        *,
        patience: float,
        hint: str = "",
        on_loss: Callable[[str], None] | None = None,
    ) -> None:
        self._group, self._patience, self._hint = group, patience, hint
        self._on_loss = _end_process if on_loss is None else on_loss
        self._closing = threading.Event()
        self._peers = self._connect()
        self._threads = [
            threading.Thread(target=self._watch, args=(peer, link), daemon=True)
            for peer, link in self._peers.items()
        ]
        for thread in self._threads:
            thread.start()

    def _connect(self) -> dict[int, socket.socket]:
        """Returns, on process 0, a connection to each other process; on the others one to process 0."""
        group = self._group
        first = group.process_id == 0
        listener = None
        # Process 0 announces its port and a secret over the collectives that JAX has set up already.
        announced = np.zeros(17, np.uint32)
        if first:
            loopback = group.host in ("127.0.0.1", "localhost")
            listener = socket.create_server(("127.0.0.1" if loopback else "", 0))
            announced[0] = listener.getsockname()[1]
            announced[1:] = np.frombuffer(secrets.token_bytes(16), np.uint8)
        announced = np.asarray(multihost_utils.broadcast_one_to_all(announced))
        token = announced[1:].astype(np.uint8).tobytes()
        if listener is None:
            address = (group.host, int(announced[0]))
            link = socket.create_connection(address, timeout=self._patience)
            link.sendall(token + group.process_id.to_bytes(4, "big"))
            return {0: link}
        links: dict[int, socket.socket] = {}
        with listener:
            listener.settimeout(self._patience)
            while len(links) < group.processes - 1:
                link, _ = listener.accept()
                # A connection that says nothing must not hold up the others.
                link.settimeout(self._patience)
                greeting = _read(link, 20)
                if greeting[:16] == token:  # without the secret it is no process of this group
                    links[int.from_bytes(greeting[16:], "big")] = link
                else:
                    link.close()
        return links

    def _watch(self, peer: int, link: socket.socket) -> None:
        link.settimeout(_SECONDS_BETWEEN_BEATS)
        heard = time.monotonic()
        while not self._closing.is_set():
            reason = ""
            try:
                # Both sides send, so each hears from the other.
                link.sendall(_BEAT)
                received = link.recv(64)
                if _BYE in received:
                    return
                heard = time.monotonic()
                if not received:
                    reason = "its connection closed"
                else:
                    self._closing.wait(_SECONDS_BETWEEN_BEATS / 2)
            except TimeoutError:
                silent = time.monotonic() - heard
                if silent > self._patience:
                    reason = f"silent for {silent:.0f} s"
            except OSError as error:
                reason = error.strerror or "its connection broke"
            if reason and not self._closing.is_set():
                self._on_loss(
                    f"process {self._group.process_id} of {self._group.processes}: stopped, since "
                    f"process {peer} is gone ({reason}). {self._hint}".rstrip()
                )
                return

    def close(self, word: bytes = _BYE) -> None:
        """Stops watching. The default word tells the others that this process ended well."""
        self._closing.set()
        for link in self._peers.values():
            with contextlib.suppress(OSError):
                if word == _BYE:
                    link.sendall(_BYE)
                    # Only the sending half: the partner's own farewell can still be read.
                    link.shutdown(socket.SHUT_WR)
        for thread in self._threads:
            thread.join(timeout=2 * _SECONDS_BETWEEN_BEATS)
        for link in self._peers.values():
            link.close()


def _read(link: socket.socket, count: int) -> bytes:
    """Reads ``count`` bytes, or fewer if the connection ends."""
    received = b""
    while len(received) < count:
        part = link.recv(count - len(received))
        if not part:
            break
        received += part
    return received


def _end_process(message: str) -> None:
    sys.stderr.write(message + "\n")
    sys.stderr.flush()
    os._exit(EXIT_CODE)


# --- arrays ---------------------------------------------------------------------------------


def barrier(name: str) -> None:
    """Waits until every process calls it. Does nothing in a single process."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def global_array(whole: np.ndarray, sharding: jax.sharding.Sharding) -> jax.Array:
    """Returns an array over all processes; each process reads only the rows that its devices hold.

    Args:
        whole: the same array on every process, or anything that can be indexed like it.
        sharding: how it is split.
    """
    return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])


def gathered(tree: Any) -> Any:
    """Returns the whole arrays as NumPy arrays on process 0, and None in their place on the others.

    Gathers one array after another, so that no device holds more than one of them whole. Every process
    must call it.
    """
    first = jax.process_index() == 0

    def gather(x: Any) -> Any:
        if isinstance(x, jax.Array) and not x.is_fully_addressable:
            # Every process holds all of it, so nothing has to be sent.
            if x.is_fully_replicated:
                return np.asarray(x.addressable_data(0)) if first else None
            x = multihost_utils.process_allgather(x, tiled=True)
        return np.asarray(x) if first else None

    return jax.tree.map(gather, tree)


def agreed(error: Exception | None) -> None:
    """Raises on every process if process 0 had an error, so that no process waits for it.

    Args:
        error: the error of process 0, or None; the others pass None.
    """
    if jax.process_count() > 1:
        failed = multihost_utils.broadcast_one_to_all(np.asarray(error is not None))
        if bool(failed) and error is None:
            raise RuntimeError("process 0 failed; its message says why.")
    if error is not None:
        raise error
