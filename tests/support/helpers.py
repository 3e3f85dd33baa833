"""Small things that several tests need."""

import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SUPPORT = ROOT / "tests" / "support"

# Longer than anything here takes where other work runs, and shorter than what pytest gives a test.
PATIENCE_S = 500.0


def environment(**more: str) -> dict[str, str]:
    """Return the environment of a fresh interpreter that imports what these tests do."""
    return os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(SUPPORT)])} | more


def alive(pid: int) -> bool:
    """Return whether a process runs (a zombie does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def wait_until(
    ready: Callable[[], object], what: str = "what the test waits for", *, running: subprocess.Popen | None = None
) -> None:
    """Wait until a condition holds.

    How long that takes says how busy the machine is: a test that promises a time measures it by itself.

    Args:
        ready: the condition.
        what: named when it does not hold in time.
        running: the process that is to bring it about; when it ends before, so does the wait.
    """
    deadline = time.monotonic() + PATIENCE_S
    while not ready():
        if running is not None and running.poll() is not None and not ready():
            raise AssertionError(f"the process must run until {what}; it ended with {running.returncode}")
        assert time.monotonic() < deadline, f"{what}: not within {PATIENCE_S:g} s"
        time.sleep(0.01)
