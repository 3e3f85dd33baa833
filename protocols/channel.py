"""Connections between roles: mutual TLS 1.3, frames, counters, deadlines and a watch; no arithmetic.

A `Link` is one TLS connection to one role and belongs to one thread (an OpenSSL connection must
not be read and written by two threads at once). It makes progress in both directions while it
sends, so that two parties may send large messages at the same time. A `Watch` is a thread with
connections of its own: it sends and expects a heartbeat, spreads the reason of an abort, and
wakes every link when a role is gone, silent or has failed. Where a watch guards a link, it alone
judges whether the peer lives: a role that computes for long is waited for as long as it beats.

A frame is a header (length of the meta data, length of the body, logical clock), meta data as
JSON, and raw little-endian arrays. Nothing is ever unpickled.
"""

import contextlib
import functools
import json
import logging
import math
import os
import select
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from protocols import errors
from protocols.errors import (
    IntegrityError,
    PeerLost,
    PeerRefused,
    PeerTimeout,
    ProtocolAbort,
    SecureError,
    WrongProcess,
)
from protocols.origin import Origin, let_go_after_fork
from protocols.pulse import Pulse
from protocols.tls import Credentials, SecureSocket, context_of

log = logging.getLogger(__name__)

HEADER = struct.Struct("!IQI")
MAX_META_BYTES = 1 << 26
MAX_BODY_BYTES = 1 << 36
DTYPES = {"<i8", "<f4", "|u1", "<u8"}
BEAT_S = 0.5
# Time between two looks of a watch that counts as silence of a peer: for longer, it was the watch that did not look.
LOOK_S = 1.0
# Beats that a watch seals ahead for each peer before it starts, and at each look: few, for a prediction may be running.
_FIRST_BEATS, _MORE_BEATS = 240, 6
# A peer that computes answers within a fraction of a millisecond, a thread that sleeps is woken after a tenth of one.
SPIN_S = 3e-4
# Frames up to this size wait for the next one, or for the moment when this side waits: one record, one system call.
HELD_BYTES = 1 << 13
_JOINED_BYTES = 1 << 17

Meta = dict[str, Any]


# --- messages -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Message:
    """One received frame: its kind, JSON meta data, and read-write numpy arrays."""

    kind: str
    meta: Meta
    arrays: list[np.ndarray] = field(repr=False)


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
        self, kind: str, meta: Meta | None = None, arrays: Sequence[np.ndarray] = (), *, hold: bool = False
    ) -> None:
        """Send one frame; reads what arrives meanwhile.

        Args:
            kind: names the frame.
            meta: JSON values.
            arrays: sent raw.
            hold: whether a small frame may wait for the next one, for `recv`, `flush` or `enter`.

        Raises:
            PeerTimeout: the peer took nothing for `timeout_s`.
            PeerLost: the connection is gone.
        """
        self._sock.require_here()
        parts = [np.asarray(a, order="C") for a in arrays]
        text = _describe(kind, meta or {}, [(a.dtype.str, a.shape) for a in parts])
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

    def recv(self, kind: str, *, timeout_s: float | None = -1.0) -> Message:
        """Return the next frame, which must be of `kind`; frames of kind "refused" raise what they carry.

        Args:
            kind: expected kind.
            timeout_s: longest silence; None waits for ever, the default is the link's.
        """
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
        message = _decode(text, body, self.role)
        if message.kind == "refused":
            raise restore_error(message.meta)
        if message.kind != kind:
            raise IntegrityError(f"{self.role} must send {kind!r} now; got {message.kind!r} ({self.step})")
        return message

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
        return _decode(text, body, self.role).kind

    def seal(self, kind: str) -> bytes:
        """Return an empty frame as bytes for the network, to go there before all that is sent or sealed later."""
        text = _describe(kind, {}, [])
        return self._sock.seal(HEADER.pack(len(text), 0, 0) + text)

    def refuse(self, error: SecureError) -> None:
        """Answer a request by an error: the peer's `recv` raises it."""
        self.send("refused", describe_error(error))

    def send_array(self, kind: str, array: np.ndarray, *, hold: bool = False) -> None:
        """Send one array, as `send` does."""
        self.send(kind, None, [array], hold=hold)

    def recv_array(self, kind: str, shape: Sequence[int], dtype: str = "<i8") -> np.ndarray:
        """Return one array, which must have `shape` and `dtype`."""
        message = self.recv(kind)
        got = [(a.shape, a.dtype.str) for a in message.arrays]
        if got != [(tuple(shape), dtype)]:
            raise IntegrityError(f"{self.role} must send {kind!r} of shape {tuple(shape)} {dtype}; got {got}")
        return message.arrays[0]

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
        n_meta, n_body, clock = HEADER.unpack(self._header)
        if self._meta is None:
            if not 0 < n_meta <= MAX_META_BYTES or n_body > MAX_BODY_BYTES:
                raise IntegrityError(f"{self.role} sent a frame of impossible size")
            self._meta = bytearray(n_meta)
            self._target = memoryview(self._meta)
        elif self._body is None and n_body:
            self._body = bytearray(n_body)
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


