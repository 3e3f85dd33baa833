"""Exact products modulo 2**64 by limbs in float64 and BLAS: a rival of `protocols.primitives.kernels`, and a check."""

from collections.abc import Callable

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

Product = Callable[[Tensor], Tensor]


def limbs_of(x: Tensor, bits: int) -> list[Tensor]:
    """Return signed limbs of x, the lowest first: x = sum_i limb_i 2**(i bits) modulo 2**64."""
    made = []
    for _ in range(0, 64, bits):
        made.append((x << (64 - bits)) >> (64 - bits))
        x = (x - made[-1]) >> min(bits, 63)
    return made


def matmul(w: Tensor) -> Product:
    """Return the product x @ w for many x; w is int64 (K, N)."""
    return _by_limbs(w, (0,), torch.matmul)


def conv2d(
    w: Tensor,
    *,
    stride: tuple[int, int] = (1, 1),
    pads: tuple[int, int, int, int] = (0, 0, 0, 0),
    dilation: tuple[int, int] = (1, 1),
    groups: int = 1,
) -> Product:
    """Return the convolution of many x with w, int64 (O, C / groups, kh, kw), as `kernels.conv2d` has it."""
    top, left, bottom, right = pads

    def convolve(x: Tensor, part: Tensor) -> Tensor:
        return F.conv2d(F.pad(x, (left, right, top, bottom)), part, None, stride, 0, dilation, groups)

    return _by_limbs(w, (1, 2, 3), convolve)


def _by_limbs(w: Tensor, axes: tuple[int, ...], product: Callable[[Tensor, Tensor], Tensor]) -> Product:
    """Prepare a product in float64; `axes` of w are those that its sums run along.

    Limbs of x have so few bits that no partial sum passes 2**53: in whatever order BLAS adds, it rounds nothing.
    """
    small = int(w.min()) >= -(2**25) and int(w.max()) <= 2**25
    w_bits = 64 if small else 22
    parts = [part.double() for part in limbs_of(w, w_bits)]
    most = max(int(part.abs().sum(axes).max()) for part in parts)
    bits = min(32, 54 - (max(most, 2) - 1).bit_length())

    def apply(x: Tensor) -> Tensor:
        terms = [
            product(limb.double(), part).to(torch.int64) << i * bits + j * w_bits
            for i, limb in enumerate(limbs_of(x, bits))
            for j, part in enumerate(parts)
            if i * bits + j * w_bits < 64
        ]
        return torch.stack(terms).sum(0)

    return apply
