"""Integer steps around the comparison keys: one pass over memory where numba is installed.

Each step is written once, in operators that mean the same for a scalar and for a whole int64 array.
With numba a compiled loop applies it element by element, without temporaries; else numpy evaluates it
operator by operator. Arithmetic wraps around mod 2**64.

`h` is an opened value z + r + 2**62 of which BITS bits are cut off, as in `party.truncate`. Its carry m
(one bit) is shared mod 2**16 only, for it is multiplied by 2**48: up to four such shares lie in one
word, lane 0 lowest. `first` is 1 at the keeper, who adds public terms, and 0 at the user.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

try:
    from numba import njit
except ImportError:  # optional at run time
    njit = None  # type: ignore[assignment]

BITS = 16
Ints = NDArray[np.int64]
Bits = NDArray[np.uint8]
_POINT = np.int64((1 << 31) - 1)
_LOW48 = np.int64((1 << 48) - 1)
_OFFSET = np.int64(1 << 46)
_TOP = np.int64(-(1 << 48))


def _compiled_step(function: Any) -> Any:
    return function if njit is None else njit(function)


@_compiled_step
def _public_part(h: Any) -> Any:
    return ((h >> 16) & _LOW48) - _OFFSET


@_compiled_step
def _truncated(h: Any, R: Any, m: Any, first: Any) -> Any:
    return first * _public_part(h) - R + ((m << 48) & ~(h >> 63))


@_compiled_step
def _relu_truncated(c: Any, h: Any, R: Any, carries: Any, beta: Any, beta_R: Any, first: Any) -> Any:
    t = _truncated(h, R, carries, first)
    beta_t = beta * _public_part(h) - beta_R + (carries & _TOP & ~(h >> 63))
    return c * t + (1 - 2 * c) * beta_t


@_compiled_step
def _relu(c: Any, T: Any, r: Any, beta: Any, beta_R: Any, first: Any) -> Any:
    return c * (first * T - r) + (1 - 2 * c) * (beta * T - beta_R)


@_compiled_step
def _larger_truncated(
    c: Any, ha: Any, hb: Any, Ra: Any, Rb: Any, carries: Any, beta: Any, beta_dR: Any, first: Any
) -> Any:
    ga, gb = ~(ha >> 63), ~(hb >> 63)
    ta = _truncated(ha, Ra, carries, first)
    tb = _truncated(hb, Rb, carries >> 16, first)
    D = _public_part(ha) - _public_part(hb)
    beta_d = beta * D - beta_dR + ((carries << 16) & _TOP & ga) - (carries & _TOP & gb)
    return tb + c * (ta - tb) + (1 - 2 * c) * beta_d


@_compiled_step
def _larger(c: Any, Ta: Any, Tb: Any, ra: Any, rb: Any, beta: Any, beta_dR: Any, first: Any) -> Any:
    tb = first * Tb - rb
    return tb + c * (first * Ta - ra - tb) + (1 - 2 * c) * (beta * (Ta - Tb) - beta_dR)


STEPS = {
    "public_part": _public_part,
    "truncated": _truncated,
    "relu_truncated": _relu_truncated,
    "relu": _relu,
    "larger_truncated": _larger_truncated,
    "larger": _larger,
}

if njit is not None:
    _I, _B, _S = "int64[::1]", "uint8[::1]", "int64"

    @njit(f"{_I}({_I})", nogil=True, cache=True)
    def _public_part_loop(h):  # type: ignore[no-untyped-def]
        out = np.empty_like(h)
        for i in range(len(h)):
            out[i] = _public_part(h[i])
        return out

    @njit(f"{_I}({_I}, {_I}, {_I}, {_S})", nogil=True, cache=True)
    def _truncated_loop(h, R, m, first):  # type: ignore[no-untyped-def]
        out = np.empty_like(h)
        for i in range(len(h)):
            out[i] = _truncated(h[i], R[i], m[i], first)
        return out

    @njit(f"{_I}({_B}, {_I}, {_I}, {_I}, {_I}, {_I}, {_S})", nogil=True, cache=True)
    def _relu_truncated_loop(c, h, R, carries, beta, beta_R, first):  # type: ignore[no-untyped-def]
        out = np.empty_like(h)
        for i in range(len(h)):
            out[i] = _relu_truncated(np.int64(c[i]), h[i], R[i], carries[i], beta[i], beta_R[i], first)
        return out

    @njit(f"{_I}({_B}, {_I}, {_I}, {_I}, {_I}, {_S})", nogil=True, cache=True)
    def _relu_loop(c, T, r, beta, beta_R, first):  # type: ignore[no-untyped-def]
        out = np.empty_like(T)
        for i in range(len(T)):
            out[i] = _relu(np.int64(c[i]), T[i], r[i], beta[i], beta_R[i], first)
        return out

    @njit(f"{_I}({_B}, {_I}, {_I}, {_I}, {_I}, {_I}, {_I}, {_I}, {_S})", nogil=True, cache=True)
    def _larger_truncated_loop(c, ha, hb, Ra, Rb, carries, beta, beta_dR, first):  # type: ignore[no-untyped-def]
        out = np.empty_like(ha)
        for i in range(len(ha)):
            out[i] = _larger_truncated(
                np.int64(c[i]), ha[i], hb[i], Ra[i], Rb[i], carries[i], beta[i], beta_dR[i], first
            )
        return out

    @njit(f"{_I}({_B}, {_I}, {_I}, {_I}, {_I}, {_I}, {_I}, {_S})", nogil=True, cache=True)
    def _larger_loop(c, Ta, Tb, ra, rb, beta, beta_dR, first):  # type: ignore[no-untyped-def]
        out = np.empty_like(Ta)
        for i in range(len(Ta)):
            out[i] = _larger(np.int64(c[i]), Ta[i], Tb[i], ra[i], rb[i], beta[i], beta_dR[i], first)
        return out


def public_part(h: Ints) -> Ints:
    """Return T = (h >> 16) - 2**46, the shift logical."""
    out: Ints = _public_part(h) if njit is None else _public_part_loop(h)
    return out


def point_of(T: Ints) -> Ints:
    """Return y = T mod 2**31."""
    return T & _POINT


def sign_of(T: Ints) -> Bits:
    """Return bit 31 of T."""
    return ((T >> 31) & 1).astype(np.uint8)


def truncated(h: Ints, R: Ints, m: Ints, first: np.int64) -> Ints:
    """Return t = first T - R + m g; m in lane 0."""
    out: Ints = _truncated(h, R, m, first) if njit is None else _truncated_loop(h, R, m, first)
    return out


def relu_truncated(c: Bits, h: Ints, R: Ints, carries: Ints, beta: Ints, beta_R: Ints, first: np.int64) -> Ints:
    """Return c t + (1 - 2c) beta t; m in lane 0 and beta m in lane 3 of `carries`."""
    rest = (h, R, carries, beta, beta_R, first)
    out: Ints = _relu_truncated(c.astype(np.int64), *rest) if njit is None else _relu_truncated_loop(c, *rest)
    return out


def relu(c: Bits, T: Ints, r: Ints, beta: Ints, beta_R: Ints, first: np.int64) -> Ints:
    """Return c t + (1 - 2c) beta t with t = first T - r and beta t = beta T - beta_R."""
    rest = (T, r, beta, beta_R, first)
    out: Ints = _relu(c.astype(np.int64), *rest) if njit is None else _relu_loop(c, *rest)
    return out


def larger_truncated(
    c: Bits, ha: Ints, hb: Ints, Ra: Ints, Rb: Ints, carries: Ints, beta: Ints, beta_dR: Ints, first: np.int64
) -> Ints:
    """Return tb + c d + (1 - 2c) beta d with d = ta - tb; lanes of `carries`: ma, mb, beta ma, beta mb."""
    rest = (ha, hb, Ra, Rb, carries, beta, beta_dR, first)
    out: Ints = _larger_truncated(c.astype(np.int64), *rest) if njit is None else _larger_truncated_loop(c, *rest)
    return out


def larger(c: Bits, Ta: Ints, Tb: Ints, ra: Ints, rb: Ints, beta: Ints, beta_dR: Ints, first: np.int64) -> Ints:
    """Return tb + c d + (1 - 2c) beta d with ta = first Ta - ra, tb = first Tb - rb and d = ta - tb."""
    rest = (Ta, Tb, ra, rb, beta, beta_dR, first)
    out: Ints = _larger(c.astype(np.int64), *rest) if njit is None else _larger_loop(c, *rest)
    return out
