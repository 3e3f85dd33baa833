"""A beat that does not wait for the interpreter."""

import contextlib
import ctypes
import socket
import subprocess
import sys
import time

import pytest
from helpers import environment

from protocols.net import pulse
from protocols.net.pulse import AHEAD, Pulse

SIZE = 75
pulse.warm()
RUNNERS = {"compiled": pulse._compiled(), "of Python": None}


def record(i: int) -> bytes:
    return i.to_bytes(4, "big") + bytes(SIZE - 4)


@contextlib.contextmanager
def beating(period_s: float, peers: int = 1, small: bool = False):
    """A pulse, not started, and the sockets that get its records."""
    pairs = [socket.socketpair() for _ in range(peers)]
    for own, _ in pairs:
        own.setblocking(False)
        if small:
            own.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4608)
    beats = Pulse("securemtk-test-pulse", [own.fileno() for own, _ in pairs], period_s)
    try:
        yield beats, [theirs for _, theirs in pairs]
    finally:
        beats.stop()
        for both in pairs:
            for sock in both:
                sock.close()


def taken(sock: socket.socket, n: int) -> bytes:
    sock.settimeout(20)
    data = bytearray()
    while len(data) < n:
        data += sock.recv(n - len(data))
    return bytes(data)


def test_beats_go_on_while_a_call_holds_the_interpreters_lock():
    with beating(0.05) as (beats, [peer]):
        for i in range(200):
            beats.add([record(i)])
        beats.start()
        taken(peer, SIZE)
        ctypes.PyDLL(None).usleep(1_000_000)  # called with the lock held
        peer.setblocking(False)
        # 20 on an idle machine. A thread of Python's would have sent none since.
        assert len(peer.recv(1 << 20)) >= 5 * SIZE


@pytest.mark.parametrize("runner", RUNNERS)
def test_every_peer_gets_every_record_once_and_in_order_round_the_ring(monkeypatch, runner):
    monkeypatch.setattr(pulse, "_compiled", lambda: RUNNERS[runner])
    monkeypatch.setattr(pulse, "AHEAD", 8)
    with beating(0.001, peers=2) as (beats, peers):
        added = 0
        for _ in range(7):
            beats.add([record(added), record(1000 + added)])
            added += 1
        assert beats.room == 0
        beats.start()
        while added < 40:
            if beats.room:
                beats.add([record(added), record(1000 + added)])
                added += 1
            time.sleep(0.0005)
        for first, peer in zip((0, 1000), peers, strict=True):
            assert taken(peer, 40 * SIZE) == b"".join(record(first + i) for i in range(40))


@pytest.mark.parametrize("runner", RUNNERS)
def test_a_record_that_the_system_took_in_part_is_completed(monkeypatch, runner):
    monkeypatch.setattr(pulse, "_compiled", lambda: RUNNERS[runner])
    with beating(0.001, small=True) as (beats, [peer]):
        for i in range(600):
            beats.add([record(i)])
        beats.start()
        time.sleep(1.0)  # nobody reads, and the system's buffer is full
        assert taken(peer, 600 * SIZE) == b"".join(map(record, range(600)))


def test_a_pulse_has_room_for_twenty_minutes_and_stops_at_once():
    with beating(3600.0) as (beats, [peer]):
        assert beats.room == AHEAD == 2400
        beats.add([record(0)])
        beats.start()
        taken(peer, SIZE)
        start = time.monotonic()
        beats.stop()
        beats.stop()
        assert time.monotonic() - start < 5
        assert not beats._thread.is_alive()


@pytest.mark.parametrize("started", [False, True])
def test_a_pulse_without_peers_or_records_ends_by_itself(started):
    beats = Pulse("securemtk-test-pulse", [], 0.5)
    if started:
        beats.start()
    beats.stop()
    assert not beats._thread.is_alive()


BEFORE_AND_AFTER = """
import ctypes, socket, numba
from protocols.net import pulse
own, theirs = socket.socketpair()
beats = pulse.Pulse("securemtk-test", [own.fileno()], 1.5)
for i in range(100):
    beats.add([bytes(8)])
assert pulse._compiled() is None
beats.start()
theirs.recv(8)
pulse.warm()
ctypes.PyDLL(None).usleep(3_500_000)  # at once, with the lock held
theirs.setblocking(False)
print(len(theirs.recv(1 << 20)) // 8)
beats.stop()
"""


def test_a_pulse_of_python_beats_without_the_lock_as_soon_as_the_compiled_loop_is_warm():
    command = [sys.executable, "-c", BEFORE_AND_AFTER]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), check=True)
    assert int(done.stdout) >= 2
