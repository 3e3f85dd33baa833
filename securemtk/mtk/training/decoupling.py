"""What one task tells of another, found on training labels, and how much of it may be told.

Two tasks that hang together betray each other: who reads "beard" off an open task need not ask a closed one for the
sex. Decoupling finds the open tasks that tell of a closed one, and as long as the closed one's key is absent it lets
them answer truly with probability beta only, and otherwise by a draw from their own marginal law.

Source: [Wan21] and [Wan24] have one parameter that trades protection for performance; measures, thresholds and the
mixture are docs/method.md#decoupling, where "inferred" says what is ours.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import rel_entr

from protocols.errors import InputError
from securemtk.data.base import DataSet, Labels

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class DecouplingConfig:
    """How much open tasks may tell of closed ones.

    Args:
        beta: probability with which an open task that tells of a closed one answers truly; 1 is no decoupling.
        conditional: a class b of the source is leaky when some class of the closed task has at least this probability
            given b, and that is `margin` more than without b;
        lift: or at least this much more than without b.
        margin: see `conditional`: a class that is nearly certain anyway is told by nothing.
        whole: whether a source with one leaky class is decoupled in all of its classes. In the leaky ones alone, a
            true answer of another class says that it was none of them.
    """

    beta: float = 1.0
    conditional: float = 0.9
    lift: float = 0.2
    margin: float = 0.02
    whole: bool = True

    def __post_init__(self) -> None:
        for name in ("beta", "conditional", "lift", "margin"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"{name} must lie in 0..1; got {getattr(self, name)}")


@dataclass(frozen=True, eq=False)
class Correlation:
    """What one task, the source, tells of another one, the target; counted on samples that have both labels.

    Args:
        target, source: names.
        samples: number of samples with both labels.
        given: float64 (C_source, C_target): P(target = a | source = b) in row b; a class never seen has the marginal
            law.
        marginal: float64 (C_target,): P(target = a).
        of_source: float64 (C_source,): P(source = b).
    """

    target: str
    source: str
    samples: int
    given: Floats
    marginal: Floats
    of_source: Floats

    @property
    def lift(self) -> Floats:
        """P(target = a | source = b) - P(target = a): float64 (C_source, C_target)."""
        return self.given - self.marginal

    @property
    def mutual_information(self) -> float:
        """I(target; source) in nats."""
        independent = self.of_source[:, None] * self.marginal
        return float(max(rel_entr(self.given * self.of_source[:, None], independent).sum(), 0.0))

    @property
    def cramers_v(self) -> float:
        """Cramer's V, 0 for independent tasks to 1 where the task with fewer classes is a function of the other.

        Source: [Cra46], chapter 21.
        """
        independent = self.of_source[:, None] * self.marginal
        seen = independent > 0
        joint = self.given * self.of_source[:, None]
        chi2 = float(((joint - independent)[seen] ** 2 / independent[seen]).sum())
        least = min(int((self.marginal > 0).sum()), int((self.of_source > 0).sum())) - 1
        return math.sqrt(chi2 / least) if least > 0 else 0.0

    @property
    def guess(self) -> float:
        """How often the best guess of the target is right for who knows the source's true label."""
        return float((self.given.max(axis=1) * self.of_source).sum())

    @property
    def prior(self) -> float:
        """How often the best guess of the target is right without anything."""
        return float(self.marginal.max())

    def leaky(self, config: DecouplingConfig) -> tuple[int, ...]:
        """Return the source's classes that tell more than the config's thresholds allow."""
        certain = (self.given >= config.conditional) & (self.lift >= config.margin)
        leaky = (certain | (self.lift >= config.lift)).any(axis=1) & (self.of_source > 0)
        return tuple(int(b) for b in np.flatnonzero(leaky))


def correlations(dataset: DataSet) -> dict[tuple[str, str], Correlation]:
    """Count for each ordered pair (target, source) of tasks what one tells of the other, on the training labels."""
    found = {}
    for target in dataset.tasks:
        for source in dataset.tasks:
            if target.name == source.name:
                continue
            y, z = dataset.y_train[target.name], dataset.y_train[source.name]
            found[target.name, source.name] = _count(target.name, source.name, y, z, target.classes, source.classes)
    return found


def _count(target: str, source: str, y: Labels, z: Labels, n_target: int, n_source: int) -> Correlation:
    both = (y >= 0) & (z >= 0)
    table = np.zeros((n_source, n_target))
    np.add.at(table, (z[both], y[both]), 1.0)
    total = max(table.sum(), 1.0)
    marginal, of_source = table.sum(axis=0) / total, table.sum(axis=1) / total
    rows = table.sum(axis=1, keepdims=True)
    given = np.where(rows > 0, table / np.maximum(rows, 1.0), marginal)
    return Correlation(target, source, int(both.sum()), given, marginal, of_source)


@dataclass(frozen=True, eq=False)
class Decoupling:
    """Which open tasks tell of which closed ones, and what they answer instead.

    Args:
        beta: as in `DecouplingConfig`.
        leaks: (closed task, open task) -> the open task's classes that are not answered truly.
        marginals: open task -> its marginal law on the training labels, float64 (classes,).
    """

    beta: float
    leaks: Mapping[tuple[str, str], tuple[int, ...]]
    marginals: Mapping[str, Floats]

    def sources(self, closed: Sequence[str]) -> list[str]:
        """Return the open tasks that tell of one of these closed ones, in a fixed order."""
        return sorted({source for target, source in self.leaks if target in closed})

    def opening(self, task: str, closed: Sequence[str]) -> float:
        """Return the probability with which an open task answers truly while these tasks are closed.

        Args:
            task: an open one.
            closed: tasks that are closed.
        """
        return self.beta if task in self.sources(closed) else 1.0

    def by_closed(self) -> dict[str, list[str]]:
        """Return closed task -> the open tasks that tell of it; what a bundle's manifest says."""
        names = sorted({target for target, _ in self.leaks})
        return {name: self.sources([name]) for name in names}


def decouple(dataset: DataSet, secured: Sequence[str], config: DecouplingConfig) -> Decoupling | None:
    """Find the unprotected tasks that tell of secured ones; None where `beta` is 1 or none does.

    Args:
        dataset: its training labels are counted.
        secured: names of the secured tasks.
        config: thresholds and beta.

    Source: detection on training labels alone, docs/method.md#decoupling.
    """
    if config.beta == 1:
        return None
    leaks = dict(_leaks(dataset, secured, config))
    if not leaks:
        return None
    marginals = {source: _marginal(dataset, source) for _, source in leaks}
    return Decoupling(config.beta, leaks, marginals)


def _leaks(
    dataset: DataSet, secured: Sequence[str], config: DecouplingConfig
) -> Iterator[tuple[tuple[str, str], tuple[int, ...]]]:
    for (target, source), found in correlations(dataset).items():
        if target not in secured or source in secured:
            continue
        if leaky := found.leaky(config):
            yield (target, source), tuple(range(len(found.of_source))) if config.whole else leaky


def _marginal(dataset: DataSet, task: str) -> Floats:
    y = dataset.y_train[task]
    counts = np.bincount(y[y >= 0], minlength=dataset.task(task).classes).astype(np.float64)
    law: Floats = counts / counts.sum()
    return law
