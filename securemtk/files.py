"""Results on disk: whole or not at all."""

import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from protocols.errors import InputError


def write_whole(path: str | os.PathLike[str], data: bytes, *, private: bool = False) -> None:
    """Write a file so that its name always stands for all of it: the old content, or `data`.

    Args:
        path: the file; its folder must be there.
        data: all of its content.
        private: whether only its owner may read and write it, mode 0600 from the first byte.

    Raises:
        OSError: the disk refuses; nothing is left behind.
    """
    target = Path(os.path.abspath(path))
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.", suffix=".tmp") as work:
        fresh = Path(work) / "new"
        mode = 0o600 if private else 0o666
        with open(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(fresh, target)


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
    work = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.", suffix=".tmp"))
    try:
        fresh, old = work / "new", work / "old"
        fresh.mkdir()
        yield fresh
        check_new_folder(folder, replaceable=replaceable)
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
