"""What an eavesdropper and what the roles themselves see: no weight, input or key value."""

import queue
import socket
import threading
from collections.abc import Iterator

import numpy as np
import pytest
import small_models

from protocols.net.link import Link
from securemtk import Session
from securemtk.serving import local_start, process
from securemtk.serving import role as roles
from securemtk.serving.launch import RoleProcess

PRECISIONS = (16, 32)


def patterns(values: np.ndarray) -> Iterator[bytes]:
    """Every form in which a value could travel: float32, float64, fixed point at both scales."""
    flat = np.asarray(values, dtype=np.float64).ravel()
    for value in flat[np.abs(flat) > 1e-2]:
        yield np.float32(value).tobytes()
        yield np.float64(value).tobytes()
        for bits in PRECISIONS:
            yield np.int64(round(value * 2**bits)).tobytes()


def secrets_of(keys, weights, x) -> dict[str, list[bytes]]:
    found = {
        "weights": [p for w in weights.values() for p in patterns(w)],
        "input": list(patterns(x)),
        "keys": [p for key in keys.values() for p in patterns(key.pattern)],
    }
    assert all(len(v) > 50 for v in found.values())
    # float32 patterns of 4 bytes would be found by chance in megabytes of masks; those of 8 bytes are not.
    return {name: [p for p in v if len(p) == 8] for name, v in found.items()}


class RoleThread:
    """Stands in for RoleProcess: the same role, over the same sockets, in a thread whose frames we can see."""

    def __init__(self, role, settings):
        self.role, self.pid = role, 0
        self._to, self._from = queue.Queue(), queue.Queue()
        self._to.put(settings)
        self._thread = threading.Thread(target=self._run, name=f"securemtk-{role}")
        self._thread.start()

    def _run(self):
        roles.serve(self)

    def say(self, message):
        self._from.put(message)

    def hear(self, *kinds):
        message = self._to.get(timeout=60)
        assert isinstance(message, kinds)
        return message

    def tell(self, message):
        self._to.put(message)

    def address(self, timeout_s):
        return self._from.get(timeout=timeout_s).address

    def stop(self, grace_s):
        self._thread.join(timeout=20)
        assert not self._thread.is_alive()


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wire")
    return folder, small_models.make_bundle(folder), small_models.multitask()[1]


def run(folder, x) -> None:
    with Session(key_files=folder / "keys") as s:
        model = s.load(folder / "bundle")
        model.predict(x, open_tasks=["digit"])
        model.predict(x)


def test_no_frame_between_roles_holds_a_weight_an_input_or_a_key(bundle, monkeypatch):
    folder, keys, weights = bundle
    frames: list[tuple[str, str, bytes]] = []
    real = Link.send

    def record(link, kind, message=None, arrays=(), **how):
        frames.append((threading.current_thread().name, kind, b"".join(np.asarray(a).tobytes() for a in arrays)))
        real(link, kind, message, arrays, **how)

    monkeypatch.setattr(Link, "send", record)
    monkeypatch.setattr(local_start, "RoleProcess", RoleThread)
    monkeypatch.setattr(process, "end_timer", lambda: threading.Timer(0, lambda: None))
    x = np.random.default_rng(3).uniform(-1, 1, (3, *small_models.SHAPE)).astype(np.float32)
    run(folder, x)
    assert {kind for _, kind, _ in frames} >= {"input", "open", "reveal", "corrections", "seed", "zero", "model"}
    everything = b"".join(body for _, _, body in frames)
    assert len(everything) > 100_000
    for name, listed in secrets_of(keys, weights, x).items():
        hits = [p for p in listed if p in everything]
        assert not hits, f"{len(hits)} of {len(listed)} {name} travel in the clear"
    # The search does find what is there: the user's own masked input is.
    masked = next(body for _, kind, body in frames if kind == "input")
    assert masked[8:16] in everything


def test_an_eavesdropper_on_the_sockets_sees_neither_values_nor_frames(bundle, monkeypatch):
    folder, keys, weights = bundle
    recorded, relays = [bytearray()], []

    def relayed(process, timeout_s, real=RoleProcess.address):
        relay = Relay(real(process, timeout_s), recorded[0])
        relays.append(relay)
        return relay.address

    monkeypatch.setattr(RoleProcess, "address", relayed)
    x = np.random.default_rng(4).uniform(-1, 1, (2, *small_models.SHAPE)).astype(np.float32)
    run(folder, x)
    for relay in relays:
        relay.close()
    wire = bytes(recorded[0])
    assert len(wire) > 100_000  # it did listen
    for name, listed in secrets_of(keys, weights, x).items():
        assert not any(p in wire for p in listed), name
    for word in (b'"kind"', b"corrections", b"prediction", b"securemtk:role", b"digit"):
        assert word not in wire


class Relay:
    """Listens, passes bytes on to the real address and back, and records all of them."""

    def __init__(self, target, record: bytearray):
        self._target, self._record = target, record
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = self._listener.getsockname()
        self._threads: list[threading.Thread] = []
        self._sockets: list[socket.socket] = []
        self._spawn(self._accept)

    def _spawn(self, work, *args):
        thread = threading.Thread(target=work, args=args, name="securemtk-relay", daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self):
        while True:
            try:
                near, _ = self._listener.accept()
                far = socket.create_connection(self._target)
            except OSError:
                return
            self._sockets += [near, far]
            for sock in (near, far):
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._spawn(self._pass, near, far)
            self._spawn(self._pass, far, near)

    def _pass(self, source, sink):
        try:
            while data := source.recv(1 << 16):
                self._record += data
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)
        except OSError:
            pass

    def close(self):
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for thread in self._threads:
            thread.join(timeout=10)
        for sock in self._sockets:
            sock.close()
