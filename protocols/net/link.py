"""A connection between two roles: frames over mutual TLS 1.3, counters, deadlines; no arithmetic.

A `Link` is one TLS connection to one role and belongs to one thread (an OpenSSL connection must
not be read and written by two threads at once). It makes progress in both directions while it
sends, so that two parties may send large messages at the same time. Where a watch guards a link, it alone
judges whether the peer lives: a role that computes for long is waited for as long as it beats.
"""

import contextlib
import logging
import os
import select
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, overload

import numpy as np

from protocols.errors import (
    IntegrityError,
    PeerLost,
    PeerTimeout,
    SecureError,
    WrongProcess,
)
from protocols.net.frames import (
    HEADER,
    Frame,
    Heard,
    M,
    Message,
    N,
    Refused,
    decode,
    describe,
    describe_error,
    read,
    read_header,
    restore_error,
    room_for,
)
from protocols.net.tls import SecureSocket

log = logging.getLogger(__name__)
# A peer that computes answers within a fraction of a millisecond, a thread that sleeps is woken after a tenth of one.
SPIN_S = 3e-4
# Frames up to this size wait for the next one, or for the moment when this side waits: one record, one system call.
HELD_BYTES = 1 << 13
_JOINED_BYTES = 1 << 17


@dataclass
class Counters:
    """Traffic of one link in one phase, in bytes of whole frames (without TLS records)."""

    sent: int = 0
    received: int = 0


