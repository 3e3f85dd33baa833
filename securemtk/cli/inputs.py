"""Arrays that commands read."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from protocols.errors import InputError


def read_input(path: Path) -> Any:
    """Return the array of an .npy file, or those of an .npz file by name.

    Raises:
        InputError: no such file, or none of finite floating-point numbers.
    """
    try:
        read = np.load(path, allow_pickle=False)
        arrays: Any = {name: read[name] for name in read} if isinstance(read, Mapping) else read
    except OSError as error:
        raise InputError(f"{str(path)!r} must be a readable .npy file; {error.strerror or 'it is none'}") from None
    except (ValueError, EOFError) as error:
        raise InputError(f"{str(path)!r} must be a .npy file of numbers; it is none ({type(error).__name__})") from None
    for name, array in arrays.items() if isinstance(arrays, dict) else [(path.name, arrays)]:
        _check_numbers(name, array)
    return arrays


def _check_numbers(name: str, array: NDArray[Any]) -> None:
    """Refuse early what every model would refuse: starting a session takes seconds."""
    if array.dtype.kind != "f":
        raise InputError(f"{name!r} must hold floating-point numbers; got {array.dtype}")
    if not np.isfinite(array).all():
        raise InputError(f"{name!r} must be finite; got nan or infinity")
