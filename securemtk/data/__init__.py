"""Data sets, by name."""

from collections.abc import Callable, Mapping
from inspect import signature
from types import MappingProxyType

from protocols.errors import InputError
from securemtk.data import digits, embedded, faces, shapes, tables
from securemtk.data.base import MISSING, Columns, DataSet
from securemtk.data.shapes import Law, correlated_law

DATA_SETS: Mapping[str, Callable[..., DataSet]] = MappingProxyType(
    {
        "digits": digits.load,
        "shapes": shapes.load,
        "shapes-correlated": shapes.load_correlated,
        "wine": embedded.wine,
        "breast_cancer": embedded.breast_cancer,
        "celeba": faces.celeba,
        "utkface": faces.utkface,
        "images": tables.images,
        "table": tables.table,
    }
)


def load(name: str, **options: object) -> DataSet:
    """Load a data set by its name; options are those of the function that `DATA_SETS` has for it.

    Raises:
        InputError: no data set has this name, or it has no such option or needs one more; the message lists those
            known.

    Example:
        >>> load("digits").x_test.shape
        (360, 1, 16, 16)
    """
    if name not in DATA_SETS:
        raise InputError(f"data set must be one of {', '.join(DATA_SETS)}; got {name!r}")
    loader = DATA_SETS[name]
    parameters = signature(loader).parameters
    missing = [option for option, p in parameters.items() if p.default is p.empty and option not in options]
    if missing or not set(options) <= set(parameters):
        needs = f", {', '.join(missing)} given" if missing else ""
        raise InputError(f"options of {name} must be among {', '.join(parameters)}{needs}; got {sorted(options)}")
    return loader(**options)


__all__ = ["DATA_SETS", "MISSING", "Columns", "DataSet", "Law", "correlated_law", "load"]
