"""The comparison functions of `dcf` as machine code with AES instructions.

Written in LLVM's vector code, LANES comparisons at a time, so that states stay in registers and the
latency of the AES instruction is hidden: about 60 ns an evaluation and 200 ns a generation on one core
of a Zen 3 (31-bit points), where 25 and 98 blocks of AES alone would take 22 and 86 ns.
Imported by `dcf` where the processor has such instructions; `dcf.generate_numpy` and
`dcf.evaluate_numpy` are the same functions in plain words, and a test compares them bit by bit.
"""

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from protocols.primitives import aes
from protocols.primitives.dcf_layout import LANES, LEAF_BITS, SEED_MASK
from protocols.primitives.loops import compiled

_VECTORS = LANES // aes.LANES
_U64 = types.uint64


def _variables(b, values):
    """Return places that LLVM keeps in registers, for states that a loop walks on."""
    return [cgutils.alloca_once_value(b, x) for x in values]


@intrinsic
def _generate_block(typing, seeds0, seeds1, point_flip, n_levels, below, words, packed, keys):
    """Walk LANES comparisons down the tree; arguments are addresses, vectors lie one after the other.

    point_flip: (lanes, 2) words q << (64 - bits) and flip; below: (lanes, 2) leaf masks; words: the block's
    correction words; packed: (lanes, 2), of which the low words become the value bits.
    """

    def codegen(context, builder, signature, args):
        seeds0, seeds1, point_flip, n_levels, below, words, packed, keys = args
        v, b = aes.VectorIR(context, builder, keys), builder
        one, seed = v.constant(1, 0), v.constant(SEED_MASK, -1)
        lanes = range(_VECTORS)

        both = [v.load(point_flip, k) for k in lanes]
        point = _variables(b, [b.and_(x, v.constant(-1, 0)) for x in both])
        value = _variables(b, [b.and_(v.high_to_low(x), one) for x in both])
        s = [_variables(b, [v.load(seeds, k) for k in lanes]) for seeds in (seeds0, seeds1)]
        t = [_variables(b, [v.constant(m, m)] * _VECTORS) for m in (0, -1)]
        bits = _variables(b, [v.constant(0, 0)] * _VECTORS)
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
                b.store(b.xor(val, b.and_(b.xor(b.lshr(b.xor(keep0, keep1), v.constant(1, 1)), v_cw), one)), value[k])
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
def _evaluate_block(typing, party, seeds, point_bits, n_levels, words, leaf, keys):
    """Walk LANES comparisons down the tree; arguments are addresses, vectors lie one after the other.

    point_bits: (lanes, 2) words y << (64 - bits) and value bits; leaf: (2, lanes, 2), the corrected leaf
    blocks and the value bits so far (bit 1 of the low word xor bit 0 of the high one).
    """

    def codegen(context, builder, signature, args):
        party, seeds, point_bits, n_levels, words, leaf, keys = args
        v, b = aes.VectorIR(context, builder, keys), builder
        one, seed = v.constant(1, 0), v.constant(SEED_MASK, -1)
        lanes = range(_VECTORS)

        both = [v.load(point_bits, k) for k in lanes]
        s = _variables(b, [v.load(seeds, k) for k in lanes])
        t = _variables(b, [v.splat(b.sub(ir.Constant(v.word, 0), party))] * _VECTORS)
        value = _variables(b, [v.constant(0, 0)] * _VECTORS)
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


@compiled(f"void({_A2}, {_A2}, {_A1}, {_A1}, int64, {_A4}, uint32[::1], {_A3})")
def _generate_compiled(seeds0, seeds1, q, flip, bits, words, values, round_keys):
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


@compiled(f"void(int64, {_A2}, {_A4}, uint32[::1], {_A1}, int64, uint8[::1], {_A3})")
def _evaluate_compiled(party, seeds, words, values, y, bits, out, round_keys):
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


def generate_native(*args: Any) -> None:
    """`dcf.generate_numpy`, compiled."""
    _generate_compiled(*args, aes.ROUND_KEYS)


def evaluate_native(*args: Any) -> None:
    """`dcf.evaluate_numpy`, compiled."""
    _evaluate_compiled(*args, aes.ROUND_KEYS)
