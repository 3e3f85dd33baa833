"""Fine-tuning: a fresh branch on the stolen trunk, learnt from a few labelled samples.

Source: docs/method.md#limits.
"""

import copy
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from protocols.errors import InputError
from securemtk.data.base import Labels
from securemtk.mtk.attacks.base import Finding, Victim, percent
from securemtk.mtk.training.model import MultiTaskModel
from securemtk.support.progress import Progress, silent

NAME = "finetune"

_BATCH, _RATE, _DECAY = 64, 3e-3, 1e-2


def finetune(
    victim: Victim,
    *,
    counts: Sequence[int] = (50, 200, 1000),
    steps: int = 200,
    repeats: int = 2,
    seed: int = 0,
    progress: Progress = silent,
) -> list[Finding]:
    """Train a new branch for each secured task on the stolen trunk, and the same network from scratch.

    The labelled samples are of the training part, without any key. The trunk has seen them, keyless and keyed, which
    favours the thief.

    Args:
        victim: model, data and keys; keys are not used.
        counts: numbers of labelled samples; those beyond what the training part has of any closed task are left out.
        steps: of each training, 64 samples a step.
        repeats: trainings on different samples, of which the mean is reported.
        seed: of samples and first weights.
        progress: told what goes on.

    Returns:
        For each secured task and number: accuracy of the fresh branch on the test part; its chance is the network
        trained from scratch on the same samples.

    Raises:
        InputError: no count fits the training part, or a number is not positive.
    """
    n_train = min(int(victim.dataset.known(task).sum()) for task in victim.keys)
    fitting = [n for n in counts if 0 < n <= n_train]
    if not fitting or min(steps, repeats) < 1:
        raise InputError(
            f"counts must lie in 1..{n_train}, steps and repeats be at least 1; got {list(counts)}, {steps}, {repeats}"
        )
    findings = []
    for number, task in enumerate(victim.keys):
        for n in fitting:
            progress(f"finetune {task}, {n} samples", number / len(victim.keys))
            pairs = [_pair(victim, task, n, steps, seed * repeats + k) for k in range(repeats)]
            findings.append(_finding(victim, task, n, np.array(pairs)))
    return findings


def _finding(victim: Victim, task: str, n: int, pairs: np.ndarray) -> Finding:
    stolen, scratch = (float(value) for value in pairs.mean(axis=0))
    verdict = "the stolen trunk carries the task" if stolen > scratch + 0.02 else "the stolen trunk is of little help"
    meaning = (
        f"With {n} labelled samples a new branch on the stolen trunk reaches {percent(stolen)} of {task}, a network "
        f"from scratch {percent(scratch)}: {verdict}."
    )
    _, y = victim.labelled(task)
    details = {"labelled": n, "stolen": pairs[:, 0].tolist(), "scratch": pairs[:, 1].tolist()}
    details["prior"] = float(np.bincount(y).max() / len(y))
    return Finding(NAME, task, f"{n} samples: accuracy of a new branch", stolen, scratch, meaning, details)


def _pair(victim: Victim, task: str, n: int, steps: int, seed: int) -> tuple[float, float]:
    """Return the accuracies of a fresh branch on the stolen trunk and of the whole network from scratch."""
    x_all, y_all = victim.labelled(task, "train")
    rows = np.random.default_rng(seed).permutation(len(x_all))[:n]
    x, y = torch.from_numpy(x_all[rows]), torch.from_numpy(y_all[rows])
    samples, y_test = victim.labelled(task)
    x_test = torch.from_numpy(samples)
    with torch.no_grad():
        stolen, stolen_test = (victim.model.trunk(part).flatten(1) for part in (x, x_test))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        branch = _branch(victim.model, task)
        head = _fit(branch, stolen, y, steps)
        whole = _fit(nn.Sequential(_fresh(victim.model.trunk), nn.Flatten(), _branch(victim.model, task)), x, y, steps)
    return _accuracy(head, stolen_test, y_test), _accuracy(whole, x_test, y_test)


def _branch(model: MultiTaskModel, task: str) -> nn.Module:
    return _fresh(model.branches[[t.name for t in model.tasks].index(task)])


def _fresh(module: nn.Module) -> nn.Module:
    """Return a copy of a module with weights drawn anew."""
    copied = copy.deepcopy(module)
    for part in copied.modules():
        if callable(reset := getattr(part, "reset_parameters", None)):
            reset()
            continue
        for parameter in part.parameters(recurse=False):
            nn.init.normal_(parameter, std=0.05)
    return copied


def _fit(network: nn.Module, x: Tensor, y: Tensor, steps: int) -> nn.Module:
    optimizer = torch.optim.AdamW(network.parameters(), lr=_RATE, weight_decay=_DECAY)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    network.train()
    for _ in range(steps):
        rows = torch.randperm(len(x))[:_BATCH]
        optimizer.zero_grad()
        cross_entropy(network(x[rows]), y[rows]).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
    return network.eval()


def _accuracy(network: nn.Module, x: Tensor, y: Labels) -> float:
    with torch.no_grad():
        return float((network(x).argmax(dim=1).numpy() == y).mean())
