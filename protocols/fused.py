"""Integer steps around the comparison keys, on flat int64 arrays: numpy expressions that numba fuses.

Each function runs as it stands; where numba is installed it is compiled, so that a chain of array
operations makes one pass over memory. Arithmetic wraps around mod 2**64.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

try:
    import numba
except ImportError:  # optional at run time
    numba = None  # type: ignore[assignment]

Ints = NDArray[np.int64]
_POINT = np.int64((1 << 31) - 1)


def _compiled(signature: str) -> Callable[[Any], Any]:
    if numba is None:
        return lambda function: function
    decorate: Callable[[Any], Any] = numba.njit(signature, nogil=True, cache=True)
    return decorate


_A = "int64[::1]"


@_compiled(f"{_A}({_A}, {_A}, {_A}, {_A}, {_A}, {_A}, {_A}, {_A}, int64)")
def relu_truncated(
    c: Ints, T: Ints, g: Ints, R: Ints, m: Ints, beta: Ints, beta_R: Ints, beta_m: Ints, first: np.int64
) -> Ints:
    """Return c t + (1 - 2c) beta t with t = first T - R + m g and beta t = beta T - beta_R + beta_m g."""
    return c * (first * T - R + m * g) + (1 - 2 * c) * (beta * T - beta_R + beta_m * g)


@_compiled(f"{_A}({_A}, {_A}, {_A}, {_A}, {_A}, int64)")
def relu(c: Ints, T: Ints, r: Ints, beta: Ints, beta_R: Ints, first: np.int64) -> Ints:
    """Return c t + (1 - 2c) beta t with t = first T - r and beta t = beta T - beta_R."""
    return c * (first * T - r) + (1 - 2 * c) * (beta * T - beta_R)


@_compiled(f"{_A}({_A}, {_A}, {_A}, {_A}, int64)")
def truncated(T: Ints, g: Ints, R: Ints, m: Ints, first: np.int64) -> Ints:
    """Return t = first T - R + m g."""
    return first * T - R + m * g


@_compiled(f"{_A}({_A}, {_A}, {_A})")
def beta_times(T: Ints, beta: Ints, beta_R: Ints) -> Ints:
    """Return beta T - beta_R."""
    return beta * T - beta_R


@_compiled(f"{_A}({_A}, {_A}, {_A}, {_A})")
def beta_carry(ga: Ints, gb: Ints, beta_ma: Ints, beta_mb: Ints) -> Ints:
    """Return beta_ma ga - beta_mb gb."""
    return beta_ma * ga - beta_mb * gb


@_compiled(f"{_A}({_A}, {_A}, {_A}, {_A})")
def larger(c: Ints, ta: Ints, tb: Ints, beta_d: Ints) -> Ints:
    """Return tb + c d + (1 - 2c) beta d with d = ta - tb."""
    return tb + c * (ta - tb) + (1 - 2 * c) * beta_d


def point_and_sign(T: Ints) -> tuple[NDArray[np.uint64], NDArray[np.uint8]]:
    """Return y = T mod 2**31 and bit 31 of T."""
    return (T & _POINT).view(np.uint64), ((T >> 31) & 1).astype(np.uint8)


def public_part(h: Ints, bits: int) -> tuple[Ints, Ints, NDArray[np.uint64], NDArray[np.uint8]]:
    """Return T, g, y = T mod 2**31 and bit 31 of T of an opened value; see `party.public_part`."""
    if bits == 0:
        return (h, h[:0], *point_and_sign(h))
    unsigned = h.view(np.uint64)
    T = (unsigned >> np.uint64(bits)).view(np.int64) - np.int64(1 << (62 - bits))
    g = ((np.uint64(1) - (unsigned >> np.uint64(63))) << np.uint64(64 - bits)).view(np.int64)
    return (T, g, *point_and_sign(T))
