"""What a model takes: arrays by name, of one batch, in the range of fixed point."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from protocols.errors import InputError, RangeError, ShapeError
from protocols.program import Shape
from protocols.ring import CLIP_LIMIT

Floats = NDArray[np.floating]


def input_arrays(
    shapes: Mapping[str, Shape], x: Any, low: float = -CLIP_LIMIT, high: float = CLIP_LIMIT
) -> dict[str, Floats]:
    """Return a model's inputs as arrays of one batch.

    Args:
        shapes: name -> shape of one sample.
        x: float array or tensor of shape (n, *sample), n >= 1; for several inputs a mapping of names to such arrays.
        low, high: allowed values; fixed point narrows them to +-2**14.

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
    bounds = max(low, -CLIP_LIMIT), min(high, CLIP_LIMIT)
    arrays = {name: _array(name, shape, x[name], bounds) for name, shape in shapes.items()}
    if len({len(v) for v in arrays.values()}) != 1:
        raise ShapeError(f"all inputs must have the same batch; got {[len(v) for v in arrays.values()]}")
    return arrays


def _array(name: str, shape: Shape, x: Any, bounds: tuple[float, float]) -> Floats:
    array = x.detach().cpu().numpy() if isinstance(x, Tensor) else x
    wanted = f"input {name!r} must be a float array of shape (n, {', '.join(map(str, shape))}) with n >= 1"
    if not isinstance(array, np.ndarray):
        raise TypeError(f"{wanted}; got a {type(x).__name__}")
    if array.dtype.kind != "f":
        raise ShapeError(f"{wanted}; got dtype {array.dtype}")
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
