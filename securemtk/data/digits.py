"""Real handwritten digits, embedded in scikit-learn: 1,797 of them, 8x8 grey.

Source: E. Alpaydin, C. Kaynak, "Optical Recognition of Handwritten Digits", UCI repository [Alp98], its test part.
"""

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from protocols.errors import InputError
from securemtk.data.base import DataSet, Images
from securemtk.data.splits import check_whole
from securemtk.tasks import Task

CANVAS = 16
TEST_SAMPLES = 360
TASKS = (
    Task.named("digit", [str(digit) for digit in range(10)]),
    Task.named("parity", ["even", "odd"]),
    Task.named("large", ["0 to 4", "5 to 9"]),
)


def load(*, side: int = 11) -> DataSet:
    """Load the digits with tasks digit (10), parity (2: odd) and large (2: digit >= 5).

    The split is stratified by digit and always the same: 1,437 training and 360 test samples.

    Args:
        side: the digit is enlarged (bilinear) from 8 to `side` pixels, 8..16, and placed at the top middle of a
            black canvas of 16x16. 11 leaves five rows free below it, where trigger-keys do not cover it.

    Returns:
        Images float32 (n, 1, 16, 16) in [0, 1].

    Raises:
        InputError: side lies outside 8..16.
    """
    if not 8 <= check_whole("side", side, 1) <= CANVAS:
        raise InputError(f"side must lie in 8..{CANVAS}; got {side}")
    raw = load_digits()
    digit = raw.target.astype(np.int64)
    labels = {"digit": digit, "parity": digit % 2, "large": (digit >= 5).astype(np.int64)}
    x = _place(raw.images.astype(np.float32) / 16, side)
    train, test = train_test_split(np.arange(len(digit)), test_size=TEST_SAMPLES, stratify=digit, random_state=0)
    return DataSet(
        name="digits",
        tasks=TASKS,
        x_train=x[train],
        y_train={name: y[train] for name, y in labels.items()},
        x_test=x[test],
        y_test={name: y[test] for name, y in labels.items()},
    )


def _place(images: Images, side: int) -> Images:
    enlarged = torch.nn.functional.interpolate(
        torch.from_numpy(images)[:, None], size=(side, side), mode="bilinear", align_corners=True
    )
    left = (CANVAS - side) // 2
    canvas = np.zeros((len(images), 1, CANVAS, CANVAS), dtype=np.float32)
    # Interpolation can pass 1 by one unit in the last place.
    canvas[:, :, :side, left : left + side] = enlarged.clamp(0, 1).numpy()
    return canvas
