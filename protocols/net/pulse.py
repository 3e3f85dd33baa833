"""A beat that needs no interpreter: records that were sealed ahead, sent by a thread of machine code.

A thread of Python's cannot beat while another one holds the interpreter's lock: one long call in C, such as a sort of
millions of strings, would look as a process that was stopped. The thread here runs a compiled loop without the lock. It
sends what was sealed before, one record each period to each peer, so that it need not know of TLS. It stops when
its process is stopped, which is what peers want to know.

Until that loop is loaded (`warm`), a thread of Python's does the same, and is as silent as the lock makes it.
"""

import contextlib
import os
import select
import socket
import sys
import threading
import time
import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from protocols.forks import let_go_after_fork
from protocols.on_demand import load

# Records that wait for each peer; at two a second, how long the lock may be held: 20 minutes.
AHEAD = 2400
# The same loop twice: of Python, and compiled, which takes part of a second to load.
_NATIVE = "protocols.net.pulse_native"
# How long the loop of Python sleeps at once, in seconds: `warm` waits for it.
_NAP_S = 0.02
_DONT_WAIT = int(socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)


class Pulse:
    """Sends records that `add` was given, one to each descriptor in each period, until it is stopped.

    Args:
        name: of the thread.
        descriptors: of connected sockets, which must stay open until `stop` has returned.
        period_s: time between two records, in seconds.

    A record that the system takes only in part is completed before the next. Errors are nobody's here: who reads the
    sockets sees them.
    """

    def __init__(self, name: str, descriptors: Sequence[int], period_s: float) -> None:
        self._descriptors = np.array(descriptors, dtype=np.int32)
        self._period_ms = max(1, min(round(period_s * 1000), 1 << 30))
        # Rows: bytes sent, and records that are there. Each number only grows, and has one writer.
        self._counts = np.zeros((2, len(descriptors)), dtype=np.int64)
        self._records: NDArray[np.uint8] | None = None
        self._wake = os.pipe()
        # As poll(2) reads it: a descriptor, then 16 bits of events asked for and 16 of events found. Behind it 1 once
        # the compiled loop runs.
        self._poll = np.array([self._wake[0], select.POLLIN, 0], dtype=np.int32)
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        let_go_after_fork(self)

    @property
    def room(self) -> int:
        """How many more records `add` takes for each descriptor."""
        if self._records is None:
            return AHEAD
        sent = self._counts[0] // self._records.shape[2]
        # One slot stays free: its record may be on its way.
        return int((sent + AHEAD - 1 - self._counts[1]).min())

    def add(self, records: Sequence[bytes]) -> None:
        """Take one more record for each descriptor; all records ever given must be of one length."""
        if self._records is None:
            self._records = np.zeros((len(records), AHEAD, len(records[0])), dtype=np.uint8)
        slot = int(self._counts[1, 0]) % AHEAD
        for i, record in enumerate(records):
            self._records[i, slot] = np.frombuffer(record, dtype=np.uint8)
        # Only now: from here on the other thread may send them.
        self._counts[1] += 1

    def start(self) -> None:
        """Begin to send what has been added and will be."""
        self._thread.start()

    def stop(self) -> None:
        """Stop sending; returns when no more will be sent. May be called any number of times."""
        with contextlib.suppress(OSError):
            os.write(self._wake[1], b"x")
        if self._thread.is_alive():
            self._thread.join()
        self.let_go()

    def let_go(self) -> None:
        """Close this process's ends of the pipe that wakes the thread."""
        wake, self._wake = self._wake, (-1, -1)
        for descriptor in wake:
            with contextlib.suppress(OSError):
                os.close(descriptor)

    def _run(self) -> None:
        if self._records is None or not len(self._descriptors):
            return
        self._poll[0] = self._wake[0]
        work = (self._descriptors, self._records, self._counts, self._poll, self._period_ms)
        if _compiled() is None:
            _BY_PYTHON.add(self)
            if _send_all_python(*work):
                return
        compiled = _compiled()
        if compiled is not None:
            compiled(*work)

    @property
    def _waits_for_the_lock(self) -> bool:
        return self._thread.is_alive() and not self._poll[2]


# Those that began before the compiled loop was there.
_BY_PYTHON: "weakref.WeakSet[Pulse]" = weakref.WeakSet()


def warm() -> None:
    """Load the compiled loop; when this returns, pulses that beat already go on with it, whoever holds the lock."""
    load(_NATIVE)
    while any(pulse._waits_for_the_lock for pulse in list(_BY_PYTHON)):
        time.sleep(0.001)
    _BY_PYTHON.clear()


def _compiled() -> Any:
    """Return the compiled loop, None before it is loaded."""
    return getattr(sys.modules.get(_NATIVE), "send_all", None)


def _send_all_python(
    descriptors: NDArray[np.int32],
    records: NDArray[np.uint8],
    counts: NDArray[np.int64],
    wake: NDArray[np.int32],
    period_ms: int,
) -> bool:
    """The same as the compiled loop, with the interpreter; return whether it was stopped, not replaced by that one."""
    size = records.shape[2]
    sockets = [socket.socket(fileno=os.dup(int(d))) for d in descriptors]
    try:
        while _compiled() is None:
            for i, sock in enumerate(sockets):
                slot, offset = divmod(int(counts[0, i]), size)
                if slot < counts[1, i]:
                    with contextlib.suppress(OSError):
                        counts[0, i] += sock.send(records[i, slot % records.shape[1], offset:].data, _DONT_WAIT)
            beaten = time.monotonic()
            while _compiled() is None and (left := beaten + period_ms / 1000 - time.monotonic()) > 0:
                if select.select([int(wake[0])], [], [], min(left, _NAP_S))[0]:
                    return True
        return False
    finally:
        for sock in sockets:
            sock.close()
