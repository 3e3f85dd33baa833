"""Exact int64 products mod 2**64."""

import torch
from torch import Tensor

from protocols import ring


def matmul(x: Tensor, w: Tensor) -> Tensor:
    """Return x @ w mod 2**64."""
    return torch.matmul(x, w)


def conv2d(
    x: Tensor,
    w: Tensor,
    *,
    stride: tuple[int, ...],
    pads: tuple[int, ...],
    dilation: tuple[int, ...],
    groups: int,
) -> Tensor:
    """Return the 2-D convolution mod 2**64."""
    return torch.conv2d(ring.pad2d(x, pads), w, stride=stride, dilation=dilation, groups=groups)
