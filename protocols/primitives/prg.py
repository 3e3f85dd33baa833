"""All randomness of the project: AES-128-CTR streams, keyed from the operating system.

No other module draws a secret. A `Stream` is a pseudo-random generator with a 128-bit
seed; two parties that hold the same seed draw the same values in the same order, which is
how one share of a correlation costs 16 bytes on the wire instead of an array.

A fork copies a stream with its state: two processes would draw the same masks. So a stream serves only the process
that made it, and nothing that was drawn is kept for later.

Source: AES in counter mode, [SP800-38A] section 6.5; streams by label, [RFC7693]; seeds from getrandom(2);
docs/protocols.md#randomness.
"""

import hashlib
import math
import os
from collections.abc import Sequence

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from torch import Tensor

from protocols.forks import Origin

SEED_BYTES = 16
# One update call takes at most 2**31 - 1 bytes; a counter under one key must not come near 2**64 blocks.
_CHUNK_BYTES = 1 << 26
_WHAT = "a random stream"


def fresh_seed() -> bytes:
    """Return 16 bytes from the operating system's generator."""
    return os.urandom(SEED_BYTES)


class Stream:
    """A sequence of pseudo-random values under one 128-bit seed.

    Args:
        seed: 16 bytes; drawn from the operating system when absent.

    The security of every value is that of AES-128 as a pseudo-random permutation. `repr`
    shows no seed, and the object does not pickle. In a fork of the process that made it, every method that would draw
    raises WrongProcess.
    """

    def __init__(self, seed: bytes | None = None) -> None:
        self._seed = fresh_seed() if seed is None else bytes(seed)
        if len(self._seed) != SEED_BYTES:
            raise ValueError(f"a seed must be {SEED_BYTES} bytes; got {len(self._seed)}")
        self._cipher = Cipher(algorithms.AES(self._seed), modes.CTR(bytes(16))).encryptor()
        self._origin = Origin()

    def __repr__(self) -> str:
        return "Stream(<hidden>)"

    def __reduce__(self) -> tuple[object, ...]:
        raise TypeError("a Stream holds a secret seed and must not be pickled")

    def derive(self, label: str) -> "Stream":
        """Return an independent stream for `label`; the same seed and label give the same stream."""
        self._origin.require(_WHAT)
        return Stream(
            hashlib.blake2b(label.encode(), key=self._seed, digest_size=SEED_BYTES, person=b"securemtk-prg").digest()
        )

    def fill(self, out: np.ndarray) -> np.ndarray:
        """Overwrite a contiguous array with stream bytes and return it."""
        self._origin.require(_WHAT)
        view = out.data.cast("B") if out.size else memoryview(b"")
        if out.size and view.readonly:
            raise ValueError("out must be writable")
        for start in range(0, len(view), _CHUNK_BYTES):
            part = view[start : start + _CHUNK_BYTES]
            # Encrypting zeros in place yields the key stream itself.
            np.frombuffer(part, dtype=np.uint8)[:] = 0
            self._cipher.update_into(part, part)
        return out

    def bytes(self, n: int) -> bytes:
        """Return the next n bytes."""
        self._origin.require(_WHAT)
        return self._cipher.update(bytes(n))

    def words(self, shape: Sequence[int]) -> Tensor:
        """Return uniform elements of Z_2^64 as an int64 tensor of `shape`."""
        out = np.empty(math.prod(shape), dtype=np.int64)
        return torch.from_numpy(self.fill(out)).reshape(tuple(shape))

    def integers(self, bits: int, shape: Sequence[int]) -> Tensor:
        """Return uniform integers in [0, 2**bits) as an int64 tensor of `shape`, 1 <= bits <= 63."""
        if not 1 <= bits <= 63:
            raise ValueError(f"bits must lie in 1..63; got {bits}")
        return self.words(shape) & ((1 << bits) - 1)

    def below(self, bound: int, shape: Sequence[int]) -> Tensor:
        """Return integers in [0, bound), uniform up to 2**-31 in statistical distance for bound <= 2**31."""
        if not 1 <= bound <= 1 << 31:
            raise ValueError(f"bound must lie in 1..2**31; got {bound}")
        # 62 random bits modulo the bound: the bias of each value is at most bound / 2**62.
        return self.integers(62, shape) % bound

    def uniform(self, shape: Sequence[int]) -> Tensor:
        """Return float64 values in [0, 1) with 53 random bits each."""
        return self.integers(53, shape).double() * 2.0**-53

    def normal(self, shape: Sequence[int]) -> Tensor:
        """Return float64 standard normal values [Box58]."""
        radius = torch.sqrt(-2.0 * torch.log1p(-self.uniform(shape)))
        return radius * torch.cos(2.0 * math.pi * self.uniform(shape))

    def permutation(self, n: int) -> Tensor:
        """Return a uniformly random permutation of 0..n-1 as int64 (a sort by 63-bit keys)."""
        return torch.argsort(self.integers(63, (n,)))
