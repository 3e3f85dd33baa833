"""What is dead and what is only busy: real processes that are held, stopped, killed and cut off."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import alive_user
import crypten_programs
import numpy as np
import onnxruntime
import pytest
import small_models
import torch
from helpers import SUPPORT, alive, environment

from securemtk import Config, PeerTimeout, Session
from securemtk.crypten_backend import run
from securemtk.serving.launch import RoleProcess

# The fixed limit that there once was.
OLD_LIMIT_S = 3.5
TRUTH = onnxruntime.InferenceSession(small_models.mlp()).run(None, {"x": alive_user.X})[0]


class User:
    """A user's process that `alive_user` drives."""

    def __init__(self, timeout_s: float) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(SUPPORT / "alive_user.py"), str(timeout_s)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment(),
        )
        self.pids = self.hear()["pids"]

    def say(self, command: str) -> None:
        self.process.stdin.write(command + "\n")
        self.process.stdin.flush()

    def hear(self) -> dict:
        return json.loads(self.process.stdout.readline())

    def ask(self, command: str) -> dict:
        self.say(command)
        return self.hear()

    def close(self) -> None:
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.wait(timeout=60)
        self.process.stdout.close()

    def predicts(self, n: int = 1) -> None:
        np.testing.assert_allclose(self.ask(f"predict {n}")["y"], TRUTH, atol=2e-3)


@contextlib.contextmanager
def stopped(*pids: int):
    """Processes that are stopped, as by Ctrl-Z, and go on afterwards."""
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)


@pytest.fixture(scope="module")
def user_session():
    """A user with the settings that a session has when nothing is said."""
    user = User(Config.timeout_s)
    yield user
    user.close()


# --- with the default settings ---------------------------------------------------------------------------------------


def test_a_session_outlives_a_user_that_holds_its_interpreter_between_predictions(user_session):
    user_session.predicts(100)
    assert user_session.ask("hold 7")["held"] > 2 * OLD_LIMIT_S - 0.1
    user_session.predicts(100)
    assert user_session.ask("sort 5000000")["held"] > 0.2
    user_session.predicts()


def test_a_session_outlives_roles_that_are_stopped_for_a_while_during_a_prediction(user_session):
    with stopped(*user_session.pids.values()):
        user_session.say("predict 3")
        time.sleep(7)
    answer = user_session.hear()
    np.testing.assert_allclose(answer["y"], TRUTH, atol=2e-3)
    assert answer["seconds"] > OLD_LIMIT_S


def test_a_session_outlives_a_user_that_is_stopped_for_a_while(user_session):
    user_session.say("predict 50")
    with stopped(user_session.process.pid):
        time.sleep(7)
    np.testing.assert_allclose(user_session.hear()["y"], TRUTH, atol=2e-3)
    user_session.predicts()


# --- with a small limit -----------------------------------------------------------------------------------------------


def test_a_beat_is_not_starved_by_the_interpreter_and_a_stopped_role_is_named_in_time():
    user = User(2.0)
    try:
        user.predicts(3)
        assert user.ask("hold 7")["held"] > 3 * 2.0
        user.predicts(3)
        # All of it at once, as when a machine is paused: nobody could look, so nobody was silent.
        with stopped(user.process.pid, *user.pids.values()):
            time.sleep(5)
        user.predicts(3)
        with stopped(user.pids["keeper"]):
            answer = user.ask("predict 1")
        assert answer["error"] == "PeerTimeout"
        assert "keeper has been silent for 2 s (its last step: " in answer["said"]
        assert "prediction 9" in answer["said"]
        assert answer["seconds"] < 2 + 5
    finally:
        user.close()
    assert not any(alive(pid) for pid in user.pids.values())


def test_roles_end_when_their_user_is_stopped_for_longer_than_the_limit():
    user = User(2.0)
    try:
        user.predicts()
        with stopped(user.process.pid):
            start = time.monotonic()
            while any(alive(pid) for pid in user.pids.values()) and time.monotonic() - start < 20:
                time.sleep(0.05)
            took = time.monotonic() - start
        answer = user.ask("predict 1")
        assert answer["error"] == "PeerTimeout"
        assert "user has been silent for 2 s" in answer["said"]
        assert took < 2 + 5
    finally:
        user.close()


class Cut:
    """Passes bytes between a role and its peers until `now` is set; then nothing more, and no end either."""

    def __init__(self, target) -> None:
        self.now = threading.Event()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = self._listener.getsockname()
        self._target, self._sockets = target, [self._listener]
        self._threads: list[threading.Thread] = []
        self._spawn(self._accept)

    def _spawn(self, work, *args) -> None:
        self._threads.append(threading.Thread(target=work, args=args, name="securemtk-test-cut", daemon=True))
        self._threads[-1].start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                far = socket.create_connection(self._target)
                self._sockets += [near, far]
                self._spawn(self._pass, near, far)
                self._spawn(self._pass, far, near)

    def _pass(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                if not self.now.is_set():
                    sink.sendall(data)

    def close(self) -> None:
        for sock in self._sockets:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()
        for thread in self._threads:
            thread.join(timeout=10)


def test_a_role_behind_a_network_that_is_cut_is_named_in_time(monkeypatch):
    cuts = []

    def behind_a_cut(process, timeout_s, real=RoleProcess.address):
        address = real(process, timeout_s)
        if process.role != "keeper":
            return address
        cuts.append(Cut(address))
        return cuts[0].address

    monkeypatch.setattr(RoleProcess, "address", behind_a_cut)
    try:
        with Session(timeout_s=2.0) as session:
            pids = session.pids
            model = session.load(small_models.mlp())
            model.predict(alive_user.X)
            cuts[0].now.set()
            start = time.monotonic()
            with pytest.raises(PeerTimeout, match="keeper has been silent for 2 s"):
                model.predict(alive_user.X)
            assert time.monotonic() - start < 2 + 5
        assert not any(alive(pid) for pid in pids.values())
    finally:
        for cut in cuts:
            cut.close()


def test_a_party_of_a_crypten_program_that_holds_its_interpreter_is_waited_for():
    for result in run(crypten_programs.busy, 6.0, config=Config(timeout_s=2.0)):
        assert torch.equal(result, torch.tensor([0.0, 3.0]))
