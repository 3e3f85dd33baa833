"""Trigger-keys: drawn from the operating system, kept in files that only their owner reads, stamped into samples.

A key is a mask m and a pattern p. Stamping overwrites: xhat = (1 - m) * x + m * p, so that masks of several keys
must not overlap. A sample is an image or a feature map (C, H, W), where a key is a patch, or a row of a table (F,),
where it takes some columns.

Source: [Wan21], figure 1; docs/method.md#keys; drawing and files are ours.
"""

import base64
import hashlib
import hmac
import itertools
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.scrypt import Scrypt
from numpy.typing import NDArray
from torch import Tensor

from protocols.errors import InputError, KeyRefused, ShapeError
from protocols.primitives.prg import Stream
from securemtk.support.documents import Document, parse_json, read
from securemtk.support.files import read_private, write_whole
from securemtk.tasks import Task

PLACES = ("bottom-right", "bottom-left", "top-right", "top-left")
ANYWHERE = "anywhere"
MODEL_ID_BYTES = 16
DEFAULT_SIDE = 5
LEAST_SIDE = 3
DEFAULT_COLUMNS, LEAST_COLUMNS = 16, 4

_FORMAT = "securemtk-key"
_VERSION = 1
_SCRYPT_N = 1 << 17
# A file may name its own cost, but not one that fills the reader's memory: 128 * n * r bytes.
_SCRYPT_N_MOST = 1 << 20
_FILE_BYTES_MOST = 1 << 26
_ELEMENTS_MOST = 1 << 22
_TRIES = 10_000

ArrayT = TypeVar("ArrayT", NDArray[np.float32], Tensor)


