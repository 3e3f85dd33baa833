"""The loop of `pulse` as machine code, which runs without the interpreter's lock. Imported by `pulse.warm`."""

import socket
from typing import Any

import numpy as np
from numba import types
from numpy.typing import NDArray

from protocols.primitives.loops import compiled

_DONT_WAIT = int(socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
_send: Any = types.ExternalFunction("send", types.intp(types.int32, types.uintp, types.uintp, types.int32))
_poll: Any = types.ExternalFunction("poll", types.int32(types.uintp, types.uintp, types.int32))


@compiled("void(int32[::1], uint8[:, :, ::1], int64[:, ::1], int32[::1], int64)")
def send_all(
    descriptors: NDArray[np.int32],
    records: NDArray[np.uint8],
    counts: NDArray[np.int64],
    wake: NDArray[np.int32],
    period_ms: int,
) -> None:
    """Send one record to each descriptor in each period, until `wake` can be read; arrays as `Pulse` has them."""
    ahead, size = records.shape[1], records.shape[2]
    wake[2] = 1
    while True:
        for i in range(len(descriptors)):
            sent = counts[0, i]
            if sent < counts[1, i] * size:
                rest = records[i, (sent // size) % ahead, sent % size :]
                n = _send(descriptors[i], rest.ctypes.data, len(rest), _DONT_WAIT)
                if n > 0:
                    counts[0, i] = sent + n
        if _poll(wake.ctypes.data, 1, period_ms) != 0:
            return
