"""Documents that stand on the disk as JSON or TOML: read as what a dataclass or struct says, and as nothing else.

Messages name the place and the kinds, never a value: a key file is such a document.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

import msgspec

from protocols.errors import InputError

T = TypeVar("T")


class Document(msgspec.Struct, frozen=True, forbid_unknown_fields=True, repr_omit_defaults=True):
    """A document, or a part of one, that has no class of its own in memory."""

    def __repr__(self) -> str:
        # It may hold a key.
        return f"{type(self).__name__}(<hidden>)"

    def __rich_repr__(self) -> list[tuple[str, Any]]:
        # Else rich would be given every entry by msgspec.
        return []


# As msgspec writes them in its messages.
_KINDS = {
    "int": "a whole number",
    "float": "a number",
    "str": "a text",
    "bool": "true or false",
    "array": "a list",
    "object": "a table",
    "null": "nothing",
}
_WRONG_KIND = re.compile(r"Expected `([^`]*)`(?: of length (\d+))?(?:, got `([^`]*)`| of length \d+)?")
_PLACE = re.compile(r" - at `(?:key in )?\$\.?([^`]*)`$")


def parse_json(text: str | bytes, what: str) -> Any:
    """Return the values of a JSON document, in which no table has a name twice and every number is one.

    Args:
        text: the document.
        what: names it in a message.

    Raises:
        InputError: it is none.
    """
    try:
        return json.loads(text, object_pairs_hook=_each_once, parse_constant=_refuse, parse_float=_finite)
    except (ValueError, RecursionError):
        raise InputError(f"{what} must be whole JSON text that has each name once; got another") from None


def read(kind: type[T], values: Any, what: str) -> T:
    """Return plain values as an object.

    Args:
        kind: a `Document` or a dataclass; those within it count alike. What has a default may be left out.
        values: dicts, lists, texts, numbers, booleans and None.
        what: names the document in a message.

    Raises:
        InputError: an entry is missing, unknown, or of another kind, or the object refuses it.
    """
    _refuse_unknown(kind, values, what, "")
    try:
        return msgspec.convert(values, kind)
    except msgspec.ValidationError as error:
        raise InputError(_said(error, what)) from None
    except RecursionError:
        raise InputError(f"{what} must not be nested deeply; it is") from None
    except UnicodeEncodeError:
        # Half a character, which JSON can write and no other text can hold.
        raise InputError(f"{what} must be of whole characters; it is not") from None


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len({name for name, _ in pairs}) != len(pairs):
        raise ValueError("a name stands twice")
    return dict(pairs)


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no number")


def _finite(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise ValueError("a number is too large")
    return number


def _refuse_unknown(kind: Any, values: Any, what: str, place: str) -> None:
    """Raise InputError where a table has an entry that its dataclass has not: msgspec passes those over."""
    if get_origin(kind) in (list, tuple) and isinstance(values, list):
        for number, value in enumerate(values):
            _refuse_unknown(get_args(kind)[0], value, what, f"{place}[{number}]")
    if not is_dataclass(kind) or not isinstance(values, Mapping):
        return
    known = [field.name for field in fields(kind)]
    if unknown := sorted(str(name) for name in set(values) - set(known)):
        raise InputError(f"{_at(what, place)} must have entries among {', '.join(known)}; got {', '.join(unknown)}")
    kinds = get_type_hints(kind)
    for name, value in values.items():
        _refuse_unknown(kinds[name], value, what, f"{place}.{name}".removeprefix("."))


def _at(what: str, place: str) -> str:
    return f"{what}: {place}" if place else what


def _said(error: msgspec.ValidationError, what: str) -> str:
    """Return msgspec's message in our form."""
    if isinstance(error.__cause__, InputError):
        cause = str(error.__cause__)
        return cause if cause.startswith(f"{what}:") else f"{what}: {cause}"
    text = str(error)
    place = _PLACE.search(text)
    where = _at(what, "" if place is None else place[1].replace("[...]", ""))
    if match := re.match(r"Object (missing required|contains unknown) field `([^`]*)`", text):
        rule = f"have {match[2]}; it is missing" if match[1].startswith("missing") else "have known entries; got others"
        return f"{where} must {rule}"
    if match := _WRONG_KIND.match(text):
        wanted = " or ".join(_KINDS.get(kind, kind) for kind in match[1].split(" | "))
        length = f" of length {match[2]}" if match[2] else ""
        got = _KINDS.get(match[3] or "", match[3]) or "another"
        return f"{where} must be {wanted}{length}; got {got}"
    return f"{where} must be a value that its format knows; got another"
