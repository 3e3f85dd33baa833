"""Keys at a split point: whoever holds the data runs the first layers, keys are stamped into the maps that cross.

Source: ours, see docs/decisions/0017-keys-at-a-split-point.md.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from protocols.errors import RangeError, ShapeError
from protocols.limits import input_limit
from securemtk.data.base import DataSet, Samples
from securemtk.data.splits import check_whole
from securemtk.support.progress import progress_bar

_BATCH = 256


@dataclass(frozen=True, eq=False)
class SplitPoint:
    """The local part of a network, and how its maps become samples of a keyed model.

    Args:
        local: module (n, *sample) -> float (n, C, H, W) or (n, F). It is never changed.
        low: least value of a sample; lesser ones become it.
        high: greatest value of a sample; greater ones become it.
        room: empty rows below each map, or empty columns after each row (F,), for keys to take.

    Raises:
        RangeError: low and high are not finite, low < high, or outside what encrypted inference takes.
        InputError: room is not a whole number, or negative.

    Example:
        >>> from securemtk.data import load
        >>> split = SplitPoint.fit(nn.Conv2d(1, 4, 3, stride=2, padding=1), load("digits"), room=5)
        >>> split.dataset(load("digits")).shape
        (4, 13, 8)
    """

    local: nn.Module = field(repr=False)
    low: float
    high: float
    room: int = 0

    def __post_init__(self) -> None:
        limit = input_limit()
        # NaN fails every comparison, hence the form "not inside".
        if not -limit <= self.low < self.high <= limit:
            raise RangeError(
                f"the least and greatest value must lie in [-{limit:g}, {limit:g}] and differ; "
                f"got {self.low} and {self.high}"
            )
        check_whole("room", self.room, 0)

    @classmethod
    def fit(cls, local: nn.Module, dataset: DataSet, *, room: int) -> "SplitPoint":
        """Take the range of values from the maps of the training part.

        Args:
            local: see `SplitPoint`.
            dataset: what its samples are.
            room: see `SplitPoint`. As many rows as a patch has, or as many columns as all keys take together; 0 lets
                keys overwrite what crosses, which costs accuracy.

        Raises:
            ShapeError: the module does not take these samples, or gives no such maps.
            RangeError: maps are not finite, all of one value, or outside what encrypted inference takes.
        """
        maps = _maps(local, dataset.x_train)
        return cls(local, float(maps.min()), float(maps.max()), room)

    def maps(self, x: Samples) -> Samples:
        """Return what crosses before a key is stamped: the maps of samples, clipped to the range, with room below.

        The room is filled with 0, or with the end of the range that is nearest to it.

        Args:
            x: float32 (n, *sample) of what the local part takes, n >= 1.

        Returns:
            float32 (n, C, H + room, W) or (n, F + room), in [low, high].

        Raises:
            ShapeError: the module does not take these samples, or gives no such maps.
            RangeError: maps are not finite.
        """
        low, high = np.float32(self.low), np.float32(self.high)
        maps = _maps(self.local, x).clip(low, high)
        width = [(0, 0)] * maps.ndim
        width[2 if maps.ndim == 4 else 1] = (0, self.room)
        padded: Samples = np.pad(maps, width, constant_values=np.float32(0).clip(low, high))
        return padded

    def dataset(self, dataset: DataSet) -> DataSet:
        """Return the data set of the maps of another one, with its tasks, labels and names of classes.

        Raises:
            ShapeError, RangeError: as of `maps`.
        """
        return DataSet(
            name=f"{dataset.name} at a split",
            tasks=dataset.tasks,
            x_train=self.maps(dataset.x_train),
            y_train=dataset.y_train,
            x_test=self.maps(dataset.x_test),
            y_test=dataset.y_test,
            low=self.low,
            high=self.high,
            left_out=dataset.left_out,
        )


def _maps(local: nn.Module, x: Samples) -> Samples:
    """Return the maps of samples, computed batch by batch; a bar is drawn on stderr if that is a terminal."""
    if not len(x):
        raise ShapeError("samples must be one or more; got none")
    device = next(local.parameters(), torch.empty(0)).device
    parts = []
    with progress_bar("local part") as progress, _evaluating(local), torch.no_grad():
        for start in range(0, len(x), _BATCH):
            progress("", start / len(x))
            # A copy: a layer may write over its input.
            parts.append(_run(local, torch.tensor(x[start : start + _BATCH], device=device)))
    return np.concatenate(parts)


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Put a module into evaluation mode, and each of its parts back into its own mode afterwards."""
    before = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in before:
            part.training = training


def _run(local: nn.Module, x: Tensor) -> Samples:
    shape = tuple(x.shape[1:])
    try:
        maps = local(x)
    # torch's batch normalisation, alone of its layers, refuses a shape by a ValueError.
    except (RuntimeError, ValueError) as error:
        raise ShapeError(f"the local part must take samples of shape {shape}; got: {error}") from None
    wanted = f"the local part must give floats (n, C, H, W) or (n, F), none of them 0, for n samples {shape}"
    if not isinstance(maps, Tensor):
        raise ShapeError(f"{wanted}; got a {type(maps).__name__}")
    if not maps.is_floating_point() or maps.ndim not in (2, 4) or len(maps) != len(x) or 0 in maps.shape:
        raise ShapeError(f"{wanted}; got {maps.dtype} {tuple(maps.shape)} for {len(x)}")
    values: Samples = maps.float().cpu().numpy()
    if not np.isfinite(values).all():
        raise RangeError("the local part must give finite values of float32; got NaN or infinity")
    return values
