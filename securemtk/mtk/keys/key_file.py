"""Key files: what a trigger-key consists of as JSON, locked by a passphrase or not, for its owner alone to read.

Who wants another form of these files changes this module. Nothing else knows it, but that task, model and whether it is
locked can be read without it, as the command line does (`securemtk/cli/secrets.py`).
"""

import base64
import hashlib
import hmac
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.scrypt import Scrypt

from protocols.errors import InputError, KeyRefused
from protocols.primitives.prg import Stream
from securemtk.support.documents import Document, parse_json, read
from securemtk.support.files import read_private, write_whole

_FORMAT = "securemtk-key"
_VERSION = 1
_SCRYPT_N = 1 << 17
# A file may name its own cost, but not one that fills the reader's memory: 128 * n * r bytes.
_SCRYPT_N_MOST = 1 << 20
_FILE_BYTES_MOST = 1 << 26


@dataclass(frozen=True, repr=False)
class KeyContent:
    """What a key file holds; nothing has been looked at but that it is what was written.

    Args:
        task: name of the task.
        model_id: of the model.
        shape: of the samples that the key is stamped into.
        mask: bits of one channel, or of a table's row, packed into bytes.
        pattern: little-endian float32 for each place of the mask, in every channel.
    """

    task: str
    model_id: str
    shape: tuple[int, ...]
    mask: bytes
    pattern: bytes


def save_content(path: str | os.PathLike[str], content: KeyContent, passphrase: str | None) -> None:
    """Write a key file (mode 0600 from the first byte), whole or not at all.

    Under a passphrase, mask and pattern are encrypted by AES-256-GCM under a key from scrypt (n = 2**17, r = 8,
    p = 1), with all other fields as associated data. Without one they stand in the file as they are.

    Args:
        path: of the file; an older one is replaced.
        content: of the key.
        passphrase: locks the file; None leaves it open.

    Raises:
        InputError: the passphrase is empty, or as `securemtk.support.files.check_file`.
        OSError: the file cannot be written; nothing is left behind.
    """
    header = {"format": _FORMAT, "version": _VERSION, "task": content.task, "model_id": content.model_id}
    header["shape"] = list(content.shape)
    secret = {"mask": _encode(content.mask), "pattern": _encode(content.pattern)}
    body = _plain(header, secret) if passphrase is None else _locked(header, secret, passphrase)
    write_whole(path, json.dumps(body, indent=1).encode(), private=True)


def load_content(path: Path, passphrase: str | None) -> KeyContent:
    """Read what `save_content` wrote.

    Args:
        path: of the file.
        passphrase: the one that it was locked with; None where it was not.

    Raises:
        KeyRefused: there is no such file, others than its owner may read or write it, it is damaged or edited, or its
            passphrase is missing or wrong.
    """
    try:
        body = parse_json(read_private(path, _FILE_BYTES_MOST), path.name)
        if isinstance(body, dict) and "cipher" in body:
            locked = read(_LockedFile, body, path.name)
            return _content(locked, _unlock(path, locked, body, passphrase))
        plain = read(_PlainFile, body, path.name)
        return _content(plain, _open_plain(path, plain, body))
    except KeyRefused:
        raise
    except InputError as error:
        raise KeyRefused(str(error)) from None
    except OSError as error:
        raise KeyRefused(f"key file {path} must be readable; got {error.strerror}") from None
    except ValueError:
        raise KeyRefused(f"{path.name} must be a whole key file; got a damaged one") from None


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


def _content(header: _Header, secret: _Secret) -> KeyContent:
    mask, pattern = _decode(secret.mask), _decode(secret.pattern)
    return KeyContent(header.task, header.model_id, tuple(header.shape), mask, pattern)


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


def _canonical(body: Mapping[str, object]) -> bytes:
    return json.dumps(body, sort_keys=True, separators=(",", ":")).encode()


def _encode(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def _decode(text: str) -> bytes:
    return base64.b64decode(text, validate=True)
