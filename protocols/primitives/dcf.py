"""Distributed comparison functions: two keys that share the bit 1{y < q} of a public y and a secret q.

The construction is that of Boyle, Chandran, Gilboa, Gupta, Ishai, Kumar and Rathee, EUROCRYPT 2021,
figure 1 [Boy21], for one output bit under xor, with two changes that keep its security argument:
children are H(s ^ b) = pi(s ^ b) ^ (s ^ b) for a fixed-key AES pi, whose two low bits are the control
bit t and the value bit v (seeds keep 126 bits); and the tree ends 7 levels early, where the last seed
expands to 128 bits, one for each value of the last 7 bits, corrected by one block F.

Everything is vectorised over n comparisons. Keys of a party: its seeds (16 bytes each, drawn from
its stream, never sent), and correction words that are the same for both parties: `Keys`.

    levels 24 for 31-bit points; 16 bytes a level, 16 bytes for F, 4 bytes for the value bits: 404 bytes.

Source: [Boy21], figure 1; the early end, [BGI16]; docs/protocols.md#comparison-keys.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from protocols.primitives import aes, dcf_layout
from protocols.primitives.prg import Stream

LEAF_BITS, LANES = dcf_layout.LEAF_BITS, dcf_layout.LANES
Words = NDArray[np.uint64]
_SEED = np.uint64(dcf_layout.SEED_MASK)
_ONE, _TWO = np.uint64(1), np.uint64(2)


@dataclass(frozen=True)
class Keys:
    """Correction words of n comparisons, the same for both parties; uniform without the other's seeds.

    Args:
        words: uint64 (blocks, levels + 1, 8, 2), where block and lane number the comparison and the
            last level is F. The two low bits of a level's word are the corrections of the control bits.
        values: uint32 (blocks * 8), bit i corrects the value bit of level i.
        bits: length of the points.
    """

    words: Words
    values: NDArray[np.uint32]
    bits: int


def levels(bits: int) -> int:
    """Return the number of levels of the tree for points of that many bits, 8..39."""
    return bits - LEAF_BITS


def padded(n: int) -> int:
    """Return n rounded up to whole blocks of lanes."""
    return -(-n // LANES) * LANES


def seeds(stream: Stream, n: int) -> Words:
    """Draw a party's seeds for n comparisons: uint64 (padded n, 2)."""
    out: Words = np.empty((padded(n), 2), dtype=np.uint64)
    stream.fill(out)
    out[:, 0] &= _SEED
    return out


def key_bytes(n: int, bits: int) -> int:
    """Return the bytes of `Keys` for n comparisons."""
    return padded(n) * (16 * (levels(bits) + 1) + 4)


