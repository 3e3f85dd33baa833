"""Integer steps around the comparison keys, one pass over memory each: compiled, without temporaries.

Each step is written once for a scalar; a compiled loop applies it element by element. Arithmetic wraps around mod
2**64. Tensors are flat and contiguous, int64 where nothing else is said; on torch's meta device only shapes are made.

`h` is an opened value z + r + 2**62 of which b bits are cut off, as in `party.truncate`. Its carry m (one bit) is
shared mod 2**b only, for it is multiplied by 2**(64 - b): where b is 16, up to four such shares lie in one word,
lane 0 lowest; of a ReLU, which may cut up to 32, two. `is_keeper` is 1 at the keeper, who adds public terms, and 0 at
the user.
"""

from collections.abc import Sequence
from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from protocols.limits import FEWEST_CUT_BITS
from protocols.primitives import dcf
from protocols.primitives.loops import compiled, filled

Ints = NDArray[np.int64]
Bits = NDArray[np.uint8]
_LOW48 = np.int64((1 << 48) - 1)
_OFFSET = np.int64(1 << 46)
_TOP = np.int64(-(1 << 48))


# --- steps ----------------------------------------------------------------------------------------------------------


@numba.njit
def _public_part(h: Any) -> Any:
    return ((h >> 16) & _LOW48) - _OFFSET


@numba.njit
def _public_part_of(h: Any, b: Any) -> Any:
    """The same for b bits of 16 to 32: the shift is arithmetic, and its sign is taken off again."""
    one = np.int64(1)
    return ((h >> b) & ((one << (64 - b)) - one)) - (one << (62 - b))


@numba.njit
def _truncated(h: Any, R: Any, m: Any, is_keeper: Any) -> Any:
    return is_keeper * _public_part(h) - R + ((m << 48) & ~(h >> 63))


@numba.njit
def _relu_truncated(c: Any, h: Any, R: Any, carries: Any, beta: Any, beta_R: Any, is_keeper: Any, b: Any) -> Any:
    T, negative, up = _public_part_of(h, b), ~(h >> 63), 64 - b
    t = is_keeper * T - R + ((carries << up) & negative)
    beta_t = beta * T - beta_R + (((carries >> 32) << up) & negative)
    return c * t + (1 - 2 * c) * beta_t


@numba.njit
def _relu(c: Any, T: Any, r: Any, beta: Any, beta_R: Any, is_keeper: Any) -> Any:
    return c * (is_keeper * T - r) + (1 - 2 * c) * (beta * T - beta_R)


@numba.njit
def _larger_truncated(
    c: Any, ha: Any, hb: Any, Ra: Any, Rb: Any, carries: Any, beta: Any, beta_dR: Any, is_keeper: Any
) -> Any:
    ga, gb = ~(ha >> 63), ~(hb >> 63)
    ta = _truncated(ha, Ra, carries, is_keeper)
    tb = _truncated(hb, Rb, carries >> 16, is_keeper)
    D = _public_part(ha) - _public_part(hb)
    beta_d = beta * D - beta_dR + ((carries << 16) & _TOP & ga) - (carries & _TOP & gb)
    return tb + c * (ta - tb) + (1 - 2 * c) * beta_d


@numba.njit
def _larger(c: Any, Ta: Any, Tb: Any, ra: Any, rb: Any, beta: Any, beta_dR: Any, is_keeper: Any) -> Any:
    tb = is_keeper * Tb - rb
    return tb + c * (is_keeper * Ta - ra - tb) + (1 - 2 * c) * (beta * (Ta - Tb) - beta_dR)


@numba.njit
def _step_of_piece(c: Any, X: Any, A: Any, B: Any, C: Any, beta: Any, beta_r: Any, beta_r2: Any) -> Any:
    """What one knot adds through its mask: (1 - 2c) (beta D(X) - beta r D'(X) + beta r**2 C), D = A + B X + C X**2."""
    return (1 - 2 * c) * (beta * (A + X * (B + X * C)) - beta_r * (B + 2 * X * C) + beta_r2 * C)


# --- loops: each step for every element -----------------------------------------------------------------------------

_I, _B, _S = "int64[::1]", "uint8[::1]", "int64"
_I2, _B2 = "int64[:,::1]", "uint8[:,::1]"


@compiled(f"void({_I}, {_S}, {_I})")
def _public_part_loop(h: Ints, b: int, out: Ints) -> None:
    if b == 16:
        for i in range(len(h)):
            out[i] = _public_part(h[i])
    else:
        for i in range(len(h)):
            out[i] = _public_part_of(h[i], b)


@compiled(f"void({_I}, {_I}, {_I}, {_S}, {_I})")
def _truncated_loop(h: Ints, R: Ints, m: Ints, is_keeper: int, out: Ints) -> None:
    for i in range(len(h)):
        out[i] = _truncated(h[i], R[i], m[i], is_keeper)


