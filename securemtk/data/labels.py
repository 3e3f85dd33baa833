"""Labels tables: CSV files with a header, and columns of them as labels of tasks."""

import csv
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from protocols.errors import InputError
from securemtk.data.base import MISSING, Labels
from securemtk.data.splits import as_path, few

MOST_CLASSES = 1000

Rows = Iterator[tuple[int, list[str]]]


@contextmanager
def open_table(path: Path) -> Iterator[tuple[tuple[str, ...], Rows]]:
    """Give a CSV file's column names, and its rows one by one with their line numbers; spaces around values go.

    Raises:
        InputError: the file cannot be read, is not UTF-8, has no header or one that names a column twice, or a row
            has another number of values than the header.
    """
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file, strict=True)
            header = tuple(name.strip() for name in next(reader, ()))
            if not header or "" in header or len(set(header)) != len(header):
                raise InputError(
                    f"{path} must begin with a line of unique column names; got {few(header) or 'nothing'}"
                )
            yield header, _rows(path, reader, len(header))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        why = error.strerror if isinstance(error, OSError) else str(error)
        raise InputError(f"{path} must be a readable CSV file in UTF-8; got: {why}") from None


def _rows(path: Path, reader: Iterator[list[str]], width: int) -> Rows:
    line = 1
    for line, row in enumerate(reader, start=2):
        if not row:
            continue
        if len(row) != width:
            raise InputError(f"{path}, row {line}, must have {width} values as the first line; got {len(row)}")
        yield line, [value.strip() for value in row]
    if line == 1:
        raise InputError(f"{path} must have a row below its first line; got none")


def places_of(path: Path, header: Sequence[str], names: Sequence[str]) -> list[int]:
    """Return the places of columns; raise InputError for those that are not there.

    Args:
        path: of the table, for the message.
        header: all its columns.
        names: those wanted.
    """
    if unknown := [name for name in names if name not in header]:
        raise InputError(f"{path} must have the columns {few(names)}; got no {few(unknown)} among {few(header, 20)}")
    return [header.index(name) for name in names]


def encoded(name: str, values: Sequence[str], source: str) -> tuple[Labels, tuple[str, ...]]:
    """Return labels, int64 (n,), of a column of values, and the names of its classes.

    Each distinct value is a class: in order of size where all are whole numbers, by text otherwise. An empty value is
    a missing label.

    Args:
        name: of the column.
        values: its texts, one for each row.
        source: names the table in a message.

    Raises:
        InputError: there are fewer than 2 or more than 1,000 distinct values.
    """
    distinct = {value for value in values if value}
    numbers = {value: _whole(value) for value in distinct}
    names = {value: value if None in numbers.values() else str(number) for value, number in numbers.items()}
    order = sorted(set(names.values()), key=lambda text: (0, text) if None in numbers.values() else (int(text), ""))
    if not 2 <= len(order) <= MOST_CLASSES:
        raise InputError(
            f"{source}, column {name!r}, must hold 2 to {MOST_CLASSES} distinct labels; got {len(order)} in "
            f"{len(values)} rows"
        )
    classes = {text: i for i, text in enumerate(order)}
    labels = [classes[names[value]] if value else MISSING for value in values]
    return np.array(labels, dtype=np.int64), tuple(order)


def interned(value: str) -> str:
    """Return one object for equal values: a column of labels has few distinct ones."""
    return sys.intern(value)


def as_folder(path: object, holds: str) -> Path:
    """Return the path of a folder; raise InputError that says what it should hold where there is none.

    Args:
        path: of the folder, as somebody gave it.
        holds: what it should hold, in words.
    """
    folder = as_path("path", path)
    if not folder.is_dir():
        raise InputError(f"path must be a folder that holds {holds}; got {str(folder)!r}")
    return folder


def _whole(value: str) -> int | None:
    # Programs that know no missing whole numbers write 1 as 1.0.
    try:
        number = float(value)
    except ValueError:
        return None
    return int(number) if number.is_integer() else None