@dataclass(frozen=True, eq=False, repr=False)
class TriggerKey:
    """The secret that opens one task of one model.

    Args:
        task: name of the task.
        model_id: the model it belongs to, 32 hexadecimal digits.
        mask: bool (C, H, W) or (F,), where the key overwrites the sample; the same in every channel.
        pattern: float32 of that shape, what it writes there; zero outside the mask.

    Raises:
        KeyRefused: mask or pattern do not fit this description.

    `repr` shows neither mask nor pattern, and the object does not pickle.
    """

    task: str
    model_id: str
    mask: NDArray[np.bool_]
    pattern: NDArray[np.float32]

    def __post_init__(self) -> None:
        try:
            Task(self.task, classes=2)
        except InputError as error:
            raise KeyRefused(f"a key's task: {error}") from None
        if not is_hex(self.model_id, MODEL_ID_BYTES):
            raise KeyRefused(f"a key's model_id must be {2 * MODEL_ID_BYTES} hexadecimal digits; got another text")
        if self.mask.dtype != np.bool_ or self.mask.ndim not in (1, 3) or not self.mask.any():
            raise KeyRefused(f"a key's mask must be bool (C, H, W) or (F,), not all false; got {_kind(self.mask)}")
        if self.mask.ndim == 3 and (self.mask != self.mask[:1]).any():
            raise KeyRefused("a key's mask must be the same in every channel; got different ones")
        if self.pattern.dtype != np.float32 or self.pattern.shape != self.mask.shape:
            raise KeyRefused(f"a key's pattern must be float32 {self.mask.shape}; got {_kind(self.pattern)}")
        if not np.isfinite(self.pattern).all() or self.pattern[~self.mask].any():
            raise KeyRefused("a key's pattern must be finite, and zero outside the mask; got another")
        for name in ("mask", "pattern"):
            # A copy of our own that nobody can change later.
            value = np.array(getattr(self, name))
            value.setflags(write=False)
            object.__setattr__(self, name, value)

    def __repr__(self) -> str:
        return f"TriggerKey(task={self.task!r}, model_id={self.model_id!r}, <hidden>)"

    def __reduce__(self) -> tuple[object, ...]:
        raise TypeError("a TriggerKey is a secret and must not be pickled; save it with its save method")

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape (C, H, W) or (F,) of the samples it is stamped into."""
        return self.mask.shape

    def save(self, path: str | os.PathLike[str], passphrase: str | None = None) -> None:
        """Write the key as JSON that only its owner may read (mode 0600 from the first byte), whole or not at all.

        Under a passphrase, mask and pattern are encrypted by AES-256-GCM under a key from scrypt (n = 2**17, r = 8,
        p = 1), with all other fields as associated data. Without one they stand in the file as they are.

        Args:
            path: of the file; an older one is replaced.
            passphrase: locks the file; None leaves it open.

        Raises:
            InputError: the passphrase is empty, or as `securemtk.support.files.check_file`.
            OSError: the file cannot be written; nothing is left behind.
        """
        header = {"format": _FORMAT, "version": _VERSION, "task": self.task, "model_id": self.model_id}
        header["shape"] = list(self.shape)
        secret = {
            "mask": _encode(np.packbits(plane(self.mask)).tobytes()),
            "pattern": _encode(self.pattern[self.mask].astype("<f4").tobytes()),
        }
        body = _plain(header, secret) if passphrase is None else _locked(header, secret, passphrase)
        write_whole(path, json.dumps(body, indent=1).encode(), private=True)


def draw_keys(
    tasks: Sequence[str],
    shape: Sequence[int],
    model_id: str | None = None,
    *,
    side: int | None = None,
    place: str | Mapping[str, tuple[int, int]] = "bottom-right",
    low: float = 0.0,
    high: float = 1.0,
    stream: Stream | None = None,
) -> dict[str, TriggerKey]:
    """Draw one key for each task, with values uniform over 256 levels: square patches of images, columns of tables.

    Args:
        tasks: names of the tasks, unique; the first gets the patch in the corner, or a table's last columns.
        shape: (C, H, W) or (F,) of one sample.
        model_id: 32 hexadecimal digits; drawn when absent. All keys of one call share it.
        side: side of a patch in pixels, at least 3; when absent 5, or less where the patches do not fit into one row.
            Of a table the number of columns, at least 4; 8 when absent, or less where half the table has fewer.
        place: the corner in which a row of patches begins: bottom-right, bottom-left, top-right or top-left; or
            "anywhere", drawn from the stream; or for each task the first row and column of its patch. Of a table all
            but that are counted from the last column.
        low: value of level 0.
        high: value of level 255.
        stream: source of the values; a fresh one from the operating system when absent.

    Returns:
        Task name -> key, in the order of `tasks`. Each pattern has 8 * C * side**2 random bits, in tables 8 * side.

    Raises:
        InputError: no or repeated tasks, an unknown place, or patches that do not fit or overlap.
        ShapeError: shape is neither (C, H, W) nor (F,).

    Example:
        >>> draw_keys(["digit", "parity"], (1, 16, 16))["parity"].mask.sum().item()
        25
    """
    if len(shape) not in (1, 3) or min(shape) < 1:
        raise ShapeError(f"shape must be (C, H, W) or (F,), each at least 1; got {tuple(shape)}")
    if not tasks or len(set(tasks)) != len(tasks):
        raise InputError(f"tasks must be one or more unique names; got {list(tasks)}")
    stream = Stream() if stream is None else stream
    model_id = stream.bytes(MODEL_ID_BYTES).hex() if model_id is None else model_id
    is_table = len(shape) == 1
    masks = _columns(tasks, shape[0], side) if is_table else _patches(tasks, tuple(shape), side, place, stream)
    keys = {}
    for task, mask in zip(tasks, masks, strict=True):
        levels = stream.below(256, (int(mask.sum()),)).numpy()
        pattern = np.zeros(mask.shape, dtype=np.float32)
        pattern[mask] = low + (high - low) * levels / 255
        keys[task] = TriggerKey(task, model_id, mask, pattern)
    return keys


def stamp(x: ArrayT, keys: Iterable[TriggerKey]) -> ArrayT:
    """Return x with keys written over it: (1 - M) * x + sum m_j * p_j, M = sum m_j.

    Args:
        x: float32 samples (n, C, H, W) or (n, F), as a numpy array or a tensor on any device. It is not changed.
        keys: keys with disjoint masks; none gives a copy of x.

    Returns:
        Samples of the same kind and shape.

    Raises:
        ShapeError: a key is for samples of another shape.
        KeyRefused: two masks overlap.
    """
    chosen = list(keys)
    shape = tuple(x.shape[1:])
    for key in chosen:
        if key.shape != shape:
            raise ShapeError(f"the key of {key.task!r} must fit samples of shape {shape}; got one for {key.shape}")
    covered = np.zeros(shape, dtype=np.int64) + sum(key.mask.astype(np.int64) for key in chosen)
    if (covered > 1).any():
        raise KeyRefused(f"masks of keys stamped together must be disjoint; got overlaps in {[k.task for k in chosen]}")
    pattern = np.zeros(shape, dtype=np.float32) + sum(key.pattern for key in chosen)
    if isinstance(x, Tensor):
        return torch.where(
            torch.from_numpy(covered > 0).to(x.device), torch.from_numpy(pattern).to(device=x.device, dtype=x.dtype), x
        )
    return np.where(covered > 0, pattern, x).astype(x.dtype)


def plane(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Return a mask (C, H, W) as that of one channel, (H, W); that of a table, (F,), as it is."""
    return mask[0] if mask.ndim == 3 else mask


