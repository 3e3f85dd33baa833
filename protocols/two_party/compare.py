"""Comparisons by distributed comparison functions: ReLU fused with truncation, and maxima of pairs.

A value z is opened under a dealer's mask r; then t = T - R + m g (see `party.truncate`), and the sign
of t follows from the public y = T mod 2**(k-1) and the secret q = R mod 2**(k-1):

    [t < 0] = T_{k-1} ^ R_{k-1} ^ 1{y < q}          for |t| < 2**(k-1)

The comparison key's output is flipped by R_{k-1} and a random bit beta, so that the opened bit
c = [t >= 0] ^ beta is uniform; with dealer shares of beta, beta R and beta m,

    relu(t) = c t + (1 - 2c) beta t,    beta t = [beta] T - [beta R] + [beta m] g.

A maximum is max(a, b) = b + relu(a - b); the difference of two opened values has the public part
T_a - T_b and the mask R_a - R_b, which the dealer knows, so that no opening of its own is needed.

Source: [Boy21] for the comparison key; docs/protocols.md#comparison, with proofs of ReLU, sign and maxima.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from protocols import limits
from protocols.cost import Cost, costs
from protocols.dealing import correlation
from protocols.dealing.correlation import KEEPER, Dealing, Dealt, Kind, Request, Shape, share_for_keeper, share_lanes
from protocols.errors import UnsupportedError
from protocols.primitives import comparison_steps, dcf, ring
from protocols.primitives.prg import Stream
from protocols.two_party.party import Party


def key_shapes(n: int, k: int) -> list[tuple[int, ...]]:
    """Shapes, as int64, of the correction words of n comparisons on k bits."""
    blocks = dcf.padded(n) // dcf.LANES
    return [(blocks, dcf.levels(k - 1) + 1, dcf.LANES, 2), (blocks * dcf.LANES // 2,)]


def make_keys(mask: Tensor, beta: Tensor, keeper: Stream, user: Stream, k: int) -> list[Tensor]:
    """Return correction words for the sign of values under `mask`, flipped by its bit k-1 and beta."""
    flat = mask.reshape(-1)
    n = flat.numel()
    q = (flat & ((1 << (k - 1)) - 1)).numpy().view(np.uint64)
    flip = ((flat >> (k - 1)) & 1).bitwise_xor_(beta.reshape(-1)).numpy().view(np.uint64)
    keys = dcf.generate(dcf.seeds(keeper, n), dcf.seeds(user, n), q, flip, k - 1)
    return [torch.from_numpy(keys.words.view(np.int64)), torch.from_numpy(keys.values.view(np.int64))]


def random_bits(keeper: Stream, user: Stream, shape: Sequence[int]) -> Tensor:
    """Return bits that each party alone cannot know: the sum of one draw of each."""
    n = int(np.prod(shape))
    words = keeper.words(((n + 63) // 64,)) ^ user.words(((n + 63) // 64,))
    bits = np.unpackbits(words.numpy().view(np.uint8), count=n)
    return torch.from_numpy(bits.astype(np.int64)).reshape(tuple(shape))


def _skip_bits(stream: Stream, n: int) -> None:
    stream.words(((n + 63) // 64,))


# The bits of a lane, and how many of them lie in a word.
_LANES = {torch.int16: 4, torch.int32: 2}


def _lanes(kind: torch.dtype, *carries: Tensor) -> Tensor:
    """Pack tensors of bits into the lanes of one word each, the first one lowest."""
    lanes = torch.zeros((*carries[0].shape, _LANES[kind]), dtype=kind)
    for i, carry in enumerate(carries):
        lanes[..., i] = carry.to(kind)
    return lanes.view(torch.int64).squeeze(-1)


def width_of(request: Request) -> int:
    """Return the bits k on which a request's values are compared."""
    return int(dict(request.options)["k"])


def request_of(kind: str, shape: Sequence[int], bits: int, k: int = limits.COMPARISON_BITS) -> Request:
    """Return what one comparison of values of `shape`, truncated by `bits`, needs; `kind` is "sign" or "pairs"."""
    return Request(kind, (tuple(shape),), (("bits", bits), ("k", k)))


