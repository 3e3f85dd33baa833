"""A data set for multi-task classification: images or rows of a table, and one label for each task."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from protocols.errors import InputError, RangeError, ShapeError
from securemtk.tasks import Task

Samples = NDArray[np.float32]
Images = Samples
Labels = NDArray[np.int64]
Part = Literal["train", "test"]

MISSING = -1


@dataclass(frozen=True, eq=False)
class Columns:
    """The features of a table, and how its values became those of a data set.

    Args:
        names: of the features, in order.
        mean: float64 (F,), of the training part, in the table's own units.
        std: float64 (F,), of the training part; 1 where a feature is constant.
        low: value of a feature `REACH` standard deviations below its mean, and of every lesser one.
        high: value of one as far above, and of every greater one.

    Raises:
        ShapeError: means or deviations are not one for each name.
        RangeError: they are not finite, or a deviation is not positive.
    """

    names: tuple[str, ...]
    mean: NDArray[np.float64] = field(repr=False)
    std: NDArray[np.float64] = field(repr=False)
    low: float = -1.0
    high: float = 1.0

    REACH = 3.0

    def __post_init__(self) -> None:
        if self.mean.shape != (len(self.names),) or self.std.shape != self.mean.shape:
            raise ShapeError(f"mean and std must be ({len(self.names)},); got {self.mean.shape}, {self.std.shape}")
        if not (np.isfinite(self.mean).all() and np.isfinite(self.std).all() and (self.std > 0).all()):
            raise RangeError("mean and std must be finite and std positive; got others")
        if (
            not all(isinstance(v, int | float) and np.isfinite(v) for v in (self.low, self.high))
            or self.low >= self.high
        ):
            raise RangeError(f"low and high must be finite numbers, low < high; got {self.low!r} and {self.high!r}")

    @classmethod
    def fit(cls, names: Sequence[str], rows: NDArray[np.float64], low: float = -1.0, high: float = 1.0) -> "Columns":
        """Take mean and standard deviation from rows, float64 (n, F).

        Args:
            names: of the features.
            rows: float64 (n, F), in the table's own units.
            low, high: as in `Columns`.
        """
        std = rows.std(axis=0)
        return cls(tuple(names), rows.mean(axis=0), np.where(std > 0, std, 1.0), low, high)

    def scaled(self, rows: NDArray[np.floating]) -> Samples:
        """Return rows in the table's units, (n, F), as samples: float32 (n, F) in [low, high].

        New data must go through it before a model that was trained on the data set is asked.

        Raises:
            ShapeError: rows have another number of features.
        """
        if rows.ndim != 2 or rows.shape[1] != len(self.names):
            raise ShapeError(f"rows must be (n, {len(self.names)}); got {rows.shape}")
        share = ((rows - self.mean) / self.std / self.REACH + 1) / 2
        low, high = np.float32(self.low), np.float32(self.high)
        values: Samples = (self.low + (self.high - self.low) * share).astype(np.float32).clip(low, high)
        return values


@dataclass(frozen=True, eq=False)
class DataSet:
    """Samples with labels of several tasks, split into training and test.

    Args:
        name: the name it is loaded by.
        tasks: every task that has labels. None is secured here: which are is the trainer's decision.
        x_train: float32, images (n, C, H, W) or rows of a table (n, F), values in [low, high].
        y_train: task name -> int64 (n,), values in 0..classes-1, or `MISSING` (-1) where the label is not known.
        x_test: float32, m samples of the same shape.
        y_test: task name -> int64 (m,), as y_train.
        low: least value of a pixel or feature.
        high: greatest value of a pixel or feature.
        columns: what the features of a table are; absent for images.
        key_columns: how many columns at the end of a table are for keys and hold nothing.
        left_out: names of files or rows that could not be used, where a loader leaves such ones out.

    Raises:
        ShapeError: an array's shape or dtype is not the one above.
        RangeError: a pixel, feature or label lies outside its range.
        InputError: tasks are missing, named twice, already secured or without any label; or names of columns do not
            fit.
    """

    name: str
    tasks: tuple[Task, ...]
    x_train: Samples = field(repr=False)
    y_train: Mapping[str, Labels] = field(repr=False)
    x_test: Samples = field(repr=False)
    y_test: Mapping[str, Labels] = field(repr=False)
    low: float = 0.0
    high: float = 1.0
    columns: Columns | None = field(default=None, repr=False)
    key_columns: int = 0
    left_out: tuple[str, ...] = field(default=(), repr=False)

    def __post_init__(self) -> None:
        names = [task.name for task in self.tasks]
        if not names or len(set(names)) != len(names):
            raise InputError(f"a data set's tasks must be one or more with unique names; got {names}")
        if secured := [task.name for task in self.tasks if task.secured]:
            raise InputError(f"a data set's tasks must not be secured yet; got {secured}")
        if not (np.isfinite([self.low, self.high]).all() and self.low < self.high):
            raise RangeError(f"low must be less than high; got {self.low} and {self.high}")
        for part, x, y in (("train", self.x_train, self.y_train), ("test", self.x_test, self.y_test)):
            self._check_samples(part, x)
            self._check_labels(part, len(x), y)
        if self.x_train.shape[1:] != self.x_test.shape[1:]:
            raise ShapeError(f"x_test must have samples of shape {self.shape}; got {self.x_test.shape[1:]}")
        if self.columns is not None and self.shape != (len(self.columns.names),):
            raise InputError(f"columns must be those of samples {self.shape}; got {len(self.columns.names)} of them")

    def _check_samples(self, part: str, x: Samples) -> None:
        if x.dtype != np.float32 or x.ndim not in (2, 4) or 0 in x.shape:
            raise ShapeError(
                f"x_{part} must be float32 of shape (n, C, H, W) or (n, F), none of them 0; got {x.dtype} {x.shape}"
            )
        # NaN is its own minimum and fails the comparison, hence the form "not inside".
        if not (x.min() >= np.float32(self.low) and x.max() <= np.float32(self.high)):
            raise RangeError(f"x_{part} must lie in [{self.low}, {self.high}]; got values outside or not finite")

    def _check_labels(self, part: str, n: int, labels: Mapping[str, Labels]) -> None:
        if set(labels) != {task.name for task in self.tasks}:
            raise InputError(f"y_{part} must have labels of {[t.name for t in self.tasks]}; got {sorted(labels)}")
        for task in self.tasks:
            y = labels[task.name]
            if y.dtype != np.int64 or y.shape != (n,):
                raise ShapeError(f"y_{part}[{task.name!r}] must be int64 of shape ({n},); got {y.dtype} {y.shape}")
            if y.min() < MISSING or y.max() >= task.classes:
                raise RangeError(
                    f"y_{part}[{task.name!r}] must lie in 0..{task.classes - 1}, or be {MISSING} where missing; "
                    f"got {y.min()}..{y.max()}"
                )
            if y.max() == MISSING:
                raise InputError(f"y_{part}[{task.name!r}] must have a label for one sample at least; got none")

    def with_key_columns(self, n: int) -> "DataSet":
        """Return this table with n more columns at the end, of one value in the middle of the range, for keys to take.

        In the table's own units the value is 0: who asks about new rows appends n zeros before `Columns.scaled`.

        Raises:
            InputError: the samples are images, which have room for keys, or n is less than 1.
        """
        if len(self.shape) != 1 or n < 1:
            raise InputError(f"one or more columns may be added to rows of a table; got {n} for samples {self.shape}")

        def widened(x: Samples) -> Samples:
            return np.pad(x, ((0, 0), (0, n)), constant_values=np.float32((self.low + self.high) / 2))

        columns = self.columns
        if columns is not None:
            names = (*columns.names, *(f"key {i + 1}" for i in range(n)))
            mean, std = np.pad(columns.mean, (0, n)), np.pad(columns.std, (0, n), constant_values=1.0)
            columns = replace(columns, names=names, mean=mean, std=std)
        x_train, x_test = widened(self.x_train), widened(self.x_test)
        return replace(self, x_train=x_train, x_test=x_test, columns=columns, key_columns=self.key_columns + n)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one sample: (C, H, W) of an image, (F,) of a row."""
        return self.x_train.shape[1:]

    @property
    def class_names(self) -> Mapping[str, tuple[str, ...]]:
        """Task name -> the names of its classes, for those tasks whose classes have names (`Task.labels`)."""
        return {task.name: task.labels for task in self.tasks if task.labels is not None}

    def task(self, name: str) -> Task:
        """Return the task of that name; raise InputError that lists those known."""
        for task in self.tasks:
            if task.name == name:
                return task
        raise InputError(f"task must be one of {[t.name for t in self.tasks]}; got {name!r}")

    def known(self, name: str, part: Part = "train") -> NDArray[np.bool_]:
        """Return which samples of a part have a label of that task: bool (n,).

        Args:
            name: of the task.
            part: train or test.
        """
        mask: NDArray[np.bool_] = self._labels(name, part) != MISSING
        return mask

    def shares(self, name: str, part: Part = "train") -> NDArray[np.float64]:
        """Return the share of each class among the samples of a part whose label is known: float64 (classes,).

        Args:
            name: of the task.
            part: train or test.
        """
        counts = np.bincount(self._labels(name, part)[self.known(name, part)], minlength=self.task(name).classes)
        shares: NDArray[np.float64] = counts / counts.sum()
        return shares

    def _labels(self, name: str, part: Part) -> Labels:
        if part not in ("train", "test"):
            raise InputError(f"part must be train or test; got {part!r}")
        return (self.y_train if part == "train" else self.y_test)[self.task(name).name]
