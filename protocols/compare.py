"""Comparisons by distributed comparison functions: ReLU fused with truncation, and maxima of pairs.

A value z is opened under a dealer's mask r; then t = T - R + m g (see `party.truncate`), and the sign
of t follows from the public y = T mod 2**(k-1) and the secret q = R mod 2**(k-1):

    [t < 0] = T_{k-1} ^ R_{k-1} ^ 1{y < q}          for |t| < 2**(k-1)

The comparison key's output is flipped by R_{k-1} and a random bit beta, so that the opened bit
c = [t >= 0] ^ beta is uniform; with dealer shares of beta, beta R and beta m,

    relu(t) = c t + (1 - 2c) beta t,    beta t = [beta] T - [beta R] + [beta m] g.

A maximum is max(a, b) = b + relu(a - b); the difference of two opened values has the public part
T_a - T_b and the mask R_a - R_b, which the dealer knows, so that no opening of its own is needed.

Source: [BCG+21] for the comparison key; shared/design/protocols.md, "Sign of a value whose mask the
dealer knows" and "ReLU fused with truncation".
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from protocols import correlation, dcf, fused, ring
from protocols.correlation import KEEPER, Dealing, Dealt, Kind, Request, share_for_keeper
from protocols.cost import Cost, costs
from protocols.party import Party
from protocols.prg import Stream

K = 32
POINT_BITS = K - 1
_POINT = (1 << POINT_BITS) - 1


def _key_shapes(n: int) -> list[tuple[int, ...]]:
    """Shapes, as int64, of the correction words of n comparisons."""
    blocks = dcf.padded(n) // dcf.LANES
    return [(blocks, dcf.levels(POINT_BITS) + 1, dcf.LANES, 2), (blocks * dcf.LANES // 2,)]


def _make_keys(mask: Tensor, beta: Tensor, keeper: Stream, user: Stream) -> list[Tensor]:
    """Return correction words for the sign of values under `mask`, flipped by its bit k-1 and beta."""
    flat = mask.reshape(-1)
    n = flat.numel()
    q = (flat & _POINT).numpy().view(np.uint64)
    flip = ((flat >> POINT_BITS) & 1).bitwise_xor_(beta.reshape(-1)).numpy().view(np.uint64)
    keys = dcf.generate(dcf.seeds(keeper, n), dcf.seeds(user, n), q, flip, POINT_BITS)
    return [torch.from_numpy(keys.words.view(np.int64)), torch.from_numpy(keys.values.view(np.int64))]


def _random_bits(keeper: Stream, user: Stream, shape: Sequence[int]) -> Tensor:
    """Return bits that each party alone cannot know: the sum of one draw of each."""
    n = int(np.prod(shape))
    words = keeper.words(((n + 63) // 64,)) ^ user.words(((n + 63) // 64,))
    bits = np.unpackbits(words.numpy().view(np.uint8), count=n)
    return torch.from_numpy(bits.astype(np.int64)).reshape(tuple(shape))


def _skip_bits(stream: Stream, shape: Sequence[int]) -> None:
    stream.words(((int(np.prod(shape)) + 63) // 64,))


# --- sign: of one value. Part: [r], [beta], [beta R], and with bits [R], [m], [beta m]; seeds; keys -----------------


def _deal_sign(request: Request, keeper: Stream, user: Stream, dealing: Dealing) -> Dealt:
    (shape,) = request.shapes
    bits = correlation.bits_of(request)
    r = keeper.words(shape) + user.words(shape)
    beta = _random_bits(keeper, user, shape)
    R = ring.shift_right_logical(r, bits) if bits else r
    keys = _make_keys(R, beta, keeper, user)
    values = [beta, beta * R]
    if bits:
        m = ring.top_bit(r)
        values += [R, m, beta * m]
    return [share_for_keeper(v, user) for v in values], keys


def _take_sign(request: Request, rank: int, stream: Stream, corrections: Sequence[Tensor]) -> tuple[Tensor, ...]:
    (shape,) = request.shapes
    n_values = 5 if correlation.bits_of(request) else 2
    r = stream.words(shape)
    _skip_bits(stream, shape)
    seeds = torch.from_numpy(dcf.seeds(stream, r.numel()).view(np.int64))
    if rank == KEEPER:
        return (r, *corrections[:n_values], seeds, *corrections[n_values:])
    return (r, *(stream.words(shape) for _ in range(n_values)), seeds, *corrections)


correlation.KINDS["sign"] = Kind(
    _deal_sign,
    _take_sign,
    lambda q: q.shapes * (5 if correlation.bits_of(q) else 2),
    lambda q: _key_shapes(int(np.prod(q.shapes[0]))),
)


# --- opening: [r], [R], [m] of values whose pairs are compared; R and m are kept by the dealer for `pair` -----------
# A pair request carries the whole group: it is dealt together, so that the dealer knows both masks.


def _pair_masks(R: Tensor) -> tuple[Tensor, Tensor]:
    half = R.shape[-1] // 2
    return R[..., :half], R[..., half : 2 * half]


def _deal_pairs(request: Request, keeper: Stream, user: Stream, dealing: Dealing) -> Dealt:
    (shape,) = request.shapes
    bits, half = correlation.bits_of(request), shape[-1] // 2
    pairs = (*shape[:-1], half)
    r = keeper.words(shape) + user.words(shape)
    beta = _random_bits(keeper, user, pairs)
    R = ring.shift_right_logical(r, bits) if bits else r
    Ra, Rb = _pair_masks(R)
    dR = Ra - Rb
    keys = _make_keys(dR, beta, keeper, user)
    values = [beta, beta * dR]
    if bits:
        m = ring.top_bit(r)
        ma, mb = _pair_masks(m)
        values += [R, m, beta * ma, beta * mb]
    return [share_for_keeper(v, user) for v in values], keys


def _pair_shapes(request: Request) -> list[tuple[int, ...]]:
    (shape,) = request.shapes
    pairs = (*shape[:-1], shape[-1] // 2)
    return [pairs, pairs, shape, shape, pairs, pairs] if correlation.bits_of(request) else [pairs, pairs]


def _take_pairs(request: Request, rank: int, stream: Stream, corrections: Sequence[Tensor]) -> tuple[Tensor, ...]:
    (shape,) = request.shapes
    listed = _pair_shapes(request)
    r = stream.words(shape)
    pairs = (*shape[:-1], shape[-1] // 2)
    _skip_bits(stream, pairs)
    seeds = torch.from_numpy(dcf.seeds(stream, int(np.prod(pairs))).view(np.int64))
    if rank == KEEPER:
        return (r, *corrections[: len(listed)], seeds, *corrections[len(listed) :])
    return (r, *(stream.words(s) for s in listed), seeds, *corrections)


correlation.KINDS["pairs"] = Kind(
    _deal_pairs,
    _take_pairs,
    _pair_shapes,
    lambda q: _key_shapes(int(np.prod(q.shapes[0][:-1])) * (q.shapes[0][-1] // 2)),
)


# --- online ---------------------------------------------------------------------------------------------------------


def _open_bits(
    party: Party, y: NDArray[np.uint64], sign: NDArray[np.uint8], key: Sequence[Tensor]
) -> NDArray[np.int64]:
    """Evaluate the keys at y and open c = [t >= 0] ^ beta; `sign` is bit k-1 of T. One round, n / 8 bytes each way."""
    seeds, words, values = (t.numpy() for t in key)
    keys = dcf.Keys(words.view(np.uint64), values.view(np.uint32), POINT_BITS)
    share = dcf.evaluate(party.rank, seeds.view(np.uint64), keys, y)
    if party.rank == KEEPER:
        share ^= sign ^ 1
    packed = np.packbits(share)
    opened = packed ^ party.wire.exchange("bits", torch.from_numpy(packed)).numpy()
    return np.unpackbits(opened, count=len(share)).astype(np.int64)


def _flat(tensors: Sequence[Tensor]) -> list[NDArray[np.int64]]:
    return [t.reshape(-1).numpy() for t in tensors]


def _open(party: Party, z: Tensor, r: Tensor, bits: int) -> NDArray[np.int64]:
    """Open z + r (+ 2**62 when it is to be truncated); flat."""
    masked = z + r
    if bits and party.rank == KEEPER:
        masked += 1 << 62
    return (masked + party.wire.exchange("open", masked)).reshape(-1).numpy()


@costs(lambda n: Cost(rounds=2, payload_bytes=16 * n + 2 * -(-n // 8)))
def relu(party: Party, z: Tensor, bits: int) -> Tensor:
    """Truncate a sharing by `bits` and take max(t, 0).

    Args:
        party: this party.
        z: share, int64 of any shape, at scale 2**(f + bits); |z| < 2**62 and |t| < 2**(k-1).
        bits: 0 or more.

    Returns:
        Share of relu(t), t = z >> bits up to one unit in the last place, same shape, scale 2**f.

    Cost: 2 rounds; 8 bytes and 1 bit each way for each of n elements.
    Security: both opened values are uniform: z under r, the sign under beta.
    """
    part = party.correlations.take(Request("sign", (tuple(z.shape),), (("bits", bits),)))
    if party.dry:
        return torch.empty_like(z)
    n_values = 5 if bits else 2
    r, beta, beta_R, *rest = part[: 1 + n_values]
    h = _open(party, z, r, bits)
    T, g, y, sign = fused.public_part(h, bits)
    c = _open_bits(party, y, sign, part[1 + n_values :])
    first = np.int64(party.rank == KEEPER)
    if bits:
        R, m, beta_m = _flat(rest)
        out = fused.relu_truncated(c, T, g, R, m, *_flat([beta, beta_R]), beta_m, first)
    else:
        out = fused.relu(c, T, *_flat([r, beta, beta_R]), first)
    return torch.from_numpy(out).reshape(z.shape)


@costs(lambda n, pairs: Cost(rounds=2, payload_bytes=16 * n + 2 * -(-pairs // 8)))
def max_of_pairs(party: Party, z: Tensor, bits: int) -> Tensor:
    """Truncate a sharing by `bits` and take the maximum of each pair along the last axis.

    Args:
        party: this party.
        z: share, (..., w) at scale 2**(f + bits): element i is compared with element i + w // 2; the last one
            of an odd w is truncated and passed on.
        bits: 0 or more.

    Returns:
        Share of the maxima, (..., w // 2 + w % 2) at scale 2**f.

    Cost: 2 rounds; 8 bytes each way for each of n elements, 1 bit each way for each pair. Opened values serve
        the truncation and the comparison at once.
    Security: as `relu`.
    """
    part = party.correlations.take(Request("pairs", (tuple(z.shape),), (("bits", bits),)))
    width = z.shape[-1]
    half, odd = width // 2, width % 2
    shape = (*z.shape[:-1], half)
    if party.dry:
        return torch.empty((*z.shape[:-1], half + odd), dtype=torch.int64, device="meta")
    n_values = 6 if bits else 2
    r, beta, beta_dR, *rest = part[: 1 + n_values]
    h = _open(party, z, r, bits)
    T, g, _, _ = fused.public_part(h, bits)
    first = np.int64(party.rank == KEEPER)
    if bits:
        R, m, beta_ma, beta_mb = rest
        t = fused.truncated(T, g, *_flat([R, m]), first).reshape(z.shape)
    else:
        t = (first * T - r.reshape(-1).numpy()).reshape(z.shape)
    T = T.reshape(z.shape)
    D = np.ascontiguousarray(T[..., :half] - T[..., half : 2 * half]).reshape(-1)
    y, sign = fused.point_and_sign(D)
    c = _open_bits(party, y, sign, part[1 + n_values :])
    beta_d = fused.beta_times(D, *_flat([beta, beta_dR]))
    if bits:
        G = g.reshape(z.shape)
        ga, gb = (np.ascontiguousarray(v).reshape(-1) for v in (G[..., :half], G[..., half : 2 * half]))
        beta_d += fused.beta_carry(ga, gb, *_flat([beta_ma, beta_mb]))
    ta, tb = (np.ascontiguousarray(v).reshape(-1) for v in (t[..., :half], t[..., half : 2 * half]))
    best = torch.from_numpy(fused.larger(c, ta, tb, beta_d)).reshape(shape)
    return torch.cat([best, torch.from_numpy(t[..., 2 * half :])], dim=-1) if odd else best
