"""Programs as CrypTen's users write them, which tests run at two parties."""

import os
import time
from pathlib import Path

import torch

from protocols.engine import crypten


def operations(x: torch.Tensor, y: torch.Tensor, image: torch.Tensor, kernel: torch.Tensor) -> dict:
    crypten.init()
    a, b = crypten.cryptensor(x, src=0), crypten.cryptensor(y, src=1)
    picture, weights = crypten.cryptensor(image, src=1), crypten.cryptensor(kernel, src=0)
    best, place = a.max(dim=1)
    secret = {
        "sum": a + b,
        "product": a * b,
        "matmul": a.matmul(b.t()),
        "matmul with it again": (a + 1).matmul(b.t()),
        "public matmul": a.matmul(y.t()),
        "conv": picture.conv2d(weights, stride=2, padding=1),
        "public conv": picture.conv2d(kernel, padding=(0, 1)),
        "relu": a.relu(),
        "abs": a.abs(),
        "less": a < b,
        "at least": a >= b,
        "equal": a.round() == a.round() if hasattr(a, "round") else a == a,
        "unequal": a != b,
        "max": best,
        "place": place,
        "least": a.min(dim=1, one_hot=False)[0],
        "of all": a.max(),
        "argmax": a.argmax(dim=1, one_hot=False),
        "argmax of all": a.argmax(one_hot=False),
        "pool": picture.max_pool2d(2),
        "padded pool": picture.max_pool2d(3, stride=2, padding=1),
        "hardtanh": a.hardtanh(-0.5, 0.5),
        "softmax": a.softmax(1),
        "sigmoid": a.sigmoid(),
        "where": crypten.where(a < b, a, b),
        "stack": crypten.stack([a, b]).relu(),
    }
    return {name: value.get_plain_text() for name, value in secret.items()} | {"type": type(a.relu()).__name__}
