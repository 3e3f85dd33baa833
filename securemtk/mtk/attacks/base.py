"""What all attacks share: their victim, what they find, and when a pattern counts as having opened a task.

Source: the rule's false-positive rate is Hoeffding's inequality for sampling without replacement [Hoe63],
theorems 2 and 4, docs/method.md#when-a-pattern-opens; the bound of a share is that of [Clo34].
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import beta
from threadpoolctl import threadpool_limits

from protocols.errors import InputError, KeyRefused
from protocols.primitives.prg import SEED_BYTES, Stream
from securemtk.data.base import DataSet, Labels, Part, Samples
from securemtk.mtk.evaluation.evaluate import released_accuracy
from securemtk.mtk.keys.key import TriggerKey, stamp
from securemtk.mtk.training.model import MultiTaskModel, Scores

LIFT = 0.2
_LEAST_LIFT = 0.05
_ROWS = 1024


@dataclass(frozen=True, eq=False)
class Victim:
    """A model under attack, with what is needed to judge whether an attack succeeded.

    Args:
        model: in evaluation mode, on the CPU, with at least one secured task.
        dataset: the one it was trained on.
        keys: task name -> key, one for each secured task. Attacks judge with them and never start from them, but for
            those that try a damaged key.

    Raises:
        InputError: no task is secured.
        KeyRefused: keys and secured tasks differ.
    """

    model: MultiTaskModel
    dataset: DataSet
    keys: Mapping[str, TriggerKey]

    def __post_init__(self) -> None:
        secured = [task.name for task in self.model.tasks if task.secured]
        if not secured:
            raise InputError("a model under attack must have a secured task; it has none")
        if set(self.keys) != set(secured):
            raise KeyRefused(f"keys must be those of the secured tasks {secured}; got {sorted(self.keys)}")

    def others(self, task: str) -> list[TriggerKey]:
        """Return the keys of all tasks but this one."""
        return [key for name, key in self.keys.items() if name != task]

    def labelled(self, task: str, part: Part = "test") -> tuple[Samples, Labels]:
        """Return the samples of a part that have a label of the task, (n, *sample), and the labels, (n,).

        Args:
            task: name of the task.
            part: train or test.
        """
        data, known = self.dataset, self.dataset.known(task, part)
        x, y = (data.x_train, data.y_train) if part == "train" else (data.x_test, data.y_test)
        return x[known], y[task][known]

    def halves(self, task: str, seed: int) -> tuple[tuple[Samples, Labels], tuple[Samples, Labels]]:
        """Split the labelled test samples into what an attacker has and what the attack is judged on.

        Args:
            task: name of the task.
            seed: of the split.
        """
        x, y = self.labelled(task)
        order = np.random.default_rng(seed).permutation(len(x))
        mine, judged = order[: len(x) // 2], order[len(x) // 2 :]
        return (x[mine], y[mine]), (x[judged], y[judged])


@dataclass(frozen=True)
class Finding:
    """What one attack found about one task.

    Args:
        attack: name of the attack.
        task: the task attacked.
        what: in a few words, what was tried and what the figure is.
        figure: the figure.
        chance: the same figure where nothing leaks.
        meaning: one sentence.
        details: further figures, as JSON values. Never a pattern: one that opens is as good as the key.
    """

    attack: str
    task: str
    what: str
    figure: float
    chance: float
    meaning: str
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class OpeningRule:
    """When a pattern counts as having opened a task: its answers are right at least this often.

    Args:
        base: the greater of two accuracies: of the best constant answer, and of the released answers without a key.
        right: accuracy with the right key.
        lift: what must be added to `base`: 20 points, or half of what the right key adds where that is less.
        samples: number of samples on which it is applied.
        relabellings: ways to read the answers, of which the best counts.
    """

    base: float
    right: float
    lift: float
    samples: int
    relabellings: int = 1

    @property
    def threshold(self) -> float:
        """The accuracy that counts as open."""
        return self.base + self.lift

    @property
    def false_positive(self) -> float:
        """Bound on the chance that answers which do not depend on the label pass.

        Such answers meet a random order of the labels; their mean accuracy over all orders is at most that of the best
        constant answer, and Hoeffding bounds the deviation: exp(-2 n lift^2), once for each relabelling.
        """
        return min(1.0, self.relabellings * math.exp(-2 * self.samples * self.lift**2))

    def to_dict(self) -> dict[str, Any]:
        """Return all of it as JSON values."""
        return asdict(self) | {"threshold": self.threshold, "false_positive": self.false_positive}

    def opens(self, accuracies: NDArray[np.float64]) -> NDArray[np.bool_]:
        """Return for each accuracy whether it passes; a hair below counts, against losses by rounding."""
        return np.asarray(accuracies >= self.threshold - 1e-9)


def opening_rule(victim: Victim, task: str, x: Samples, y: Labels, *, raw: bool = False) -> OpeningRule:
    """Return the rule for patterns of one task on samples x, (n, *sample), with labels y, (n,).

    It is that of released answers or, with `raw`, of the greatest raw score as `relabelled_accuracy` reads it.

    Args:
        victim: whose task.
        task: name of the task.
        x: float32 (n, *sample).
        y: int64 (n,).
        raw: whether the greatest raw score is judged.
    """
    measure = relabelled_accuracy if raw else released_accuracy
    constant = float(np.bincount(y).max() / len(y))
    scores = task_scores(victim.model, task, x)
    base = max(constant, measure(scores, y))
    right = measure(task_scores(victim.model, task, stamp(x, [victim.keys[task]])), y)
    lift = min(LIFT, max(_LEAST_LIFT, (right - base) / 2))
    classes = scores.shape[1]
    return OpeningRule(base, right, lift, len(y), classes**classes if raw else 1)


def relabelled_accuracy(scores: Scores, y: Labels) -> float:
    """Return how often the class of the greatest score is right when each class is read as that most often true then.

    A closed task's greatest score is often *wrong* far more often than chance, which tells as much as being right.

    Args:
        scores: (n, classes).
        y: int64 (n,), none missing.
    """
    classes = scores.shape[1]
    counts = np.bincount(scores.argmax(axis=1) * classes + y, minlength=classes**2)
    return float(counts.reshape(classes, classes).max(axis=1).sum() / len(y))


def task_scores(model: MultiTaskModel, task: str, x: Samples) -> Scores:
    """Return the scores of one task, float32 (n, classes); the branches of the others are not computed.

    Args:
        model: on the CPU, in evaluation mode.
        task: name of the task.
        x: float32 (n, *sample).
    """
    branch = model.branches[[t.name for t in model.tasks].index(task)]
    parts = []
    with torch.no_grad():
        for start in range(0, len(x), _ROWS):
            features = model.trunk(torch.from_numpy(x[start : start + _ROWS])).flatten(1)
            parts.append(branch(features).numpy())
    scores: Scores = np.concatenate(parts)
    return scores


def scores_with(model: MultiTaskModel, task: str, x: Samples, patterns: Samples) -> Iterator[tuple[slice, Scores]]:
    """Give the scores of samples under each of many patterns, block by block.

    Args:
        model: whose scores.
        task: whose scores.
        x: float32 (m, *sample).
        patterns: float32 (n, *sample), NaN where the sample shows.

    Yields:
        A slice of the patterns, and float32 (patterns, m, classes).
    """
    block = max(1, _ROWS // len(x))
    for start in range(0, len(patterns), block):
        part = slice(start, min(start + block, len(patterns)))
        written = patterns[part, None]
        stamped = np.where(np.isnan(written), x[None], written)
        yield part, task_scores(model, task, stamped.reshape(-1, *x.shape[1:])).reshape(part.stop - start, len(x), -1)


def pattern_accuracies(
    model: MultiTaskModel, task: str, x: Samples, y: Labels, patterns: Samples
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the accuracy under each pattern, twice (n,): of released, sampled labels, and of raw scores, relabelled.

    Arguments are those of `scores_with`, and the labels y, int64 (m,).
    """
    released, raw = np.empty(len(patterns)), np.empty(len(patterns))
    for part, scores in scores_with(model, task, x, patterns):
        released[part] = [released_accuracy(rows, y) for rows in scores]
        raw[part] = [relabelled_accuracy(rows, y) for rows in scores]
    return released, raw


