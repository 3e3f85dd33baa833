"""What a model takes: arrays of one batch by name, in the range of fixed point; and what may be told of them before."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from protocols.errors import InputError, RangeError, ShapeError
from protocols.limits import input_limit
from protocols.program.program import Shape

Floats = NDArray[np.floating]
# Of what is told of a shape: more than any array has.
MOST_AXES, MOST_SIZE = 64, 1 << 40
NUMBERS = ("bool", "float16", "float32", "float64", *(f"{u}int{n}" for u in ("", "u") for n in (8, 16, 32, 64)))


def input_arrays(
    shapes: Mapping[str, Shape],
    x: Any,
    low: float = -math.inf,
    high: float = math.inf,
    *,
    whole: bool = False,
    limit: float = input_limit(),
) -> dict[str, Floats]:
    """Return a model's inputs as arrays of one batch.

    Args:
        shapes: name -> shape of one sample.
        x: float array or tensor of shape (n, *sample), n >= 1; for several inputs a mapping of names to such arrays.
        low, high: allowed values, beside those that fixed point holds.
        limit: largest magnitude that fixed point holds.
        whole: whether the arrays are of shape `sample`, without a batch; they are returned as a batch of one.

    Raises:
        InputError: the names are others.
        ShapeError: a shape or dtype does not fit, or batches differ.
        RangeError: a value is not finite, or outside the allowed ones.
        TypeError: a value is no array.
    """
    if not isinstance(x, Mapping):
        if len(shapes) != 1:
            raise InputError(f"a model with inputs {', '.join(shapes)} takes a mapping of names to arrays")
        x = {next(iter(shapes)): x}
    if set(x) != set(shapes):
        raise InputError(f"the inputs must be {', '.join(shapes)}; got {', '.join(map(str, x)) or 'none'}")
    bounds = max(low, -limit), min(high, limit)
    arrays = {name: _array(name, shape, x[name], bounds, whole=whole) for name, shape in shapes.items()}
    if len({len(v) for v in arrays.values()}) != 1:
        raise ShapeError(f"all inputs must have the same batch; got {[len(v) for v in arrays.values()]}")
    return arrays


def _array(name: str, shape: Shape, x: Any, bounds: tuple[float, float], *, whole: bool) -> Floats:
    array = x.detach().cpu().numpy() if isinstance(x, Tensor) else x
    sample = ", ".join(map(str, shape))
    wanted = f"input {name!r} must be a float array of shape "
    wanted += f"({sample})" if whole else f"(n, {sample}) with n >= 1"
    if not isinstance(array, np.ndarray):
        raise TypeError(f"{wanted}; got a {type(x).__name__}")
    if array.dtype.kind != "f":
        raise ShapeError(f"{wanted}; got dtype {array.dtype}")
    if whole and array.shape == shape:
        array = array[None]
    elif whole:
        raise ShapeError(f"{wanted}; got shape {array.shape}")
    if array.ndim != len(shape) + 1 or array.shape[1:] != shape or len(array) < 1:
        raise ShapeError(f"{wanted}; got shape {array.shape}")
    if not np.isfinite(array).all():
        raise RangeError(f"input {name!r} must be finite; got NaN or infinity")
    low, high = bounds
    if array.size and (array.min() < low or array.max() > high):
        raise RangeError(
            f"input {name!r} must lie in [{low:g}, {high:g}]; got values in "
            f"[{float(array.min()):g}, {float(array.max()):g}]"
        )
    return array


@dataclass(frozen=True)
class KnownInputs:
    """What is told of a model's inputs when it is loaded.

    Args:
        shapes: name -> whole shape; None where nothing is told.
        public: name -> array that takes the input's place in the clear.
    """

    shapes: Mapping[str, Shape] | None = None
    public: Mapping[str, NDArray[Any]] = field(default_factory=dict)

    @property
    def given(self) -> bool:
        """Whether anything is told."""
        return self.shapes is not None or bool(self.public)

    def pack(self) -> tuple[dict[str, Shape] | None, tuple[tuple[str, str], ...], list[NDArray[Any]]]:
        """Return the shapes, name and dtype of each public input, and their values as arrays, for the keeper.

        Raises:
            InputError: an input's name is no text.
            ShapeError: a public array is not of numbers or truth values, or a shape is none.
        """
        arrays, kinds = [], []
        for name in (*(self.shapes or ()), *self.public):
            if not isinstance(name, str):
                raise InputError(f"an input must be named by a text; got {name!r}")
        for name, shape in (self.shapes or {}).items():
            if len(shape) > MOST_AXES or not all(0 <= size <= MOST_SIZE for size in shape):
                raise ShapeError(
                    f"the shape of input {name!r} must be of at most {MOST_AXES} sizes from 0 to {MOST_SIZE}; "
                    f"got {shape}"
                )
        for name, value in self.public.items():
            array = np.asarray(value)
            if array.dtype.name not in NUMBERS:
                raise ShapeError(f"public input {name!r} must be an array of numbers; got dtype {array.dtype}")
            kinds.append((name, array.dtype.name))
            arrays.append(array.astype("<f4" if array.dtype.kind == "f" else "<i8"))
        shapes = None if self.shapes is None else {k: tuple(map(int, v)) for k, v in self.shapes.items()}
        return shapes, tuple(kinds), arrays

    @classmethod
    def unpack(
        cls,
        shapes: Mapping[str, Shape] | None,
        kinds: Sequence[tuple[str, str]],
        arrays: Sequence[NDArray[Any]],
    ) -> "KnownInputs":
        """Read what `pack` returned."""
        return cls(shapes, {name: a.astype(kind) for (name, kind), a in zip(kinds, arrays, strict=True)})