# One prediction after the other has the same frames: most descriptions have been made, and read, before.
@functools.lru_cache(4096)
def _describe_arrays(kind: str, arrays: tuple[tuple[str, tuple[int, ...]], ...]) -> bytes:
    return json.dumps({"kind": kind, "meta": {}, "arrays": arrays}, separators=(",", ":")).encode()


def _describe(kind: str, meta: Meta, arrays: list[tuple[str, tuple[int, ...]]]) -> bytes:
    if not meta:
        return _describe_arrays(kind, tuple(arrays))
    return json.dumps({"kind": kind, "meta": meta, "arrays": arrays}, separators=(",", ":")).encode()


def frame_bytes(kind: str, meta: Meta | None, arrays: Sequence[tuple[str, tuple[int, ...]]]) -> int:
    """Return the bytes of the frame that `Link.send` makes, as counters count it.

    Args:
        kind, meta: as in `Link.send`.
        arrays: dtype (such as "<i8") and shape of each.
    """
    body = sum(np.dtype(dtype).itemsize * math.prod(shape) for dtype, shape in arrays)
    return HEADER.size + len(_describe(kind, meta or {}, list(arrays))) + body


def _read_description(text: bytes) -> tuple[str, Meta, list[tuple[str, tuple[int, ...]]]]:
    raw = json.loads(text)
    arrays = []
    for dtype, shape in raw["arrays"]:
        if dtype not in DTYPES or any(not isinstance(n, int) or n < 0 for n in shape):
            raise ValueError(dtype)
        arrays.append((str(dtype), tuple(shape)))
    return str(raw["kind"]), dict(raw["meta"]), arrays


_read_short_description = functools.lru_cache(4096)(_read_description)


def _decode(text: bytes, body: bytearray, role: str) -> Message:
    try:
        is_short = len(text) <= 256
        kind, meta, described = (_read_short_description if is_short else _read_description)(text)
        arrays, start = [], 0
        for dtype, shape in described:
            arrays.append(np.frombuffer(body, dtype=dtype, count=math.prod(shape), offset=start).reshape(shape))
            start += arrays[-1].nbytes
        if start != len(body):
            raise ValueError("length")
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        raise IntegrityError(f"{role} sent a frame that is not one of ours ({type(error).__name__})") from None
    return Message(kind, dict(meta), arrays)


def describe_error(error: SecureError) -> Meta:
    """Return an error of ours as JSON: its class and message, which by the rule of errors.py hold no secret."""
    kind = next(k for k in type(error).__mro__ if vars(errors).get(k.__name__) is k)
    return {"error": kind.__name__, "message": str(error)}


def restore_error(meta: Mapping[str, Any]) -> SecureError:
    """Return the error that `describe_error` described; an unknown class becomes ProtocolAbort."""
    kind = getattr(errors, str(meta.get("error")), ProtocolAbort)
    if not (isinstance(kind, type) and issubclass(kind, SecureError)):
        kind = ProtocolAbort
    return kind(str(meta.get("message")))


# --- opening connections --------------------------------------------------------------------------------------------


