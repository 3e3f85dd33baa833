"""A log that only grows: one JSON object a line, each holding the SHA-256 of the line before and one of its own.

What it finds: a line that was edited, removed, inserted or put elsewhere. A last line that a crash cut off is told
apart from that, and the next line says that it was there. What it cannot find by itself: whole lines cut off at the
end, and a log that somebody wrote anew from the start, for nothing in it is secret. Note `Verdict.head` elsewhere and
ask for it: it must stand in every later state of the log.
"""

import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from protocols.errors import InputError
from securemtk.support.files import check_private

START = "0" * 64


@dataclass(frozen=True)
class Verdict:
    """What reading a log from its start has shown.

    Args:
        lines: whole lines that follow one another, from the first.
        head: SHA-256 of the last of them, 64 hexadecimal digits.
        torn: whether something after the last whole line was cut off, as by a crash; it counts for nothing.
        broken: number of the first line that does not fit the one before; None where all do.
        known: whether the head that was asked for stands in the log; True where none was asked for.
    """

    lines: int
    head: str
    torn: bool
    broken: int | None
    known: bool

    @property
    def ok(self) -> bool:
        """Whether nothing was edited, removed or put elsewhere, as far as the log can tell."""
        return self.broken is None and self.known


class AuditLog:
    """Appends lines to a log, for several processes at a time.

    Args:
        path: the file, mode 0600; made when absent.
        read: told each entry in order, those of other processes and our own.
    """

    def __init__(
        self, path: str | os.PathLike[str], read: Callable[[Mapping[str, Any]], None] = lambda entry: None
    ) -> None:
        self.path = Path(path)
        self._read = read
        self._chain = _Chain()
        self._offset = 0
        self._fd = -1

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the log against all other processes.

        Raises:
            InputError: it is no regular file, or others than its owner may read or write it.
            OSError: it cannot be opened.
        """
        flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        fd = os.open(self.path, flags, 0o600)
        try:
            check_private(fd, self.path)
            fcntl.flock(fd, fcntl.LOCK_EX)
            self._fd = fd
            yield
        finally:
            self._fd = -1
            os.close(fd)

    def refresh(self) -> bytes:
        """Read what was added since, inside `locked`; return what stands behind the last whole line.

        Raises:
            InputError: a line does not follow the one before.
            OSError: the disk refuses.
        """
        size = os.fstat(self._fd).st_size
        if size < self._offset:
            raise InputError(f"the log {self.path.name} must only grow; it was cut")
        *lines, tail = _read_from(self._fd, self._offset).split(b"\n")
        for line in lines:
            entry = self._chain.follow(line)
            self._offset += len(line) + 1
            if entry is not None:
                self._read(entry)
        self._chain.end(tail)
        if self._chain.broken is not None:
            raise InputError(f"the log {self.path.name} must be as it was written; line {self._chain.broken} is not")
        return tail

    def append(self, entries: Sequence[Mapping[str, Any]]) -> None:
        """Add lines inside `locked`; they are on the disk when this returns.

        Raises:
            InputError: as `refresh`; nothing was written.
            OSError: the disk refuses; what it took of the lines counts for nothing.
        """
        tail = self.refresh()
        chain = self._chain.copy()
        if tail:
            chain.follow(tail)
        data = b"\n" if tail else b""
        for entry in entries:
            data += chain.next(entry) + b"\n"
        # One call: a crash leaves a first part of it, never a line between two others.
        if os.write(self._fd, data) != len(data):
            raise OSError("the log took only a part of a line")
        os.fsync(self._fd)
        if self._offset == 0:
            _sync_folder(self.path.parent)
        self.refresh()


def verify(path: str | os.PathLike[str], head: str | None = None) -> Verdict:
    """Read a log from its start.

    Args:
        path: the log.
        head: a head that an earlier call returned; it must still be there.

    Raises:
        OSError: it cannot be read.
    """
    return read(path, head)[1]


def read(path: str | os.PathLike[str], head: str | None = None) -> tuple[list[Mapping[str, Any]], Verdict]:
    """Return the entries of a log up to the first line that does not fit, and what `verify` returns.

    Args:
        path: the log.
        head: as in `verify`.
    """
    with open(path, "rb") as file:
        # While a writer is at work, its line may be there in part.
        fcntl.flock(file, fcntl.LOCK_SH)
        *lines, tail = file.read().split(b"\n")
    chain = _Chain()
    entries, known = [], head in (None, START)
    for line in lines:
        entry = chain.follow(line)
        if entry is not None:
            entries.append(entry)
        known = known or chain.head == head
    chain.end(tail)
    return entries, Verdict(chain.n, chain.head, bool(tail), chain.broken, known)


class _Chain:
    """The state of a log after some of its lines."""

    def __init__(self) -> None:
        self.n, self.head, self.seen = 0, START, 0
        # Lines that are none, of which the next one must tell: several where one crash followed another.
        self.cut: tuple[bytes, ...] = ()
        self.broken: int | None = None

    def copy(self) -> "_Chain":
        other = _Chain()
        vars(other).update(vars(self))
        return other

    def follow(self, line: bytes) -> Mapping[str, Any] | None:
        """Take the next line of the file; return its entry unless it is cut or does not fit."""
        self.seen += 1
        if self.broken is not None:
            return None
        entry = _parse(line)
        if entry is None:
            self.cut += (line,)
            return None
        if (entry.get("n"), entry.get("prev"), entry.get("torn")) != (self.n + 1, self.head, self._torn()):
            self.broken = self.seen - len(self.cut)
            return None
        self.n, self.head, self.cut = self.n + 1, _digest(line), ()
        return entry

    def end(self, tail: bytes) -> None:
        """Take the end of the file, and what stands there without an end of its line."""
        # A crash leaves a cut line last, and never one with an end: that is written after all the rest of it.
        if self.cut and not tail and self.broken is None:
            self.broken = self.seen - len(self.cut) + 1

    def next(self, entry: Mapping[str, Any]) -> bytes:
        """Return the line for an entry, and follow it."""
        torn = {} if not self.cut else {"torn": self._torn()}
        whole = {"n": self.n + 1, **entry, **torn, "prev": self.head}
        line = _write(whole | {"sha256": _digest(_write(whole))})
        self.follow(line)
        return line

    def _torn(self) -> str | None:
        return _digest(b"\n".join(self.cut)) if self.cut else None


def _parse(line: bytes) -> Mapping[str, Any] | None:
    try:
        entry = json.loads(line)
        rest = {name: value for name, value in entry.items() if name != "sha256"}
        # Written anew it must be the same: two texts of one entry would have two hashes.
        whole = entry["sha256"] == _digest(_write(rest)) and _write(entry) == line
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
        return None
    return entry if whole else None


def _write(entry: Mapping[str, Any]) -> bytes:
    return json.dumps(entry, separators=(",", ":")).encode()


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _read_from(fd: int, offset: int) -> bytes:
    parts = []
    while part := os.pread(fd, 1 << 20, offset):
        parts.append(part)
        offset += len(part)
    return b"".join(parts)


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