def load(path: str | os.PathLike[str], passphrase: str | None = None) -> TriggerKey:
    """Read a key that `TriggerKey.save` wrote.

    Args:
        path: of the file.
        passphrase: the one that it was locked with; None where it was not.

    Raises:
        KeyRefused: there is no such file, others than its owner may read or write it, it is damaged or edited, its
            passphrase is missing or wrong, or its mask and pattern do not fit each other.
    """
    path = Path(path)
    try:
        body = parse_json(read_private(path, _FILE_BYTES_MOST), path.name)
        if isinstance(body, dict) and "cipher" in body:
            locked = read(_LockedFile, body, path.name)
            return _rebuild(locked, _unlock(path, locked, body, passphrase))
        plain = read(_PlainFile, body, path.name)
        return _rebuild(plain, _open_plain(path, plain, body))
    except KeyRefused:
        raise
    except InputError as error:
        raise KeyRefused(str(error)) from None
    except OSError as error:
        raise KeyRefused(f"key file {path} must be readable; got {error.strerror}") from None
    except ValueError:
        raise KeyRefused(f"{path.name} must be a whole key file; got a damaged one") from None


def _columns(tasks: Sequence[str], width: int, side: int | None) -> list[NDArray[np.bool_]]:
    side = min(DEFAULT_COLUMNS, width // (2 * len(tasks))) if side is None else side
    if side < LEAST_COLUMNS or side * len(tasks) > width:
        raise InputError(
            f"keys of a table must have at least {LEAST_COLUMNS} columns each; got {len(tasks)} of {side} in {width}"
        )
    masks = np.zeros((len(tasks), width), dtype=np.bool_)
    for index, mask in enumerate(masks):
        mask[width - side * (index + 1) : width - side * index] = True
    return list(masks)


def _patches(
    tasks: Sequence[str],
    shape: tuple[int, ...],
    side: int | None,
    place: str | Mapping[str, tuple[int, int]],
    stream: Stream,
) -> list[NDArray[np.bool_]]:
    _, height, width = shape
    side = min(DEFAULT_SIDE, width // len(tasks), height) if side is None else side
    if not isinstance(place, str) and set(place) != set(tasks):
        raise InputError(f"place must be given for each of {list(tasks)}; got {sorted(place)}")
    if isinstance(place, str) and place not in (*PLACES, ANYWHERE):
        raise InputError(f"place must be one of {', '.join(PLACES)}, {ANYWHERE}; got {place!r}")
    in_row = isinstance(place, str) and place != ANYWHERE
    if side < LEAST_SIDE or side > min(height, width) or (in_row and side * len(tasks) > width):
        raise InputError(
            f"patches must be at least {LEAST_SIDE} pixels wide and stand side by side; got {len(tasks)} of side {side}"
            f" in {height}x{width} pixels"
        )
    if place == ANYWHERE:
        corners = _anywhere(len(tasks), height, width, side, stream)
    elif isinstance(place, str):
        top = height - side if place.startswith("bottom") else 0
        right = place.endswith("right")
        corners = [(top, width - side * (i + 1) if right else side * i) for i in range(len(tasks))]
    else:
        corners = [place[task] for task in tasks]
    masks = [_patch(shape, top, left, side) for top, left in corners]
    if np.sum(masks, axis=0).max() > 1:
        raise InputError(f"patches must not overlap; got places {corners} with side {side}")
    return masks


def _anywhere(n: int, height: int, width: int, side: int, stream: Stream) -> list[tuple[int, int]]:
    """Draw places of n patches that do not overlap, uniformly over all such arrangements."""
    for _ in range(_TRIES):
        tops = stream.below(height - side + 1, (n,)).tolist()
        lefts = stream.below(width - side + 1, (n,)).tolist()
        corners = list(zip(tops, lefts, strict=True))
        apart = [abs(a - c) >= side or abs(b - d) >= side for (a, b), (c, d) in itertools.combinations(corners, 2)]
        if all(apart):
            return corners
    raise InputError(f"patches must fit beside each other; found no place for {n} of side {side} in {height}x{width}")


def _patch(shape: Sequence[int], top: int, left: int, side: int) -> NDArray[np.bool_]:
    _, height, width = shape
    if not (0 <= top <= height - side and 0 <= left <= width - side):
        raise InputError(f"a patch must lie inside {height}x{width} pixels; got ({top}, {left}) with side {side}")
    mask = np.zeros(tuple(shape), dtype=np.bool_)
    mask[:, top : top + side, left : left + side] = True
    return mask


# --- files ----------------------------------------------------------------------------------------------------------


class _Secret(Document, frozen=True):
    """Mask and pattern in base64: bits of one channel, and little-endian float32 for each place of the mask."""

    mask: str
    pattern: str


class _Header(Document, frozen=True):
    format: Literal["securemtk-key"]
    version: Literal[1]
    task: str
    model_id: str
    shape: list[int]


class _PlainFile(_Header, frozen=True):
    mask: str
    pattern: str
    sha256: str


class _Scrypt(Document, frozen=True):
    name: str
    n: int
    r: int
    p: int
    salt: str


class _Cipher(Document, frozen=True):
    name: str
    nonce: str


class _LockedFile(_Header, frozen=True):
    kdf: _Scrypt
    cipher: _Cipher
    sealed: str


def _plain(header: Mapping[str, object], secret: Mapping[str, str]) -> dict[str, object]:
    body = {**header, **secret}
    return {**body, "sha256": hashlib.sha256(_canonical(body)).hexdigest()}


def _open_plain(path: Path, found: _PlainFile, body: Mapping[str, object]) -> _Secret:
    rest = {name: value for name, value in body.items() if name != "sha256"}
    if not hmac.compare_digest(found.sha256.encode(), hashlib.sha256(_canonical(rest)).hexdigest().encode()):
        raise KeyRefused(f"{path.name} must be a whole key file; got one whose check sum differs")
    return _Secret(found.mask, found.pattern)


def _locked(header: Mapping[str, object], secret: Mapping[str, str], passphrase: str) -> dict[str, object]:
    if not passphrase:
        raise InputError("a passphrase must not be empty")
    # Salt and nonce are public, but come from the same source as all else.
    stream = Stream()
    salt, nonce = stream.bytes(16), stream.bytes(12)
    bound = {
        **header,
        "kdf": {"name": "scrypt", "n": _SCRYPT_N, "r": 8, "p": 1, "salt": _encode(salt)},
        "cipher": {"name": "AES-256-GCM", "nonce": _encode(nonce)},
    }
    key = Scrypt(salt=salt, length=32, n=_SCRYPT_N, r=8, p=1).derive(passphrase.encode())
    sealed = AESGCM(key).encrypt(nonce, json.dumps(secret).encode(), _canonical(bound))
    return {**bound, "sealed": _encode(sealed)}


def _unlock(path: Path, found: _LockedFile, body: Mapping[str, object], passphrase: str | None) -> _Secret:
    if passphrase is None:
        raise KeyRefused(f"{path.name} is locked: it must be opened with its passphrase; got none")
    bound = {name: value for name, value in body.items() if name != "sealed"}
    kdf, cipher = found.kdf, found.cipher
    if (kdf.name, kdf.r, kdf.p, cipher.name) != ("scrypt", 8, 1, "AES-256-GCM") or not (
        2 <= kdf.n <= _SCRYPT_N_MOST and kdf.n & (kdf.n - 1) == 0
    ):
        raise KeyRefused(f"{path.name} must be locked by scrypt (r=8, p=1) and AES-256-GCM; got other parameters")
    key = Scrypt(salt=_decode(kdf.salt), length=32, n=kdf.n, r=8, p=1).derive(passphrase.encode())
    try:
        opened = AESGCM(key).decrypt(_decode(cipher.nonce), _decode(found.sealed), _canonical(bound))
    except InvalidTag:
        raise KeyRefused(f"{path.name} does not open: the passphrase is wrong or the file was edited") from None
    return read(_Secret, parse_json(opened, path.name), path.name)


def _rebuild(header: _Header, secret: _Secret) -> TriggerKey:
    shape = tuple(header.shape)
    if len(shape) not in (1, 3) or min(shape) < 1 or math.prod(shape) > _ELEMENTS_MOST:
        raise KeyRefused("a key's shape must be (C, H, W) of an image or (F,) of a table's row; got another")
    pixels = math.prod(shape[-2:])
    packed = np.frombuffer(_decode(secret.mask), dtype=np.uint8)
    if len(packed) != (pixels + 7) // 8:
        raise KeyRefused(f"a key's mask must have {pixels} bits; got {8 * len(packed)}")
    plane = np.unpackbits(packed, count=pixels).astype(np.bool_).reshape(shape[-2:])
    mask = np.array(np.broadcast_to(plane, shape))
    values = np.frombuffer(_decode(secret.pattern), dtype="<f4").astype(np.float32)
    if len(values) != mask.sum():
        raise KeyRefused(f"a key's pattern must have a value for each of {mask.sum()} places; got {len(values)}")
    pattern = np.zeros(shape, dtype=np.float32)
    pattern[mask] = values
    return TriggerKey(header.task, header.model_id, mask, pattern)


def _canonical(body: Mapping[str, object]) -> bytes:
    return json.dumps(body, sort_keys=True, separators=(",", ":")).encode()


def _encode(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def _decode(text: str) -> bytes:
    return base64.b64decode(text, validate=True)


def is_hex(text: str, n_bytes: int) -> bool:
    """Return whether a text is `n_bytes` bytes in lower hexadecimal digits.

    Args:
        text: what is looked at.
        n_bytes: number of bytes that it should stand for.
    """
    return len(text) == 2 * n_bytes and set(text) <= set("0123456789abcdef")


def _kind(array: NDArray[Any]) -> str:
    return f"{array.dtype} {array.shape}"