class Link:
    """One TLS connection to one role, for one thread.

    Args:
        sock: connected and authenticated socket.
        timeout_s: longest wait of a single send or receive, in seconds. Under a watch that runs, a wait has no end
            of its own: the watch ends it when the peer is gone or silent.

    In a fork of the process that made it, every method that would send or read raises WrongProcess.
    """

    def __init__(self, sock: SecureSocket, timeout_s: float) -> None:
        self.role, self.user = sock.role, sock.user
        self.timeout_s = timeout_s
        self.step = "connect"
        self.clock = 0
        self.heard_at = time.monotonic()
        self.waited_s = 0.0
        self.counters: dict[str, Counters] = {"setup": Counters()}
        self.phase = "setup"
        self._sock = sock
        self._inbox: deque[tuple[int, bytes, bytearray]] = deque()
        self._failure: SecureError | None = None
        self._find_reason: Callable[[], SecureError | None] = lambda: None
        self._is_watched: Callable[[], bool] = lambda: False
        self._header = bytearray(HEADER.size)
        self._held: list[bytes] = []
        self._restart()
        self._poll = select.poll()
        self._poll.register(sock.raw, select.POLLIN)

    # state of the frame that is being read
    def _restart(self) -> None:
        self._meta: bytearray | None = None
        self._body: bytearray | None = None
        self._target = memoryview(self._header)

    def guard(self, find_reason: Callable[[], SecureError | None], is_watched: Callable[[], bool]) -> None:
        """Let a watch judge the peer.

        Args:
            find_reason: asked for the root cause when this connection breaks.
            is_watched: whether the watch runs, so that no wait for this peer needs an end of its own.
        """
        self._find_reason, self._is_watched = find_reason, is_watched

    def is_overdue(self, started: float) -> bool:
        """Return whether the peer has sent nothing here for `timeout_s` since `started`, and no watch judges it.

        Args:
            started: of the wait, as `time.monotonic` counts.
        """
        return not self._is_watched() and time.monotonic() - max(started, self.heard_at) > self.timeout_s

    def enter(self, phase: str) -> None:
        """Send what is held back, count what follows under `phase` and restart the logical clock."""
        self.flush()
        self.phase = phase
        self.counters.setdefault(phase, Counters())
        self.clock = 0

    def reset_counters(self) -> None:
        """Forget all counts but keep the phase."""
        self.counters = {self.phase: Counters()}

    def fail(self, error: SecureError) -> None:
        """Make every present and later call raise `error`; may be called by any thread."""
        self._failure = self._failure or error
        with contextlib.suppress(OSError):
            self._sock.cut()

    def close(self) -> None:
        """Close the connection; further calls raise."""
        self._failure = self._failure or PeerLost(f"the connection to {self.role} is closed")
        with contextlib.suppress(OSError, ValueError):
            self._sock.close()

    def finish(self, grace_s: float) -> None:
        """Let what was sent arrive: end our direction, read until the peer ends its own, then close."""
        deadline = time.monotonic() + grace_s
        with contextlib.suppress(OSError, ValueError, SecureError):
            self._sock.end()
            # A socket closed with unread data resets the connection, and the peer may lose our last words.
            while time.monotonic() < deadline:
                self._wait(select.POLLIN, deadline)
                self._read_available()
                self._inbox.clear()
        self.close()

    def fileno(self) -> int:
        """Return the socket's descriptor."""
        return self._sock.raw.fileno()

    def send(
        self, kind: str, message: Message | None = None, arrays: Sequence[np.ndarray] = (), *, hold: bool = False
    ) -> None:
        """Send one frame; reads what arrives meanwhile.

        Args:
            kind: names the frame.
            message: of that kind; None for a frame of arrays alone.
            arrays: sent raw.
            hold: whether a small frame may wait for the next one, for `recv`, `flush` or `enter`.

        Raises:
            PeerTimeout: the peer took nothing for `timeout_s`.
            PeerLost: the connection is gone.
        """
        self._sock.require_here()
        parts = [np.asarray(a, order="C") for a in arrays]
        text = describe(kind, message, [(a.dtype.str, a.shape) for a in parts])
        n_body = sum(a.nbytes for a in parts)
        head = HEADER.pack(len(text), n_body, self.clock + 1) + text
        self.counters[self.phase].sent += len(head) + n_body
        views = [a.data.cast("B") for a in parts if a.size]
        if n_body + len(head) <= HELD_BYTES:
            self._held += [head, *map(bytes, views)]
            if not hold or sum(map(len, self._held)) > HELD_BYTES:
                self.flush()
            return
        self._held.append(head)
        if n_body <= _JOINED_BYTES:
            self._held += map(bytes, views)
            views = []
        self.flush()
        for view in views:
            self._write(view)

    def flush(self) -> None:
        """Send what is held back; raises as `send`."""
        if self._held:
            held, self._held = b"".join(self._held), []
            self._write(memoryview(held))

    def say(self, message: Message, arrays: Sequence[np.ndarray] = (), *, hold: bool = False) -> None:
        """Send a message, as `send` does."""
        self.send(message.kind, message, arrays, hold=hold)

    @overload
    def hear(self, first: type[M], /, *, timeout_s: float | None = ...) -> Heard[M]: ...
    @overload
    def hear(self, first: type[M], second: type[N], /, *, timeout_s: float | None = ...) -> Heard[M | N]: ...
    @overload
    def hear(self, *kinds: type[Message], timeout_s: float | None = ...) -> Heard[Message]: ...
    def hear(self, *kinds: type[Any], timeout_s: float | None = -1.0) -> Heard[Any]:
        """Return the next message, which must be one of `kinds`, and its arrays; otherwise as `recv`.

        Raises:
            IntegrityError: it is another one, or its fields break their rules.
        """
        return read(self._next(timeout_s), self.role, *kinds, step=self.step)

    def recv(self, kind: str, *, timeout_s: float | None = -1.0) -> Frame:
        """Return the next frame, of arrays alone, which must be of `kind`; a refusal raises what it carries.

        Args:
            kind: expected kind.
            timeout_s: longest silence; None waits for ever, the default is the link's.
        """
        frame = self._next(timeout_s)
        if frame.kind != kind:
            raise IntegrityError(f"{self.role} must send {kind!r} now; got {frame.kind!r} ({self.step})")
        if frame.meta != b"{}":
            raise IntegrityError(f"{self.role} must send {kind!r} with arrays alone; it has fields ({self.step})")
        return frame

    def _next(self, timeout_s: float | None) -> Frame:
        self._sock.require_here()
        is_patient = timeout_s == -1.0
        limit = self.timeout_s if is_patient else timeout_s
        self.flush()
        if not self._inbox:
            self._read_available()
        started = time.monotonic()
        deadline = None if limit is None else started + limit
        while not self._inbox:
            if self.phase == "online" and time.monotonic() < started + SPIN_S:
                os.sched_yield()
            else:
                self._wait(select.POLLIN, deadline, is_patient=is_patient)
            self._read_available()
        self.waited_s += time.monotonic() - started
        clock, text, body = self._inbox.popleft()
        # Counted when it is taken, not when it comes: a frame belongs to the step that waits for it.
        self.counters[self.phase].received += HEADER.size + len(text) + len(body)
        self.clock = max(self.clock, clock)
        frame = decode(text, body, self.role)
        if frame.kind == Refused.kind:
            raise restore_error(read(frame, self.role, Refused, step=self.step).message)
        return frame

    def peek(self, timeout_s: float) -> str | None:
        """Return the kind of the next frame without taking it; None where none comes within `timeout_s`."""
        self._sock.require_here()
        self.flush()
        started = time.monotonic()
        self._read_available()
        while not self._inbox:
            if time.monotonic() >= started + timeout_s:
                return None
            if self.phase == "online" and time.monotonic() < started + SPIN_S:
                os.sched_yield()
            else:
                with contextlib.suppress(PeerTimeout):
                    self._wait(select.POLLIN, started + timeout_s)
            self._read_available()
        _, text, body = self._inbox[0]
        return decode(text, body, self.role).kind

    def seal(self, kind: str) -> bytes:
        """Return an empty frame as bytes for the network, to go there before all that is sent or sealed later."""
        text = describe(kind, None)
        return self._sock.seal(HEADER.pack(len(text), 0, 0) + text)

    def refuse(self, error: SecureError) -> None:
        """Answer a request by an error: the peer's `recv` raises it."""
        self.say(describe_error(error))

    def send_array(self, kind: str, array: np.ndarray, *, hold: bool = False) -> None:
        """Send one array, as `send` does."""
        self.send(kind, None, [array], hold=hold)

    def recv_array(self, kind: str, shape: Sequence[int], dtype: str = "<i8") -> np.ndarray:
        """Return one array, which must have `shape` and `dtype`."""
        arrays = self.recv(kind).arrays
        got = [(a.shape, a.dtype.str) for a in arrays]
        if got != [(tuple(shape), dtype)]:
            raise IntegrityError(f"{self.role} must send {kind!r} of shape {tuple(shape)} {dtype}; got {got}")
        return arrays[0]

    def exchange(self, kind: str, array: np.ndarray) -> np.ndarray:
        """Send an array and return the peer's of the same shape and dtype: one round."""
        self.send_array(kind, array, hold=True)
        return self.recv_array(kind, array.shape, array.dtype.str)

    def _write(self, view: memoryview) -> None:
        deadline = time.monotonic() + self.timeout_s
        flushed = False
        while len(view) or not flushed:
            self._raise_failure()
            try:
                if len(view):
                    view = view[self._sock.send(view) :]
                    deadline = time.monotonic() + self.timeout_s
                self._sock.flush()
                flushed = True
            except BlockingIOError:
                flushed = False
                self._wait(select.POLLIN | select.POLLOUT, deadline, is_patient=True)
                self._read_available()
            except WrongProcess:
                raise
            except (OSError, ValueError) as error:
                raise self._lost(error) from None

    def _read_available(self) -> None:
        """Read until the socket would block; completed frames go to the inbox."""
        while True:
            self._raise_failure()
            try:
                n = self._sock.recv_into(self._target)
            except BlockingIOError:
                return
            except WrongProcess:
                raise
            except (OSError, ValueError) as error:
                raise self._lost(error) from None
            if n == 0:
                if self._inbox:
                    return  # what came before the end is still to be taken
                raise self._lost(None)
            self.heard_at = time.monotonic()
            self._target = self._target[n:]
            if not len(self._target):
                self._advance()

    def _advance(self) -> None:
        n_meta, n_body, clock = read_header(self._header, self.role)
        if self._meta is None:
            self._meta = room_for(n_meta, self.role)
            self._target = memoryview(self._meta)
        elif self._body is None and n_body:
            self._body = room_for(n_body, self.role)
            self._target = memoryview(self._body)
        else:
            self._inbox.append((clock, bytes(self._meta), self._body or bytearray()))
            self._restart()

    def _wait(self, events: int, deadline: float | None, *, is_patient: bool = False) -> None:
        """Wait for events until the deadline; a patient wait has none while a watch judges the peer."""
        self._poll.modify(self._sock.raw, events)
        while True:
            self._raise_failure()
            left = 1.0 if deadline is None else deadline - time.monotonic()
            if left <= 0 and is_patient and self._is_watched():
                left = 1.0
            if left <= 0:
                raise PeerTimeout(f"{self.role} has been silent for {self.timeout_s:g} s ({self.step})")
            if self._poll.poll(min(left, 1.0) * 1000):
                return

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _lost(self, error: Exception | None) -> SecureError:
        reason = self._failure or self._find_reason()
        if reason is None:
            why = "closed the connection" if error is None else f"broke the connection: {type(error).__name__}"
            reason = PeerLost(f"{self.role} {why} ({self.step})")
        self._failure = reason
        return reason
