"""Data sets of the caller's own: a CSV table, or a folder of images with a table of labels."""

import math
import os
from array import array
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from protocols.errors import InputError
from securemtk.data.base import Columns, DataSet
from securemtk.data.images import ImageOptions, image_set
from securemtk.data.labels import as_folder, encoded, interned, open_table, places_of
from securemtk.data.splits import Split, as_path, few, named_split, names_of, random_split
from securemtk.tasks import Task

StrPath = str | os.PathLike[str]


def table(
    *,
    path: StrPath,
    tasks: str | Sequence[str],
    features: str | Sequence[str] | None = None,
    split_column: str | None = None,
    test_share: float = 0.2,
    n_train: int | None = None,
    n_test: int | None = None,
    seed: int = 0,
    low: float = -1.0,
    high: float = 1.0,
) -> DataSet:
    """Load a CSV table: columns of numbers are features, other columns are labels of tasks.

    Args:
        path: of the file: UTF-8, separated by commas, a header in the first line.
        tasks: columns that hold labels, whole numbers or text; an empty value is a missing label.
        features: columns that hold finite numbers; all others when absent.
        split_column: a column of the words train and test, which says what a row is for.
        test_share: share of the rows for testing, drawn at random, where there is no such column.
        n_train: at most so many training rows, drawn at random.
        n_test: at most so many test rows.
        seed: of what is drawn at random.
        low: value of a feature three standard deviations below its mean in the training part, and of lesser ones.
        high: value of one as far above, and of greater ones.

    Returns:
        Rows float32 (n, F) in [low, high]; `columns` has what new rows need to be scaled alike.

    Raises:
        InputError: a file, column or value is missing or not as above; the message names it.
    """
    file, names = as_path("path", path), names_of(tasks, "tasks")
    special = [*names, *([] if split_column is None else [split_column])]
    with open_table(file) as (header, rows):
        chosen = [name for name in header if name not in special] if features is None else features
        columns = names_of(chosen, "features")
        if both := set(columns) & set(special):
            raise InputError(f"a column must be a feature or a label, not both; got {few(sorted(both))}")
        wanted, places = places_of(file, header, columns), places_of(file, header, special)
        numbers = array("d")
        texts: list[list[str]] = [[] for _ in special]
        for line, row in rows:
            numbers.extend(_number(row[i], file, line, header[i]) for i in wanted)
            for i, column in zip(places, texts, strict=True):
                column.append(interned(row[i]))
    split = _split(file, split_column, texts[-1], test_share, seed).limited(n_train, n_test, seed)
    raw = np.frombuffer(numbers, dtype=np.float64).reshape(-1, len(columns))
    fitted = Columns.fit(columns, raw[split.train], low, high)
    labels = {name: encoded(name, column, str(file)) for name, column in zip(names, texts, strict=False)}
    return DataSet(
        name="table",
        tasks=tuple(Task.named(name, classes) for name, (_, classes) in labels.items()),
        x_train=fitted.scaled(raw[split.train]),
        y_train={name: y[split.train] for name, (y, _) in labels.items()},
        x_test=fitted.scaled(raw[split.test]),
        y_test={name: y[split.test] for name, (y, _) in labels.items()},
        low=low,
        high=high,
        columns=fitted,
    )


def images(
    *,
    path: StrPath,
    labels: StrPath = "labels.csv",
    file_column: str | None = None,
    tasks: str | Sequence[str] | None = None,
    split_column: str | None = None,
    test_share: float = 0.2,
    side: int = 64,
    crop: bool = False,
    grey: bool = False,
    n_train: int | None = None,
    n_test: int | None = None,
    seed: int = 0,
    cache: StrPath | None = None,
) -> DataSet:
    """Load a folder of images whose labels stand in a CSV table, one row for each file.

    Args:
        path: the folder.
        labels: the table: UTF-8, separated by commas, a header in the first line; a relative path starts at the folder.
        file_column: column of the file names, relative to the folder; the first one when absent.
        tasks: columns that hold labels, whole numbers or text; all others when absent. An empty value is a missing
            label.
        split_column: a column of the words train and test, which says what a file is for.
        test_share: share of the files for testing, drawn at random, where there is no such column.
        side, crop, grey: as in `ImageOptions`.
        n_train: at most so many training files, drawn at random; only files in use are read.
        n_test: at most so many test files.
        seed: of what is drawn at random.
        cache: as in `read_images`.

    Returns:
        Images float32 (n, 3 or 1, side, side) in [0, 1].

    Raises:
        InputError: a file, column or value is missing or not as above; the message names it.
        OSError: the cache cannot be written.
    """
    folder = as_folder(path, "images")
    options = ImageOptions(side, crop, grey)
    file = folder / as_path("labels", labels)
    with open_table(file) as (header, rows):
        names_column = header[0] if file_column is None else file_column
        special = [names_column, *([] if split_column is None else [split_column])]
        names = names_of([name for name in header if name not in special] if tasks is None else tasks, "tasks")
        places = places_of(file, header, [*special, *names])
        texts: list[list[str]] = [[] for _ in places]
        for _, row in rows:
            for i, column in zip(places, texts, strict=True):
                column.append(interned(row[i]))
    files = texts[0]
    if len(set(files)) != len(files) or "" in files:
        raise InputError(f"{file}, column {names_column!r}, must name each file once; got repeated or empty names")
    split = _split(file, split_column, texts[1] if split_column else files, test_share, seed)
    encodings = {
        name: encoded(name, column, str(file)) for name, column in zip(names, texts[len(special) :], strict=True)
    }
    return image_set("images", folder, files, encodings, split.limited(n_train, n_test, seed), options, cache=cache)


def _split(file: Path, column: str | None, texts: Sequence[str], test_share: float, seed: int) -> Split:
    if column is None:
        return random_split(len(texts), test_share, seed)
    return named_split(texts, f"{file}, column {column!r},")


def _number(text: str, file: Path, line: int, column: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise InputError(f"{file}, row {line}, column {column!r}, must hold a finite number; got {text[:30]!r}")
    return number
