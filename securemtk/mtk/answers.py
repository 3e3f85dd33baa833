"""What an open task's scores look like, so that an authority can answer for a closed one in their likeness.

The statistics are public: they stand in a bundle's manifest. A closed answer is drawn from them and from nothing
else, so it cannot tell anything about the sample or the weights beyond them.

Source: output gate, "Key gate" and "Output gate" in the design of the protocols; a Gaussian for each class with a
pooled covariance is the model of linear discriminant analysis (Fisher, 1936).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from protocols.errors import InputError, RangeError, ShapeError
from protocols.prg import Stream
from securemtk.mtk.keys import TriggerKey, stamp
from securemtk.mtk.model import MultiTaskModel, Scores, predict

Floats = NDArray[np.float64]


class Samples(Protocol):
    """What is needed of a `DataSet`; importing that would bring its libraries into every role."""

    @property
    def x_train(self) -> NDArray[np.float32]:
        """Training samples, float32 (n, C, H, W)."""


@dataclass(frozen=True, eq=False)
class AnswerStats:
    """Statistics of an open task's scores.

    Args:
        mean: float64 (C, C); row c is the mean score vector of samples for which class c was predicted.
        covariance: float64 (C, C), symmetric, positive semidefinite up to rounding; pooled over predicted classes.

    Raises:
        ShapeError: shapes differ from these.
        RangeError: a value is not finite, or the covariance is none.
    """

    mean: Floats
    covariance: Floats

    def __post_init__(self) -> None:
        n = len(self.mean)
        if n < 2 or self.mean.shape != (n, n) or self.covariance.shape != (n, n):
            raise ShapeError(f"mean and covariance must be (C, C); got {self.mean.shape}, {self.covariance.shape}")
        if not (np.isfinite(self.mean).all() and np.isfinite(self.covariance).all()):
            raise RangeError("statistics of answers must be finite; got others")
        scale = max(1.0, float(np.abs(self.covariance).max()))
        if np.abs(self.covariance - self.covariance.T).max() > 1e-9 * scale or (
            np.linalg.eigvalsh(self.covariance).min() < -1e-6 * scale
        ):
            raise RangeError("a covariance must be symmetric and positive semidefinite; got another matrix")

    def to_dict(self) -> dict[str, list[list[float]]]:
        """Return the form that stands in a manifest."""
        return {"mean": self.mean.tolist(), "covariance": self.covariance.tolist()}

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> "AnswerStats":
        """Read what `to_dict` made; raise InputError for anything else."""
        try:
            return cls(*(np.array(raw[name], dtype=np.float64) for name in ("mean", "covariance")))
        except (KeyError, TypeError, ValueError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError("statistics of answers must hold mean and covariance; got something else") from None


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


def draw_answers(stats: AnswerStats, n: int, stream: Stream) -> Floats:
    """Draw n closed answers: a label uniformly, then scores from the Gaussian of that label.

    Args:
        stats: of the task.
        n: number of answers.
        stream: source of all randomness.

    Returns:
        float64 (n, C); a function of stats, n and the stream alone.
    """
    n_classes = len(stats.mean)
    labels = stream.below(n_classes, (n,)).numpy()
    normal = stream.normal((n, n_classes)).numpy()
    # The symmetric root also exists where scores depend on each other linearly, and a Cholesky factor does not.
    values, vectors = np.linalg.eigh(stats.covariance)
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    answers: Floats = stats.mean[labels] + normal @ root
    return answers
