"""Forks of a process that has sessions: real forks, real roles."""

import json
import os
import signal
import subprocess
import sys
import time

import fork_program
import numpy as np
import onnxruntime
import pytest
import small_models
from helpers import SUPPORT, alive, environment

from protocols.forks import Origin
from securemtk import InputError, WrongProcess

# onnxruntime 1.32 starts a thread for its telemetry when it is imported; a fork without that thread hangs at its exit.
ENV = {"ORT_DISABLE_TELEMETRY": "1"}


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """What `fork_program` found; warnings are errors there too."""
    command = [sys.executable, "-W", "error", str(SUPPORT / "fork_program.py"), str(tmp_path_factory.mktemp("store"))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, env=environment(**ENV), check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]) | {"stderr": done.stderr}


def expected():
    return onnxruntime.InferenceSession(small_models.mlp()).run(None, {"x": fork_program.X})[0]


def test_every_door_of_a_copied_session_refuses_at_once_and_says_what_to_do(report):
    doors = report["all doors"]["doors"]
    assert len(doors) == 19
    for name, found in doors.items():
        assert found["error"] == "WrongProcess", (name, found)
        assert "must be used in the process that made it" in found["said"], name
        assert "make a new one after the fork" in found["said"], name
        assert found["seconds"] < 2, name
    assert doors["predict"]["said"].startswith("a session must")
    assert doors["send"]["said"].startswith("the connection to keeper must")


def test_whatever_a_copy_does_its_maker_predicts_on(report):
    assert len(report["answers"]) == 4
    for answer in report["answers"]:
        np.testing.assert_allclose(answer, expected(), atol=2e-3)
    assert report["files"] == 4  # what the maker and its keeper have stored
    assert report["left"] == []
    assert not any(alive(pid) for pid in report["pids"])


def test_a_copy_ends_without_a_word(report):
    assert report["all doors"]["status"] == report["forgotten"]["status"] == 0
    assert report["worker ended"] == 0
    assert report["stderr"] == ""


def test_a_copied_stream_draws_nothing(report):
    draws = report["streams"]
    assert draws.pop("status") == 0
    assert len(draws) == 5
    for name, found in draws.items():
        assert (found["error"], found["said"].split(" must")[0]) == ("WrongProcess", "a random stream"), name
    assert report["streams differ"]


def test_a_worker_of_multiprocessing_is_refused_and_may_have_a_session_of_its_own(report):
    refused, answers = report["worker"]
    assert refused["error"] == "WrongProcess"
    assert refused["seconds"] < 2
    np.testing.assert_allclose(answers, expected(), atol=2e-3)


LIVES_ON = """
import os, sys, time, warnings
import small_models
from securemtk import Session
if __name__ == "__main__":
    session = Session()
    session.load(small_models.mlp())
    warnings.simplefilter("ignore")
    child = os.fork()
    if not child:
        time.sleep(60)
        os._exit(0)
    print(child, *session.pids.values(), flush=True)
    time.sleep(60)
"""


def test_roles_end_with_their_user_though_a_copy_of_it_lives_on():
    process = subprocess.Popen(
        [sys.executable, "-c", LIVES_ON], stdout=subprocess.PIPE, text=True, env=environment(**ENV)
    )
    child, *roles = map(int, process.stdout.readline().split())
    process.kill()
    process.wait()
    process.stdout.close()
    try:
        deadline = time.monotonic() + 5
        while any(alive(pid) for pid in roles) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert len(roles) == 2
        assert not any(alive(pid) for pid in roles)
        assert alive(child)
    finally:
        os.kill(child, signal.SIGKILL)


def test_an_origin_tells_a_process_by_its_number_and_by_its_forks(monkeypatch):
    origin = Origin()
    assert origin.is_here
    origin.require("this")
    with monkeypatch.context() as patch:
        patch.setattr("protocols.forks._forks", 1)  # a later process may get the same number
        assert not origin.is_here
    with monkeypatch.context() as patch:
        patch.setattr("os.getpid", lambda: 1)  # a fork that Python was not told of
        with pytest.raises(InputError, match=r"this must be used in the process that made it \(\d+\); this one \(1\)"):
            origin.require("this")
    assert issubclass(WrongProcess, ValueError)
