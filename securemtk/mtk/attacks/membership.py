"""Membership: do a closed task's answers tell samples of the training from others?

Fixed random labels can be learnt by heart; the answers for members are then confident, at labels that mean nothing.

Source: by the loss, and the advantage as the true less the false positive rate, [Yeo18]; the standard error of the area
where there is no effect is that of the rank-sum test [Man47].
"""

import math

import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score, roc_curve
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from securemtk.data.base import MISSING, Labels
from securemtk.mtk.attacks.base import Finding, Victim
from securemtk.mtk.evaluation.evaluate import Floats, probabilities
from securemtk.mtk.training.model import Scores, predict
from securemtk.support.progress import Progress, silent

NAME = "membership"


def membership(victim: Victim, *, seed: int = 0, progress: Progress = silent) -> list[Finding]:
    """Tell training from test samples by each task's raw scores, without any key.

    Three attackers: confidence (the greatest probability), loss at the true label, and logistic regression on sorted
    scores and loss, judged out of fold. Raw scores are the worst case; rounded and sampled ones tell less.

    Args:
        victim: model, data and keys; keys are not used.
        seed: of folds and of the halves for the threshold.
        progress: told what goes on.

    Returns:
        For each task, secured or not: the greatest area under the ROC curve of the three, with one half as chance.
    """
    findings = []
    dataset = victim.dataset
    members, strangers = predict(victim.model, dataset.x_train), predict(victim.model, dataset.x_test)
    for number, task in enumerate(victim.model.tasks):
        progress(f"membership by {task.name}", number / len(victim.model.tasks))
        scores = np.concatenate([members[task.name], strangers[task.name]])
        y = np.concatenate([dataset.y_train[task.name], dataset.y_test[task.name]])
        member, known = np.arange(len(y)) < len(dataset.x_train), y != MISSING
        findings.append(_finding(task.name, task.secured, scores[known], y[known], member[known], seed))
    return findings


def _finding(task: str, closed: bool, scores: Scores, y: Labels, member: NDArray[np.bool_], seed: int) -> Finding:
    n, n_members = len(member), int(member.sum())
    signals = _signals(scores, y, member, seed)
    areas = {name: float(roc_auc_score(member, signal)) for name, signal in signals.items()}
    best = max(areas, key=lambda name: areas[name])
    error = math.sqrt((n + 1) / (12 * n_members * (n - n_members)))
    advantage = _advantage(member, signals[best], seed)
    # The best of three passes 2.4 standard errors by luck in one case of forty.
    seen = areas[best] > 0.5 + 2.4 * error
    answers = "closed" if closed else "open"
    meaning = (
        f"The {answers} answers of {task} {'tell' if seen else 'do not tell'} members from others: area "
        f"{areas[best]:.3f} by {best} (chance 0.5, standard error {error:.3f})."
    )
    details = {"closed": closed, "areas": areas, "best": best, "standard_error": error, "advantage": advantage}
    details |= {"members": n_members, "others": n - n_members}
    what = f"raw {answers} answers: area under the ROC curve"
    return Finding(NAME, task, what, areas[best], 0.5, meaning, details)


def _signals(scores: Scores, y: Labels, member: NDArray[np.bool_], seed: int) -> dict[str, Floats]:
    """Return for each attacker how much each sample looks like a member, (n,)."""
    p = np.maximum(probabilities(scores), 1e-12)
    loss = -np.log(p[np.arange(len(y)), y])
    features = np.column_stack([np.sort(np.log(p), axis=1), loss])
    learner = make_pipeline(StandardScaler(), LogisticRegression(class_weight="balanced", max_iter=1000))
    folds = StratifiedKFold(5, shuffle=True, random_state=seed)
    learnt = cross_val_predict(learner, features, member, cv=folds, method="decision_function")
    return {"confidence": p.max(axis=1), "loss": -loss, "learnt attacker": learnt}


def _advantage(member: NDArray[np.bool_], signal: Floats, seed: int) -> float:
    """Choose a threshold on one half of the samples; return true less false positive rate on the other."""
    half = np.random.default_rng(seed).random(len(member)) < 0.5
    if len(set(member[half])) < 2 or len(set(member[~half])) < 2:
        return 0.0
    false, true, thresholds = roc_curve(member[half], signal[half])
    said = signal[~half] >= thresholds[(true - false).argmax()]
    return float(said[member[~half]].mean() - said[~member[~half]].mean())
