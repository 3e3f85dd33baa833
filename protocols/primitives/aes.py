"""Fixed-key AES-128 for whole arrays: the permutation behind the comparison keys.

The key is public and the same for all: security rests on AES with a fixed key behaving like a random
permutation pi, in the construction H(x) = pi(x) ^ x. Where the processor has AES instructions,
`encrypt` is an intrinsic inside compiled loops (below one nanosecond a block); elsewhere
OpenSSL encrypts whole arrays.

Source: [GKWY20], section 7, and [FIPS197]; how much strength many keys leave, docs/protocols.md#fixed-key-aes.
"""

import platform
from typing import Any

import llvmlite.binding as llvm
import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from llvmlite import ir
from numpy.typing import NDArray

# Instructions of x86 alone: what other processors have would be another intrinsic.
_FEATURES = dict(llvm.get_host_cpu_features()) if platform.machine() in ("x86_64", "AMD64") else {}

# The first 128 fraction bits of pi: nothing up our sleeve.
KEY = bytes.fromhex("243f6a8885a308d313198a2e03707344")
BLOCK_BYTES = 16
ROUNDS = 10
# 0: no instructions; 1: one block an instruction; 2: two.
LANES = 2 if _FEATURES.get("vaes") and _FEATURES.get("avx2") else 1 if _FEATURES.get("aes") else 0
NATIVE = LANES > 0


def _sbox() -> list[int]:
    """Return the S-box from its definition ([FIPS197], section 5.1.1)."""
    box = [0] * 256
    p = q = 1
    while True:
        p = p ^ ((p << 1) & 0xFF) ^ (0x1B if p & 0x80 else 0)
        q ^= q << 1
        q ^= q << 2
        q = (q ^ (q << 4)) & 0xFF
        if q & 0x80:
            q ^= 0x09
        rotated = [(q << k | q >> (8 - k)) & 0xFF for k in range(1, 5)]
        box[p] = q ^ rotated[0] ^ rotated[1] ^ rotated[2] ^ rotated[3] ^ 0x63
        if p == 1:
            box[0] = 0x63
            return box


def expand(key: bytes) -> NDArray[np.uint8]:
    """Return the 11 round keys of AES-128, uint8 (11, 16) ([FIPS197], section 5.2)."""
    box, words, constant = _sbox(), [list(key[4 * i : 4 * i + 4]) for i in range(4)], 1
    for i in range(4, 4 * (ROUNDS + 1)):
        word = list(words[i - 1])
        if i % 4 == 0:
            word = [box[b] for b in word[1:] + word[:1]]
            word[0] ^= constant
            constant = ((constant << 1) ^ (0x11B if constant & 0x80 else 0)) & 0xFF
        words.append([a ^ b for a, b in zip(words[i - 4], word, strict=True)])
    return np.array(words, dtype=np.uint8).reshape(ROUNDS + 1, BLOCK_BYTES)


# Each round key once for every lane of a vector register.
ROUND_KEYS = np.repeat(expand(KEY)[:, None, :], max(LANES, 1), axis=1).copy()


def encrypt_blocks(blocks: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return pi of each block, uint64 (n, 2), by OpenSSL."""
    # Electronic code book on purpose: pi is a public permutation of single blocks, not an encryption of data.
    cipher = Cipher(algorithms.AES(KEY), modes.ECB()).encryptor()  # noqa: S305
    out = cipher.update(np.ascontiguousarray(blocks).data.cast("B"))
    return np.frombuffer(out, dtype=np.uint64).reshape(blocks.shape)


class VectorIR:
    """Builds LLVM code on vectors that hold whole 128-bit blocks, `LANES` to a register.

    Args:
        context, builder: numba's, of the intrinsic that is being generated.
        keys: address of ROUND_KEYS.
    """

    def __init__(self, context: Any, builder: Any, keys: Any) -> None:
        self.context, self.builder = context, builder
        self.word = ir.IntType(64)
        self.type = ir.VectorType(self.word, 2 * LANES)
        suffix = ".256" if LANES == 2 else ""
        self._round, self._last = (
            self._function(f"llvm.x86.aesni.{name}{suffix}") for name in ("aesenc", "aesenclast")
        )
        self._keys = [self.load(keys, i) for i in range(ROUNDS + 1)]

    def _function(self, name: str) -> Any:
        kind = ir.FunctionType(self.type, [self.type, self.type])
        return self.builder.module.globals.get(name) or ir.Function(self.builder.module, kind, name)

    def load(self, address: Any, i: Any) -> Any:
        """Load vector number i after an address."""
        value = self.builder.load(self._element(address, i))
        value.align = 8
        return value

    def store(self, value: Any, address: Any, i: Any) -> None:
        """Store vector number i after an address."""
        self.builder.store(value, self._element(address, i)).align = 8

    def _element(self, address: Any, i: Any) -> Any:
        index = ir.Constant(self.word, i) if isinstance(i, int) else i
        return self.builder.gep(self.builder.inttoptr(address, ir.PointerType(self.type)), [index])

    def constant(self, low: int, high: int) -> Any:
        """Return a vector with these two words in every block."""
        return ir.Constant(self.type, [low, high] * LANES)

    def splat(self, value: Any) -> Any:
        """Return a vector with one 64-bit value in every word."""
        vector = self.builder.insert_element(
            ir.Constant(self.type, ir.Undefined), value, ir.Constant(ir.IntType(32), 0)
        )
        return self._shuffle(vector, [0] * (2 * LANES))

    def low_to_both(self, x: Any) -> Any:
        """Return each block's low word in both its words."""
        return self._shuffle(x, [2 * (i // 2) for i in range(2 * LANES)])

    def high_to_low(self, x: Any) -> Any:
        """Return each block's high word in both its words."""
        return self._shuffle(x, [2 * (i // 2) + 1 for i in range(2 * LANES)])

    def _shuffle(self, x: Any, order: list[int]) -> Any:
        mask = ir.Constant(ir.VectorType(ir.IntType(32), len(order)), order)
        return self.builder.shuffle_vector(x, ir.Constant(self.type, ir.Undefined), mask)

    def mask(self, bit: Any) -> Any:
        """Return all ones in each block whose low word is 1, all zeros where it is 0."""
        return self.low_to_both(self.builder.sub(self.constant(0, 0), bit))

    def choose(self, mask: Any, yes: Any, no: Any) -> Any:
        """Return `yes` where the mask is set, `no` elsewhere."""
        b = self.builder
        return b.xor(no, b.and_(mask, b.xor(yes, no)))

    def hash(self, blocks: list[Any]) -> list[Any]:
        """Return pi(x) ^ x of each vector, interleaved to hide the instruction's latency."""
        b = self.builder
        states = [b.xor(x, self._keys[0]) for x in blocks]
        for key in self._keys[1:-1]:
            states = [b.call(self._round, [x, key]) for x in states]
        states = [b.call(self._last, [x, self._keys[-1]]) for x in states]
        return [b.xor(x, y) for x, y in zip(states, blocks, strict=True)]
