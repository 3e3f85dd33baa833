"""What a trained model tells whom: accuracies for each state of the keys, guesses of keys, attacks on closed tasks.

Whoever answers in the clear must not release a closed task's scores as they are: small deviations from the uniform
law tell much to those who have labels to learn from. `release` samples a label from them (the default: what it tells
is bounded) or rounds their probabilities to 0.01. Accuracies of closed tasks are of released answers.

Source: docs/method.md#levels, docs/method.md#attackers and docs/method.md#guarantees.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.special import softmax
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits

from protocols.errors import InputError, KeyRefused, ShapeError
from protocols.primitives.prg import Stream
from securemtk.data.base import MISSING, DataSet, Labels, Samples
from securemtk.mtk.keys.key import TriggerKey, stamp
from securemtk.mtk.training.model import MultiTaskModel, Scores, predict

Release = Literal["sampled", "rounded", "raw"]
RELEASES: tuple[Release, ...] = ("sampled", "rounded", "raw")
Floats = NDArray[np.float64]

_ROWS = 4096


@dataclass(frozen=True)
class TaskResult:
    """Accuracies of one task on the test part, each in [0, 1].

    Args:
        secured: whether the task has a key.
        chance: best guess from the true labels of the unprotected tasks.
        no_key: without any key; a secured task's answers as released.
        right_key: with its own key alone; of an unprotected task the least over all sets of one key.
        wrong_random: with a random pattern in the place of the key, as released: the mean over patterns; of an
            unprotected task the mean over patterns in the place of every key.
        wrong_other: with another task's key in its own place, or its pattern in the place of this key, as released:
            the greatest; of an unprotected task the least over patterns of one key in the place of another.
        all_keys: with all keys.
    """

    secured: bool
    chance: float
    no_key: float
    right_key: float
    wrong_random: float
    wrong_other: float
    all_keys: float

    @property
    def wrong_key(self) -> float:
        """The worse of both kinds of wrong keys: the greater for a secured task, the less for an unprotected one."""
        both = (self.wrong_random, self.wrong_other)
        return max(both) if self.secured else min(both)


@dataclass(frozen=True)
class OpeningRate:
    """How random patterns in the place of a key fare.

    Args:
        tries: number of patterns.
        share: of those that lift the task's released accuracy by `lift` over that without a key.
        no_key: released accuracy without a key, on the same samples.
        mean: released accuracy, mean over the patterns.
        worst: released accuracy of the best pattern.
    """

    tries: int
    share: float
    no_key: float
    mean: float
    worst: float


@dataclass(frozen=True)
class Attack:
    """What attackers with held-out labels make of revealed answers; accuracies out of fold.

    Args:
        chance: best guess that needs no answers.
        logistic: logistic regression on the standardised answers.
        boosting: gradient boosting on them.
    """

    chance: float
    logistic: float
    boosting: float

    @property
    def gain(self) -> float:
        """Accuracy of the better attacker beyond chance."""
        return max(self.logistic, self.boosting) - self.chance


def probabilities(scores: Scores | Floats) -> Floats:
    """Return the softmax of scores (n, classes), float64."""
    result: Floats = softmax(scores.astype(np.float64), axis=1)
    return result


def release(scores: Scores | Floats, how: Release = "sampled", stream: Stream | None = None) -> Floats:
    """Return what is released of a closed task's scores: float64 (n, classes).

    - "sampled": one label drawn from their softmax, as a row with a single 1. What one answer tells is bounded: with
      KL(uniform || softmax) <= e on average its law is within sqrt(e / 2) of uniform (docs/method.md#t2). Each further
      request for the same input tells more.
    - "rounded": the softmax, rounded to 0.01; the same however often it is asked. It still has a greatest entry.
    - "raw": the softmax itself, for measuring what the other two save from.

    Args:
        scores: (n, classes).
        how: the rule.
        stream: source of sampled labels; a fresh one from the operating system when absent.
    """
    p = probabilities(scores)
    if how != "sampled":
        return np.round(p, 2) if how == "rounded" else p
    stream = Stream() if stream is None else stream
    u = stream.uniform((len(p), 1)).numpy()
    # The last edge is 1 up to rounding, and u may lie above it.
    labels = np.minimum((np.cumsum(p, axis=1) <= u).sum(axis=1), p.shape[1] - 1)
    one_hot: Floats = np.eye(p.shape[1])[labels]
    return one_hot


def accuracy(answers: Scores | Floats, y: Labels) -> float:
    """Return the share of rows whose greatest answer is at y; of t equal greatest ones each counts 1 / t.

    Rows whose label is missing (-1) do not count. The share is the expectation over ties broken at random: rounded
    probabilities of a closed task are often all equal, and the lowest index would then be a guess of class 0.

    Args:
        answers: (n, classes), scores or probabilities.
        y: int64 (n,).
    """
    answers, y = _labelled(answers, y)
    top = answers == answers.max(axis=1, keepdims=True)
    return float((top[np.arange(len(y)), y] / top.sum(axis=1)).mean())


def released_accuracy(scores: Scores | Floats, y: Labels, how: Release = "sampled") -> float:
    """Return the accuracy of released answers, in expectation over sampled labels and broken ties.

    Rows whose label is missing (-1) do not count.

    Args:
        scores: (n, classes).
        y: int64 (n,).
        how: the rule of release.
    """
    scores, y = _labelled(scores, y)
    if how == "sampled":
        return float(probabilities(scores)[np.arange(len(y)), y].mean())
    return accuracy(release(scores, how), y)


def chance(dataset: DataSet, task: str, given: Sequence[str]) -> float:
    """Return how often the best guess of a task from the true labels of the tasks `given` is right on the test part.

    Samples whose label is missing are left out; a given label that is missing counts as a class of its own.
    The guess for each combination of given labels is the most frequent class among the training samples that have it
    (of all training samples where none has): what an attacker without test labels can do. With nothing given it is
    the most frequent class.

    Raises:
        InputError: a task is unknown, or given and asked for at once.
    """
    if task in given:
        raise InputError(f"task must not be among those given; got {task!r} in both")
    for name in (task, *given):
        dataset.task(name)
    y_train, y_test = dataset.y_train[task], dataset.y_test[task]
    both = [np.concatenate([dataset.y_train[name], dataset.y_test[name]]) for name in given]
    cells = _joint(both, len(y_train) + len(y_test))
    known_train, known_test = dataset.known(task, "train"), dataset.known(task, "test")
    cells_train, cells_test = cells[: len(y_train)][known_train], cells[len(y_train) :][known_test]
    return float((_best_guess(cells_train, y_train[known_train], cells_test) == y_test[known_test]).mean())


def evaluate(
    model: MultiTaskModel,
    dataset: DataSet,
    keys: Mapping[str, TriggerKey],
    *,
    how: Release = "sampled",
    n_random: int = 20,
    stream: Stream | None = None,
) -> dict[str, TaskResult]:
    """Measure each task on the test part with no key, its key, wrong keys and all keys.

    Args:
        model: as `train` returns it.
        dataset: the one it was trained on.
        keys: task name -> key, one for each secured task.
        how: the rule by which closed tasks are released.
        n_random: random patterns tried for each key.
        stream: source of the random patterns.

    Raises:
        KeyRefused: a secured task has no key here.
    """
    secured = [task.name for task in model.tasks if task.secured]
    if set(keys) != set(secured):
        raise KeyRefused(f"keys must be those of the secured tasks {secured}; got {sorted(keys)}")
    states = _states(model, dataset.x_test, keys, n_random, dataset, Stream() if stream is None else stream)
    unprotected = [task.name for task in model.tasks if not task.secured]
    results = {}
    for task in model.tasks:
        known = chance(dataset, task.name, [name for name in unprotected if name != task.name])
        make = _secured_result if task.secured else _unprotected_result
        results[task.name] = make(task.name, dataset.y_test[task.name], states, known, how)
    return results


def opening_rate(
    model: MultiTaskModel,
    dataset: DataSet,
    key: TriggerKey,
    *,
    how: Release = "sampled",
    tries: int = 1000,
    samples: int = 100,
    lift: float = 0.2,
    stream: Stream | None = None,
) -> OpeningRate:
    """Try random patterns in the place of a key on the first test samples that have a label of its task.

    Args:
        model: as `train` returns it.
        dataset: the one it was trained on.
        key: its place is used, its pattern is not.
        how: the rule by which the closed task is released.
        tries: number of patterns.
        samples: number of test samples for each.
        lift: accuracy above that without a key from which a pattern counts as having opened the task.
        stream: source of the patterns.
    """
    if min(tries, samples) < 1:
        raise InputError(f"tries and samples must be at least 1; got {tries} and {samples}")
    stream = Stream() if stream is None else stream
    tried = np.flatnonzero(dataset.known(key.task, "test"))[:samples]
    x, y = dataset.x_test[tried], dataset.y_test[key.task][tried]
    no_key = released_accuracy(predict(model, x)[key.task], y, how)
    found = []
    block = max(1, _ROWS // len(x))
    for start in range(0, tries, block):
        patterns = _random_patterns(key, dataset, min(block, tries - start), stream)
        stamped = np.where(key.mask, patterns[:, None], x[None])
        scores = predict(model, stamped.reshape(-1, *x.shape[1:]))[key.task]
        found += [released_accuracy(part, y, how) for part in scores.reshape(len(patterns), len(x), -1)]
    # A hair below, so that a lift of exactly 20 points is not lost to rounding.
    share = float(np.mean(np.array(found) >= no_key + lift - 1e-9))
    return OpeningRate(tries, share, no_key, float(np.mean(found)), max(found))


def attack(
    answers: Scores | Floats, y: Labels, given: Sequence[Labels] = (), *, folds: int = 5, seed: int = 0
) -> Attack:
    """Let attackers learn a task's labels from revealed answers, and compare with the best guess without answers.

    Each accuracy is over all rows, every row judged by an attacker that was trained on the other folds.

    Args:
        answers: (n, features), all that was revealed about each sample: scores, rounded or sampled answers.
        y: int64 (n,), the labels to be guessed; rows where it is missing (-1) are left out. At least `folds` rows of
            each class.
        given: further int64 (n,) labels that the guess without answers may use; true labels of open tasks whose
            answers are among the features.
        folds: number of folds.
        seed: of the folds and of boosting.

    Raises:
        ShapeError: answers and labels do not fit each other.
    """
    if answers.ndim != 2 or y.shape != (len(answers),) or any(g.shape != y.shape for g in given):
        raise ShapeError(f"answers must be (n, features) and labels (n,); got {answers.shape} and {y.shape}")
    known = y != MISSING
    answers, y, given = answers[known], y[known], [labels[known] for labels in given]
    split = list(StratifiedKFold(folds, shuffle=True, random_state=seed).split(answers, y))
    logistic = make_pipeline(StandardScaler(), LogisticRegression(max_iter=5000))
    boosting = HistGradientBoostingClassifier(max_iter=50, random_state=seed)
    features = np.asarray(answers, dtype=np.float64)
    # Threads of boosting wait for each other in a busy loop: on shared cores two of them take minutes.
    with threadpool_limits(1):
        right = [float((cross_val_predict(m, features, y, cv=split) == y).mean()) for m in (logistic, boosting)]
    guesses = np.empty_like(y)
    cells = _joint(given, len(y))
    for train, test in split:
        guesses[test] = _best_guess(cells[train], y[train], cells[test])
    return Attack(float((guesses == y).mean()), right[0], right[1])


@dataclass(frozen=True)
class _States:
    """Scores of the test part in each state of the keys."""

    none: dict[str, Scores]
    single: dict[str, dict[str, Scores]]
    everything: dict[str, Scores]
    random: dict[str, list[dict[str, Scores]]]
    foreign: dict[str, list[dict[str, Scores]]]


def _states(
    model: MultiTaskModel,
    x: Samples,
    keys: Mapping[str, TriggerKey],
    n_random: int,
    dataset: DataSet,
    stream: Stream,
) -> _States:
    random, foreign = {}, {}
    for name, key in keys.items():
        patterns = _random_patterns(key, dataset, n_random, stream)
        random[name] = [predict(model, np.where(key.mask, pattern, x)) for pattern in patterns]
        others = [other for other in keys.values() if other is not key]
        foreign[name] = [predict(model, np.where(key.mask, _in_place_of(key, other), x)) for other in others]
    return _States(
        none=predict(model, x),
        single={name: predict(model, stamp(x, [key])) for name, key in keys.items()},
        everything=predict(model, stamp(x, keys.values())),
        random=random,
        foreign=foreign,
    )


def _secured_result(t: str, y: Labels, states: _States, known: float, how: Release) -> TaskResult:
    wrong_random = float(np.mean([released_accuracy(s[t], y, how) for s in states.random[t]]))
    others = [s for name, s in states.single.items() if name != t] + states.foreign[t]
    return TaskResult(
        secured=True,
        chance=known,
        no_key=released_accuracy(states.none[t], y, how),
        right_key=accuracy(states.single[t][t], y),
        wrong_random=wrong_random,
        wrong_other=max((released_accuracy(s[t], y, how) for s in others), default=wrong_random),
        all_keys=accuracy(states.everything[t], y),
    )


def _unprotected_result(t: str, y: Labels, states: _States, known: float, how: Release) -> TaskResult:
    del how  # an unprotected task is released as it is
    no_key = accuracy(states.none[t], y)
    randoms = [accuracy(s[t], y) for wrong in states.random.values() for s in wrong]
    others = [accuracy(s[t], y) for wrong in states.foreign.values() for s in wrong]
    return TaskResult(
        secured=False,
        chance=known,
        no_key=no_key,
        right_key=min((accuracy(s[t], y) for s in states.single.values()), default=no_key),
        wrong_random=float(np.mean(randoms)) if randoms else no_key,
        wrong_other=min(others, default=no_key),
        all_keys=accuracy(states.everything[t], y),
    )


def _random_patterns(key: TriggerKey, dataset: DataSet, n: int, stream: Stream) -> Scores:
    """Draw n patterns as `draw_keys` does, in the place of a key: float32 (n, C, H, W), zero outside the mask."""
    patterns = np.zeros((n, *key.shape), dtype=np.float32)
    levels = stream.below(256, (n, int(key.mask.sum()))).numpy()
    patterns[:, key.mask] = dataset.low + (dataset.high - dataset.low) * levels / 255
    return patterns


def _in_place_of(key: TriggerKey, other: TriggerKey) -> Scores:
    """Return the values of another key, repeated or cut, in the place of this one: float32 (C, H, W)."""
    pattern = np.zeros(key.shape, dtype=np.float32)
    pattern[key.mask] = np.resize(other.pattern[other.mask], int(key.mask.sum()))
    return pattern


def _labelled(answers: Scores | Floats, y: Labels) -> tuple[Scores | Floats, Labels]:
    """Return the rows whose label is known."""
    known = y != MISSING
    if not known.any():
        raise InputError("an accuracy must be over one row with a label at least; got none")
    return answers[known], y[known]


def _joint(labels: Sequence[Labels], n: int) -> Labels:
    """Number the combinations of labels: int64 (n,), all 0 where there are none."""
    if not labels:
        return np.zeros(n, dtype=np.int64)
    _, cells = np.unique(np.stack(labels, axis=1), axis=0, return_inverse=True)
    return cells.reshape(n).astype(np.int64)


def _best_guess(cells_known: Labels, y_known: Labels, cells: Labels) -> Labels:
    """Return for each cell the class most frequent there among known labels, or among all of them where none is."""
    table = np.zeros((max(cells_known.max(), cells.max()) + 1, y_known.max() + 1))
    np.add.at(table, (cells_known, y_known), 1)
    table[table.sum(axis=1) == 0] = np.bincount(y_known, minlength=table.shape[1])
    guesses: Labels = table.argmax(axis=1)[cells].astype(np.int64)
    return guesses