def generate(seeds0: Words, seeds1: Words, q: Words, flip: Words, bits: int) -> Keys:
    """Make the correction words: the parties' outputs xor to 1{y < q} ^ flip.

    Args:
        seeds0, seeds1: from `seeds`, of the two parties.
        q: secret points, uint64 (n), below 2**bits.
        flip: secret bits, uint64 (n), 0 or 1.
        bits: 8..39.

    Cost: 4 blocks of AES for each level and comparison, and 2.
    """
    n = padded(len(q))
    points, flips = (np.concatenate([v, np.zeros(n - len(v), dtype=np.uint64)]) for v in (q, flip))
    words = np.empty((n // LANES, levels(bits) + 1, LANES, 2), dtype=np.uint64)
    values = np.empty(n, dtype=np.uint32)
    _generate(seeds0, seeds1, points, flips, bits, words, values)
    return Keys(words, values, bits)


def evaluate(party: int, party_seeds: Words, keys: Keys, y: Words) -> NDArray[np.uint8]:
    """Return a party's share (under xor) of 1{y < q} ^ flip.

    Args:
        party: 0 or 1.
        party_seeds: the party's seeds.
        keys: the correction words.
        y: public points, uint64 (n), below 2**bits.

    Returns:
        uint8 (n), 0 or 1.

    Cost: one block of AES for each level and comparison, and one.
    """
    n = len(party_seeds)
    points = y if len(y) == n else np.concatenate([y, np.zeros(n - len(y), dtype=np.uint64)])
    out = np.empty(n, dtype=np.uint8)
    _evaluate(party, party_seeds, keys.words, keys.values, points, keys.bits, out)
    return out[: len(y)]


# --- without AES instructions of x86 --------------------------------------------------------------------------------


def _hash(blocks: Words) -> Words:
    """Return pi(x) ^ x of uint64 (..., 2)."""
    flat = blocks.reshape(-1, 2)
    return (aes.encrypt_blocks(flat) ^ flat).reshape(blocks.shape)


def _side(s: Words, b: Any) -> Words:
    """Return s with b xored into its low word."""
    out = s.copy()
    out[..., 0] ^= b
    return out


def generate_numpy(
    seeds0: Words, seeds1: Words, q: Words, flip: Words, bits: int, words: Words, values: NDArray[np.uint32]
) -> None:
    """The same as the compiled `_generate`, level by level over the whole array."""
    n, n_levels = len(q), levels(bits)
    state = np.stack([seeds0, seeds1])
    t = np.stack([np.zeros(n, np.uint64), np.ones(n, np.uint64)])
    value, packed, lanes = flip.copy(), np.zeros(n, np.uint64), np.arange(n)
    flat = np.empty((n_levels + 1, n, 2), dtype=np.uint64)
    for level in range(n_levels):
        child = np.stack([_hash(_side(state, np.uint64(b))) for b in (0, 1)])  # side, party, n, word
        a = (q >> np.uint64(bits - 1 - level)) & _ONE
        keep = child[a.astype(np.int64)[None, :], np.arange(2)[:, None], lanes]
        lose = child[(a ^ _ONE).astype(np.int64)[None, :], np.arange(2)[:, None], lanes]
        cw = lose[0] ^ lose[1]
        v_cw = (cw[:, 0] >> _ONE & _ONE) ^ value ^ a
        cw[:, 0] &= _SEED
        left = (child[0, 0, :, 0] ^ child[0, 1, :, 0] ^ a ^ _ONE) & _ONE
        right = (child[1, 0, :, 0] ^ child[1, 1, :, 0] ^ a) & _ONE
        value ^= ((keep[0, :, 0] ^ keep[1, :, 0]) >> _ONE & _ONE) ^ v_cw
        packed |= v_cw << np.uint64(level)
        flat[level] = cw
        flat[level, :, 0] |= left | (right << _ONE)
        mask = (np.uint64(0) - t)[:, :, None]
        new_t = (keep[:, :, 0] & _ONE) ^ (t & np.where(a == _ONE, right, left))
        keep[:, :, 0] &= _SEED
        state, t = keep ^ (mask & cw), new_t
    leaf = _hash(_side(state, _TWO))
    last = q & np.uint64(127)
    shift0, shift1 = np.minimum(last, 63), np.minimum(np.maximum(last, 64) - np.uint64(64), 63)
    below0 = np.where(last >= 64, ~np.uint64(0), (_ONE << shift0) - _ONE)
    below1 = (_ONE << shift1) - _ONE
    everywhere = np.uint64(0) - value
    flat[n_levels] = leaf[0] ^ leaf[1] ^ np.stack([everywhere ^ below0, everywhere ^ below1], axis=1)
    words[:] = flat.reshape(n_levels + 1, n // LANES, LANES, 2).transpose(1, 0, 2, 3)
    values[:] = packed.astype(np.uint32)


def evaluate_numpy(
    party: int,
    party_seeds: Words,
    words: Words,
    values: NDArray[np.uint32],
    y: Words,
    bits: int,
    out: NDArray[np.uint8],
) -> None:
    """The same as the compiled `_evaluate`, level by level over the whole array."""
    n, n_levels = len(y), levels(bits)
    flat = words.transpose(1, 0, 2, 3).reshape(n_levels + 1, n, 2)
    state, t, value = party_seeds, np.full(n, party, dtype=np.uint64), np.zeros(n, dtype=np.uint64)
    packed = values.astype(np.uint64)
    for level in range(n_levels):
        b = (y >> np.uint64(bits - 1 - level)) & _ONE
        child, cw = _hash(_side(state, b)), flat[level]
        value ^= (child[:, 0] >> _ONE & _ONE) ^ (t & (packed >> np.uint64(level)) & _ONE)
        state = child ^ ((np.uint64(0) - t)[:, None] & cw)
        t = (child[:, 0] & _ONE) ^ (t & (cw[:, 0] >> b) & _ONE)
        state[:, 0] &= _SEED
    leaf = _hash(_side(state, _TWO)) ^ ((np.uint64(0) - t)[:, None] & flat[n_levels])
    last = y & np.uint64(127)
    half = np.where(last >= 64, leaf[:, 1], leaf[:, 0])
    out[:] = ((value ^ (half >> (last & np.uint64(63)))) & _ONE).astype(np.uint8)


if aes.NATIVE:
    from protocols.primitives.dcf_native import evaluate_native as _evaluate
    from protocols.primitives.dcf_native import generate_native as _generate
else:
    _generate, _evaluate = generate_numpy, evaluate_numpy
