"""Integer steps around the comparison keys, element by element: one pass over memory where numba is installed.

Each function is written for scalars and runs on whole int64 arrays as well: numba makes a ufunc of it,
numpy evaluates it operator by operator. Arithmetic wraps around mod 2**64. `h` is an opened value
z + r + 2**62 of which BITS bits are cut off, as in `party.truncate`; its carry m (one bit) is shared
mod 2**16 only, for it is multiplied by 2**48: up to four such shares lie in one word, lane 0 lowest.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

try:
    import numba
except ImportError:  # optional at run time
    numba = None  # type: ignore[assignment]

BITS = 16
Ints = NDArray[np.int64]
_POINT = np.int64((1 << 31) - 1)
_LOW48 = np.int64((1 << 48) - 1)
_OFFSET = np.int64(1 << 46)
_TOP = np.int64(-(1 << 48))
_I, _B = "int64", "uint8"


def _ufunc(result: str, *arguments: str) -> Callable[[Any], Any]:
    if numba is None:
        return lambda function: function
    decorate: Callable[[Any], Any] = numba.vectorize([f"{result}({', '.join(arguments)})"], cache=True)  # type: ignore[no-untyped-call]
    return decorate


@_ufunc(_I, _I)
def public_part(h: Any) -> Any:
    """Return T = (h >> 16) - 2**46, the shift logical."""
    return ((h >> 16) & _LOW48) - _OFFSET


@_ufunc(_I, _I)
def point_of(T: Any) -> Any:
    """Return y = T mod 2**31."""
    return T & _POINT


@_ufunc(_B, _I)
def sign_of(T: Any) -> Any:
    """Return bit 31 of T."""
    return np.uint8((T >> 31) & 1)


@_ufunc(_I, _I, _I, _I, _I)
def truncated(h: Any, R: Any, m: Any, first: Any) -> Any:
    """Return t = first T - R + m g; m in lane 0."""
    return first * (((h >> 16) & _LOW48) - _OFFSET) - R + ((m << 48) & ~(h >> 63))


@_ufunc(_I, _B, _I, _I, _I, _I, _I, _I)
def relu_truncated(c: Any, h: Any, R: Any, carries: Any, beta: Any, beta_R: Any, first: Any) -> Any:
    """Return c t + (1 - 2c) beta t; m in lane 0 and beta m in lane 3 of `carries`."""
    T = ((h >> 16) & _LOW48) - _OFFSET
    g = ~(h >> 63)
    t = first * T - R + ((carries << 48) & g)
    beta_t = beta * T - beta_R + (carries & _TOP & g)
    return np.int64(c) * t + (1 - 2 * np.int64(c)) * beta_t


@_ufunc(_I, _B, _I, _I, _I, _I, _I)
def relu(c: Any, T: Any, r: Any, beta: Any, beta_R: Any, first: Any) -> Any:
    """Return c t + (1 - 2c) beta t with t = first T - r and beta t = beta T - beta_R."""
    return np.int64(c) * (first * T - r) + (1 - 2 * np.int64(c)) * (beta * T - beta_R)


@_ufunc(_I, _B, _I, _I, _I, _I, _I, _I, _I, _I)
def larger_truncated(
    c: Any, ha: Any, hb: Any, Ra: Any, Rb: Any, carries: Any, beta: Any, beta_dR: Any, first: Any
) -> Any:
    """Return tb + c d + (1 - 2c) beta d with d = ta - tb; lanes of `carries`: ma, mb, beta ma, beta mb."""
    Ta, Tb = ((ha >> 16) & _LOW48) - _OFFSET, ((hb >> 16) & _LOW48) - _OFFSET
    ga, gb = ~(ha >> 63), ~(hb >> 63)
    ta = first * Ta - Ra + ((carries << 48) & ga)
    tb = first * Tb - Rb + ((carries << 32) & _TOP & gb)
    beta_d = beta * (Ta - Tb) - beta_dR + ((carries << 16) & _TOP & ga) - (carries & _TOP & gb)
    return tb + np.int64(c) * (ta - tb) + (1 - 2 * np.int64(c)) * beta_d


@_ufunc(_I, _B, _I, _I, _I, _I, _I, _I, _I)
def larger(c: Any, Ta: Any, Tb: Any, ra: Any, rb: Any, beta: Any, beta_dR: Any, first: Any) -> Any:
    """Return tb + c d + (1 - 2c) beta d with ta = first Ta - ra, tb = first Tb - rb and d = ta - tb."""
    tb = first * Tb - rb
    d = first * Ta - ra - tb
    return tb + np.int64(c) * d + (1 - 2 * np.int64(c)) * (beta * (Ta - Tb) - beta_dR)
