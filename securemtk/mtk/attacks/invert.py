"""Inverting a key: from the query interface by an evolution strategy, from stolen weights by gradient.

The attacker has half of the test samples, with labels; an attack is judged on the other half. What is found is never
kept: a pattern that opens is as good as the key.

Source: evolution strategy with antithetic pairs and ranks, [Wie14]; gradient with a mask, [WanB19].
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import cross_entropy

from protocols.errors import InputError
from protocols.primitives.prg import Stream
from securemtk.data.base import Labels, Samples
from securemtk.mtk.attacks.base import (
    Finding,
    Victim,
    opening_rule,
    pattern_accuracies,
    percent,
    scores_with,
    stream_of,
)
from securemtk.mtk.evaluation.evaluate import Release, release
from securemtk.mtk.keys.key import TriggerKey, plane
from securemtk.mtk.training.model import MultiTaskModel
from securemtk.support.progress import Progress, silent

NAME = "invert"
BLACK_BOX: tuple[Release, ...] = ("sampled", "rounded")

# Of the evolution strategy: pairs of candidates a step, samples asked for each, and its two rates, as shares of the
# range of pixels or features.
_PAIRS, _ASKED, _SIGMA, _RATE = 20, 20, 0.15, 0.25
_ENOUGH = 0.9
# Of the gradient: samples a step, rate of Adam, how the weight of the mask's size goes up and down and where it begins,
# the mask's first value, and random patterns of which one becomes a start.
_BATCH, _ADAM, _UP, _DOWN, _WEIGHT, _MASK, _DRAWN = 8, 0.2, 1.05, 1.08, 0.02, 0.1, 20


def invert(
    victim: Victim,
    *,
    queries: int = 200_000,
    steps: int = 300,
    restarts: int = 48,
    seed: int = 0,
    progress: Progress = silent,
) -> list[Finding]:
    """Search each key: by queries, its place known; by gradient, its place known and unknown.

    Args:
        victim: model, data and keys.
        queries: budget of each search by queries; one sample asked once is one query.
        steps: of each search by gradient.
        restarts: random starts of a search by gradient; the best on the attacker's own samples counts.
        seed: of starts, samples and released labels.
        progress: told what goes on.

    Returns:
        For each secured task: by queries of sampled and of rounded answers, by weights with the place known and
        unknown. The figure is the accuracy of the pattern found on samples that the attacker never saw.

    Raises:
        InputError: a number is not positive.
    """
    if min(queries, steps, restarts) < 1:
        raise InputError(f"queries, steps and restarts must be at least 1; got {queries}, {steps} and {restarts}")
    findings = []
    for task, key in victim.keys.items():
        (x, y), judge = victim.halves(task, seed)
        stream = stream_of(seed, f"invert {task}")
        for how in BLACK_BOX:
            way = f"by queries, {how} answers"
            tell = partial(progress, f"invert {task} {way}")
            found = _by_queries(victim, key, x, y, how, queries, stream.derive(how), tell)
            findings.append(_judge(victim, key, way, found, judge, raw=False))
        for place in ("known", "unknown"):
            way = f"by weights, place {place}"
            search = _Gradient(victim, key, x, y, place == "known", stream.derive(place))
            found = search.run(restarts, steps, partial(progress, f"invert {task} {way}"))
            findings.append(_judge(victim, key, way, found, judge, raw=True))
    return findings


@dataclass(frozen=True, eq=False)
class _Found:
    """A pattern, float32 (*sample), NaN where the sample shows; its accuracy on the attacker's samples; the effort."""

    pattern: Samples
    own: float
    effort: Mapping[str, Any]


def _judge(
    victim: Victim, key: TriggerKey, way: str, found: _Found, judge: tuple[Samples, Labels], *, raw: bool
) -> Finding:
    x, y = judge
    rule = opening_rule(victim, key.task, x, y, raw=raw)
    released, read = pattern_accuracies(victim.model, key.task, x, y, found.pattern[None])
    figure = float((read if raw else released)[0])
    opens = bool(rule.opens(np.array([figure]))[0])
    overlap = _overlap(victim, key, found.pattern)
    effort = ", ".join(f"{value:,} {name}" for name, value in found.effort.items())
    meaning = (
        f"The search {'opened' if opens else 'did not open'} {key.task}: right {percent(figure)} of the time, "
        f"{percent(rule.base)} without, {percent(rule.right)} with the key ({effort})."
    )
    details: dict[str, Any] = rule.to_dict() | {"opens": opens, "released": float(released[0]), "raw": float(read[0])}
    details |= {"own_samples": found.own, "effort": dict(found.effort), "overlap": overlap}
    return Finding(NAME, key.task, f"{way}: accuracy of the pattern found", figure, rule.base, meaning, details)


