"""Integer steps around the comparison keys: one pass over memory where numba is installed.

Each step is written once, in operators that mean the same for a scalar and for a whole int64 array.
With numba a compiled loop applies it element by element, without temporaries; else numpy evaluates it
operator by operator. Arithmetic wraps around mod 2**64.

`h` is an opened value z + r + 2**62 of which b bits are cut off, as in `party.truncate`. Its carry m (one bit) is
shared mod 2**b only, for it is multiplied by 2**(64 - b): where b is BITS, up to four such shares lie in one word,
lane 0 lowest; of a ReLU, which may cut up to MOST_BITS, two. `first` is 1 at the keeper, who adds public terms, and
0 at the user.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

try:
    from numba import njit
except ImportError:  # optional at run time
    njit = None  # type: ignore[assignment]

BITS, MOST_BITS = 16, 32
Ints = NDArray[np.int64]
Bits = NDArray[np.uint8]
_LOW48 = np.int64((1 << 48) - 1)
_OFFSET = np.int64(1 << 46)
_TOP = np.int64(-(1 << 48))


def _compiled_step(function: Any) -> Any:
    return function if njit is None else njit(function)


@_compiled_step
def _public_part(h: Any) -> Any:
    return ((h >> 16) & _LOW48) - _OFFSET


@_compiled_step
def _public_part_of(h: Any, b: Any) -> Any:
    """The same for b bits of 16 to 32: the shift is arithmetic, and its sign is taken off again."""
    one = np.int64(1)
    return ((h >> b) & ((one << (64 - b)) - one)) - (one << (62 - b))


@_compiled_step
def _truncated(h: Any, R: Any, m: Any, first: Any) -> Any:
    return first * _public_part(h) - R + ((m << 48) & ~(h >> 63))


@_compiled_step
def _relu_truncated(c: Any, h: Any, R: Any, carries: Any, beta: Any, beta_R: Any, first: Any, b: Any) -> Any:
    T, negative, up = _public_part_of(h, b), ~(h >> 63), 64 - b
    t = first * T - R + ((carries << up) & negative)
    beta_t = beta * T - beta_R + (((carries >> 32) << up) & negative)
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


@_compiled_step
def _step_of_piece(c: Any, X: Any, A: Any, B: Any, C: Any, beta: Any, beta_r: Any, beta_r2: Any) -> Any:
    """What one knot adds through its mask: (1 - 2c) (beta D(X) - beta r D'(X) + beta r**2 C), D = A + B X + C X**2."""
    return (1 - 2 * c) * (beta * (A + X * (B + X * C)) - beta_r * (B + 2 * X * C) + beta_r2 * C)


STEPS = {
    "public_part": _public_part,
    "public_part_of": _public_part_of,
    "truncated": _truncated,
    "relu_truncated": _relu_truncated,
    "relu": _relu,
    "larger_truncated": _larger_truncated,
    "larger": _larger,
}


def _piecewise_numpy(
    c: Bits,
    X: Ints,
    table: Ints,
    r: Ints,
    beta: Ints,
    beta_r: Ints,
    beta_r2: Ints,
    r2: Ints,
    first: np.int64,
    out: Ints,
) -> None:
    """The same as the compiled `_piecewise`, knot by knot over the whole array."""
    a0, a1, a2 = (np.full_like(X, v) for v in table[0])
    out[:] = 0
    for i in range(len(c)):
        A, B, C = table[i + 1]
        ci = c[i].astype(np.int64)
        a0, a1, a2 = a0 + ci * A, a1 + ci * B, a2 + ci * C
        out += _step_of_piece(ci, X, A, B, C, beta[i], beta_r[i], beta_r2[i])
    out += first * (a0 + X * (a1 + X * a2)) - r * (a1 + 2 * X * a2) + r2 * a2


_piecewise: Any = _piecewise_numpy

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

    @njit(f"{_I}({_I}, {_S})", nogil=True, cache=True)
    def _public_part_of_loop(h, b):  # type: ignore[no-untyped-def]
        out = np.empty_like(h)
        for i in range(len(h)):
            out[i] = _public_part_of(h[i], b)
        return out

    @njit(f"{_I}({_B}, {_I}, {_I}, {_I}, {_I}, {_I}, {_S}, {_S})", nogil=True, cache=True)
    def _relu_truncated_loop(c, h, R, carries, beta, beta_R, first, b):  # type: ignore[no-untyped-def]
        out = np.empty_like(h)
        for i in range(len(h)):
            out[i] = _relu_truncated(np.int64(c[i]), h[i], R[i], carries[i], beta[i], beta_R[i], first, b)
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

    _I2, _B2 = "int64[:,::1]", "uint8[:,::1]"

    @njit(f"void({_B2}, {_I}, {_I2}, {_I}, {_I2}, {_I2}, {_I2}, {_I}, {_S}, {_I})", nogil=True, cache=True)
    def _piecewise_loop(c, X, table, r, beta, beta_r, beta_r2, r2, first, out):  # type: ignore[no-untyped-def]
        for k in range(len(X)):
            a0, a1, a2 = table[0, 0], table[0, 1], table[0, 2]
            total = np.int64(0)
            for i in range(len(c)):
                A, B, C = table[i + 1, 0], table[i + 1, 1], table[i + 1, 2]
                ci = np.int64(c[i, k])
                a0, a1, a2 = a0 + ci * A, a1 + ci * B, a2 + ci * C
                total += _step_of_piece(ci, X[k], A, B, C, beta[i, k], beta_r[i, k], beta_r2[i, k])
            out[k] = total + first * (a0 + X[k] * (a1 + X[k] * a2)) - r[k] * (a1 + 2 * X[k] * a2) + r2[k] * a2

    _piecewise = _piecewise_loop


def public_part(h: Ints, b: int = BITS) -> Ints:
    """Return T = (h >> b) - 2**(62 - b), the shift logical, for b of BITS to MOST_BITS."""
    if b == BITS:
        out: Ints = _public_part(h) if njit is None else _public_part_loop(h)
        return out
    out = _public_part_of(h, np.int64(b)) if njit is None else _public_part_of_loop(h, b)
    return out


def point_of(T: Ints, k: int) -> Ints:
    """Return y = T mod 2**(k - 1)."""
    return T & np.int64((1 << (k - 1)) - 1)


def sign_of(T: Ints, k: int) -> Bits:
    """Return bit k - 1 of T."""
    return ((T >> (k - 1)) & 1).astype(np.uint8)


def truncated(h: Ints, R: Ints, m: Ints, first: np.int64) -> Ints:
    """Return t = first T - R + m g; m in lane 0."""
    out: Ints = _truncated(h, R, m, first) if njit is None else _truncated_loop(h, R, m, first)
    return out


def relu_truncated(
    c: Bits, h: Ints, R: Ints, carries: Ints, beta: Ints, beta_R: Ints, first: np.int64, b: int = BITS
) -> Ints:
    """Return c t + (1 - 2c) beta t for b bits cut off; m in the low and beta m in the high half of `carries`."""
    rest = (h, R, carries, beta, beta_R, first, np.int64(b))
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


def piecewise(c: Bits, X: Ints, table: Ints, r: Ints, shares: Sequence[Ints], first: np.int64) -> Ints:
    """Return p_0(x) + sum_i b_i D_i(x) with x = X - r, as `spline` has it.

    Args:
        c: (m, n) opened bits.
        X: (n) opened values.
        table: (m + 1, 3) coefficients of p_0 and of the D_i; p_0 is a line.
        r: (n) the party's share of r.
        shares: of beta_i r**j, (m, n), for j = 0 up to the degree, then of r**2, (n), where the degree is 2.
        first: 1 at the keeper, 0 at the user.
    """
    degree = min(len(shares) - 1, 2)
    out = np.empty_like(X)
    # Absent powers have coefficients of 0: whatever stands in their place is not read into the sum.
    powers = [shares[min(j, degree)] for j in range(3)]
    r2 = shares[3] if degree == 2 else r
    _piecewise(c, X, table, r, powers[0], powers[1], powers[2], r2, first, out)
    return out
