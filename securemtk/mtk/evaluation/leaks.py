"""What open tasks tell of closed ones: by their true labels, and by what is released of them.

A task is open because it is unprotected or because its key is held; one whose key is not held is closed. Its own answer
under encryption is noise of the authority and tells nothing, so that here an attacker is given what is open: the answer
of one open task, or of all of them. A decoupled task's answer is true with probability beta only and otherwise noise in
its likeness, row by row, as the output gate has it.

Source: measures on labels, docs/method.md#decoupling; attackers with held-out labels, docs/method.md#attackers.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from protocols.errors import InputError, KeyRefused
from protocols.primitives.prg import Stream
from securemtk.data.base import MISSING, DataSet, Labels
from securemtk.mtk.evaluation.answer_fit import answer_stats
from securemtk.mtk.evaluation.evaluate import Floats, attack
from securemtk.mtk.keys.answers import AnswerStats, draw_answers
from securemtk.mtk.keys.key import TriggerKey, stamp
from securemtk.mtk.training.decoupling import Correlation, Decoupling, DecouplingConfig, correlations
from securemtk.mtk.training.model import MultiTaskModel, predict
from securemtk.support.progress import Progress, silent

AnswerRule = Literal["label", "scores"]
ANSWER_RULES: tuple[AnswerRule, ...] = ("label", "scores")

_FOLDS = 5


@dataclass(frozen=True)
class LabelLeak:
    """What the true labels of one task, the source, tell of those of a secured one, the target; on training labels.

    Args:
        target, source: names.
        samples: number of training samples with both labels.
        prior: how often the best guess of the target is right without anything.
        guess: how often it is for who knows the source's true label.
        mutual_information: in nats.
        cramers_v: 0 for independent tasks to 1.
        source_class, target_class: the pair of classes that hangs together most, by lift.
        conditional: P(target = target_class | source = source_class).
        lift: how much that is more than P(target = target_class).
        leaky: whether a class of the source passes the thresholds of decoupling.
    """

    target: str
    source: str
    samples: int
    prior: float
    guess: float
    mutual_information: float
    cramers_v: float
    source_class: int
    target_class: int
    conditional: float
    lift: float
    leaky: bool

    @property
    def gain(self) -> float:
        """What the source's true label adds to the best guess."""
        return self.guess - self.prior


@dataclass(frozen=True)
class AnswerLeak:
    """What attackers with held-out labels make of the released answers of open tasks, on the test part.

    Args:
        target: the closed task.
        sources: the open tasks whose answers the attackers see.
        held: secured tasks whose keys are held meanwhile.
        rule: what is released of an open task: its greatest score's "label", or all its "scores" as a secure predict
            reveals them.
        opening: source -> probability with which a row of its answers is the true one; below 1 where it is decoupled.
        samples: number of test samples that were guessed.
        prior: share of the most frequent class among them.
        labels: accuracy of the best guess from the sources' true labels, learnt on the same folds. It falls short
            where sources are so many that most combinations of labels are rare.
        logistic, boosting: accuracies of the two attackers, out of fold.
    """

    target: str
    sources: tuple[str, ...]
    held: tuple[str, ...]
    rule: AnswerRule
    opening: Mapping[str, float]
    samples: int
    prior: float
    labels: float
    logistic: float
    boosting: float

    @property
    def best(self) -> float:
        """Accuracy of the better attacker; as the greater of two it is a little too high where nothing leaks."""
        return max(self.logistic, self.boosting)

    @property
    def gain(self) -> float:
        """What the answers add to the most frequent class."""
        return self.best - self.prior

    @property
    def beyond_labels(self) -> float:
        """What they add to the sources' true labels."""
        return self.best - self.labels

    @property
    def standard_error(self) -> float:
        """Of the better attacker's accuracy, from the number of samples."""
        return math.sqrt(self.best * (1 - self.best) / self.samples)


def label_leaks(
    dataset: DataSet, secured: Sequence[str], config: DecouplingConfig | None = None
) -> tuple[LabelLeak, ...]:
    """Return what each other task's labels tell of each secured one's, counted on the training part.

    Args:
        dataset: whose labels.
        secured: names of the tasks that are told of.
        config: thresholds of `LabelLeak.leaky`; the default ones when absent.

    Raises:
        InputError: a secured task is unknown.
    """
    for name in secured:
        dataset.task(name)
    config = DecouplingConfig() if config is None else config
    found = correlations(dataset)
    return tuple(_label_leak(each, config) for (target, _), each in found.items() if target in secured)


def answer_leaks(
    model: MultiTaskModel,
    dataset: DataSet,
    keys: Mapping[str, TriggerKey],
    decoupling: Decoupling | None = None,
    *,
    samples: int = 2000,
    seed: int = 0,
    stream: Stream | None = None,
    progress: Progress = silent,
) -> tuple[AnswerLeak, ...]:
    """Let attackers guess each closed task from released answers: of each single open task, and of all open ones.

    Views of a closed task are: each unprotected task, without keys; each other secured task, with its key; all
    unprotected ones, without keys; and these with all other secured ones, with their keys. Each is taken under both
    rules. Test samples without a label of the closed task are left out, and so are its classes that have fewer samples
    than there are folds (5); a task of which less than two classes remain has no row in the result.

    Args:
        model: as `train` returns it.
        dataset: the one it was trained on.
        keys: task name -> key, one for each secured task.
        decoupling: as training found it; None where every open task always answers truly.
        samples: greatest number of test samples that are looked at.
        seed: of folds and boosting.
        stream: source of the output gate's noise; a fresh one from the operating system when absent.
        progress: told what goes on, and the share of it that is done.

    Raises:
        InputError: samples is less than 1.
        KeyRefused: keys and secured tasks differ.

    Example:
        >>> for leak in answer_leaks(result.model, dataset, result.keys):           # doctest: +SKIP
        ...     print(leak.target, leak.sources, leak.rule, round(leak.gain, 3))
    """
    secured = [task.name for task in model.tasks if task.secured]
    if set(keys) != set(secured):
        raise KeyRefused(f"keys must be those of the secured tasks {secured}; got {sorted(keys)}")
    if samples < 1:
        raise InputError(f"samples must be at least 1; got {samples}")
    released = _Released(model, dataset, keys, decoupling, samples, Stream() if stream is None else stream)
    views = list(_views([task.name for task in model.tasks if not task.secured], secured))
    found = []
    for number, (target, sources, held) in enumerate(views):
        progress(f"what {', '.join(sources)} tells of {target}", number / len(views))
        found += list(_attacked(target, sources, held, released, seed))
    return tuple(found)