def share_bounds(count: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """Return the bounds of a share of which `count` of n were seen: each holds with probability `level`.

    Args:
        count: how many were seen.
        n: of how many, at least 1.
        level: probability with which each bound holds.
    """
    low = float(beta.ppf(1 - level, count, n - count + 1)) if count else 0.0
    high = float(beta.ppf(level, count + 1, n - count)) if count < n else 1.0
    return low, high


def stream_of(seed: int, label: str) -> Stream:
    """Return the stream of an attack's own guesses, which are no secrets: the same for the same seed and label.

    Args:
        seed: 0 to 2^63 - 1.
        label: what the stream is for.
    """
    if not 0 <= seed < 1 << 63:
        raise InputError(f"seed must lie in 0..2^63 - 1; got {seed}")
    return Stream(seed.to_bytes(SEED_BYTES, "little")).derive(label)


def random_patterns(victim: Victim, key: TriggerKey, n: int, stream: Stream) -> Samples:
    """Draw patterns as `draw_keys` does, float32 (n, *sample), NaN outside the mask.

    Args:
        victim: gives the range of values.
        key: gives the mask; its pattern is not looked at.
        n: number of patterns.
        stream: source of the values.
    """
    patterns = np.full((n, *key.shape), np.nan, dtype=np.float32)
    levels = stream.below(256, (n, int(key.mask.sum()))).numpy()
    patterns[:, key.mask] = victim.dataset.low + (victim.dataset.high - victim.dataset.low) * levels / 255
    return patterns


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute on one thread: the networks are small, and threads that wait for each other take longer."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with threadpool_limits(1):
            yield
    finally:
        torch.set_num_threads(before)


def percent(value: float) -> str:
    """Return an accuracy as text, in per cent."""
    return f"{100 * value:.1f} %"