class Listener:
    """Accepts the connections of known roles.

    Args:
        credentials: this role's.
        host: address to listen on.
        port: 0 lets the system choose.
        timeout_s: passed to each link.
    """

    def __init__(self, credentials: Credentials, host: str, port: int, timeout_s: float) -> None:
        self._context = context_of(credentials, server=True)
        self._timeout_s = timeout_s
        self._sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            self._sock.bind((host, port))
        except OSError as error:
            self._sock.close()
            raise errors.InputError(
                f"{credentials.role}: the address {host}:{port} must be free; {error.strerror}"
            ) from None
        self._sock.listen(16)
        let_go_after_fork(self)
        self.address: tuple[str, int] = self._sock.getsockname()[:2]

    def accept(self, expected: Iterable[tuple[str, str]], timeout_s: float) -> dict[tuple[str, str], Link]:
        """Return one link for each expected (role, purpose); strangers are refused and waited past.

        Raises:
            PeerTimeout: not all came within `timeout_s`.
        """
        missing, links = set(expected), {}
        deadline = time.monotonic() + timeout_s
        while missing:
            left = deadline - time.monotonic()
            if left <= 0:
                names = ", ".join(sorted({role for role, _ in missing}))
                raise PeerTimeout(f"{names} must connect within {timeout_s:g} s; did not")
            self._sock.settimeout(left)
            try:
                raw, _ = self._sock.accept()
            except TimeoutError:
                continue
            link = self._admit(raw, missing, min(left, 5.0))
            if link is not None:
                key, accepted = link
                links[key] = accepted
                missing.discard(key)
        return links

    def _admit(
        self, raw: socket.socket, missing: set[tuple[str, str]], timeout_s: float
    ) -> tuple[tuple[str, str], Link] | None:
        raw.settimeout(timeout_s)
        _tune(raw, self._timeout_s)
        try:
            sock = SecureSocket(raw, self._context, server=True)
        except (OSError, PeerRefused) as error:
            log.warning("refused a connection: %s", type(error).__name__)
            return None
        role, link = sock.role, Link(sock, self._timeout_s)
        try:
            purpose = str(link.recv("hello", timeout_s=timeout_s).meta.get("purpose"))
            if (role, purpose) not in missing:
                link.refuse(PeerRefused(f"no connection of {role!r} for {purpose!r} is expected here"))
                raise PeerRefused(role)
            link.send("welcome")
        except SecureError as error:
            log.warning("refused %s: %s", role, type(error).__name__)
            link.close()
            return None
        return (role, purpose), link

    def close(self) -> None:
        """Stop listening; accepted links stay."""
        self._sock.close()

    def let_go(self) -> None:
        """Close a copy's descriptor."""
        self._sock.close()


def _tune(raw: socket.socket, timeout_s: float) -> None:
    """Send small messages at once, and have the system notice after about `timeout_s` that the network was cut.

    The system's probes are answered by the peer's system, whatever its process does. No limit on data that is not
    acknowledged (TCP_USER_TIMEOUT): that would end a connection to a peer that computes and does not read.
    """
    pause_s = max(1, round(min(timeout_s, 3600.0) / 5))
    raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in ((socket.TCP_KEEPIDLE, pause_s), (socket.TCP_KEEPINTVL, pause_s), (socket.TCP_KEEPCNT, 4)):
        raw.setsockopt(socket.IPPROTO_TCP, option, value)


def connect(
    credentials: Credentials,
    address: tuple[str, int],
    role: str,
    purpose: str,
    timeout_s: float,
    *,
    opening_s: float | None = None,
) -> Link:
    """Return a link to `role` at `address`.

    Args:
        credentials: this role's.
        address: host and port.
        role: who must be there.
        purpose: what the link is for; the peer must expect it.
        timeout_s: passed to the link.
        opening_s: longest wait while it is opened, in seconds; `timeout_s` where None.

    Raises:
        PeerRefused: the peer is not `role` under our authority, or does not accept us.
        PeerLost: nobody answers.
    """
    opening_s = timeout_s if opening_s is None else opening_s
    try:
        raw = socket.create_connection(address, timeout=opening_s)
    except OSError as error:
        raise PeerLost(f"{role} must answer at {address[0]}:{address[1]}; {type(error).__name__}") from None
    _tune(raw, timeout_s)
    try:
        sock = SecureSocket(raw, context_of(credentials, server=False), server=False)
    except (OSError, PeerRefused) as error:
        raise PeerRefused(f"{role} must prove its role under this run's authority; {type(error).__name__}") from None
    if sock.role != role:
        sock.close()
        raise PeerRefused(f"the peer at {address[0]}:{address[1]} must be {role!r}; its certificate says {sock.role!r}")
    link = Link(sock, timeout_s)
    try:
        link.send("hello", {"purpose": purpose})
        link.recv("welcome", timeout_s=opening_s)
    except PeerLost:
        link.close()
        raise PeerRefused(f"{role} did not accept our certificate") from None
    except SecureError:
        link.close()
        raise
    return link


