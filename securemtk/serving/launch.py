"""Role processes on this machine: fresh interpreters, their start and their end."""

import contextlib
import os
import select
import subprocess
import sys
import time
from pathlib import Path

from protocols.errors import PeerLost, PeerTimeout
from protocols.forks import Origin, let_go_after_fork
from protocols.net.frames import Message, Refused, from_line, restore_error, to_line
from securemtk.serving.start_messages import Listening
from securemtk.support.silence import SILENT

_PACKAGES = str(Path(__file__).resolve().parents[2])
# What a fresh interpreter runs. To look for garbage while torch is imported takes a sixth of the start, and there is
# none: what is imported stays. `process.settle` ends that.
_START = (
    "import gc; gc.disable(); import runpy, sys; runpy.run_module(sys.argv[1], run_name='__main__', alter_sys=True)"
)


class RoleProcess:
    """One role in a process of its own.

    The process is a fresh interpreter (nothing of ours is forked), leads a session of its own, so
    that Ctrl-C at the terminal reaches only the user's process, and gets its settings through a pipe:
    no secret is in its command line or environment. Its libraries keep no record of it, whatever the user's
    environment says: it is a process of ours.

    Args:
        role: for messages.
        settings: sent as one line.
        module: what the interpreter runs.
        talks: whether the role may write to this process's standard error.
    """

    def __init__(
        self, role: str, settings: Message, *, module: str = "securemtk.serving.role", talks: bool = False
    ) -> None:
        self.role = role
        self._origin = Origin()
        # Before there is a process: one that cannot be told its settings would be left waiting for them.
        line = to_line(settings)
        path = os.pathsep.join([_PACKAGES, *filter(None, [os.environ.get("PYTHONPATH")])])
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", _START, module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=None if talks else subprocess.DEVNULL,
            env=os.environ | SILENT | {"PYTHONPATH": path},
            start_new_session=True,
        )
        let_go_after_fork(self)
        self._write(line)

    @property
    def pid(self) -> int:
        """The process's id."""
        return self._process.pid

    def tell(self, message: Message) -> None:
        """Write a message to the process, as one line."""
        self._origin.require(f"the process of the {self.role}")
        self._write(to_line(message))

    def _write(self, line: bytes) -> None:
        with contextlib.suppress(BrokenPipeError):
            if self._process.stdin is not None:
                self._process.stdin.write(line)
                self._process.stdin.flush()

    def address(self, timeout_s: float) -> tuple[str, int]:
        """Return where the role listens, or raise the error that it announced instead."""
        stdout = self._process.stdout
        if stdout is None or not select.select([stdout], [], [], timeout_s)[0]:
            raise PeerTimeout(f"{self.role} must start within {timeout_s:g} s; it has not")
        line = stdout.readline()
        if not line:
            raise PeerLost(f"{self.role} ended while it started (exit status {self._process.wait(timeout=5)})")
        said = from_line(line, self.role, Listening, Refused)
        if isinstance(said, Refused):
            raise restore_error(said)
        return said.address

    def stop(self, grace_s: float) -> None:
        """Wait for the process to end by itself, then end it; returns when it is gone.

        In a fork of the process that started it nothing happens: it serves its starter.
        """
        if not self._origin.is_here:
            return
        deadline = time.monotonic() + grace_s
        self._close_pipes()
        try:
            self._process.wait(timeout=max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def let_go(self) -> None:
        """Close a copy's ends of the pipes, and forget the process: it is no child of this one."""
        self._close_pipes()
        # Else the copy's Popen would say, when it goes, that its child still runs.
        self._process.returncode = 0

    def _close_pipes(self) -> None:
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):
                    stream.close()


def stop_all(processes: list[RoleProcess], grace_s: float = 0.0) -> None:
    """Stop every process; called at exit for sessions that nobody closed."""
    for process in processes:
        process.stop(grace_s)
    processes.clear()
