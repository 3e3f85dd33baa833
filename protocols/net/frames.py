"""What travels between roles: a frame's form, its size, typed messages, and errors as messages; no connection.

A frame is a header (length of the description, length of the body, logical clock), a description as JSON (the frame's
kind, a message's fields, dtype and shape of each array), and raw little-endian arrays. Nothing is ever unpickled.

A `Message` is what a role says beside arrays: a frozen record with a kind and typed fields. What arrives must be, byte
for byte, the text that the message which it decodes to is written as. So there is one text for each message: what is
left over, stands twice, is unknown, missing or of another type is an error, whoever sent it.

Source: docs/protocols.md#links.
"""

import functools
import math
import re
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Generic, Literal, TypeVar, overload

import msgspec
import numpy as np

from protocols import errors
from protocols.errors import InputError, IntegrityError, ProtocolAbort, SecureError

HEADER = struct.Struct("!IQI")
MAX_META_BYTES = 1 << 26
MAX_BODY_BYTES = 1 << 36
# Far more rounds than a program has; the clock of what is sent next must fit the header.
MAX_CLOCK = 1 << 31

# A number that counts something from 0, and one that counts from 1.
Index = Annotated[int, msgspec.Meta(ge=0, le=1 << 53)]
Count = Annotated[int, msgspec.Meta(ge=1, le=1 << 53)]
Shape = Annotated[tuple[Annotated[int, msgspec.Meta(ge=0, le=1 << 40)], ...], msgspec.Meta(max_length=64)]
ArrayForm = tuple[Literal["<i8", "<f4", "|u1", "<u8"], Shape]

_encode = msgspec.json.Encoder().encode
# What decoding raises for bytes that are not ours, whatever they are.
_BAD = (ValueError, TypeError, OverflowError, RecursionError, MemoryError)


