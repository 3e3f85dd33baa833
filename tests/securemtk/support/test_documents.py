"""Documents are read as what they say they are, and errors name places and kinds, never a value."""

from dataclasses import dataclass, field
from typing import Literal

import msgspec
import pytest
from rich.pretty import pretty_repr

from protocols.errors import InputError
from securemtk.support.documents import Document, parse_json, read


class Sheet(Document, frozen=True):
    format: Literal["sheet"]
    rows: list[int]
    notes: dict[str, float] = msgspec.field(default_factory=dict)


@dataclass(frozen=True)
class Inner:
    size: int = 1

    def __post_init__(self) -> None:
        if self.size < 1:
            raise InputError(f"size must be at least 1; got {self.size}")


@dataclass(frozen=True)
class Outer:
    name: str
    pair: tuple[float, float] = (0.0, 1.0)
    inner: Inner = field(default_factory=Inner)
    more: tuple[Inner, ...] = ()


def test_what_fits_is_read():
    assert read(Sheet, {"format": "sheet", "rows": [1]}, "x").rows == [1]
    found = read(Outer, {"name": "a", "pair": [1, 2], "inner": {"size": 2}, "more": [{}]}, "x")
    assert found == Outer("a", (1.0, 2.0), Inner(2), (Inner(),))


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        (Sheet, 1, "x must be a table; got a whole number"),
        (Sheet, {"format": "sheet"}, "x must have rows; it is missing"),
        (Sheet, {"format": "sheet", "rows": [], "secret": 1}, "x must have known entries; got others"),
        (Sheet, {"format": "secret", "rows": []}, "x: format must be a value that its format knows; got another"),
        (Sheet, {"format": "sheet", "rows": [1, "secret"]}, r"x: rows[1] must be a whole number; got a text"),
        (Sheet, {"format": "sheet", "rows": [True]}, r"x: rows[0] must be a whole number; got true or false"),
        (Sheet, {"format": "sheet", "rows": [], "notes": {"secret": "s"}}, "x: notes must be a number; got a text"),
        (Outer, {"name": "a", "nmae": "secret"}, "x must have entries among name, pair, inner, more; got nmae"),
        (Outer, {"name": "a", "inner": {"sise": 1}}, "x: inner must have entries among size; got sise"),
        (Outer, {"name": "a", "more": [{}, {"sise": 1}]}, "x: more[1] must have entries among size; got sise"),
        (Outer, {"name": "a", "inner": {"size": 0}}, "x: size must be at least 1; got 0"),
        (Sheet, {"format": "sheet", "rows": [], "\ud800": 1}, "x must be of whole characters; it is not"),
        (Sheet, {"format": "\ud800", "rows": []}, "x must be of whole characters; it is not"),
        (Outer, {"name": "a", "pair": [1]}, "x: pair must be a list of length 2; got another"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named_and_not_shown(kind, values, message):
    with pytest.raises(InputError) as caught:
        read(kind, values, "x")
    assert str(caught.value) == message


@pytest.mark.parametrize(
    "text", ["", "{", "[NaN]", "[Infinity]", "[-1e999]", '{"a": 1, "a": 1}', "[" * 100_000, b"\xff"]
)
def test_what_is_no_json_is_refused(text):
    with pytest.raises(InputError, match="x must be whole JSON text"):
        parse_json(text, "x")


def test_a_document_does_not_show_what_it_holds():
    sheet = read(Sheet, {"format": "sheet", "rows": [7]}, "x")
    assert "7" not in repr(sheet) + pretty_repr(sheet)
