"""No test writes outside its folders: watched in every interpreter that the tests run in or start.

`conftest.py` puts this folder on PYTHONPATH, so that Python imports `sitecustomize` as it starts, and says in an
environment variable where writing is allowed. Elsewhere no file can be opened for writing, made, replaced or removed;
each try is refused and noted, for code under test may swallow the refusal.

Caches are allowed: they are no results, and several belong to the interpreter and its libraries.
"""

import os
import sys
from pathlib import Path

ALLOWED, NOTES = "SECUREMTK_TESTS_WRITE_IN", "SECUREMTK_TESTS_NOTES"
CACHES = {"__pycache__", ".cache", ".pytest_cache", ".hypothesis", ".config"}
# Opened for writing as a matter of course, and harmless: what must not happen is that they are replaced.
SINKS = ("/dev/null", "/dev/tty", "/dev/ptmx", "/dev/pts/", "/dev/shm/", "/proc/")
WRITES = os.O_WRONLY | os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_TRUNC
# Which arguments of an audit event name what it makes or replaces, and which one a folder that this is relative to.
MAKES = {
    "os.rename": ((0, 2), (1, 3)),
    "os.mkdir": ((0, 2),),
    "os.link": ((1, 3),),
    "os.symlink": ((1, 2),),
    "os.truncate": ((0, None),),
    "os.chmod": ((0, 2),),
    "os.remove": ((0, 1),),
    "os.rmdir": ((0, 1),),
}


class WritesOutside(PermissionError):
    """A test, or a process that it started, would write outside its folders."""


def place_of(path: object, folder: object = -1) -> str | None:
    """Return the absolute path that an event names; None for an open file, or one relative to an open folder."""
    if isinstance(path, int) or path is None or folder not in (-1, None):
        return None
    text = os.fsdecode(path)  # type: ignore[arg-type]
    # The name itself may be a link, which is what would be replaced; its folder may not.
    return os.path.join(os.path.realpath(os.path.dirname(os.path.abspath(text))), os.path.basename(text))


def is_allowed(place: str, *, opened: bool) -> bool:
    """Return whether something may be written there; `opened`: without replacing it."""
    roots = os.environ.get(ALLOWED, "/").split(os.pathsep)
    if any(place == root or place.startswith(root.rstrip(os.sep) + os.sep) for root in roots if root):
        return True
    if opened and place.startswith(SINKS):
        return True
    return not CACHES.isdisjoint(Path(place).parts) or os.path.basename(place) in CACHES


def _refuse(event: str, place: str) -> None:
    text = f"{event} {place}"
    if notes := os.environ.get(NOTES):
        handle = os.open(notes, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(handle, text.encode() + b"\n")
        os.close(handle)
    raise WritesOutside(f"a test must write in its own folders; got {text}")


def watch(event: str, arguments: tuple[object, ...]) -> None:
    """Refuse an audit event that writes elsewhere."""
    if event == "open":
        path, mode, flags = arguments
        writes = flags & WRITES if isinstance(flags, int) else False
        place = place_of(path) if writes else None
        if place is not None and not is_allowed(place, opened=True):
            _refuse(f"open {mode or flags}", place)
    elif event in MAKES:
        for name, folder in MAKES[event]:
            place = place_of(arguments[name], -1 if folder is None else arguments[folder])
            if place is not None and not is_allowed(place, opened=False):
                _refuse(event, place)


def notes() -> list[str]:
    """Return what was tried so far, by any process."""
    path = os.environ.get(NOTES, "")
    return Path(path).read_text().splitlines() if os.path.exists(path) else []


def install() -> None:
    """Watch this interpreter from now to its end; without a word on where writing is allowed it watches nothing."""
    if os.environ.get(ALLOWED):
        sys.addaudithook(watch)