def _cut(request: Request) -> int:
    """Return the bits by which values are truncated: such as the fused steps are written for."""
    bits = correlation.bits_of(request)
    most = limits.most_cut(width_of(request)) if request.kind == "sign" else limits.FEWEST_CUT_BITS
    if bits and not limits.FEWEST_CUT_BITS <= bits <= most:
        raise UnsupportedError(f"a comparison truncates by 0 or {limits.FEWEST_CUT_BITS} to {most} bits; got {bits}")
    return bits


def _take(
    request: Request, rank: int, stream: Stream, corrections: Sequence[Tensor], shares: Sequence[Shape], n_keys: int
) -> tuple[Tensor, ...]:
    """A party's part: [r], its seeds, the correction words, then the shares in order."""
    r = stream.words(request.shapes[0])
    _skip_bits(stream, n_keys)
    seeds = torch.from_numpy(dcf.seeds(stream, n_keys).view(np.int64))
    if rank == KEEPER:
        return (r, seeds, *corrections[len(shares) :], *corrections[: len(shares)])
    return (r, seeds, *corrections, *(stream.words(s) for s in shares))


def _part_shapes(request: Request, compared: Shape, shares: Sequence[Shape]) -> list[Shape]:
    """Shapes of what `_take` returns, where values of shape `compared` have a key each."""
    n = math.prod(compared)
    return [request.shapes[0], (dcf.padded(n), 2), *key_shapes(n, width_of(request)), *shares]


# --- sign: of each value. Shares: [beta], [beta R]; where it is cut also [R] and the half words m, beta m -------------


def _sign_shapes(request: Request) -> list[Shape]:
    return [request.shapes[0]] * (4 if _cut(request) else 2)


def _deal_sign(request: Request, keeper: Stream, user: Stream, dealing: Dealing) -> Dealt:
    (shape,) = request.shapes
    cut = _cut(request)
    r = keeper.words(shape) + user.words(shape)
    beta = random_bits(keeper, user, shape)
    R = ring.shift_right_logical(r, cut) if cut else r
    keys = make_keys(R, beta, keeper, user, width_of(request))
    shares = [share_for_keeper(v, user) for v in (beta, beta * R)]
    if cut:
        m = ring.top_bit(r)
        shares += [share_for_keeper(R, user), share_lanes(_lanes(torch.int32, m, beta * m), user, torch.int32)]
    return shares, keys


