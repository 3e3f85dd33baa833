"""What an open task's scores look like, so that an authority can answer for a closed one in their likeness.

The statistics are public: they stand in a bundle's manifest. A closed answer is drawn from them and from nothing
else, so it cannot tell anything about the sample or the weights beyond them.

Source: docs/protocols.md#output-gate; a Gaussian for each class with a pooled covariance is the model of linear
discriminant analysis [Fis36].
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from protocols.errors import InputError, RangeError, ShapeError
from protocols.primitives.prg import Stream

Floats = NDArray[np.float64]


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
