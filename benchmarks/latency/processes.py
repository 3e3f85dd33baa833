"""Runners as child processes: one JSON line each, and none outlives the benchmark that started it."""

import contextlib
import json
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Sequence
from types import FrameType
from typing import Any

from benchmarks.report import ROOT

# How long a runner that is told to stop may take to end its own children before its group is killed.
GRACE_S = 4.0
POLL_S = 0.05


class RunnerError(RuntimeError):
    """A runner failed, said nothing or took too long; the message ends with what it last wrote to stderr."""


def run_json(command: Sequence[str], timeout_s: float) -> dict[str, Any]:
    """Run a command in the repository's root and return the JSON object of its last line on stdout.

    The command leads a process group of its own. Whatever ends this function early, Ctrl-C included, ends that
    group: first by an interrupt to the command, so that it can close what it opened, then for good.

    Args:
        command: program and arguments.
        timeout_s: longest time that it may take.

    Raises:
        RunnerError: as its docstring says.
    """
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=err, start_new_session=True)
        try:
            if not _ended(process, timeout_s):
                raise RunnerError(f"{_name(command)} must end within {timeout_s:g} s; it has not\n{_tail(err)}")
        finally:
            _end(process)
        lines = _tail(out).splitlines()
        if process.returncode != 0 or not lines:
            raise RunnerError(f"{_name(command)} failed with exit status {process.returncode}\n{_tail(err)}")
        try:
            answer: dict[str, Any] = json.loads(lines[-1])
        except json.JSONDecodeError:
            raise RunnerError(f"{_name(command)} must end with a line of JSON; got {lines[-1][:200]!r}") from None
        return answer


def _name(command: Sequence[str]) -> str:
    return " ".join(command[command.index("-m") + 1 :] if "-m" in command else command)


def _tail(file: Any) -> str:
    file.seek(0)
    return str(file.read())[-200_000:].strip()


def _ended(process: subprocess.Popen[bytes], timeout_s: float) -> bool:
    """Wait for the end without reaping: until then no other process can get the number of the process or its group."""
    deadline = time.monotonic() + timeout_s
    while not os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
        if time.monotonic() > deadline:
            return False
        time.sleep(POLL_S)
    return True


def _end(process: subprocess.Popen[bytes]) -> None:
    if not _ended(process, 0):
        os.kill(process.pid, signal.SIGINT)
        _ended(process, GRACE_S)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def terminate_as_interrupt() -> None:
    """Treat SIGTERM as Ctrl-C: children are ended before this process."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
