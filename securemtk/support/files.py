"""Results on disk: whole or not at all, and never in the place of anything but an older file or folder.

Everything that securemtk writes under a name that somebody gave goes through here. What takes a name by being renamed
would also replace a device, a pipe or a socket of that name, and programs that need /dev/null would then fail; a link
would be replaced instead of what it leads to. All of these are refused, before the work whose result it would be.
"""

import os
import shutil
import stat
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from protocols.errors import InputError

_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFLNK: "a symbolic link",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
}


def check_file(path: str | os.PathLike[str], what: str = "a file to write") -> Path:
    """Return the absolute path of a file that may be made, or replaced; for use before the work.

    Args:
        path: absent, or a regular file; nothing there is changed.
        what: for the message.

    Raises:
        InputError: its folder is not there, or what has the name is no regular file: a folder, a symbolic link
            (wherever it leads), a device, a named pipe or a socket.
        OSError: the folder takes no new file.
    """
    target = Path(os.path.abspath(path))
    said = f"got {os.fspath(path)!r}"
    if not target.parent.is_dir():
        raise InputError(f"{what} must lie in a folder that is there; {said}")
    _mode(target, what)
    # Only trying tells: root may write everywhere by the modes. What is opened here never has a name.
    with tempfile.TemporaryFile(dir=target.parent):
        return target


def _mode(target: Path, what: str) -> int | None:
    """Return the mode of what has a name, None where nothing has; raise InputError unless it is a regular file."""
    try:
        mode = os.lstat(target).st_mode
    except FileNotFoundError:
        return None
    if not stat.S_ISREG(mode):
        found = _KINDS.get(stat.S_IFMT(mode), "something else")
        raise InputError(f"{what} must be a new name or a regular file; {str(target)!r} is {found}")
    return stat.S_IMODE(mode)


@contextmanager
def whole_file(path: str | os.PathLike[str], *, private: bool = False) -> Iterator[BinaryIO]:
    """Give a file to write that takes the name `path` when the block ends well, and vanishes otherwise.

    Args:
        path: the file; its folder must be there. An older file keeps its mode; links to it elsewhere keep the old
            content.
        private: whether only its owner may read and write it, mode 0600 from the first byte.

    Raises:
        InputError: as `check_file`, before the block and, for what has come meanwhile, after it.
        OSError: the disk refuses; nothing is left behind.
    """
    target = check_file(path)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name[:40]}.", suffix=".tmp") as work:
        fresh = Path(work) / "new"
        with open(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600 if private else 0o666), "wb") as file:
            yield file
            file.flush()
            mode = _mode(target, "a file to write")
            if mode is not None and not private:
                os.fchmod(file.fileno(), mode)
            os.fsync(file.fileno())
        os.replace(fresh, target)


def write_whole(path: str | os.PathLike[str], data: bytes, *, private: bool = False) -> None:
    """Write a file so that its name always stands for all of it: the old content, or `data`.

    Args:
        path, private: as in `whole_file`.
        data: all of its content.

    Raises:
        InputError: as `check_file`.
        OSError: the disk refuses; nothing is left behind.
    """
    with whole_file(path, private=private) as file:
        file.write(data)


def check_private(descriptor: int, path: str | os.PathLike[str]) -> None:
    """Raise InputError unless an open file is a regular one that its owner alone may read and write, mode 0600.

    Args:
        descriptor: of the file.
        path: its name, for the message.
    """
    found = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(found):
        raise InputError(f"{os.path.basename(path)} must be a regular file; it is none")
    mode = stat.S_IMODE(found)
    if mode & 0o077:
        raise InputError(
            f"{os.path.basename(path)} must be readable by its owner alone; got mode {mode:04o}: run chmod 600 {path}"
        )


def no_waiting(path: str, flags: int) -> int:
    """Open a file, for `open` as its opener: without O_NONBLOCK a named pipe in its place would wait for a writer.

    Args:
        path: of the file.
        flags: those that `open` chose.
    """
    return os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC)


