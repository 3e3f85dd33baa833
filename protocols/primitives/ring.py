"""Z_2^64 on int64 tensors: fixed point, and the integer steps of protocols; no party, no network.

Torch's int64 arithmetic wraps around, which is arithmetic modulo 2**64 in two's complement.
"""

import numpy as np
import torch
from torch import Tensor

from protocols.errors import RangeError
from protocols.limits import FRAC_BITS, LIMIT_BITS, RING_BITS


def encode(values: np.ndarray | Tensor, frac_bits: int = FRAC_BITS, *, what: str = "values") -> Tensor:
    """Return round(values * 2**frac_bits) as int64, to the nearest.

    Args:
        values: floating-point array of any shape.
        frac_bits: fraction bits f.
        what: name for the message.

    Raises:
        RangeError: a value is not finite, or its magnitude reaches 2**(62 - frac_bits).
    """
    # In numpy: torch would start its threads for it, which takes longer than the work.
    x = np.array(values.numpy() if isinstance(values, Tensor) else values, dtype=np.float64)
    if not np.isfinite(x).all():
        raise RangeError(f"{what} must be finite; got NaN or infinity")
    if x.size and float(np.abs(x).max()) >= 2.0 ** (LIMIT_BITS - frac_bits):
        raise RangeError(f"{what} must be below 2**{LIMIT_BITS - frac_bits} in magnitude")
    return torch.from_numpy(np.asarray(np.rint(x * 2.0**frac_bits), order="C").astype(np.int64))


def decode(values: Tensor, frac_bits: int = FRAC_BITS) -> np.ndarray:
    """Return values / 2**frac_bits as float32."""
    return (values.double() * 2.0**-frac_bits).float().numpy()


def shift_right_logical(x: Tensor, bits: int) -> Tensor:
    """Return x >> bits with zeros shifted in, 1 <= bits <= 63."""
    return (x >> bits) & ((1 << (RING_BITS - bits)) - 1)


def top_bit(x: Tensor) -> Tensor:
    """Return bit 63 of each element, as 0 or 1."""
    return shift_right_logical(x, RING_BITS - 1)


def pad2d(x: Tensor, pads: tuple[int, ...], value: int = 0) -> Tensor:
    """Pad the last two axes by (top, left, bottom, right)."""
    top, left, bottom, right = pads
    if not any(pads):
        return x
    return torch.nn.functional.pad(x, (left, right, top, bottom), value=value)


def windows(x: Tensor, kernel: tuple[int, ...], stride: tuple[int, ...]) -> Tensor:
    """Return sliding windows of (..., h, w) as (kh * kw, ..., h', w')."""
    (kh, kw), (sh, sw) = kernel, stride
    h, w = (x.shape[-2] - kh) // sh + 1, (x.shape[-1] - kw) // sw + 1
    parts = [x[..., i : i + sh * h : sh, j : j + sw * w : sw] for i in range(kh) for j in range(kw)]
    return torch.stack([part[..., :h, :w] for part in parts])
