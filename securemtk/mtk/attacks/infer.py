"""Inferring a closed task from everything that is released while it is closed.

Source: docs/method.md#attackers.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np

from protocols.primitives.prg import Stream
from securemtk.data.base import MISSING, Labels
from securemtk.mtk.attacks.base import Finding, Victim, percent, stream_of
from securemtk.mtk.evaluation.evaluate import RELEASES, Floats, Release, attack, release
from securemtk.mtk.keys.key import TriggerKey, stamp
from securemtk.mtk.training.model import Scores, predict
from securemtk.support.progress import Progress, silent

NAME = "infer"


def infer(victim: Victim, *, seed: int = 0, progress: Progress = silent) -> list[Finding]:
    """Let attackers with labels learn each closed task from all outputs, without any key and with all other keys.

    Logistic regression and gradient boosting learn on four fifths of the test part and are judged on the rest, in
    turns. Each is given every output as one rule releases it: a sampled label, probabilities rounded to 0.01, or,
    for comparison, raw scores. The baseline is the best guess from the true labels of the tasks that are open, learnt
    on the same folds; beside it stand the most frequent class, and attackers who see the open outputs alone.

    Args:
        victim: model, data and keys.
        seed: of folds, boosting and sampled labels.
        progress: told what goes on.

    Returns:
        For each secured task, state of the other keys and rule: the better attacker's accuracy.
    """
    findings = []
    stream = stream_of(seed, NAME)
    x, labels = victim.dataset.x_test, victim.dataset.y_test
    unprotected = [task.name for task in victim.model.tasks if not task.secured]
    for number, task in enumerate(victim.keys):
        states: dict[str, list[TriggerKey]] = {"no key": []}
        if others := victim.others(task):
            states["all other keys"] = others
        for state, held in states.items():
            progress(f"infer {task}, {state}", number / len(victim.keys))
            opened = [*unprotected, *(key.task for key in held)]
            scores = predict(victim.model, stamp(x, held))
            for rule in RELEASES:
                findings.append(_infer(task, state, rule, scores, labels, opened, seed, stream))
    return findings


def _infer(
    task: str,
    state: str,
    rule: Release,
    scores: Mapping[str, Scores],
    labels: Mapping[str, Labels],
    opened: Sequence[str],
    seed: int,
    stream: Stream,
) -> Finding:
    y = labels[task]
    seen = {name: _seen(values, rule, stream) for name, values in scores.items()}
    found = attack(np.concatenate(list(seen.values()), axis=1), y, [labels[name] for name in opened], seed=seed)
    best = max(found.logistic, found.boosting)
    known = y[y != MISSING]
    prior = float(np.bincount(known).max() / len(known))
    error = math.sqrt(best * (1 - best) / len(known))
    details = {"rule": rule, "state": state, "open": list(opened), "prior": prior, "samples": len(known)}
    details |= {"logistic": found.logistic, "boosting": found.boosting, "standard_error": error}
    alone = prior
    if opened:
        only = attack(np.concatenate([seen[name] for name in opened], axis=1), y, seed=seed)
        alone = max(only.logistic, only.boosting)
    details["open_outputs_alone"] = alone
    meaning = (
        f"From all {rule} outputs ({state}) an attacker guesses {task} in {percent(best)} of cases: {percent(prior)} "
        f"is the most frequent class, {percent(found.chance)} what true open labels tell, {percent(alone)} what open "
        f"outputs alone tell (standard error {100 * error:.1f} points)."
    )
    what = f"all {rule} outputs, {state}: accuracy of the better attacker"
    return Finding(NAME, task, what, best, found.chance, meaning, details)


def _seen(scores: Scores, rule: Release, stream: Stream) -> Floats:
    """Return what an attacker sees of scores: raw ones as they are, for their scale tells something too."""
    return scores.astype(np.float64) if rule == "raw" else release(scores, rule, stream)
