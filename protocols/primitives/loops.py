"""Compiled loops, as functions of tensors: of numbers on the CPU, of shapes alone on torch's meta device.

A recorder runs protocols on tensors without values, as torch runs its own operators there. So a protocol is written
once, and each step beside it says what shape it makes.
"""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import numba
import numpy as np
import torch
from numba.core.caching import FunctionCache
from numpy.typing import NDArray
from torch import Tensor

_F = TypeVar("_F", bound=Callable[..., Any])
_DTYPES = {np.int64: torch.int64, np.uint8: torch.uint8}


class _Cache(FunctionCache):
    """Numba's, but for files that do not hold what was written: a loop is then compiled anew, as for the first time.

    A machine that loses its power, or a disk that is full, leaves such files, and numba reads them as they are.
    """

    def load_overload(self, *wanted: Any) -> Any:
        """Return what was compiled before, None where that is not there or cannot be read."""
        try:
            return super().load_overload(*wanted)  # type: ignore[no-untyped-call]
        except Exception:
            with contextlib.suppress(OSError):
                self.flush()  # type: ignore[no-untyped-call]
            return None

    def save_overload(self, *made: Any) -> None:
        """Keep what was compiled, where the disk takes it."""
        with contextlib.suppress(OSError):
            super().save_overload(*made)  # type: ignore[no-untyped-call]


def compiled(signature: str | None = None) -> Callable[[_F], _F]:
    """Return a decorator that compiles a loop with numba: without the interpreter's lock, cached where that can be.

    Args:
        signature: numba's, compiled at once; None to compile for what the first call brings.
    """

    def compile_loop(function: _F) -> _F:
        loop: Any = numba.njit(nogil=True)(function)
        with contextlib.suppress(RuntimeError):  # no folder that the cache could be written to
            loop._cache = _Cache(function)  # type: ignore[no-untyped-call]
        if signature is not None:
            loop.compile(signature)
            loop.disable_compile()
        return cast(_F, loop)

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
