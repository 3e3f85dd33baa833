"""Compiled loops, as functions of tensors: of numbers on the CPU, of shapes alone on torch's meta device.

A recorder runs protocols on tensors without values, as torch runs its own operators there. So a protocol is written
once, and each step beside it says what shape it makes.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import numba
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_F = TypeVar("_F", bound=Callable[..., Any])
_DTYPES = {np.int64: torch.int64, np.uint8: torch.uint8}


def compiled(signature: str | None = None) -> Callable[[_F], _F]:
    """Return a decorator that compiles a loop with numba: without the interpreter's lock, cached where that can be.

    Args:
        signature: numba's, compiled at once; None to compile for what the first call brings.
    """

    def compile_loop(function: _F) -> _F:
        try:
            return cast(_F, numba.njit(signature, cache=True, nogil=True)(function))
        except RuntimeError:  # no folder that the cache could be written to
            return cast(_F, numba.njit(signature, nogil=True)(function))

    return compile_loop


def filled(
    loop: Callable[..., None],
    shape: Sequence[int],
    first: Tensor,
    *rest: Tensor | NDArray[Any] | int,
    dtype: type[np.int64] | type[np.uint8] = np.int64,
) -> Tensor:
    """Return a new tensor that a loop has filled.

    Args:
        loop: called with the arguments, tensors among them as arrays, and then the array to fill.
        shape: of the result.
        first: the first argument; where it is on the meta device, the result is too, and the loop is not called.
        rest: the other arguments.
        dtype: of the result.
    """
    if first.is_meta:
        return torch.empty(tuple(shape), dtype=_DTYPES[dtype], device="meta")
    # Numpy's, for torch takes ten times as long to make one.
    out = np.empty(shape, dtype)
    loop(first.numpy(), *[a.numpy() if isinstance(a, Tensor) else a for a in rest], out)
    return torch.from_numpy(out)
