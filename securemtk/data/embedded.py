"""Two tables embedded in scikit-learn, each with further tasks made of features that are held out.

A task "is this feature above its median?" is correlated with the diagnosis or the cultivar, as such features are.
The feature itself is no input, nor are those that follow from it, so that the task must be learnt and not read off.

Sources: S. Aeberhard and M. Forina, "Wine", UCI repository [Aeb92]; W. Wolberg, O. Mangasarian, N. Street and
W. Street, "Breast Cancer Wisconsin (Diagnostic)", UCI repository [Wol93].
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from sklearn.datasets import load_breast_cancer, load_wine
from sklearn.model_selection import train_test_split

from securemtk.data.base import Columns, DataSet
from securemtk.data.splits import check_whole
from securemtk.tasks import Task

TEST_SHARE = 0.25

# For each further task its feature, and all that are no inputs because of it.
_WINE = {"proline": ("proline", ["proline"]), "colour": ("color_intensity", ["color_intensity"])}
_SIZES = [f"{kind} {name}" for kind in ("mean", "worst") for name in ("radius", "perimeter", "area")]
_CONCAVE = ["mean concave points", "concave points error", "worst concave points"]
_CANCER = {"size": ("mean area", _SIZES), "concave": ("worst concave points", _CONCAVE)}


def wine(*, seed: int = 0) -> DataSet:
    """Load 178 wines with tasks cultivar (3), proline (2) and colour (2: intensity), from 11 chemical measurements.

    proline and colour tell whether that measurement is above its median in the training part.

    Args:
        seed: of the split, which is stratified by cultivar: 133 training and 45 test samples.

    Returns:
        Rows float32 (n, 11) in [-1, 1], three standard deviations of the training part to each side.

    Raises:
        InputError: seed is not a whole number.
    """
    return _table("wine", load_wine(), "cultivar", _WINE, seed)


def breast_cancer(*, seed: int = 0) -> DataSet:
    """Load 569 tumours with tasks benign (2), size (2) and concave (2), from 21 measurements of their cells' nuclei.

    size tells whether the mean area, concave whether the worst count of concave points is above its median in the
    training part. Radius, perimeter and area (mean and worst) and all counts of concave points are no inputs.

    Args:
        seed: of the split, which is stratified by benign: 426 training and 143 test samples. A seed that is not a
            whole number is an InputError.

    Returns:
        Rows float32 (n, 21), scaled as those of `wine`.
    """
    return _table("breast_cancer", load_breast_cancer(), "benign", _CANCER, seed)


def _table(name: str, raw: Any, target: str, further: Mapping[str, tuple[str, list[str]]], seed: int) -> DataSet:
    check_whole("seed", seed, 0)
    y = raw.target.astype(np.int64)
    train, test = train_test_split(np.arange(len(y)), test_size=TEST_SHARE, stratify=y, random_state=seed)
    names = [str(feature) for feature in raw.feature_names]
    labels = {target: y}
    for task, (feature, _) in further.items():
        values = raw.data[:, names.index(feature)]
        labels[task] = (values > np.median(values[train])).astype(np.int64)
    held_out = {feature for _, features in further.values() for feature in features}
    kept = [i for i, feature in enumerate(names) if feature not in held_out]
    columns = Columns.fit([names[i] for i in kept], raw.data[train][:, kept])
    x = columns.scaled(raw.data[:, kept])
    return DataSet(
        name=name,
        tasks=(
            Task.named(target, [str(label) for label in raw.target_names]),
            *(Task.named(task, ("low", "high")) for task in further),
        ),
        x_train=x[train],
        y_train={task: values[train] for task, values in labels.items()},
        x_test=x[test],
        y_test={task: values[test] for task, values in labels.items()},
        low=columns.low,
        high=columns.high,
        columns=columns,
    )
