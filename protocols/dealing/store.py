"""Correlations that wait on disk: sealed, read once, and useless once this process has ended.

A `SealedStore` has a folder of its own inside the one that it is given, which only this user may open, and one file for
prediction. Each file is sealed by AES-256-GCM under a key of its own, which is drawn when the file is written, lives in
this process's memory alone, and is forgotten when the file is read. So whoever has the disk learns how much waits and
nothing else; a file that was read cannot be brought back; and what a process leaves that was killed opens to nobody.
The next store in the same place removes it: a lock on its folder, which ends with the process, tells who lives.

Source: AES-GCM, [SP800-38D], nonces by counter (section 8.2.1); keys from getrandom(2); docs/protocols.md#store.
"""

import contextlib
import fcntl
import itertools
import math
import os
import shutil
import tempfile
import weakref
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from torch import Tensor

from protocols.errors import DealerError, InputError, StoreError
from protocols.forks import Origin, let_go_after_fork
from protocols.primitives.prg import fresh_seed

# Folders of this name inside the one that a store is given belong to stores, and are removed when nobody holds them.
PREFIX = "securemtk-store-"
# Sealed at a time: what a store needs in memory beside the tensors.
PIECE_BYTES = 1 << 22
TAG_BYTES = 16


class SealedStore:
    """The correlations of coming predictions of one party, on disk.

    Args:
        folder: made when absent; stores of several roles and sessions may share it.
        role: whose correlations these are; for messages and sealed with each file.

    Raises:
        InputError: the folder cannot be used.

    Security: sealed under keys that are never written. Files are not wiped but unlinked, for they are ciphertext.
        Names and sizes tell the number and the size of the predictions to come.
    """

    def __init__(self, folder: str | os.PathLike[str], role: str) -> None:
        root = Path(folder).absolute()
        try:
            root.mkdir(mode=0o700, parents=True, exist_ok=True)
            with _locked(root):
                _remove_forsaken(root)
                self._folder = Path(tempfile.mkdtemp(prefix=f"{PREFIX}{role}-", dir=root))
                lock = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY)
                fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError as error:
            raise InputError(f"store must be a folder that the {role} can write to; {error.strerror}") from None
        self._role = role
        self._last = -1
        self._keys: dict[int, bytes] = {}
        self._origin, self._lock = Origin(), lock
        self._end = weakref.finalize(self, _remove, self._folder, lock, self._origin)
        let_go_after_fork(self)

    def __repr__(self) -> str:
        return f"SealedStore({len(self._keys)} predictions of the {self._role})"

    def put(self, prediction: int, tensors: Sequence[Tensor]) -> None:
        """Write a prediction's tensors, int64 of any shapes: whole or not at all.

        Raises:
            DealerError: this prediction, or a later one, has been written before.
            StoreError: the disk refuses.
        """
        self._origin.require("a store")
        if prediction <= self._last:
            raise DealerError(f"the correlations of prediction {prediction} must be stored once; they have been")
        self._last = prediction
        key = fresh_seed() + fresh_seed()
        seal, about, counter = AESGCM(key).encrypt, self._about(prediction), itertools.count()
        path = self._path(prediction)
        try:
            with open(path, "xb", opener=partial(os.open, mode=0o600)) as file:
                for tensor in tensors:
                    for piece in _pieces(tensor.contiguous().numpy()):
                        file.write(seal(_nonce(counter), piece, about))
        except OSError as error:
            with contextlib.suppress(OSError):
                path.unlink()
            raise self._broken(prediction, f"be written; {error.strerror}") from None
        self._keys[prediction] = key

    def take(self, prediction: int, shapes: Sequence[Sequence[int]]) -> list[Tensor]:
        """Return what was put for a prediction, int64 of these shapes; its file and its key are gone by then.

        Raises:
            DealerError: nothing was put, or it was taken.
            StoreError: the file is missing, cut, altered or another one.
        """
        self._origin.require("a store")
        key = self._keys.pop(prediction, None)
        if key is None:
            raise DealerError(f"the correlations of prediction {prediction} must be stored, and be read once")
        unseal, about, counter = AESGCM(key).decrypt, self._about(prediction), itertools.count()
        arrays = [np.empty(tuple(shape), dtype=np.int64) for shape in shapes]
        path = self._path(prediction)
        try:
            with open(path, "rb") as file:
                path.unlink()
                if os.fstat(file.fileno()).st_size != sealed_bytes(shapes):
                    raise self._broken(prediction, "be whole; the file has another size")
                for array in arrays:
                    for piece in _pieces(array):
                        piece[:] = unseal(_nonce(counter), file.read(len(piece) + TAG_BYTES), about)
        except OSError as error:
            raise self._broken(prediction, f"be there; {error.strerror}") from None
        except InvalidTag:
            raise self._broken(prediction, "be as they were written; the file was altered") from None
        return [torch.from_numpy(array) for array in arrays]

    def drop(self, prediction: int) -> None:
        """Remove what was put for a prediction, unread."""
        self._origin.require("a store")
        if self._keys.pop(prediction, None) is not None:
            with contextlib.suppress(OSError):
                self._path(prediction).unlink()

    def close(self) -> None:
        """Remove all files and forget all keys; may be called any number of times. In a fork no file is removed."""
        self._keys.clear()
        self._end()

    def let_go(self) -> None:
        """Forget a copy's keys and close its hold of the folder's lock, which else would outlive the maker."""
        self._keys.clear()
        if self._end.detach() is not None:
            os.close(self._lock)

    def _path(self, prediction: int) -> Path:
        return self._folder / f"{prediction}.sealed"

    def _about(self, prediction: int) -> bytes:
        # The folder's name holds the role and is this store's alone.
        return f"{self._folder.name} {prediction}".encode()

    def _broken(self, prediction: int, said: str) -> StoreError:
        return StoreError(f"the {self._role}'s correlations of prediction {prediction} on disk must {said}")


def sealed_bytes(shapes: Sequence[Sequence[int]]) -> int:
    """Return the size of the file of int64 tensors of these shapes."""
    sizes = [8 * math.prod(shape) for shape in shapes]
    return sum(n + TAG_BYTES * -(-n // PIECE_BYTES) for n in sizes)


def _pieces(array: np.ndarray) -> Iterator[memoryview]:
    view = array.data.cast("B") if array.size else memoryview(b"")
    for start in range(0, len(view), PIECE_BYTES):
        yield view[start : start + PIECE_BYTES]


def _nonce(counter: Iterator[int]) -> bytes:
    return next(counter).to_bytes(12, "big")


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keep other stores from starting in `folder`: one that has no lock yet must not be taken for forsaken."""
    held = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(held, fcntl.LOCK_EX)
        yield
    finally:
        os.close(held)


def _remove_forsaken(root: Path) -> None:
    for path in root.glob(f"{PREFIX}*"):
        try:
            held = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except OSError:
            continue  # no store's folder, or another user's
        try:
            if os.fstat(held).st_uid == os.getuid():
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path)
        except BlockingIOError:
            continue  # its process lives
        finally:
            os.close(held)


def _remove(folder: Path, lock: int, origin: Origin) -> None:
    if origin.is_here:
        shutil.rmtree(folder, ignore_errors=True)
    os.close(lock)