@compiled(f"void({_B}, {_I}, {_I}, {_I}, {_I}, {_I}, {_S}, {_S}, {_I})")
def _relu_truncated_loop(
    c: Bits, h: Ints, R: Ints, carries: Ints, beta: Ints, beta_R: Ints, is_keeper: int, b: int, out: Ints
) -> None:
    for i in range(len(h)):
        out[i] = _relu_truncated(np.int64(c[i]), h[i], R[i], carries[i], beta[i], beta_R[i], is_keeper, b)


@compiled(f"void({_B}, {_I}, {_I}, {_I}, {_I}, {_S}, {_I})")
def _relu_loop(c: Bits, T: Ints, r: Ints, beta: Ints, beta_R: Ints, is_keeper: int, out: Ints) -> None:
    for i in range(len(T)):
        out[i] = _relu(np.int64(c[i]), T[i], r[i], beta[i], beta_R[i], is_keeper)


@compiled(f"void({_B}, {_I}, {_I}, {_I}, {_I}, {_I}, {_I}, {_I}, {_S}, {_I})")
def _larger_truncated_loop(
    c: Bits,
    ha: Ints,
    hb: Ints,
    Ra: Ints,
    Rb: Ints,
    carries: Ints,
    beta: Ints,
    beta_dR: Ints,
    is_keeper: int,
    out: Ints,
) -> None:
    for i in range(len(ha)):
        out[i] = _larger_truncated(
            np.int64(c[i]), ha[i], hb[i], Ra[i], Rb[i], carries[i], beta[i], beta_dR[i], is_keeper
        )


@compiled(f"void({_B}, {_I}, {_I}, {_I}, {_I}, {_I}, {_I}, {_S}, {_I})")
def _larger_loop(
    c: Bits, Ta: Ints, Tb: Ints, ra: Ints, rb: Ints, beta: Ints, beta_dR: Ints, is_keeper: int, out: Ints
) -> None:
    for i in range(len(Ta)):
        out[i] = _larger(np.int64(c[i]), Ta[i], Tb[i], ra[i], rb[i], beta[i], beta_dR[i], is_keeper)


@compiled(f"void({_B2}, {_I}, {_I2}, {_I}, {_I2}, {_I2}, {_I2}, {_I}, {_S}, {_I})")
def _piecewise_loop(
    c: Bits,
    X: Ints,
    table: Ints,
    r: Ints,
    beta: Ints,
    beta_r: Ints,
    beta_r2: Ints,
    r2: Ints,
    is_keeper: int,
    out: Ints,
) -> None:
    for k in range(len(X)):
        a0, a1, a2 = table[0, 0], table[0, 1], table[0, 2]
        total = np.int64(0)
        for i in range(len(c)):
            A, B, C = table[i + 1, 0], table[i + 1, 1], table[i + 1, 2]
            ci = np.int64(c[i, k])
            a0, a1, a2 = a0 + ci * A, a1 + ci * B, a2 + ci * C
            total += _step_of_piece(ci, X[k], A, B, C, beta[i, k], beta_r[i, k], beta_r2[i, k])
        out[k] = total + is_keeper * (a0 + X[k] * (a1 + X[k] * a2)) - r[k] * (a1 + 2 * X[k] * a2) + r2[k] * a2


# --- public ---------------------------------------------------------------------------------------------------------


def public_part(h: Tensor, b: int = FEWEST_CUT_BITS) -> Tensor:
    """Return T = (h >> b) - 2**(62 - b), the shift logical, for b of 16 to 32."""
    return filled(_public_part_loop, h.shape, h, b)


def truncated(h: Tensor, R: Tensor, m: Tensor, is_keeper: int) -> Tensor:
    """Return t = is_keeper T - R + m g, for 16 bits cut off; m in lane 0."""
    return filled(_truncated_loop, h.shape, h, R, m, is_keeper)


def relu_truncated(
    c: Tensor,
    h: Tensor,
    R: Tensor,
    carries: Tensor,
    beta: Tensor,
    beta_R: Tensor,
    is_keeper: int,
    b: int = FEWEST_CUT_BITS,
) -> Tensor:
    """Return c t + (1 - 2c) beta t for b bits cut off; c uint8; the low half of `carries` is m, the high one beta m."""
    return filled(_relu_truncated_loop, h.shape, c, h, R, carries, beta, beta_R, is_keeper, b)


def relu(c: Tensor, T: Tensor, r: Tensor, beta: Tensor, beta_R: Tensor, is_keeper: int) -> Tensor:
    """Return c t + (1 - 2c) beta t with t = is_keeper T - r and beta t = beta T - beta_R; c uint8."""
    return filled(_relu_loop, T.shape, c, T, r, beta, beta_R, is_keeper)


def larger_truncated(
    c: Tensor,
    ha: Tensor,
    hb: Tensor,
    Ra: Tensor,
    Rb: Tensor,
    carries: Tensor,
    beta: Tensor,
    beta_dR: Tensor,
    is_keeper: int,
) -> Tensor:
    """Return tb + c d + (1 - 2c) beta d, d = ta - tb, for 16 bits cut off; `carries`: ma, mb, beta ma, beta mb."""
    return filled(_larger_truncated_loop, ha.shape, c, ha, hb, Ra, Rb, carries, beta, beta_dR, is_keeper)


