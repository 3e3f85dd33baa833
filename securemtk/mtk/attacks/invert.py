"""Inverting a key: from the query interface by an evolution strategy, from stolen weights by gradient.

The attacker has half of the test samples, with labels; an attack is judged on the other half. What is found is never
kept: a pattern that opens is as good as the key.

Source: evolution strategy with antithetic pairs and ranks, Wierstra et al. (2014) and Salimans et al. (2017); gradient
with a mask, Neural Cleanse, Wang et al. (IEEE S&P 2019).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import cross_entropy

from protocols.errors import InputError
from protocols.prg import Stream
from securemtk.data.base import Images, Labels
from securemtk.mtk.attacks.base import (
    Finding,
    Progress,
    Victim,
    opening_rule,
    pattern_accuracies,
    percent,
    scores_with,
    silent,
    stream_of,
)
from securemtk.mtk.evaluate import Release, release
from securemtk.mtk.keys import TriggerKey
from securemtk.mtk.model import MultiTaskModel

NAME = "invert"
BLACK_BOX: tuple[Release, ...] = ("sampled", "rounded")

# Of the evolution strategy: pairs of candidates a step, samples asked for each, and its two rates, as shares of the
# pixels' range.
_PAIRS, _ASKED, _SIGMA, _RATE = 20, 20, 0.15, 0.25
_ENOUGH = 0.9
# Of the gradient: samples a step, rate of Adam, and how the weight of the mask's size goes up and down.
_BATCH, _ADAM, _UP, _DOWN, _WEIGHT = 64, 0.1, 1.05, 1.08, 0.02


def invert(
    victim: Victim,
    *,
    queries: int = 200_000,
    steps: int = 300,
    restarts: int = 3,
    seed: int = 0,
    progress: Progress = silent,
) -> list[Finding]:
    """Search each key: by queries, its place known; by gradient, its place known and unknown.

    Args:
        victim: model, data and keys.
        queries: budget of each search by queries; one sample asked once is one query.
        steps: of each search by gradient.
        restarts: searches by gradient, of which the best on the attacker's own samples counts.
        seed: of starts, samples and released labels.
        progress: told what goes on.

    Returns:
        For each secured task: by queries of sampled and of rounded answers, by weights with the place known and unknown.
        The figure is the accuracy of the pattern found on samples that the attacker never saw.

    Raises:
        InputError: a number is not positive.
    """
    if min(queries, steps, restarts) < 1:
        raise InputError(f"queries, steps and restarts must be at least 1; got {queries}, {steps} and {restarts}")
    (x, labels), judge = victim.halves(seed)
    findings = []
    for task, key in victim.keys.items():
        stream = stream_of(seed, f"invert {task}")
        for how in BLACK_BOX:
            progress(f"invert {task} by queries, {how}", 0.0)
            found = _by_queries(victim, key, x, labels[task], how, queries, stream.derive(how))
            findings.append(_judge(victim, key, f"by queries, {how} answers", found, judge))
        for place in ("known", "unknown"):
            search = _Gradient(victim, key, x, labels[task], place == "known", steps, stream.derive(place))
            best = None
            for k in range(restarts):
                progress(f"invert {task} by weights, place {place}", k / restarts)
                fresh = search.run(k)
                best = fresh if best is None or fresh.own > best.own else best
            if best is not None:
                findings.append(_judge(victim, key, f"by weights, place {place}", best, judge))
    return findings


@dataclass(frozen=True, eq=False)
class _Found:
    """A pattern, float32 (C, H, W), NaN where the sample shows; its accuracy on the attacker's samples; the effort."""

    pattern: Images
    own: float
    effort: Mapping[str, Any]


def _judge(
    victim: Victim, key: TriggerKey, way: str, found: _Found, judge: tuple[Images, Mapping[str, Labels]]
) -> Finding:
    x, y = judge[0], judge[1][key.task]
    how: Release = "sampled" if "queries" in way else "raw"
    rule = opening_rule(victim, key.task, x, y, how)
    released, raw = pattern_accuracies(victim.model, key.task, x, y, found.pattern[None])
    figure = float((released if how == "sampled" else raw)[0])
    opens = bool(rule.opens(np.array([figure]))[0])
    overlap = _overlap(victim, key, found.pattern)
    effort = ", ".join(f"{value:,} {name}" for name, value in found.effort.items())
    meaning = (
        f"The search {'opened' if opens else 'did not open'} {key.task}: right {percent(figure)} of the time, "
        f"{percent(rule.base)} without, {percent(rule.right)} with the key ({effort})."
    )
    details = rule.to_dict() | {"opens": opens, "released": float(released[0]), "raw": float(raw[0])}
    details |= {"own_samples": found.own, "effort": dict(found.effort), "overlap": overlap}
    return Finding(NAME, key.task, f"{way}: accuracy of the pattern found", figure, rule.base, meaning, details)


