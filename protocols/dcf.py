"""Distributed comparison functions: two keys that share the bit 1{y < q} of a public y and a secret q.

The construction is that of Boyle, Chandran, Gilboa, Gupta, Ishai, Kumar and Rathee, EUROCRYPT 2021,
figure 1 [BCG+21], for one output bit under xor, with two changes that keep its security argument:
children are H(s ^ b) = pi(s ^ b) ^ (s ^ b) for a fixed-key AES pi, whose two low bits are the control
bit t and the value bit v (seeds keep 126 bits); and the tree ends 7 levels early, where the last seed
expands to 128 bits, one for each value of the last 7 bits, corrected by one block F.

Everything is vectorised over n comparisons. Keys of a party: its seeds (16 bytes each, drawn from
its stream, never sent), and correction words that are the same for both parties: `Keys`.

    levels 24 for 31-bit points; 16 bytes a level, 16 bytes for F, 4 bytes for the value bits: 404 bytes.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from protocols import aes
from protocols.prg import Stream

LEAF_BITS = 7
LANES = 8
Words = NDArray[np.uint64]
_SEED = np.uint64(0xFFFF_FFFF_FFFF_FFFC)
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


# --- without AES instructions or numba ----------------------------------------------------------------------------------


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


# --- compiled, with AES instructions ------------------------------------------------------------------------------------

if aes.NATIVE:
    from llvmlite import ir
    from numba import njit, types
    from numba.core import cgutils
    from numba.extending import intrinsic

    _VECTORS = LANES // aes.LANES
    _U64 = types.uint64

    @intrinsic
    def _generate_block(typing, seeds0, seeds1, point_flip, n_levels, below, words, packed, keys):  # type: ignore[no-untyped-def]
        """Walk LANES comparisons down the tree; arguments are addresses, vectors lie one after the other.

        point_flip: (lanes, 2) words q << (64 - bits) and flip; below: (lanes, 2) leaf masks; words: the block's
        correction words; packed: (lanes, 2), of which the low words become the value bits.
        """

        def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
            seeds0, seeds1, point_flip, n_levels, below, words, packed, keys = args
            v, b = aes.VectorIR(context, builder, keys), builder
            one, seed = v.constant(1, 0), v.constant(int(_SEED), -1)
            lanes = range(_VECTORS)

            def variables(values):  # type: ignore[no-untyped-def]
                return [cgutils.alloca_once_value(b, x) for x in values]

            both = [v.load(point_flip, k) for k in lanes]
            point = variables([b.and_(x, v.constant(-1, 0)) for x in both])
            value = variables([b.and_(v.high_to_low(x), one) for x in both])
            s = [variables([v.load(seeds, k) for k in lanes]) for seeds in (seeds0, seeds1)]
            t = [variables([v.constant(m, m)] * _VECTORS) for m in (0, -1)]
            bits = variables([v.constant(0, 0)] * _VECTORS)
            with cgutils.for_range(b, n_levels) as loop:
                inputs = []
                for k in lanes:
                    for p in range(2):
                        state = b.load(s[p][k])
                        inputs += [state, b.xor(state, one)]
                hashed = v.hash(inputs)
                level = v.splat(loop.index)
                base = b.mul(loop.index, ir.Constant(v.word, _VECTORS))
                for k in lanes:
                    l0, r0, l1, r1 = hashed[4 * k : 4 * k + 4]
                    q = b.load(point[k])
                    # The point is shifted so that this level's bit is the top one.
                    a = b.lshr(q, v.constant(63, 63))
                    b.store(b.shl(q, v.constant(1, 1)), point[k])
                    right_is_kept = v.mask(a)
                    keep0, keep1 = v.choose(right_is_kept, r0, l0), v.choose(right_is_kept, r1, l1)
                    left, right = b.xor(l0, l1), b.xor(r0, r1)
                    lose = v.choose(right_is_kept, left, right)
                    val = b.load(value[k])
                    # Leaving the path to the left means y < q there, to the right y > q.
                    v_cw = b.and_(b.xor(b.xor(b.lshr(lose, v.constant(1, 1)), val), a), one)
                    t_left = b.and_(b.xor(b.xor(left, a), one), one)
                    t_right = b.and_(b.xor(right, a), one)
                    cw = b.and_(lose, seed)
                    b.store(
                        b.xor(val, b.and_(b.xor(b.lshr(b.xor(keep0, keep1), v.constant(1, 1)), v_cw), one)), value[k]
                    )
                    b.store(b.or_(b.load(bits[k]), b.shl(v_cw, level)), bits[k])
                    stored = b.or_(b.or_(cw, t_left), b.shl(t_right, v.constant(1, 1)))
                    v.store(stored, words, b.add(base, ir.Constant(v.word, k)))
                    t_kept = v.choose(right_is_kept, t_right, t_left)
                    for p, kept in ((0, keep0), (1, keep1)):
                        mask = b.load(t[p][k])
                        b.store(b.xor(b.and_(kept, seed), b.and_(mask, cw)), s[p][k])
                        b.store(v.mask(b.and_(b.xor(kept, b.and_(mask, t_kept)), one)), t[p][k])
            leaves = v.hash([b.xor(b.load(s[p][k]), v.constant(2, 0)) for k in lanes for p in range(2)])
            base = b.mul(n_levels, ir.Constant(v.word, _VECTORS))
            for k in lanes:
                leaf = b.xor(b.xor(leaves[2 * k], leaves[2 * k + 1]), v.mask(b.load(value[k])))
                v.store(b.xor(leaf, v.load(below, k)), words, b.add(base, ir.Constant(v.word, k)))
                v.store(b.load(bits[k]), packed, k)
            return context.get_dummy_value()

        return types.void(*[_U64] * 3, types.int64, *[_U64] * 4), codegen

    @intrinsic
    def _evaluate_block(typing, party, seeds, point_bits, n_levels, words, leaf, keys):  # type: ignore[no-untyped-def]
        """Walk LANES comparisons down the tree; arguments are addresses, vectors lie one after the other.

        point_bits: (lanes, 2) words y << (64 - bits) and value bits; leaf: (2, lanes, 2), the corrected leaf
        blocks and the value bits so far (bit 1 of the low word xor bit 0 of the high one).
        """

        def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
            party, seeds, point_bits, n_levels, words, leaf, keys = args
            v, b = aes.VectorIR(context, builder, keys), builder
            one, seed = v.constant(1, 0), v.constant(int(_SEED), -1)
            lanes = range(_VECTORS)

            def variables(values):  # type: ignore[no-untyped-def]
                return [cgutils.alloca_once_value(b, x) for x in values]

            both = [v.load(point_bits, k) for k in lanes]
            s = variables([v.load(seeds, k) for k in lanes])
            t = variables([v.splat(b.sub(ir.Constant(v.word, 0), party))] * _VECTORS)
            value = variables([v.constant(0, 0)] * _VECTORS)
            with cgutils.for_range(b, n_levels) as loop:
                level = v.splat(loop.index)
                shift = v.splat(b.sub(ir.Constant(v.word, 63), loop.index))
                bit = [b.and_(b.lshr(x, shift), one) for x in both]
                hashed = v.hash([b.xor(b.load(s[k]), bit[k]) for k in lanes])
                base = b.mul(loop.index, ir.Constant(v.word, _VECTORS))
                for k in lanes:
                    child, mask = hashed[k], b.load(t[k])
                    cw = b.and_(mask, v.load(words, b.add(base, ir.Constant(v.word, k))))
                    correction = b.and_(b.and_(mask, b.lshr(both[k], level)), v.constant(0, 1))
                    b.store(b.xor(b.load(value[k]), b.xor(b.and_(child, v.constant(2, 0)), correction)), value[k])
                    b.store(v.mask(b.and_(b.xor(child, b.lshr(cw, bit[k])), one)), t[k])
                    b.store(b.and_(b.xor(child, cw), seed), s[k])
            leaves = v.hash([b.xor(b.load(s[k]), v.constant(2, 0)) for k in lanes])
            base = b.mul(n_levels, ir.Constant(v.word, _VECTORS))
            for k in lanes:
                word = v.load(words, b.add(base, ir.Constant(v.word, k)))
                v.store(b.xor(leaves[k], b.and_(b.load(t[k]), word)), leaf, k)
                v.store(b.load(value[k]), leaf, _VECTORS + k)
            return context.get_dummy_value()

        return types.void(*[_U64] * 3, types.int64, *[_U64] * 3), codegen

    _A1, _A2, _A3, _A4 = "uint64[::1]", "uint64[:,::1]", "uint8[:,:,::1]", "uint64[:,:,:,::1]"

    @njit(f"void({_A2}, {_A2}, {_A1}, {_A1}, int64, {_A4}, uint32[::1], {_A3})", nogil=True, cache=True)
    def _generate_native(seeds0, seeds1, q, flip, bits, words, values, round_keys):  # type: ignore[no-untyped-def]
        one = np.uint64(1)
        point_flip, below, packed = (
            np.empty((LANES, 2), dtype=np.uint64),
            np.empty((LANES, 2), dtype=np.uint64),
            np.empty((LANES, 2), dtype=np.uint64),
        )
        for block in range(words.shape[0]):
            first = block * LANES
            for j in range(LANES):
                point_flip[j, 0], point_flip[j, 1] = q[first + j] << np.uint64(64 - bits), flip[first + j]
                last = q[first + j] & np.uint64(127)
                # Bits 0..last-1 set: those y are below q.
                below[j, 0] = (one << last) - one if last < np.uint64(64) else ~np.uint64(0)
                below[j, 1] = (one << (last - np.uint64(64))) - one if last > np.uint64(64) else np.uint64(0)
            _generate_block(
                np.uint64(seeds0[first:].ctypes.data),
                np.uint64(seeds1[first:].ctypes.data),
                np.uint64(point_flip.ctypes.data),
                bits - LEAF_BITS,
                np.uint64(below.ctypes.data),
                np.uint64(words[block:].ctypes.data),
                np.uint64(packed.ctypes.data),
                np.uint64(round_keys.ctypes.data),
            )
            for j in range(LANES):
                values[first + j] = np.uint32(packed[j, 0])

    @njit(f"void(int64, {_A2}, {_A4}, uint32[::1], {_A1}, int64, uint8[::1], {_A3})", nogil=True, cache=True)
    def _evaluate_native(party, seeds, words, values, y, bits, out, round_keys):  # type: ignore[no-untyped-def]
        point_bits, leaf = np.empty((LANES, 2), dtype=np.uint64), np.empty((2, LANES, 2), dtype=np.uint64)
        for block in range(words.shape[0]):
            first = block * LANES
            for j in range(LANES):
                point_bits[j, 0] = y[first + j] << np.uint64(64 - bits)
                point_bits[j, 1] = np.uint64(values[first + j])
            _evaluate_block(
                np.uint64(party),
                np.uint64(seeds[first:].ctypes.data),
                np.uint64(point_bits.ctypes.data),
                bits - LEAF_BITS,
                np.uint64(words[block:].ctypes.data),
                np.uint64(leaf.ctypes.data),
                np.uint64(round_keys.ctypes.data),
            )
            for j in range(LANES):
                last = y[first + j] & np.uint64(127)
                half = leaf[0, j, 1] if last >= np.uint64(64) else leaf[0, j, 0]
                value = (leaf[1, j, 0] >> np.uint64(1)) ^ leaf[1, j, 1] ^ (half >> (last & np.uint64(63)))
                out[first + j] = np.uint8(value & np.uint64(1))

    def _generate(*args: Any) -> None:
        _generate_native(*args, aes.ROUND_KEYS)

    def _evaluate(*args: Any) -> None:
        _evaluate_native(*args, aes.ROUND_KEYS)

else:
    _generate, _evaluate = generate_numpy, evaluate_numpy
