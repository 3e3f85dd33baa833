"""What travels between roles: a frame's form, its size, and errors as messages; no connection.

A frame is a header (length of the meta data, length of the body, logical clock), meta data as
JSON, and raw little-endian arrays. Nothing is ever unpickled.

Source: docs/protocols.md#links.
"""

import functools
import json
import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from protocols import errors
from protocols.errors import (
    IntegrityError,
    ProtocolAbort,
    SecureError,
)

HEADER = struct.Struct("!IQI")
MAX_META_BYTES = 1 << 26
MAX_BODY_BYTES = 1 << 36
DTYPES = {"<i8", "<f4", "|u1", "<u8"}

Meta = dict[str, Any]


@dataclass(frozen=True)
class Message:
    """One received frame: its kind, JSON meta data, and read-write numpy arrays."""

    kind: str
    meta: Meta
    arrays: list[np.ndarray] = field(repr=False)


# One prediction after the other has the same frames: most descriptions have been made, and read, before.
@functools.lru_cache(4096)
def describe_arrays(kind: str, arrays: tuple[tuple[str, tuple[int, ...]], ...]) -> bytes:
    """Return the description of a frame without values: its kind, and (dtype, shape) of each array."""
    return json.dumps({"kind": kind, "meta": {}, "arrays": arrays}, separators=(",", ":")).encode()


def describe(kind: str, meta: Meta, arrays: list[tuple[str, tuple[int, ...]]]) -> bytes:
    """Return the description of a frame: its kind, its values, and (dtype, shape) of each array."""
    if not meta:
        return describe_arrays(kind, tuple(arrays))
    return json.dumps({"kind": kind, "meta": meta, "arrays": arrays}, separators=(",", ":")).encode()


def frame_bytes(kind: str, meta: Meta | None, arrays: Sequence[tuple[str, tuple[int, ...]]]) -> int:
    """Return the bytes of the frame that `Link.send` makes, as counters count it.

    Args:
        kind, meta: as in `Link.send`.
        arrays: dtype (such as "<i8") and shape of each.
    """
    body = sum(np.dtype(dtype).itemsize * math.prod(shape) for dtype, shape in arrays)
    return HEADER.size + len(describe(kind, meta or {}, list(arrays))) + body


def _read_description(text: bytes) -> tuple[str, Meta, list[tuple[str, tuple[int, ...]]]]:
    raw = json.loads(text)
    arrays = []
    for dtype, shape in raw["arrays"]:
        if dtype not in DTYPES or any(not isinstance(n, int) or n < 0 for n in shape):
            raise ValueError(dtype)
        arrays.append((str(dtype), tuple(shape)))
    return str(raw["kind"]), dict(raw["meta"]), arrays


_read_short_description = functools.lru_cache(4096)(_read_description)


def decode(text: bytes, body: bytearray, role: str) -> Message:
    """Return the frame of a description and the arrays' bytes; raise IntegrityError for what is none of ours."""
    try:
        is_short = len(text) <= 256
        kind, meta, described = (_read_short_description if is_short else _read_description)(text)
        arrays, start = [], 0
        for dtype, shape in described:
            arrays.append(np.frombuffer(body, dtype=dtype, count=math.prod(shape), offset=start).reshape(shape))
            start += arrays[-1].nbytes
        if start != len(body):
            raise ValueError("length")
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        raise IntegrityError(f"{role} sent a frame that is not one of ours ({type(error).__name__})") from None
    return Message(kind, dict(meta), arrays)


def describe_error(error: SecureError) -> Meta:
    """Return an error of ours as JSON: its class and message, which by the rule of errors.py hold no secret."""
    kind = next(k for k in type(error).__mro__ if vars(errors).get(k.__name__) is k)
    return {"error": kind.__name__, "message": str(error)}


def restore_error(meta: Mapping[str, Any]) -> SecureError:
    """Return the error that `describe_error` described; an unknown class becomes ProtocolAbort."""
    kind = getattr(errors, str(meta.get("error")), ProtocolAbort)
    if not (isinstance(kind, type) and issubclass(kind, SecureError)):
        kind = ProtocolAbort
    return kind(str(meta.get("message")))