def _overlap(victim: Victim, key: TriggerKey, pattern: Images) -> dict[str, float]:
    """Compare what was found with the key: place by intersection over union, values where both lie.

    Two independent uniform values differ by a third of the range on average, and correlate by 0.
    """
    mask = ~np.isnan(pattern)
    both = mask & key.mask
    overlap = {"place": float(both.sum() / (mask | key.mask).sum()), "pixels": int(mask[0].sum())}
    if both.sum() > 1:
        mine, true = pattern[both].astype(np.float64), key.pattern[both].astype(np.float64)
        overlap["distance"] = float(np.abs(mine - true).mean() / (victim.dataset.high - victim.dataset.low))
        spread = mine.std() * true.std()
        overlap["correlation"] = float(((mine - mine.mean()) * (true - true.mean())).mean() / spread) if spread else 0.0
    return overlap


def _levels(pattern: NDArray[Any], low: float, high: float) -> Images:
    """Round to the 256 levels that keys have, and that image files can hold."""
    unit = np.round(255 * np.clip((pattern - low) / (high - low), 0, 1)) / 255
    return (low + (high - low) * unit).astype(np.float32)


# --- by queries -----------------------------------------------------------------------------------------------------


def _by_queries(
    victim: Victim, key: TriggerKey, x: Images, y: Labels, how: Release, budget: int, stream: Stream
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
        if fitness.mean() > own:
            best, own = middle, float(fitness.mean())
        if own >= _ENOUGH:
            break
        order = fitness.argsort(kind="stable")
        gradient = (weights[:, None] * steps[order]).mean(axis=0)
        middle = np.clip(middle + _RATE * span * gradient, low, high)
    chosen = middle if own < _ENOUGH else best
    return _Found(_patterns(key, _levels(chosen[None], low, high))[0], own, {"queries": used})


def _patterns(key: TriggerKey, values: Images) -> Images:
    patterns = np.full((len(values), *key.shape), np.nan, dtype=np.float32)
    patterns[:, key.mask] = values
    return patterns


def _ask(
    model: MultiTaskModel, task: str, x: Images, y: Labels, patterns: Images, how: Release, stream: Stream
) -> NDArray[np.float64]:
    """Return for each pattern the mean released score of the true label, (n,)."""
    fitness = np.empty(len(patterns))
    for part, scores in scores_with(model, task, x, patterns):
        answers = release(scores.reshape(-1, scores.shape[2]), how, stream).reshape(scores.shape)
        fitness[part] = answers[:, np.arange(len(y)), y].mean(axis=1)
    return fitness


# --- by weights -----------------------------------------------------------------------------------------------------


class _Gradient:
    """Search by gradient through the stolen network, from random starts."""

    def __init__(
        self, victim: Victim, key: TriggerKey, x: Images, y: Labels, known: bool, steps: int, stream: Stream
    ) -> None:
        self.victim, self.key, self.known, self.steps, self.stream = victim, key, known, steps, stream
        self.x, self.y = torch.from_numpy(x), torch.from_numpy(y)
        self.index = [task.name for task in victim.model.tasks].index(key.task)

    def run(self, restart: int) -> _Found:
        """Return what one start leads to."""
        low, high = self.victim.dataset.low, self.victim.dataset.high
        stream = self.stream.derive(str(restart))
        # Logits: uniform values in the pattern; of a mask that is to be found, 10 % everywhere.
        start = stream.uniform(self.key.shape).clamp(0.02, 0.98).float().logit()
        pattern = start.requires_grad_()
        place = torch.from_numpy(self.key.mask[:1].astype(np.float32))
        mask = torch.full_like(place, 0.1).logit().requires_grad_()
        leaves = [pattern] if self.known else [pattern, mask]
        optimizer = torch.optim.Adam(leaves, lr=_ADAM)
        weight = _WEIGHT
        for _ in range(self.steps):
            rows = stream.permutation(len(self.x))[:_BATCH]
            m = place if self.known else mask.sigmoid()
            stamped = (1 - m) * self.x[rows] + m * (low + (high - low) * pattern.sigmoid())
            loss, right = self._loss(stamped, rows)
            # The mask is pressed while the task is open, and given room while it is not.
            total = loss if self.known else loss + weight * m.sum()
            weight = weight * _UP if right >= _ENOUGH else weight / _DOWN
            optimizer.zero_grad()
            total.backward(inputs=leaves)  # type: ignore[no-untyped-call]
            optimizer.step()
        m = place if self.known else mask.detach().sigmoid()
        return self._finish(low + (high - low) * pattern.detach().sigmoid(), m)

    def _loss(self, stamped: Tensor, rows: Tensor) -> tuple[Tensor, float]:
        model = self.victim.model
        scores = model.branches[self.index](model.trunk(stamped).flatten(1))
        right = float((scores.detach().argmax(dim=1) == self.y[rows]).float().mean())
        return cross_entropy(scores, self.y[rows]), right

    def _finish(self, pattern: Tensor, mask: Tensor) -> _Found:
        """Make a mask of zeros and ones, and values of 256 levels, as whoever stamps images must."""
        chosen = mask >= 0.5
        if not chosen.any():
            chosen = mask == mask.max()
        low, high = self.victim.dataset.low, self.victim.dataset.high
        values = _levels(pattern.numpy(), low, high)
        found = np.where(np.broadcast_to(chosen.numpy(), values.shape), values, np.float32(np.nan))
        x, y = self.x.numpy(), self.y.numpy()
        _, raw = pattern_accuracies(self.victim.model, self.key.task, x, y, found[None])
        return _Found(found, float(raw[0]), {"steps": self.steps})