def read_regular(
    path: str | os.PathLike[str], most_bytes: int, what: str, *, folder: int | None = None, follow: bool = True
) -> bytes:
    """Return all bytes of a regular file.

    Args:
        path: of the file.
        most_bytes: how many it may have.
        what: names it in a message.
        folder: descriptor of the folder at which a relative path starts; the working folder when absent.
        follow: whether the path may be a symbolic link.

    Raises:
        InputError: it is no regular file, or longer.
        OSError: it cannot be read.
    """
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | (0 if follow else os.O_NOFOLLOW)
    with open(os.open(path, flags, dir_fd=folder), "rb") as file:
        facts = os.fstat(file.fileno())
        if not stat.S_ISREG(facts.st_mode):
            raise InputError(f"{what} must be a regular file; it is none")
        if facts.st_size > most_bytes:
            raise InputError(f"{what} must be at most {most_bytes} bytes; got {facts.st_size}")
        return file.read(most_bytes)


def read_private(path: str | os.PathLike[str], most_bytes: int) -> bytes:
    """Return what a private file begins with, up to a number of bytes.

    Args:
        path: of the file.
        most_bytes: how much is read.

    Raises:
        InputError: as `check_private`; mode and content are those of the same open file.
        OSError: it cannot be read.
    """
    with open(path, "rb", opener=no_waiting) as file:
        check_private(file.fileno(), path)
        return file.read(most_bytes)


def check_new_folder(folder: str | os.PathLike[str], *, replaceable: Sequence[str] = ()) -> Path:
    """Return the absolute path of a folder that may be made, or replaced.

    Args:
        folder: absent, empty, or holding all the files of `replaceable`.
        replaceable: names of files by which we know that the folder is an older result of the same kind.

    Raises:
        InputError: something else is there.
    """
    target = Path(os.path.abspath(folder))
    if os.path.lexists(target):
        if target.is_symlink() or not target.is_dir():
            raise InputError(f"{os.fspath(folder)!r} must be a new or empty folder; something else is there")
        present = set(os.listdir(target))
        if present and not (replaceable and set(replaceable) <= present):
            raise InputError(f"{os.fspath(folder)!r} must be a new or empty folder; it holds other files")
    return target


@contextmanager
def new_folder(folder: str | os.PathLike[str], *, replaceable: Sequence[str] = ()) -> Iterator[Path]:
    """Give an empty folder that takes the place of `folder` when the block ends well, and vanishes otherwise.

    Args:
        folder, replaceable: as in `check_new_folder`; absent parents are made.

    Raises:
        InputError: as `check_new_folder`.
        OSError: the disk refuses.

    Example:
        >>> with new_folder("result") as work:                         # doctest: +SKIP
        ...     write_whole(work / "figures.json", b"{}")
    """
    target = check_new_folder(folder, replaceable=replaceable)
    target.parent.mkdir(parents=True, exist_ok=True)
    with replaced_folder(target) as fresh:
        yield fresh
        check_new_folder(folder, replaceable=replaceable)


@contextmanager
def replaced_folder(target: Path, *, private: bool = False) -> Iterator[Path]:
    """Give an empty folder that takes the place of whatever folder is at `target`, or vanishes if the block fails.

    Args:
        target: absent, or a folder that the caller has looked at: it is removed. Its parent must be there.
        private: whether nobody but its owner may enter, mode 0700.

    Raises:
        OSError: the disk refuses; what was there is there again.
    """
    work = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name[:40]}.", suffix=".tmp"))
    try:
        fresh, old = work / "new", work / "old"
        fresh.mkdir(mode=0o700 if private else 0o777)
        yield fresh
        if os.path.lexists(target):
            os.rename(target, old)
        try:
            os.rename(fresh, target)
        except OSError:
            if old.exists():
                os.rename(old, target)
            raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
