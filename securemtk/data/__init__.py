"""Data sets, by name."""

from collections.abc import Callable, Mapping
from types import MappingProxyType

from protocols.errors import InputError
from securemtk.data import digits, shapes
from securemtk.data.base import DataSet
from securemtk.data.shapes import Law

DATA_SETS: Mapping[str, Callable[..., DataSet]] = MappingProxyType({"digits": digits.load, "shapes": shapes.load})


def load(name: str, **options: object) -> DataSet:
    """Load a data set by its name; options are those of `load` in the module of that name.

    Raises:
        InputError: no data set has this name; the message lists those known.

    Example:
        >>> load("digits").x_test.shape
        (360, 1, 16, 16)
    """
    if name not in DATA_SETS:
        raise InputError(f"data set must be one of {', '.join(DATA_SETS)}; got {name!r}")
    return DATA_SETS[name](**options)


__all__ = ["DATA_SETS", "DataSet", "Law", "load"]
