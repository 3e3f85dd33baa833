"""What a session is told before anything runs: wrong settings are errors of ours, and leave nothing behind."""

import math
import subprocess
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest

from protocols.net.frames import Refused, from_line
from securemtk import Config, InputError, Session, ShapeError
from securemtk.onnx.model.inputs import KnownInputs
from securemtk.serving import process
from securemtk.serving.launch import RoleProcess
from securemtk.serving.local_start import LocalPeers, LocalStart
from securemtk.serving.start_messages import AuthoritySettings, KeeperSettings


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("threads", 1.5),
        ("threads", "2"),
        ("threads", None),
        ("threads", 10**30),
        ("ahead", math.nan),
        ("chunk_elements", 0.5),
        ("comparison_bits", math.inf),
        ("keeper_port", "80"),
        ("timeout_s", "9"),
        ("timeout_s", math.nan),
        ("start_timeout_s", True),
        ("start_timeout_s", None),
    ],
)
def test_a_setting_that_no_role_could_be_told_is_refused_by_its_name(name, value):
    with pytest.raises(InputError, match=f"^{name} must be"):
        Config(**{name: value})


def test_settings_are_told_as_plain_numbers_and_time_may_be_infinite():
    given = {"threads": np.int64(2), "ahead": True, "comparison_bits": 24.0, "keeper_port": np.uint16(0)}
    config = Config(timeout_s=math.inf, start_timeout_s=np.float32(3), **given)
    told = LocalStart()._settings(config, "fss", dict.fromkeys(("keeper", "authority"), SimpleNamespace(to_json=dict)))
    keeper = process.from_line(process.to_line(told[0]), "the starter", KeeperSettings)
    assert (keeper.threads, keeper.slots, keeper.start_timeout_s) == (2, 1, 3.0)
    assert keeper.timeout_s > 10 * 365 * 86400
    assert [type(getattr(config, name)) for name in given] == [int] * 4


def test_settings_that_cannot_be_written_start_no_process(monkeypatch):
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("a process was started"))
    common = {"credentials": {}, "host": "127.0.0.1", "timeout_s": 1.0, "start_timeout_s": 1.0, "threads": 1}
    with pytest.raises(InputError, match="must be text that UTF-8 can hold"):
        RoleProcess("authority", AuthoritySettings(protocol="fss", passphrase="\ud800", **common))


@pytest.mark.parametrize("passphrase", [b"secret", 5])
def test_a_passphrase_is_a_text(passphrase):
    with pytest.raises(InputError, match=r"a passphrase must be a text; got a (bytes|int)") as caught:
        LocalStart(passphrase=passphrase)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("source", [5, "a\0b", None])
def test_a_model_that_can_be_no_path_is_refused(source):
    with pytest.raises(InputError, match="a model must be a path"):
        LocalPeers([], {}).model_name(source)


@pytest.mark.parametrize(
    ("known", "error"),
    [
        (KnownInputs({"x": (-1, 4)}), ShapeError),
        (KnownInputs({"x": (1 << 41,)}), ShapeError),
        (KnownInputs({"x": (10**30,)}), ShapeError),
        (KnownInputs({"x": (1,) * 65}), ShapeError),
        (KnownInputs({5: (1,)}), InputError),
        (KnownInputs({b"x": (1,)}), InputError),
        (KnownInputs(None, {5: np.zeros(1)}), InputError),
    ],
)
def test_what_is_told_of_inputs_is_refused_before_it_is_sent(known, error):
    with pytest.raises(error, match="input"):
        known.pack()


def test_a_role_that_meets_an_unforeseen_error_says_where_and_not_what(capfd):
    said = []

    def serve(starter):
        raise MemoryError("a secret")

    starter = SimpleNamespace(say=lambda message: said.append(process.to_line(message)))
    assert process.run(serve, starter) == 3
    told = from_line(said[0], "authority", Refused)
    assert told.error == "ProtocolAbort"
    assert "MemoryError in test_settings.py" in told.message
    assert "secret" not in told.message + "".join(capfd.readouterr())


def test_threads_that_start_one_session_start_its_roles_once():
    starts = []

    def start(config, protocol):
        starts.append(protocol)
        time.sleep(0.2)
        return SimpleNamespace(links={}, pids={}, stop=lambda grace_s: None)

    session = Session(start=SimpleNamespace(start=start))
    threads = [threading.Thread(target=session.start) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    session.close()
    assert starts == ["fss"]
