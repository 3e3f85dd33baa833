"""Fixtures for all tests, and the rules that no test leaves a thread or a process behind, or writes elsewhere."""

import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers import SUPPORT
from workers import Files

# Before any test imports onnxruntime: tests tell of their user no more than what they test (docs/privacy.md).
os.environ["ORT_DISABLE_TELEMETRY"] = "1"
GUARD = str(SUPPORT / "guard")
sys.path.insert(0, GUARD)

import write_guard  # noqa: E402

from securemtk import Session  # noqa: E402
from securemtk.serving import onnxruntime_api  # noqa: E402

torch.set_num_threads(1)
# Jobs in the background of a shell ignore Ctrl-C, and so would every process that a test starts.
signal.signal(signal.SIGINT, signal.default_int_handler)


# What the first of several workers runs as long as there is any of it: sessions side by side would starve each other.
ROLES = "roles"
# Longest first, in CPU time.
LONG = (
    *("test_cli", "test_session", "test_alive", "test_crypten_backend", "test_demo", "test_readme", "test_benchmarks"),
    *("test_attacks", "test_packaging", "test_mtk_training", "test_leaks", "test_conformance", "test_operators"),
)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> Files:
    """Distribute whole files."""
    return Files(config, log, first=ROLES, long=LONG)


@pytest.fixture(scope="module")
def open_session() -> Iterator[Session]:
    """One session without keys for all tests of a file that leave it alive."""
    with Session() as session:
        yield session


@pytest.fixture
def in_open_session(open_session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let an InferenceSession take the open session where it would start one of its own."""
    monkeypatch.setattr(onnxruntime_api, "Session", lambda *_, **__: open_session)
    monkeypatch.setattr(open_session, "close", lambda: None)


def _children() -> set[int]:
    found = set()
    for task in Path("/proc/self/task").iterdir():
        try:
            found |= {int(pid) for pid in (task / "children").read_text().split()}
        except OSError:
            continue
    return found


@pytest.fixture(autouse=True, scope="session")
def guarded(tmp_path_factory: pytest.TempPathFactory):
    """Let this process and all that it starts write below pytest's temporary folder only, caches apart."""
    base = tmp_path_factory.getbasetemp().resolve()
    (base / "temporary").mkdir()
    changed = {
        write_guard.ALLOWED: str(base),
        write_guard.NOTES: str(base / "written-elsewhere"),
        "TMPDIR": str(base / "temporary"),
        "PYTHONPATH": os.pathsep.join([GUARD, *filter(None, [os.environ.get("PYTHONPATH")])]),
    }
    before = {name: os.environ.get(name) for name in changed}
    os.environ.update(changed)
    tempfile.tempdir = None
    write_guard.install()
    yield
    for name, value in before.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value
    tempfile.tempdir = None


@pytest.fixture(autouse=True)
def nothing_written_elsewhere(guarded: None):
    """Fail a test that would write outside its folders; shared fixtures count for the test that asks for them first."""
    before = len(write_guard.notes())
    yield
    if tried := write_guard.notes()[before:]:
        pytest.fail(f"written elsewhere: {tried}")


@pytest.fixture(autouse=True)
def nothing_left_behind(request: pytest.FixtureRequest):
    """Fail a test that leaves a thread of ours or a child process (module-wide sessions are asked for by name)."""
    shared = {name for name in request.fixturenames if name.endswith("session")}
    before_threads, before_children = set(threading.enumerate()), _children()
    yield
    if shared:
        return
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        threads = [t for t in set(threading.enumerate()) - before_threads if t.name.startswith("securemtk")]
        children = _children() - before_children
        if not threads and not children:
            return
        time.sleep(0.05)
    pytest.fail(f"left behind: threads {threads}, processes {children}")