# --- the watch ------------------------------------------------------------------------------------------------------


class _Beats:
    """Beats to and from every peer that do not wait for the interpreter of the one that sends them.

    Args:
        role: our own role.
        links: role -> link for beats alone.
        period_s: time between two beats, in seconds.
    """

    def __init__(self, role: str, links: Mapping[str, Link], period_s: float) -> None:
        self._links = dict(links)
        self._pulse = Pulse(f"securemtk-pulse-{role}", [link.fileno() for link in links.values()], period_s)

    def start(self) -> None:
        """Begin to beat."""
        if self._links:
            self._seal(_FIRST_BEATS)
            self._pulse.start()

    def _seal(self, most: int) -> None:
        for _ in range(min(most, self._pulse.room)):
            self._pulse.add([link.seal("beat") for link in self._links.values()])

    def look(self) -> list[str]:
        """Seal more beats, and return the roles of which beats have come since the last look."""
        heard = []
        for role, link in self._links.items():
            # That a peer has left is said, and noticed, on the watch's own links.
            with contextlib.suppress(PeerLost):
                link._read_available()
            if link._inbox:
                heard.append(role)
                link._inbox.clear()
        if self._links:
            self._seal(_MORE_BEATS)
        return heard

    def stop(self) -> None:
        """End the beat and close its links."""
        self._pulse.stop()
        for link in self._links.values():
            link.close()