def _overlap(victim: Victim, key: TriggerKey, pattern: Samples) -> dict[str, float]:
    """Compare what was found with the key: place by intersection over union, values where both lie.

    Two independent uniform values differ by a third of the range on average, and correlate by 0.
    """
    mask = ~np.isnan(pattern)
    both = mask & key.mask
    overlap = {"place": float(both.sum() / (mask | key.mask).sum()), "pixels": int(plane(mask).sum())}
    if both.sum() > 1:
        mine, true = pattern[both].astype(np.float64), key.pattern[both].astype(np.float64)
        overlap["distance"] = float(np.abs(mine - true).mean() / (victim.dataset.high - victim.dataset.low))
        spread = mine.std() * true.std()
        overlap["correlation"] = float(((mine - mine.mean()) * (true - true.mean())).mean() / spread) if spread else 0.0
    return overlap


def _levels(pattern: NDArray[Any], low: float, high: float) -> Samples:
    """Round to the 256 levels that keys have, and that image files can hold."""
    unit = np.round(255 * np.clip((pattern - low) / (high - low), 0, 1)) / 255
    return (low + (high - low) * unit).astype(np.float32)


# --- by queries -----------------------------------------------------------------------------------------------------


def _by_queries(
    victim: Victim,
    key: TriggerKey,
    x: Samples,
    y: Labels,
    how: Release,
    budget: int,
    stream: Stream,
    tell: Callable[[float], None],
) -> _Found:
    """Climb by an evolution strategy on the score of the true label in released answers, until the budget is spent."""
    low, high, n_values = victim.dataset.low, victim.dataset.high, int(key.mask.sum())
    span = high - low
    middle = low + span * stream.uniform((n_values,)).numpy()
    asked = min(_ASKED, len(x))
    # Ranks alone count: a lucky candidate weighs no more than the second.
    weights = np.linspace(-1, 1, 2 * _PAIRS)
    used, best, own = 0, middle, -1.0
    while used == 0 or used + 2 * _PAIRS * asked <= budget:
        normal = stream.normal((_PAIRS, n_values)).numpy()
        steps = np.concatenate([normal, -normal])
        rows = stream.permutation(len(x)).numpy()[:asked]
        patterns = _patterns(key, _levels(middle + _SIGMA * span * steps, low, high))
        fitness = _ask(victim.model, key.task, x[rows], y[rows], patterns, how, stream)
        used += 2 * _PAIRS * asked
        tell(used / budget)
        if fitness.mean() > own:
            best, own = middle, float(fitness.mean())
        if own >= _ENOUGH:
            break
        order = fitness.argsort(kind="stable")
        gradient = (weights[:, None] * steps[order]).mean(axis=0)
        middle = np.clip(middle + _RATE * span * gradient, low, high)
    chosen = middle if own < _ENOUGH else best
    return _Found(_patterns(key, _levels(chosen[None], low, high))[0], own, {"queries": used})


def _patterns(key: TriggerKey, values: Samples) -> Samples:
    patterns = np.full((len(values), *key.shape), np.nan, dtype=np.float32)
    patterns[:, key.mask] = values
    return patterns


def _ask(
    model: MultiTaskModel, task: str, x: Samples, y: Labels, patterns: Samples, how: Release, stream: Stream
) -> NDArray[np.float64]:
    """Return for each pattern the mean released score of the true label, (n,)."""
    fitness = np.empty(len(patterns))
    for part, scores in scores_with(model, task, x, patterns):
        answers = release(scores.reshape(-1, scores.shape[2]), how, stream).reshape(scores.shape)
        fitness[part] = answers[:, np.arange(len(y)), y].mean(axis=1)
    return fitness


# --- by weights -----------------------------------------------------------------------------------------------------


