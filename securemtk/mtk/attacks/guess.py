"""Guessing a key: random patterns by the hundred thousand, plain values, other tasks' keys, damaged right keys.

Source: docs/method.md#t3; the two stages of the search are ours.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from protocols.errors import InputError
from protocols.primitives.prg import Stream
from securemtk.data.base import Labels, Samples
from securemtk.mtk.attacks.base import (
    Finding,
    Victim,
    opening_rule,
    pattern_accuracies,
    percent,
    random_patterns,
    scores_with,
    share_bounds,
    stream_of,
    task_scores,
)
from securemtk.mtk.evaluation.evaluate import probabilities
from securemtk.mtk.keys.key import TriggerKey, plane, stamp
from securemtk.support.progress import Progress, silent

NAME = "guess"
# Shares of places that are wrong, standard deviations of noise as shares of the range, and draws for each of them.
WRONG = tuple(k / 10 for k in range(1, 10))
NOISE = (0.02, 0.05, 0.1, 0.2, 0.4)
DRAWS = 20
NEAR = ("partly wrong", "noisy")
BINS = 50

_SAMPLES_MOST = 1000
_RAW_MOST = 1000
_BLOCK = 4096


def guess(
    victim: Victim, *, tries: int = 100_000, screen: int = 8, seed: int = 0, progress: Progress = silent
) -> list[Finding]:
    """Try patterns in the place of each key.

    A pattern opens a task when the *released* answers (a sampled label) are right 20 points more often than the best
    constant answer and than the answers without a key (see `OpeningRule`). Random patterns pass two stages: on a few
    samples a pattern must make the network confident, by half of what the rule asks for; what passes is judged on
    all test samples, 1,000 at most. The first 1,000 patterns are judged on all samples in any case; and of damaged
    right keys that open the task it is counted how many the first stage finds.

    Args:
        victim: model, data and keys.
        tries: random patterns for each key; a tenth as many again beside the right keys of all other tasks.
        screen: samples of the first stage.
        seed: of patterns and samples.
        progress: told what goes on.

    Returns:
        For each secured task: random patterns, alone and beside the other keys; the same by raw scores; and the best of
        each group of wrong keys.

    Raises:
        InputError: a number is not positive.
    """
    if min(tries, screen) < 1:
        raise InputError(f"tries and screen must be at least 1; got {tries} and {screen}")
    findings: list[Finding] = []
    for task, key in victim.keys.items():
        x, y = victim.labelled(task)
        x, y = x[:_SAMPLES_MOST], y[:_SAMPLES_MOST]
        stream = stream_of(seed, f"guess {task}")
        alone = _Guesser(victim, key, x, y, screen)
        wrong, found_by_screen = _wrong_keys(alone, stream.derive("wrong keys"))
        findings.append(alone.random(tries, "no other key", stream.derive("alone"), found_by_screen, progress))
        findings.append(alone.raw(min(tries, _RAW_MOST), stream.derive("alone")))
        if others := victim.others(task):
            beside = _Guesser(victim, key, stamp(x, others), y, screen)
            n = max(1, tries // 10)
            findings.append(beside.random(n, "beside all other keys", stream.derive("beside"), {}, progress))
        findings += wrong
    return findings


class _Guesser:
    """Patterns in the place of one key, on samples in one state of the other keys."""

    def __init__(self, victim: Victim, key: TriggerKey, x: Samples, y: Labels, screen: int) -> None:
        self.victim, self.key, self.task, self.x, self.y = victim, key, key.task, x, y
        self.rule = opening_rule(victim, key.task, x, y)
        self.few = _balanced(y, screen)
        closed = probabilities(task_scores(victim.model, key.task, x[self.few])).max(axis=1).mean()
        self.cut = (float(closed) + self.rule.threshold) / 2

    def accuracies(self, patterns: Samples) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return the accuracy under each pattern on all samples: released, and of raw scores, relabelled."""
        return pattern_accuracies(self.victim.model, self.task, self.x, self.y, patterns)

    def screen(self, patterns: Samples) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
        """Return which patterns pass the first stage, and the mean probability of the true label under each.

        It goes by confidence: that is at least the probability of the true label, and it varies less.
        """
        passed, true = np.empty(len(patterns), dtype=np.bool_), np.empty(len(patterns))
        for part, scores in scores_with(self.victim.model, self.task, self.x[self.few], patterns):
            p = probabilities(scores.reshape(-1, scores.shape[2])).reshape(scores.shape)
            passed[part] = p.max(axis=2).mean(axis=1) >= self.cut
            true[part] = p[:, np.arange(len(self.few)), self.y[self.few]].mean(axis=1)
        return passed, true

    def random(
        self, tries: int, state: str, stream: Stream, found_by_screen: Mapping[str, int], progress: Progress
    ) -> Finding:
        """Pass random patterns through both stages."""
        counts, second, opened, best = np.zeros(BINS, dtype=np.int64), 0, 0, 0.0
        for start in range(0, tries, _BLOCK):
            progress(f"guess {self.task}, {state}", start / tries)
            patterns = random_patterns(self.victim, self.key, min(_BLOCK, tries - start), stream)
            passed, true = self.screen(patterns)
            counts += np.histogram(true, bins=BINS, range=(0, 1))[0]
            found, _ = self.accuracies(patterns[passed])
            second, opened = second + len(found), opened + int(self.rule.opens(found).sum())
            best = max(best, *found) if len(found) else best
        lower, upper = share_bounds(opened, tries)
        bound = f"more than {lower:.2g}" if opened else f"fewer than {upper:.1e}"
        meaning = (
            f"{opened} of {tries:,} random patterns opened {self.task} ({state}): {bound} of all patterns do, with "
            "95 % confidence."
        )
        details = self.rule.to_dict() | {
            "tries": tries,
            "opened": opened,
            "upper_95": upper,
            "screen": {"samples": len(self.few), "confidence": self.cut, "passed": second, **found_by_screen},
            "best_of_second_stage": best if second else None,
            "histogram": counts.tolist(),
        }
        what = f"random patterns, {state}: share that opens"
        return Finding(NAME, self.task, what, opened / tries, self.rule.false_positive, meaning, details)

    def raw(self, tries: int, stream: Stream) -> Finding:
        """Judge random patterns on all samples, by raw scores and by what is released."""
        patterns = random_patterns(self.victim, self.key, tries, stream)
        rule = opening_rule(self.victim, self.task, self.x, self.y, raw=True)
        released, raw = self.accuracies(patterns)
        opened = int(rule.opens(raw).sum())
        meaning = (
            f"Were raw scores of {self.task} released, {opened} of {tries:,} random patterns would open it; as "
            f"released it is right {percent(float(released.mean()))} of the time under them."
        )
        details = rule.to_dict() | {
            "tries": tries,
            "opened": opened,
            "upper_95": share_bounds(opened, tries)[1],
            "mean": float(raw.mean()),
            "best": float(raw.max()),
            "released": {"opened": int(self.rule.opens(released).sum()), "best": float(released.max())},
        }
        what = "random patterns, raw scores: share that opens"
        return Finding(NAME, self.task, what, opened / tries, rule.false_positive, meaning, details)


