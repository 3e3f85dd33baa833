"""Plain Python values as JSON and arrays, for a link: nothing is ever pickled."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from protocols.errors import InputError, IntegrityError

Packed = tuple[Any, list[np.ndarray]]
_KINDS = "biuf"


def pack(value: Any, what: str = "a value") -> Packed:
    """Return a value as (JSON, arrays).

    Args:
        value: None, bool, int, float, str, numpy array or number, torch tensor; lists, tuples, dicts by str of these.
        what: names it in a message.

    Raises:
        InputError: it is, or holds, something else.
    """
    arrays: list[np.ndarray] = []

    def put(x: Any) -> Any:
        if isinstance(x, np.ndarray | np.generic | torch.Tensor) and not isinstance(x, str):
            return put_array(x)
        if x is None or isinstance(x, bool):
            return x
        if isinstance(x, int | float):
            # What JSON has no number for, or no number that every reader takes as it is.
            is_plain = math.isfinite(x) if isinstance(x, float) else abs(x) < 1 << 53
            plain = float(x) if isinstance(x, float) else int(x)
            return plain if is_plain else {"number": repr(plain)}
        if isinstance(x, str):
            return str.__str__(x)
        if isinstance(x, list | tuple):
            return {"tuple" if isinstance(x, tuple) else "list": [put(item) for item in x]}
        if isinstance(x, dict) and all(isinstance(key, str) for key in x):
            return {"dict": {key: put(item) for key, item in x.items()}}
        raise InputError(
            f"{what} must consist of numbers, text, arrays, tensors, lists, tuples and dicts by str; "
            f"got a {type(x).__name__}"
        )

    def put_array(x: np.ndarray | np.generic | torch.Tensor) -> Any:
        array = np.ascontiguousarray(x.detach().cpu().numpy() if isinstance(x, torch.Tensor) else x)
        if array.dtype.kind not in _KINDS:
            raise InputError(f"{what} must hold arrays of numbers; got one of {array.dtype}")
        arrays.append(array.reshape(-1).view(np.uint8))
        kind = "tensor" if isinstance(x, torch.Tensor) else "array"
        return {kind: len(arrays) - 1, "dtype": array.dtype.str, "shape": np.shape(x)}

    return put(value), arrays


def unpack(meta: Any, arrays: Sequence[np.ndarray]) -> Any:
    """Return what `pack` was given; raise IntegrityError for anything else.

    Args:
        meta: JSON values.
        arrays: uint8 (n,) each, in the order of `pack`.
    """

    def get(x: Any) -> Any:
        if not isinstance(x, dict):
            return x
        if "number" in x:
            text = str(x["number"])
            return float(text) if text in ("inf", "-inf", "nan") else int(text)
        if "dict" in x:
            return {key: get(item) for key, item in x["dict"].items()}
        if "list" in x or "tuple" in x:
            items = [get(item) for item in x["tuple" if "tuple" in x else "list"]]
            return tuple(items) if "tuple" in x else items
        dtype = np.dtype(x["dtype"])
        if dtype.kind not in _KINDS:
            raise ValueError(dtype)
        array = arrays[x["tensor" if "tensor" in x else "array"]].view(dtype).reshape(x["shape"])
        return torch.from_numpy(array) if "tensor" in x else array

    try:
        return get(meta)
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, OverflowError, RecursionError):
        raise IntegrityError("a value must be one of ours; it is not") from None
