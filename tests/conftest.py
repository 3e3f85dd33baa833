"""Fixtures for all tests, and the rule that no test leaves a thread or a process behind."""

import signal
import threading
import time
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)
# Jobs in the background of a shell ignore Ctrl-C, and so would every process that a test starts.
signal.signal(signal.SIGINT, signal.default_int_handler)


# Files whose tests start roles. With several workers (pytest-xdist) one of them runs all of these: sessions side by
# side would starve each other.
STARTS_ROLES = (
    *(
        "test_alive",
        "test_benchmarks",
        "test_cli",
        "test_closed_answers",
        "test_crypten_backend",
        "test_demo",
        "test_estimate",
    ),
    "test_fork",
    *("test_grants", "test_mtk_benchmarks", "test_mtk_split", "test_onnx_classical", "test_onnx_lookups"),
    *("test_readme", "test_report", "test_session", "test_session_whole", "test_wire"),
)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep tests of a file together, for the sake of what they share, and those that start roles in one group."""
    for item in items:
        group = "roles" if item.path.stem in STARTS_ROLES else item.path.stem
        item.add_marker(pytest.mark.xdist_group(group))


def _children() -> set[int]:
    found = set()
    for task in Path("/proc/self/task").iterdir():
        try:
            found |= {int(pid) for pid in (task / "children").read_text().split()}
        except OSError:
            continue
    return found


@pytest.fixture(autouse=True)
def nothing_left_behind(request: pytest.FixtureRequest):
    """Fail a test that leaves a thread of ours or a child process (module-wide sessions are asked for by name)."""
    shared = {name for name in request.fixturenames if name.endswith("session")}
    before_threads, before_children = set(threading.enumerate()), _children()
    yield
    if shared:
        return
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        threads = [t for t in set(threading.enumerate()) - before_threads if t.name.startswith("securemtk")]
        children = _children() - before_children
        if not threads and not children:
            return
        time.sleep(0.05)
    pytest.fail(f"left behind: threads {threads}, processes {children}")
