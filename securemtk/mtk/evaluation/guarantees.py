"""What can be said of a closed task's answers without trusting the experiment alone: statements T1 to T3.

T1. The network that answers a closed task best, in cross entropy, is constant: its answer is the uniform law. `kl` says
    how far a trained one is from it.
T2. Whoever sees one label drawn from each answer guesses the true label at most sqrt(kl / 2) more often than without
    it: the drawn label's law is that far from uniform in total variation (Pinsker, Jensen). It does not hold for
    the greatest entry or for raw scores, which amplify small deviations.
T3. A key of n random bits is guessed by chance in 2**-n of tries, if nothing but the key opens. Networks are tolerant,
    so that the share that does open is measured (`securemtk.mtk.evaluation.evaluate.opening_rate`, `securemtk attack`).

Source: proofs in docs/method.md#t1, docs/method.md#t2 and docs/method.md#t3; Pinsker's inequality, [Cov06].
[Wan21]'s own theorem was not at hand.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from protocols.errors import KeyRefused
from securemtk.data.base import DataSet, Labels
from securemtk.mtk.evaluation.evaluate import Floats, probabilities
from securemtk.mtk.keys.key import TriggerKey
from securemtk.mtk.training.model import MultiTaskModel, predict


@dataclass(frozen=True)
class Guarantee:
    """T1 to T3 for one secured task, on the test part without a key.

    Args:
        kl: mean of KL(uniform || answer) over samples, nats.
        bound: sqrt(kl / 2), the most that one drawn label can add to a guess, as a share of samples.
        advantage: what it adds to the best guess that knows the law of drawn and true labels of these very samples;
            expectation over the draw.
        key_bits: random bits of the key's pattern.
    """

    kl: float
    bound: float
    advantage: float
    key_bits: int


def guarantees(model: MultiTaskModel, dataset: DataSet, keys: Mapping[str, TriggerKey]) -> dict[str, Guarantee]:
    """Measure T1 and T2 for each secured task, and count T3's bits.

    Args:
        model: on the CPU, in evaluation mode.
        dataset: its test part is asked.
        keys: task name -> key, one for each secured task.

    Raises:
        KeyRefused: a secured task has no key here.
    """
    secured = [task.name for task in model.tasks if task.secured]
    if set(keys) != set(secured):
        raise KeyRefused(f"keys must be those of the secured tasks {secured}; got {sorted(keys)}")
    scores = predict(model, dataset.x_test)
    found = {}
    for name in secured:
        p = probabilities(scores[name])
        y = dataset.y_test[name]
        kl = mean_kl(p)
        bits = 8 * int(keys[name].mask.sum())
        found[name] = Guarantee(kl, math.sqrt(kl / 2), drawn_advantage(p[y >= 0], y[y >= 0]), bits)
    return found


def mean_kl(p: Floats) -> float:
    """Return the mean of KL(uniform || p) over rows, nats.

    Args:
        p: float64 (n, classes), rows that sum to 1.
    """
    classes = p.shape[1]
    return max(float(-(np.log(np.maximum(p, 1e-300) * classes)).mean()), 0.0)


def drawn_advantage(p: Floats, y: Labels) -> float:
    """Return how much more often y is guessed by who sees one label drawn from each row of p than without it.

    The guesser knows the joint law of drawn and true labels of these samples, which no attacker has: an upper bound
    but for those who know more of a sample than its answer.

    Args:
        p: float64 (n, classes).
        y: int64 (n,), true labels.
    """
    joint = np.zeros((p.shape[1], int(y.max()) + 1))
    np.add.at(joint.T, y, p)
    return float((joint.max(axis=1).sum() - joint.sum(axis=0).max()) / len(y))