def larger(
    c: Tensor, Ta: Tensor, Tb: Tensor, ra: Tensor, rb: Tensor, beta: Tensor, beta_dR: Tensor, is_keeper: int
) -> Tensor:
    """Return tb + c d + (1 - 2c) beta d with ta = is_keeper Ta - ra, tb = is_keeper Tb - rb and d = ta - tb."""
    return filled(_larger_loop, Ta.shape, c, Ta, Tb, ra, rb, beta, beta_dR, is_keeper)


def piecewise(c: Tensor, X: Tensor, table: Ints, r: Tensor, shares: Sequence[Tensor], is_keeper: int) -> Tensor:
    """Return p_0(x) + sum_i b_i D_i(x) with x = X - r, as `spline` has it.

    Args:
        c: uint8 (m, n) opened bits.
        X: (n) opened values.
        table: (m + 1, 3) coefficients of p_0 and of the D_i; p_0 is a line.
        r: (n) the party's share of r.
        shares: of beta_i r**j, (m, n), for j = 0 up to the degree, then of r**2, (n), where the degree is 2.
        is_keeper: 1 at the keeper, 0 at the user.
    """
    degree = min(len(shares) - 1, 2)
    # Absent powers have coefficients of 0: whatever stands in their place is not read into the sum.
    powers = [shares[min(j, degree)] for j in range(3)]
    r2 = shares[3] if degree == 2 else r
    return filled(_piecewise_loop, X.shape, c, X, table, r, *powers, r2, is_keeper)


# --- signs, by the keys ---------------------------------------------------------------------------------------------


def sign_shares(
    T: Tensor, offsets: Sequence[int], seeds: Tensor, words: Tensor, values: Tensor, rank: int, k: int
) -> Tensor:
    """Return a party's shares (under xor) of the bits [t >= o], flipped as the key is, for each offset o.

    Args:
        T: (n) the public part of t; |t - o| < 2**(k-1).
        offsets: o, m of them: one and the same key answers for all.
        seeds, words, values: this party's part of the keys: of `dcf.seeds` and `dcf.Keys`, as int64.
        rank: of the party; 0, the keeper, adds public terms.
        k: bits on which values are compared.

    Returns:
        uint8 (m, n), 0 or 1.
    """

    def loop(T: Ints, seeds: Ints, words: Ints, values: Ints, out: Bits) -> None:
        for i, offset in enumerate(offsets):
            out[i] = _signs(T - offset if offset else T, seeds, words, values, rank, k)

    return filled(loop, (len(offsets), *T.shape), T, seeds, words, values, dtype=np.uint8)


def packed_sign_shares(T: Tensor, seeds: Tensor, words: Tensor, values: Tensor, rank: int, k: int) -> Tensor:
    """Return a party's shares of the bits [t >= 0] as `pack_bits` packs them; see `sign_shares`."""
    return filled(_packed_signs, (-(-T.numel() // 8),), T, seeds, words, values, rank, k, dtype=np.uint8)


def _packed_signs(T: Ints, seeds: Ints, words: Ints, values: Ints, rank: int, k: int, out: Bits) -> None:
    out[:] = np.packbits(_signs(T, seeds, words, values, rank, k))


def _signs(T: Ints, seeds: Ints, words: Ints, values: Ints, rank: int, k: int) -> Bits:
    """Evaluate keys at y = T mod 2**(k-1); the keeper flips by bit k-1 of T, and once more."""
    keys = dcf.Keys(words.view(np.uint64), values.view(np.uint32), k - 1)
    shares = dcf.evaluate(rank, seeds.view(np.uint64), keys, (T & np.int64((1 << (k - 1)) - 1)).view(np.uint64))
    return shares if rank else shares ^ ((~T >> (k - 1)) & 1).astype(np.uint8)


def pack_bits(bits: Tensor) -> Tensor:
    """Return bits, uint8 of any shape, 8 to a byte, the first one highest; zeros fill the last byte."""
    return filled(_pack_bits, (-(-bits.numel() // 8),), bits, dtype=np.uint8)


def _pack_bits(bits: Bits, out: Bits) -> None:
    out[:] = np.packbits(bits)


def unpack_bits(packed: Tensor, shape: Sequence[int]) -> Tensor:
    """Return what `pack_bits` packed: uint8 of `shape`, 0 or 1."""
    return filled(_unpack_bits, shape, packed, dtype=np.uint8)


def _unpack_bits(packed: Bits, out: Bits) -> None:
    out[...] = np.unpackbits(packed, count=out.size).reshape(out.shape)


def join_bits(own: Tensor, others: Tensor, shape: Sequence[int]) -> Tensor:
    """Return the bits of two packed shares under xor: uint8 of `shape`, 0 or 1."""
    return filled(_join_bits, shape, own, others, dtype=np.uint8)


def _join_bits(own: Bits, others: Bits, out: Bits) -> None:
    _unpack_bits(own ^ others, out)
