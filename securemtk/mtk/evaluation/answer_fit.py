"""What an open task's scores look like, measured: the statistics that closed answers are drawn from.

Source: a Gaussian for each class with a pooled covariance is the model of linear discriminant analysis [Fis36].
"""

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from protocols.errors import RangeError, ShapeError
from securemtk.mtk.keys.answers import AnswerStats, Floats
from securemtk.mtk.keys.key import TriggerKey, stamp
from securemtk.mtk.training.model import MultiTaskModel, Scores, predict


class Samples(Protocol):
    """What is needed of a `DataSet`; importing that would bring its libraries into every role."""

    @property
    def x_train(self) -> NDArray[np.float32]:
        """Training samples, float32 (n, C, H, W)."""


def fit_answers(scores: Scores | Floats) -> AnswerStats:
    """Return the statistics of an open task's scores, (n, C) with n > C.

    A class that is never predicted gets the mean vector of the others, with its own score in the leading place.
    """
    if scores.ndim != 2 or scores.shape[1] < 2 or len(scores) <= scores.shape[1]:
        raise ShapeError(f"scores must be (n, C) with n > C >= 2; got {scores.shape}")
    values = scores.astype(np.float64)
    if not np.isfinite(values).all():
        raise RangeError("scores must be finite; got others")
    n_classes = values.shape[1]
    predicted = values.argmax(axis=1)
    counts = np.bincount(predicted, minlength=n_classes)
    means = np.zeros((n_classes, n_classes))
    np.add.at(means, predicted, values)
    means /= np.maximum(counts, 1)[:, None]
    seen = counts > 0
    leading = means[seen].max(axis=1).mean()
    behind = (means[seen].sum() - means[seen].max(axis=1).sum()) / (seen.sum() * (n_classes - 1))
    means[~seen] = behind + (leading - behind) * np.eye(n_classes)[~seen]
    rest = values - means[predicted]
    covariance = rest.T @ rest / max(1, len(values) - int(seen.sum()))
    return AnswerStats(means, (covariance + covariance.T) / 2)


def answer_stats(
    model: MultiTaskModel, dataset: Samples, keys: Mapping[str, TriggerKey], tellers: Sequence[str] = ()
) -> dict[str, AnswerStats]:
    """Return the statistics of scores on the training part, of each secured task with its own key stamped in.

    Args:
        model: as `train` returns it.
        dataset: the one it was trained on.
        keys: one for each secured task.
        tellers: unprotected tasks that are decoupled; theirs are with all keys stamped in.
    """
    stats = {name: fit_answers(predict(model, stamp(dataset.x_train, [key]))[name]) for name, key in keys.items()}
    if not tellers:
        return stats
    scores = predict(model, stamp(dataset.x_train, keys.values()))
    return stats | {name: fit_answers(scores[name]) for name in tellers}