def _label_leak(found: Correlation, config: DecouplingConfig) -> LabelLeak:
    b, a = np.unravel_index(found.lift.argmax(), found.lift.shape)
    return LabelLeak(
        target=found.target,
        source=found.source,
        samples=found.samples,
        prior=found.prior,
        guess=found.guess,
        mutual_information=found.mutual_information,
        cramers_v=found.cramers_v,
        source_class=int(b),
        target_class=int(a),
        conditional=float(found.given[b, a]),
        lift=float(found.lift[b, a]),
        leaky=bool(found.leaky(config)),
    )


View = tuple[str, tuple[str, ...], tuple[str, ...]]


def _views(unprotected: Sequence[str], secured: Sequence[str]) -> Iterator[View]:
    """Give each closed task with the tasks that an attacker sees, and the keys that are held; each once."""
    for target in secured:
        others = tuple(name for name in secured if name != target)
        views: list[View] = [(target, (name,), ()) for name in unprotected]
        views += [(target, (name,), (name,)) for name in others]
        views += [(target, tuple(unprotected), ()), (target, (*unprotected, *others), others)]
        yield from dict.fromkeys(view for view in views if view[1])


def _attacked(
    target: str, sources: Sequence[str], held: tuple[str, ...], released: "_Released", seed: int
) -> Iterator[AnswerLeak]:
    y = released.labels[target]
    rows = guessable(y)
    if not len(rows):
        return
    answers = released.answers(held)
    given = [released.labels[name][rows] for name in sources]
    for rule in ANSWER_RULES:
        seen = np.concatenate([_seen(answers[name], rule)[rows] for name in sources], axis=1)
        found = attack(seen, y[rows], given, folds=_FOLDS, seed=seed)
        yield AnswerLeak(
            target=target,
            sources=tuple(sources),
            held=held,
            rule=rule,
            opening={name: released.opening(name, held) for name in sources},
            samples=len(rows),
            prior=float(np.bincount(y[rows]).max() / len(rows)),
            labels=found.chance,
            logistic=found.logistic,
            boosting=found.boosting,
        )


def guessable(y: Labels, folds: int = _FOLDS) -> NDArray[np.int64]:
    """Return the rows whose label is of a class that every fold can have; none where that leaves less than two classes.

    Args:
        y: int64 (n,), -1 where the label is missing.
        folds: of `attack`.
    """
    counts = np.bincount(y[y != MISSING], minlength=1)
    rows = np.flatnonzero((y != MISSING) & (counts[y] >= folds))
    return rows if len(np.unique(y[rows])) > 1 else rows[:0]


def _seen(answers: Floats, rule: AnswerRule) -> Floats:
    one_hot: Floats = np.eye(answers.shape[1])[answers.argmax(axis=1)]
    return answers if rule == "scores" else one_hot


@dataclass(frozen=True, eq=False)
class _Released:
    """What a secure predict reveals of the test part in each state of the keys; each state is computed once."""

    model: MultiTaskModel
    dataset: DataSet
    keys: Mapping[str, TriggerKey]
    decoupling: Decoupling | None
    samples: int
    stream: Stream
    _states: dict[tuple[str, ...], dict[str, Floats]] = field(default_factory=dict)

    @property
    def labels(self) -> dict[str, Labels]:
        return {name: y[: self.samples] for name, y in self.dataset.y_test.items()}

    def opening(self, task: str, held: Sequence[str]) -> float:
        """Return the probability with which a row of an open task is answered truly."""
        closed = [name for name in self.keys if name not in held]
        return 1.0 if self.decoupling is None else self.decoupling.opening(task, closed)

    def answers(self, held: tuple[str, ...]) -> dict[str, Floats]:
        """Return what is revealed of each open task: float64 (n, classes)."""
        if held not in self._states:
            x = stamp(self.dataset.x_test[: self.samples], [self.keys[name] for name in held])
            scores = predict(self.model, x)
            is_open = [task.name for task in self.model.tasks if not task.secured or task.name in held]
            probability = {name: self.opening(name, held) for name in is_open}
            stats = self._stats([name for name in is_open if probability[name] < 1])
            self._states[held] = {
                name: _gated(scores[name].astype(np.float64), probability[name], stats.get(name), self.stream)
                for name in is_open
            }
        return self._states[held]

    def _stats(self, decoupled: Sequence[str]) -> dict[str, AnswerStats]:
        return answer_stats(self.model, self.dataset, dict(self.keys), decoupled) if decoupled else {}


def _gated(scores: Floats, opening: float, stats: AnswerStats | None, stream: Stream) -> Floats:
    """Return scores of which each row stays with probability `opening` and else becomes noise in their likeness."""
    if stats is None:
        return scores
    stays = stream.uniform((len(scores), 1)).numpy() < opening
    gated: Floats = np.where(stays, scores, draw_answers(stats, len(scores), stream))
    return gated