def _balanced(y: Labels, n: int) -> NDArray[np.int64]:
    """Return n rows with classes as equally frequent as can be: the first of each class, then the second, ..."""
    order = np.argsort(y, kind="stable")
    starts = np.searchsorted(y[order], y[order], side="left")
    rank = np.empty(len(y), dtype=np.int64)
    rank[order] = np.arange(len(y)) - starts
    return np.lexsort((y, rank))[:n]


@dataclass(frozen=True)
class _Group:
    """Wrong keys of one sort: name of each kind -> float32 (n, *sample), NaN where the sample shows."""

    name: str
    kinds: Mapping[str, Samples]


def _wrong_keys(guesser: _Guesser, stream: Stream) -> tuple[list[Finding], dict[str, int]]:
    """Return a finding for each group of wrong keys, and how many of those that open the first stage finds."""
    findings, n_open, n_found = [], 0, 0
    for group in _groups(guesser.victim, guesser.key, stream):
        rows: dict[str, dict[str, Any]] = {}
        for name, patterns in group.kinds.items():
            found, raw = guesser.accuracies(patterns)
            opened = guesser.rule.opens(found)
            rows[name] = {"patterns": len(found), "opened": int(opened.sum()), "mean": float(found.mean())}
            rows[name] |= {"best": float(found.max()), "raw_best": float(raw.max())}
            if group.name in NEAR and opened.any():
                n_open += int(opened.sum())
                n_found += int(guesser.screen(patterns[opened])[0].sum())
        findings.append(_group_finding(guesser, group.name, rows))
    return findings, {"known_to_open": n_open, "of_them_found": n_found}


def _group_finding(guesser: _Guesser, group: str, rows: Mapping[str, Mapping[str, Any]]) -> Finding:
    best = max(rows, key=lambda name: float(rows[name]["best"]))
    opening = [f"{name} ({row['opened']} of {row['patterns']})" for name, row in rows.items() if row["opened"]]
    meaning = f"These open {guesser.task}: {', '.join(opening)}." if opening else f"None opens {guesser.task}."
    if opening and group in NEAR:
        meaning += " A key has neighbours that open too: guessing must only come as near as they are."
    figure = float(rows[best]["best"])
    details = guesser.rule.to_dict() | {"group": group, "kinds": dict(rows)}
    what = f"{group} keys: released accuracy of the best ({best})"
    return Finding(NAME, guesser.task, what, figure, guesser.rule.base, meaning, details)


