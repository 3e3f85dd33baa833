"""Key files and passphrases, as the command line takes them.

A passphrase comes from a file or, hidden, from the terminal; never from the command line, where others see it.
"""

import getpass
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from protocols.errors import InputError, KeyRefused
from securemtk.runs.places import KEY_SUFFIX, KEYS


def key_files_in(paths: Sequence[Path]) -> list[Path]:
    """Return the key files among paths: files, folders of them, and folders of runs."""
    files: list[Path] = []
    for path in paths:
        folder = path / KEYS if (path / KEYS).is_dir() else path
        files += sorted(folder.glob(f"*{KEY_SUFFIX}")) if folder.is_dir() else [folder]
    if not files:
        raise KeyRefused(f"there must be key files in {', '.join(map(str, paths))}; there are none")
    return files


def header_of(file: Path) -> dict[str, str | bool]:
    """Return what a key file says openly; its secret is not looked at, and its integrity not checked."""
    try:
        body = json.loads(file.read_bytes())
        task, model_id = body["task"], body["model_id"]
        if not (isinstance(task, str) and isinstance(model_id, str)):
            raise TypeError
    except OSError as error:
        raise KeyRefused(f"key file {str(file)!r} must be readable; {error.strerror}") from None
    except (ValueError, KeyError, TypeError, RecursionError):
        raise KeyRefused(f"{str(file)!r} must be a key file; it is none") from None
    return {"file": str(file), "task": task, "model_id": model_id, "locked": "cipher" in body}


def passphrase_of(paths: Sequence[Path], file: Path | None) -> str | None:
    """Return the passphrase of keys where any of them is locked."""
    present = [path for path in paths if path.is_file() or any(path.glob(f"*{KEY_SUFFIX}"))]
    locked = [found["file"] for found in map(header_of, key_files_in(present) if present else []) if found["locked"]]
    return passphrase_from(file, needed=bool(locked), fresh=False)


def passphrase_from(file: Path | None, *, needed: bool, fresh: bool, what: str = "passphrase") -> str | None:
    """Read a passphrase from a file or, hidden, from the terminal; never from the command line."""
    if file is not None:
        try:
            lines = file.read_text().splitlines()
        except (OSError, UnicodeDecodeError):
            raise InputError(f"the passphrase's file {str(file)!r} must be readable text") from None
        if not lines or not lines[0]:
            raise InputError(f"the passphrase's file {str(file)!r} must have it in its first line; that is empty")
        return lines[0]
    if not needed:
        return None
    if not sys.stdin.isatty():
        raise InputError(f"a {what} must be typed at a terminal or be in a file (--passphrase-file); got neither")
    typed = getpass.getpass(f"{what}: ", stream=sys.stderr)
    if fresh and getpass.getpass(f"{what}, again: ", stream=sys.stderr) != typed:
        raise InputError(f"both entries of the {what} must be equal; they differ")
    if not typed:
        raise InputError(f"a {what} must not be empty")
    return typed