class Watch(threading.Thread):
    """Heartbeats with every peer, and the spreading of failures.

    A peer that has ended is noticed at once, by the end of its connections. One that is stopped, or cut off, is given
    up after `silence_s`. One that computes is neither, for its beats are sent by a thread that needs no interpreter.

    Args:
        role: our own role.
        links: role -> link that belongs to this thread from now on.
        guarded: links of other threads, failed when a peer fails.
        on_failure: called once, in this thread, with the root cause.
        silence_s: longest silence of a peer, in seconds.
        pulses: role -> link for beats alone, of this thread too; without, this thread beats as the interpreter lets it.
    """

    def __init__(
        self,
        role: str,
        links: Mapping[str, Link],
        guarded: Sequence[Link],
        on_failure: Callable[[SecureError], None] = lambda error: None,
        *,
        silence_s: float,
        pulses: Mapping[str, Link] | None = None,
    ) -> None:
        super().__init__(name=f"securemtk-watch-{role}", daemon=True)
        self.role = role
        self.step = "start"
        self._links = dict(links)
        self._guarded = list(guarded)
        self._on_failure = on_failure
        self._silence_s = silence_s
        # Several beats in the time after which a peer is given up.
        self._period_s = min(BEAT_S, silence_s / 4)
        self._beats = _Beats(role, pulses or {}, self._period_s)
        self._failure: SecureError | None = None
        self._failed = threading.Event()
        self._parting: Meta | None = None
        self._origin = Origin()
        self._wake_r, self._wake_w = os.pipe()
        let_go_after_fork(self)
        self._steps = dict.fromkeys(links, "start")
        for link in guarded:
            link.guard(self._reason, self.is_alive)

    @property
    def failure(self) -> SecureError | None:
        """The root cause, once there is one."""
        return self._failure

    def abort(self, error: SecureError) -> None:
        """Tell all peers that this role failed, and stop."""
        self._part({"reason": "abort", "step": self.step} | describe_error(error))

    def fail(self, error: SecureError) -> None:
        """End the session because another thread of this role failed: tell all peers, wake every link by `error`."""
        self._fail(error, tell=True)
        self._wake()

    def bye(self) -> None:
        """Tell all peers that this role leaves in good order, and stop."""
        self._part({"reason": "bye"})

    def let_go(self) -> None:
        """Close a copy's ends of the pipe that wakes this thread."""
        wake, self._wake_r, self._wake_w = (self._wake_r, self._wake_w), -1, -1
        for descriptor in wake:
            with contextlib.suppress(OSError):
                os.close(descriptor)

    def _part(self, meta: Meta) -> None:
        self._parting = self._parting or meta
        self._wake()
        if self.is_alive() and threading.current_thread() is not self:
            self.join(timeout=2.0)

    def _wake(self) -> None:
        # A fork has the same pipe, and must not wake its maker's watch.
        if self._origin.is_here:
            with contextlib.suppress(OSError):
                os.write(self._wake_w, b"x")

    def _reason(self) -> SecureError | None:
        # A broken connection is often noticed before the message that says why.
        self._failed.wait(timeout=1.0)
        return self._failure

    def run(self) -> None:
        """Beat and listen until this role or a peer leaves."""
        try:
            self._beats.start()
            self._listen()
        except SecureError as error:
            self._fail(self._describe(error), tell=True)
        except Exception as error:
            # Without a watch the links would wait for ever. The error's text could hold a value.
            self._fail(ProtocolAbort(f"internal error: {type(error).__name__} in the watch"), tell=True)
        finally:
            self._leave()

    def _listen(self) -> None:
        poll = select.poll()
        poll.register(self._wake_r, select.POLLIN)
        for link in self._links.values():
            poll.register(link.fileno(), select.POLLIN)
        looked = time.monotonic()
        heard = dict.fromkeys(self._links, looked)
        beat = -math.inf
        while self._parting is None:
            if time.monotonic() - beat >= self._period_s:
                beat = time.monotonic()
                for link in self._links.values():
                    link.send("beat", {"step": self.step})
            poll.poll(max(1.0, self._period_s * 500))
            now = time.monotonic()
            # While this process was stopped, or its interpreter busy, nobody looked: that was not the peers' silence.
            blind_s, looked = max(0.0, now - looked - LOOK_S), now
            heard = {role: at + blind_s for role, at in heard.items()}
            for role, link in self._links.items():
                link._read_available()
                while link._inbox:
                    heard[role] = now
                    if not self._hear(role, link):
                        return
            heard.update(dict.fromkeys(self._beats.look(), now))
            for role, at in heard.items():
                if now - at > self._silence_s:
                    raise PeerTimeout(
                        f"{role} has been silent for {self._silence_s:g} s (its last step: {self._steps[role]}; "
                        f"ours: {self.step})"
                    )

    def _describe(self, error: SecureError) -> SecureError:
        if isinstance(error, PeerLost):
            role = next((r for r, link in self._links.items() if link._failure is error), "a peer")
            return PeerLost(f"{role} is gone (its last step: {self._steps.get(role, '?')}; ours: {self.step})")
        return error

    def _hear(self, role: str, link: Link) -> bool:
        """Take one message; return whether to go on."""
        _, text, body = link._inbox.popleft()
        message = _decode(text, body, role)
        if message.kind == "beat":
            self._steps[role] = str(message.meta.get("step"))
            return True
        if message.meta.get("reason") == "bye":
            self._fail(PeerLost(f"{role} has left the session"), tell=False)
            return False
        error = restore_error(message.meta)
        said = f"{role} failed at {message.meta.get('step')}: {error} (we were at {self.step})"
        self._fail(type(error)(said), tell=True)
        return False

    def _fail(self, error: SecureError, *, tell: bool) -> None:
        if self._parting is not None:
            return
        self._failure = error
        if tell:
            # Whoever sees us go shall hear of the root cause, not of our end.
            self._parting = {"reason": "abort", "step": self.step} | describe_error(error)
        self._failed.set()
        for link in self._guarded:
            link.fail(error)
        self._on_failure(error)

    def _leave(self) -> None:
        self._beats.stop()
        for link in self._links.values():
            with contextlib.suppress(SecureError):
                if self._parting is not None:
                    link.timeout_s = 1.0
                    link.send("part", self._parting)
        for link in self._links.values():
            link.finish(0.5 if self._parting is not None else 0.0)
        self.let_go()