class Record(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Typed fields that travel; printed without those that are secret, and long ones by their length.

    The class variable `hidden` names the fields that nobody prints.
    """

    hidden: ClassVar[frozenset[str]] = frozenset()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(map('='.join, self._shown()))})"

    def __rich_repr__(self) -> list[tuple[str, Any]]:
        # Else rich, which prints tracebacks with their variables too, would be given every field by msgspec.
        return list(self._shown())

    def _shown(self) -> Iterator[tuple[str, str]]:
        for name in self.__struct_fields__:
            yield name, "<hidden>" if name in self.hidden else _short(getattr(self, name))


class Message(Record, frozen=True):
    """What one role says to another, in a frame of its own.

    The class variables `kind` and `holds_arrays` name the frame, and say whether arrays may come with it.
    """

    kind: ClassVar[str] = ""
    holds_arrays: ClassVar[bool] = False

    def frame_bytes(self, arrays: Sequence[tuple[str, tuple[int, ...]]] = ()) -> int:
        """Return the bytes of the frame in which it travels, as counters count it.

        Args:
            arrays: dtype (such as "<i8") and shape of each that comes with it.
        """
        return frame_bytes(self.kind, self, arrays)


M = TypeVar("M", bound=Message)
N = TypeVar("N", bound=Message)
M_co = TypeVar("M_co", bound=Message, covariant=True)


@dataclass(frozen=True)
class Frame:
    """One received frame: its kind, a message's fields as JSON, and read-write numpy arrays."""

    kind: str
    meta: bytes = field(repr=False)
    arrays: list[np.ndarray] = field(repr=False)


@dataclass(frozen=True)
class Heard(Generic[M_co]):
    """A message, and the arrays that came with it."""

    message: M_co
    arrays: list[np.ndarray] = field(repr=False)


class _Description(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    kind: Annotated[str, msgspec.Meta(max_length=256)]
    meta: msgspec.Raw
    arrays: tuple[ArrayForm, ...]


_read_any = msgspec.json.Decoder(_Description).decode


# --- writing --------------------------------------------------------------------------------------------------------


# One prediction after the other has the same frames: most descriptions have been made, and read, before.
@functools.lru_cache(4096)
def _describe_arrays(kind: str, arrays: tuple[tuple[str, tuple[int, ...]], ...]) -> bytes:
    return _encode({"kind": kind, "meta": {}, "arrays": arrays})


def describe(kind: str, message: Message | None, arrays: Sequence[tuple[str, tuple[int, ...]]] = ()) -> bytes:
    """Return the description of a frame."""
    if message is None:
        return _describe_arrays(kind, tuple(arrays))
    try:
        return _encode({"kind": kind, "meta": message, "arrays": arrays})
    except UnicodeEncodeError:
        raise InputError("a name or path must be text that UTF-8 can hold; one is not") from None


def frame_bytes(kind: str, message: Message | None, arrays: Sequence[tuple[str, tuple[int, ...]]]) -> int:
    """Return the bytes of the frame that `Link.send` makes, as counters count it.

    Args:
        kind, message: as in `Link.send`.
        arrays: dtype (such as "<i8") and shape of each.
    """
    body = sum(np.dtype(dtype).itemsize * math.prod(shape) for dtype, shape in arrays)
    return HEADER.size + len(describe(kind, message, arrays)) + body


# --- reading --------------------------------------------------------------------------------------------------------


def read_header(header: bytes | bytearray, role: str) -> tuple[int, int, int]:
    """Return the bytes of description and body, and the clock; raise IntegrityError where they cannot be."""
    n_meta, n_body, clock = HEADER.unpack(header)
    if not 0 < n_meta <= MAX_META_BYTES or n_body > MAX_BODY_BYTES or clock > MAX_CLOCK:
        raise IntegrityError(f"{role} sent a frame of impossible size")
    return n_meta, n_body, clock


def room_for(n_bytes: int, role: str) -> bytearray:
    """Return memory for what a header announces; raise IntegrityError where there is not as much."""
    try:
        return bytearray(n_bytes)
    except MemoryError:
        raise IntegrityError(f"{role} sent a frame of {n_bytes} bytes, for which there is no memory") from None


def _read_description(text: bytes) -> tuple[str, bytes, tuple[ArrayForm, ...]]:
    found = _read_any(text)
    if _encode(found) != text:
        raise ValueError("not as it is written")
    return found.kind, bytes(found.meta), found.arrays


_read_short_description = functools.lru_cache(4096)(_read_description)


def decode(text: bytes, body: bytearray, role: str) -> Frame:
    """Return a frame; raise IntegrityError, which names `role`, for anything that is none of ours."""
    try:
        is_short = len(text) <= 256
        kind, meta, described = (_read_short_description if is_short else _read_description)(text)
        arrays, start = [], 0
        for dtype, shape in described:
            arrays.append(np.frombuffer(body, dtype=dtype, count=math.prod(shape), offset=start).reshape(shape))
            start += arrays[-1].nbytes
        if start != len(body):
            raise ValueError("length")
    except _BAD as error:
        raise IntegrityError(f"{role} sent a frame that is not one of ours ({type(error).__name__})") from None
    return Frame(kind, meta, arrays)


@functools.cache
def _decoder(kind: type[Message]) -> "msgspec.json.Decoder[Any]":
    return msgspec.json.Decoder(kind)


def read(frame: Frame, role: str, *kinds: type[M], step: str = "") -> Heard[M]:
    """Return the message of a frame, which must be one of `kinds`.

    Args:
        frame: as `decode` returns it.
        role: who sent it, for errors.
        kinds: classes of messages.
        step: what this role does, for errors.

    Raises:
        IntegrityError: it is another one, its fields break their rules, or it comes with arrays that it must not have.
    """
    found = next((kind for kind in kinds if kind.kind == frame.kind), None)
    if found is None:
        wanted = " or ".join(repr(kind.kind) for kind in kinds)
        raise IntegrityError(f"{role} must send {wanted} now; got {_short(frame.kind)} ({step})")
    if frame.arrays and not found.holds_arrays:
        raise IntegrityError(f"{role} must send {found.kind!r} without arrays; got {len(frame.arrays)}")
    try:
        message: M = _decoder(found).decode(frame.meta)
        if _encode(message) != frame.meta:
            raise ValueError("not as it is written")
    except _BAD as error:
        raise IntegrityError(
            f"{role} must send {found.kind!r} with fields that keep its rules; one breaks them{_place_of(error)}"
        ) from None
    return Heard(message, frame.arrays)


def to_line(message: Message) -> bytes:
    """Return a message as one line of text, for a pipe."""
    return describe(message.kind, message) + b"\n"


@overload
def from_line(line: bytes, role: str, first: type[M], /) -> M: ...
@overload
def from_line(line: bytes, role: str, first: type[M], second: type[N], /) -> M | N: ...
def from_line(line: bytes, role: str, *kinds: type[Any]) -> Any:
    """Return the message that `to_line` wrote, one of `kinds`; raise IntegrityError for anything else."""
    return read(decode(line.removesuffix(b"\n"), bytearray(), role), role, *kinds).message


def _place_of(error: BaseException) -> str:
    """Return which field is wrong, where the error says so: never its value, which is the sender's."""
    found = re.search(r"at `(\$[\w.\[\]]*)`$", str(error))
    return f" at {found[1]}" if found else f" ({type(error).__name__})"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"<{type(value).__name__} of {len(text)} characters>"


# --- errors ---------------------------------------------------------------------------------------------------------


class Refused(Message, frozen=True):
    """An error of ours, in answer to a request: its class and text, which by the rule of errors.py hold no secret."""

    kind: ClassVar[str] = "refused"

    error: str
    message: str


def describe_error(error: SecureError) -> Refused:
    """Return an error of ours as a message."""
    kind = next(k for k in type(error).__mro__ if vars(errors).get(k.__name__) is k)
    return Refused(kind.__name__, str(error).encode(errors="backslashreplace").decode())


def restore_error(refused: Refused) -> SecureError:
    """Return the error that `describe_error` described; an unknown class becomes ProtocolAbort."""
    kind = getattr(errors, refused.error, ProtocolAbort)
    if not (isinstance(kind, type) and issubclass(kind, SecureError)):
        kind = ProtocolAbort
    return kind(refused.message)