def _take_sign(request: Request, rank: int, stream: Stream, corrections: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return _take(request, rank, stream, corrections, _sign_shapes(request), int(np.prod(request.shapes[0])))


correlation.KINDS["sign"] = Kind(
    _deal_sign,
    _take_sign,
    _sign_shapes,
    lambda q: key_shapes(math.prod(q.shapes[0]), width_of(q)),
    part=lambda q: _part_shapes(q, q.shapes[0], _sign_shapes(q)),
)


# --- pairs: element i with element i + w // 2 of the first axis, of length w. Shares: [beta], [beta dR]; where it is
# cut also [R] and the lanes ma, mb, beta ma, beta mb; for an odd w the last element's m in lane 0 --------------------


def _pair_shape(request: Request) -> Shape:
    width, *rest = request.shapes[0]
    return (width // 2, *rest)


def _pairs_shapes(request: Request) -> list[Shape]:
    (shape,) = request.shapes
    pairs = _pair_shape(request)
    if not _cut(request):
        return [pairs, pairs]
    odd = [(1, *shape[1:])] if shape[0] % 2 else []
    return [pairs, pairs, shape, pairs, *odd]


def _deal_pairs(request: Request, keeper: Stream, user: Stream, dealing: Dealing) -> Dealt:
    (shape,) = request.shapes
    cut, half = _cut(request), shape[0] // 2
    r = keeper.words(shape) + user.words(shape)
    beta = random_bits(keeper, user, _pair_shape(request))
    R = ring.shift_right_logical(r, cut) if cut else r
    dR = R[:half] - R[half : 2 * half]
    keys = make_keys(dR, beta, keeper, user, width_of(request))
    shares = [share_for_keeper(v, user) for v in (beta, beta * dR)]
    if cut:
        m = ring.top_bit(r)
        ma, mb, rest = m[:half], m[half : 2 * half], m[2 * half :]
        shares.append(share_for_keeper(R, user))
        shares.append(share_lanes(_lanes(torch.int16, ma, mb, beta * ma, beta * mb), user, torch.int16))
        if len(rest):
            shares.append(share_lanes(_lanes(torch.int16, rest), user, torch.int16))
    return shares, keys


def _take_pairs(request: Request, rank: int, stream: Stream, corrections: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return _take(request, rank, stream, corrections, _pairs_shapes(request), int(np.prod(_pair_shape(request))))


correlation.KINDS["pairs"] = Kind(
    _deal_pairs,
    _take_pairs,
    _pairs_shapes,
    lambda q: key_shapes(math.prod(_pair_shape(q)), width_of(q)),
    part=lambda q: _part_shapes(q, _pair_shape(q), _pairs_shapes(q)),
)


# --- online ---------------------------------------------------------------------------------------------------------


def _open_signs(party: Party, T: Tensor, key: Sequence[Tensor]) -> Tensor:
    """Evaluate the keys at y = T mod 2**(k-1) and open c = [t >= 0] ^ beta: 1 round, 1 bit each way a value."""
    seeds, words, values = key
    packed = comparison_steps.packed_sign_shares(T, seeds, words, values, party.rank, party.comparison_bits)
    return comparison_steps.join_bits(packed, party.wire.exchange("bits", packed), T.shape)


def sign_shares(party: Party, T: Tensor, offsets: Sequence[int], key: Sequence[Tensor]) -> Tensor:
    """Return this party's shares (under xor) of the bits [t >= o], flipped as the key is; nothing is sent.

    Args:
        party: this party.
        T: (n) int64, the public part of t.
        offsets: public numbers o, m of them.
        key: this party's seeds and the correction words, as parts of correlations hold them.

    Returns:
        uint8 (m, n), 0 or 1.
    """
    seeds, words, values = key
    return comparison_steps.sign_shares(T, offsets, seeds, words, values, party.rank, party.comparison_bits)


def open_bits(party: Party, shares: Sequence[Tensor]) -> list[Tensor]:
    """Open several tensors of bits shared under xor, each packed into bytes of its own, in one message each way.

    Args:
        party: this party.
        shares: uint8 of any shapes, 0 or 1.

    Returns:
        The opened bits, uint8 of the same shapes.

    Cost: 1 round; 1 bit each way for each element, in whole bytes for each tensor.
    Security: both parties learn the bits: each must be under a mask of the dealer's.
    """
    packed = [comparison_steps.pack_bits(share) for share in shares]
    others = torch.split(party.wire.exchange("bits", torch.cat(packed)), [p.numel() for p in packed])
    return [
        comparison_steps.join_bits(own, other, share.shape)
        for own, other, share in zip(packed, others, shares, strict=True)
    ]


def _flat(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [t.reshape(-1) for t in tensors]


def _open(party: Party, z: Tensor, r: Tensor, *, truncates: bool) -> Tensor:
    """Open z + r, and 2**62 where it is to be truncated; flat."""
    masked = z + r
    if truncates and party.rank == KEEPER:
        masked += 1 << 62
    return (masked + party.wire.exchange("open", masked)).reshape(-1)


@costs(lambda n: Cost(rounds=2, payload_bytes=16 * n + 2 * -(-n // 8)))
def relu(party: Party, z: Tensor, bits: int) -> Tensor:
    """Truncate a sharing by `bits` and take max(t, 0).

    Args:
        party: this party.
        z: share, int64 of any shape, at scale 2**(f + bits); |z| < 2**62 and |t| < 2**(k-1).
        bits: 0, or f to `limits.most_cut(k)`.

    Returns:
        Share of relu(t), t = z >> bits up to one unit in the last place, same shape, scale 2**f.

    Raises:
        UnsupportedError: `bits` are others.

    Cost: 2 rounds; 8 bytes and 1 bit each way for each of n elements.
    Security: both opened values are uniform: z under r, the sign under beta.
    """
    request = request_of("sign", z.shape, bits, party.comparison_bits)
    cut, is_keeper = _cut(request), party.rank == KEEPER
    r, *rest = party.correlations.take(request)
    key, shares = rest[:3], _flat(rest[3:])
    h = _open(party, z, r, truncates=cut > 0)
    if cut:
        beta, beta_R, R, carries = shares
        c = _open_signs(party, comparison_steps.public_part(h, cut), key)
        out = comparison_steps.relu_truncated(c, h, R, carries, beta, beta_R, is_keeper, cut)
    else:
        beta, beta_R = shares
        c = _open_signs(party, h, key)
        out = comparison_steps.relu(c, h, r.reshape(-1), beta, beta_R, is_keeper)
    return out.reshape(z.shape)


@costs(lambda n: Cost(rounds=2, payload_bytes=16 * n + 2 * -(-n // 8)))
def is_negative(party: Party, x: Tensor) -> Tensor:
    """Return a sharing of the bit [x < 0], as the integer 0 or 1.

    Args:
        party: this party.
        x: share, int64 of any shape, |x| < 2**(k-1).

    Returns:
        Share of 1 where x < 0 and of 0 elsewhere, same shape, scale 1.

    Cost: 2 rounds; 8 bytes and 1 bit each way for each of n elements.
    Security: as `relu`.
    """
    r, *key, beta, _ = party.correlations.take(request_of("sign", x.shape, 0, party.comparison_bits))
    c = _open_signs(party, _open(party, x, r, truncates=False), key).reshape(x.shape).long()
    # [x >= 0] = c xor beta.
    not_negative = (1 - 2 * c) * beta
    return 1 - c - not_negative if party.rank == KEEPER else -not_negative


@costs(lambda n, pairs: Cost(rounds=2, payload_bytes=16 * n + 2 * -(-pairs // 8)))
def max_of_pairs(party: Party, z: Tensor, bits: int) -> Tensor:
    """Truncate a sharing by `bits` and take the maximum of each pair along the first axis.

    Args:
        party: this party.
        z: share, (w, ...) at scale 2**(f + bits): element i is compared with element i + w // 2; the last one
            of an odd w is truncated and passed on.
        bits: 0, or f.

    Returns:
        Share of the maxima, (w // 2 + w % 2, ...) at scale 2**f.

    Raises:
        UnsupportedError: `bits` are others.

    Cost: 2 rounds; 8 bytes each way for each of n elements, 1 bit each way for each pair. Opened values serve
        the truncation and the comparison at once.
    Security: as `relu`.
    """
    request = request_of("pairs", z.shape, bits, party.comparison_bits)
    cut, is_keeper = _cut(request), party.rank == KEEPER
    shape = _pair_shape(request)
    n = math.prod(shape)
    r, *rest = party.correlations.take(request)
    key, shares = rest[:3], _flat(rest[3:])
    h = _open(party, z, r, truncates=cut > 0)
    ha, hb, last = h[:n], h[n : 2 * n], h[2 * n :]
    if cut:
        beta, beta_dR, R, carries, *odd = shares
        c = _open_signs(party, comparison_steps.public_part(ha) - comparison_steps.public_part(hb), key)
        best = comparison_steps.larger_truncated(c, ha, hb, R[:n], R[n : 2 * n], carries, beta, beta_dR, is_keeper)
        passed = [comparison_steps.truncated(last, R[2 * n :], m, is_keeper) for m in odd]
    else:
        beta, beta_dR = shares
        masks = r.reshape(-1)
        c = _open_signs(party, ha - hb, key)
        best = comparison_steps.larger(c, ha, hb, masks[:n], masks[n : 2 * n], beta, beta_dR, is_keeper)
        passed = [int(is_keeper) * last - masks[2 * n :]] if len(last) else []
    result = best.reshape(shape)
    return torch.cat([result, *(p.reshape(1, *z.shape[1:]) for p in passed)]) if passed else result