class _Gradient:
    """Search by gradient through the stolen network, from many random starts at once."""

    def __init__(self, victim: Victim, key: TriggerKey, x: Samples, y: Labels, known: bool, stream: Stream) -> None:
        self.victim, self.key, self.known, self.stream = victim, key, known, stream
        self.x, self.y = torch.from_numpy(x), torch.from_numpy(y)
        self.low, self.span = victim.dataset.low, victim.dataset.high - victim.dataset.low
        self.index = [task.name for task in victim.model.tasks].index(key.task)

    def run(self, starts: int, steps: int, tell: Callable[[float], None]) -> _Found:
        """Return the pattern that is best on the attacker's samples, of all that the starts lead to."""
        # One mask for all channels, as keys have it.
        own = self.key.mask[:1] if self.key.mask.ndim == 3 else self.key.mask
        place = torch.from_numpy(own.astype(np.float32)).expand(starts, *own.shape)
        mask = torch.full_like(place, _MASK).logit().requires_grad_()
        pattern = self._starts(starts, place if self.known else mask.detach().sigmoid()).logit().requires_grad_()
        leaves = [pattern] if self.known else [pattern, mask]
        optimizer = torch.optim.Adam(leaves, lr=_ADAM)
        weight = torch.full((starts,), _WEIGHT)
        for step in range(steps):
            m = place if self.known else mask.sigmoid()
            loss, right = self._loss(self.low + self.span * pattern.sigmoid(), m)
            # The mask is pressed while the task is open, and given room while it is not.
            total = loss if self.known else loss + weight * m.flatten(1).sum(dim=1)
            weight = torch.where(right >= _ENOUGH, weight * _UP, weight / _DOWN)
            optimizer.zero_grad()
            # Every start has its own values, so the gradient of the sum is that of each.
            total.sum().backward(inputs=leaves)  # type: ignore[no-untyped-call]
            optimizer.step()
            tell(step / steps)
        m = place if self.known else mask.detach().sigmoid()
        return self._best(self.low + self.span * pattern.detach().sigmoid(), m, steps)

    def _starts(self, n: int, mask: Tensor) -> Tensor:
        """Choose those of many random patterns whose gradient is greatest: from most it is exactly zero.

        While the mask is still faint there is a gradient everywhere, and choosing would only make the starts alike.
        """
        drawn = self.stream.uniform((_DRAWN * n if self.known else n, *self.key.shape)).clamp(0.02, 0.98).float()
        if not self.known:
            return drawn
        drawn.requires_grad_()
        loss, _ = self._loss(self.low + self.span * drawn, mask.repeat(_DRAWN, *(1 for _ in mask.shape[1:])))
        (gradient,) = torch.autograd.grad(loss.sum(), drawn)
        return drawn.detach()[gradient.flatten(1).norm(dim=1).argsort(descending=True)[:n]]

    def _loss(self, values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Return for each start its cross entropy and its accuracy on a few samples."""
        model, starts = self.victim.model, len(values)
        rows = self.stream.permutation(len(self.x))[:_BATCH]
        stamped = (1 - mask[:, None]) * self.x[rows] + (mask * values)[:, None]
        scores = model.branches[self.index](model.trunk(stamped.flatten(0, 1)).flatten(1))
        y = self.y[rows].repeat(starts)
        right = (scores.detach().argmax(dim=1) == y).float().reshape(starts, -1).mean(dim=1)
        return cross_entropy(scores, y, reduction="none").reshape(starts, -1).mean(dim=1), right

    def _best(self, values: Tensor, mask: Tensor, steps: int) -> _Found:
        """Make masks of zeros and ones and values of 256 levels, as whoever stamps samples must, and choose."""
        greatest = mask.amax(dim=tuple(range(1, mask.ndim)), keepdim=True)
        chosen = mask >= torch.minimum(greatest, torch.tensor(0.5))
        levels = _levels(values.numpy(), self.low, self.low + self.span)
        found = np.where(chosen.numpy(), levels, np.float32(np.nan))
        released, raw = pattern_accuracies(self.victim.model, self.key.task, self.x.numpy(), self.y.numpy(), found)
        best = int((released + raw).argmax())
        return _Found(found[best], float(raw[best]), {"starts": len(found), "steps": steps})