def _groups(victim: Victim, key: TriggerKey, stream: Stream) -> Iterator[_Group]:
    low, high = victim.dataset.low, victim.dataset.high
    right = np.where(key.mask, key.pattern, np.nan).astype(np.float32)[None]
    mean = float(victim.dataset.x_train[:, key.mask].mean())
    flat = {"black": low, "white": high, "grey": (low + high) / 2, "mean": mean}
    yield _Group("blank", {name: np.where(key.mask, value, right) for name, value in flat.items()})
    if others := victim.others(key.task):
        kinds = {f"{other.task} in this place": _in_place_of(key, other) for other in others}
        kinds |= {f"{other.task} in its own place": _written([other]) for other in others}
        yield _Group("other tasks'", kinds | {"all others in their places": _written(others)})
    yield _Group("shifted", {f"by {reach}": _shifted(key, reach) for reach in (1, 2, 3)})
    yield _Group("recoloured", _recoloured(right, low, high))
    yield _Group("partly wrong", {f"{w:.0%} wrong": _replaced(victim, key, right, w, stream) for w in WRONG})
    noise = {f"noise {s:.0%}": right + (high - low) * s * _normal(key, stream) for s in NOISE}
    yield _Group("noisy", {name: np.clip(patterns, low, high) for name, patterns in noise.items()})


def _in_place_of(key: TriggerKey, other: TriggerKey) -> Samples:
    """Return another key's values, repeated or cut, in the place of this one."""
    pattern = np.full((1, *key.shape), np.nan, dtype=np.float32)
    pattern[0, key.mask] = np.resize(other.pattern[other.mask], int(key.mask.sum()))
    return pattern


def _written(keys: list[TriggerKey]) -> Samples:
    pattern = np.full((1, *keys[0].shape), np.nan, dtype=np.float32)
    for key in keys:
        pattern[0, key.mask] = key.pattern[key.mask]
    return pattern


def _shifted(key: TriggerKey, reach: int) -> Samples:
    """Return the key moved by `reach` along each axis of its plane, and along both; what leaves the sample is cut."""
    places = np.argwhere(plane(key.mask))
    size = key.shape[-places.shape[1] :]
    steps = [step for step in product((-reach, 0, reach), repeat=len(size)) if any(step)]
    moved = np.full((len(steps), *key.shape), np.nan, dtype=np.float32)
    for pattern, step in zip(moved, steps, strict=True):
        inside = ((places + step >= 0) & (places + step < size)).all(axis=1)
        pattern[..., *(places + step)[inside].T] = key.pattern[..., *places[inside].T]
    return moved


def _recoloured(right: Samples, low: float, high: float) -> dict[str, Samples]:
    middle, step = (low + high) / 2, 0.25 * (high - low)
    kinds = {
        "negated": low + high - right,
        "half contrast": middle + (right - middle) / 2,
        "black and white": np.where(np.isnan(right), right, np.where(right < middle, low, high)).astype(np.float32),
        "brighter": np.clip(right + step, low, high),
        "darker": np.clip(right - step, low, high),
    }
    if right.ndim == 4 and right.shape[1] > 1:
        kinds["channels permuted"] = np.concatenate([right[:, order] for order in _orders(right.shape[1])])
    return kinds


def _orders(channels: int) -> list[list[int]]:
    """Return the channels turned round, forwards and backwards: of three all permutations but their own order."""
    forwards = [*range(channels)] * 2
    turned = {tuple(way[k : k + channels]) for way in (forwards, forwards[::-1]) for k in range(channels)}
    return [list(order) for order in sorted(turned - {tuple(range(channels))})]


def _replaced(victim: Victim, key: TriggerKey, right: Samples, share: float, stream: Stream) -> Samples:
    """Return draws in which that share of the key's pixels or columns, at random places, is drawn anew."""
    drawn = random_patterns(victim, key, DRAWS, stream)
    places = np.argwhere(plane(key.mask))
    n_wrong = max(1, round(share * len(places)))
    patterns = np.repeat(right, DRAWS, axis=0)
    for pattern, values in zip(patterns, drawn, strict=True):
        wrong = places[stream.permutation(len(places)).numpy()[:n_wrong]].T
        pattern[..., *wrong] = values[..., *wrong]
    return patterns


def _normal(key: TriggerKey, stream: Stream) -> Samples:
    return stream.normal((DRAWS, *key.shape)).numpy().astype(np.float32)
