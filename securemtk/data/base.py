"""A data set for multi-task classification: images, and one label for each task."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from protocols.errors import InputError, RangeError, ShapeError
from securemtk.tasks import Task

Images = NDArray[np.float32]
Labels = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class DataSet:
    """Images with labels of several tasks, split into training and test.

    Args:
        name: the name it is loaded by.
        tasks: every task that has labels. None is secured here: which are is the trainer's decision.
        x_train: float32 (n, C, H, W), values in [low, high].
        y_train: task name -> int64 (n,), values in 0..classes-1.
        x_test: float32 (m, C, H, W).
        y_test: task name -> int64 (m,).
        low: least value a pixel may take.
        high: greatest value a pixel may take.

    Raises:
        ShapeError: an array's shape or dtype is not the one above.
        RangeError: a pixel or label lies outside its range.
        InputError: tasks are missing, named twice or already secured.
    """

    name: str
    tasks: tuple[Task, ...]
    x_train: Images = field(repr=False)
    y_train: Mapping[str, Labels] = field(repr=False)
    x_test: Images = field(repr=False)
    y_test: Mapping[str, Labels] = field(repr=False)
    low: float = 0.0
    high: float = 1.0

    def __post_init__(self) -> None:
        names = [task.name for task in self.tasks]
        if not names or len(set(names)) != len(names):
            raise InputError(f"a data set's tasks must be one or more with unique names; got {names}")
        if secured := [task.name for task in self.tasks if task.secured]:
            raise InputError(f"a data set's tasks must not be secured yet; got {secured}")
        if not (np.isfinite([self.low, self.high]).all() and self.low < self.high):
            raise RangeError(f"low must be less than high; got {self.low} and {self.high}")
        for part, x, y in (("train", self.x_train, self.y_train), ("test", self.x_test, self.y_test)):
            self._check_images(part, x)
            self._check_labels(part, len(x), y)
        if self.x_train.shape[1:] != self.x_test.shape[1:]:
            raise ShapeError(f"x_test must have samples of shape {self.shape}; got {self.x_test.shape[1:]}")

    def _check_images(self, part: str, x: Images) -> None:
        if x.dtype != np.float32 or x.ndim != 4 or 0 in x.shape:
            raise ShapeError(f"x_{part} must be float32 of shape (n, C, H, W), none of them 0; got {x.dtype} {x.shape}")
        # NaN fails both comparisons, hence the form "not all inside".
        if not ((x >= self.low) & (x <= self.high)).all():
            raise RangeError(f"x_{part} must lie in [{self.low}, {self.high}]; got values outside or not finite")

    def _check_labels(self, part: str, n: int, labels: Mapping[str, Labels]) -> None:
        if set(labels) != {task.name for task in self.tasks}:
            raise InputError(f"y_{part} must have labels of {[t.name for t in self.tasks]}; got {sorted(labels)}")
        for task in self.tasks:
            y = labels[task.name]
            if y.dtype != np.int64 or y.shape != (n,):
                raise ShapeError(f"y_{part}[{task.name!r}] must be int64 of shape ({n},); got {y.dtype} {y.shape}")
            if y.min() < 0 or y.max() >= task.classes:
                raise RangeError(f"y_{part}[{task.name!r}] must lie in 0..{task.classes - 1}; got {y.min()}..{y.max()}")

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape (C, H, W) of one sample."""
        _, channels, height, width = self.x_train.shape
        return channels, height, width

    def task(self, name: str) -> Task:
        """Return the task of that name; raise InputError that lists those known."""
        for task in self.tasks:
            if task.name == name:
                return task
        raise InputError(f"task must be one of {[t.name for t in self.tasks]}; got {name!r}")
