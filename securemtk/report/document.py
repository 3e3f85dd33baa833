"""What a report says, as JSON values: everything that is measured of a run, in one document. No secret is in it."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from protocols.errors import InputError
from protocols.primitives.prg import Stream
from securemtk.data.base import Labels
from securemtk.mtk.attacks.base import Victim, stream_of
from securemtk.mtk.attacks.suite import AttackReport, Effort, run_attacks
from securemtk.mtk.evaluation.evaluate import RELEASES, Release, accuracy, attack, release, released_accuracy
from securemtk.mtk.evaluation.guarantees import guarantees
from securemtk.mtk.evaluation.leaks import AnswerLeak, AnswerRule, LabelLeak, answer_leaks, guessable, label_leaks
from securemtk.mtk.keys.key import stamp
from securemtk.mtk.training.model import Scores, predict
from securemtk.report import facts
from securemtk.report.encrypted import measure_encrypted
from securemtk.report.threats import threat_model
from securemtk.runs.places import CHECKPOINT, RUN
from securemtk.runs.run_folder import Run, Trained, open_run, read_run, task_figures
from securemtk.support.documents import parse_json
from securemtk.support.progress import Progress, part_of, silent

KIND, FORMAT = "securemtk report", 2
ATTACK_FILE = "attack.json"


@dataclass(frozen=True)
class ReportOptions:
    """How much a report measures.

    Args:
        encrypted: whether the run is asked under encryption.
        samples: test samples asked so in each state of the keys.
        batches: sizes of the predictions whose cost is measured.
        repeats: predictions of each size.
        attacks: how hard the run is attacked; None where it is not, and findings of `securemtk attack` are taken.
        seed: of attackers, folds and of the noise that they meet.
    """

    encrypted: bool = True
    samples: int = 200
    batches: tuple[int, ...] = (1, 16)
    repeats: int = 5
    attacks: Effort | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.samples, self.repeats, *self.batches) < 1:
            raise InputError(f"samples, batches and repeats must be at least 1; got {asdict(self)}")


def measure_report(
    folder: Path,
    *,
    passphrase: str | None = None,
    extent: ReportOptions | None = None,
    attacks: Mapping[str, Any] | None = None,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Measure a run and return the document of its report; nothing is written.

    Args:
        folder: of the run.
        passphrase: of its keys.
        extent: how much is measured; `ReportOptions()` when absent.
        attacks: findings that are there, from `read_attacks`; those of `extent.attacks` take their place.
        progress: told what goes on, and the share of it that is done.

    Returns:
        JSON values: data, tasks, model, keys, accuracy, leaks, attacks, guarantees, encrypted, threats, versions and
        more; `attacks` and `encrypted` are None where nothing was measured.

    Raises:
        InputError: the folder holds no run or one that has not ended; findings are of other tasks; attacks are wanted
            of a run without secured tasks.
        KeyRefused: a key file is absent, damaged or locked by another passphrase.
        ProtocolAbort: a role of the encrypted predictions failed.
    """
    extent = ReportOptions() if extent is None else extent
    progress("open the run", 0.0)
    run, trained = read_run(folder), open_run(folder, passphrase)
    _check_attacks(trained, attacks, extent)
    dataset, result = trained.dataset, trained.result
    labels = label_leaks(dataset, list(result.keys), run.config.decoupling)
    answers = answer_leaks(
        result.model,
        dataset,
        result.keys,
        result.decoupling,
        seed=extent.seed,
        stream=stream_of(extent.seed, "leaks"),
        progress=part_of(progress, 0.1, 0.5),
    )
    progress("guarantees", 0.5)
    measured = {
        "summary": [_summary(trained, name, answers) for name in result.keys],
        "accuracy": {name: task_figures(figures) for name, figures in trained.metrics.items()},
        "leaks": _leaks(trained, labels, answers),
        "guarantees": _guarantees(trained, stream_of(extent.seed, "report")),
        "attacks": attacks if extent.attacks is None else _attacks(trained, extent.attacks, extent.seed, progress),
        "encrypted": _encrypted(folder, trained, passphrase, extent, part_of(progress, 0.6, 1.0)),
        "threats": asdict(
            threat_model(list(result.keys), labels, answers, result.decoupling, run.config.assembler.targets)
        ),
    }
    document = _public(folder, run, trained) | measured | {"seed": extent.seed}
    plain: dict[str, Any] = json.loads(json.dumps(document, allow_nan=False))
    return plain


def _public(folder: Path, run: Run, trained: Trained) -> dict[str, Any]:
    """Return what a run is, before anything is measured of it."""
    dataset, result = trained.dataset, trained.result
    return {
        "kind": KIND,
        "format": FORMAT,
        "created": facts.moment(),
        "trained": facts.moment((folder / RUN).stat().st_mtime),
        "data": facts.data_facts(dataset, run.options),
        "tasks": facts.task_facts(dataset, result),
        "model": facts.model_facts(result.model),
        "keys": {name: facts.key_facts(key, dataset) for name, key in result.keys.items()},
        "config": asdict(run.config),
        "versions": facts.versions(),
        "machine": facts.machine(),
    }


def _attacks(trained: Trained, effort: Effort, seed: int, progress: Progress) -> dict[str, Any]:
    result = trained.result
    victim = Victim(result.model, trained.dataset, result.keys)
    found = run_attacks(victim, effort=effort, seed=seed, progress=progress)
    return found.to_dict() | {"made": facts.moment(), "stale": False}


def _encrypted(
    folder: Path, trained: Trained, passphrase: str | None, extent: ReportOptions, progress: Progress
) -> dict[str, Any] | None:
    if not extent.encrypted:
        return None
    found = measure_encrypted(
        folder,
        trained,
        passphrase=passphrase,
        samples=extent.samples,
        batches=extent.batches,
        repeats=extent.repeats,
        progress=progress,
    )
    return asdict(found)


def read_attacks(folder: Path) -> dict[str, Any] | None:
    """Return what `securemtk attack` has left in a run's folder, and whether it is older than the weights.

    Raises:
        InputError: the file holds something else.
    """
    path = folder / ATTACK_FILE
    if not path.exists():
        return None
    try:
        raw = parse_json(path.read_bytes(), ATTACK_FILE)
        made, checkpoint = path.stat().st_mtime, folder / CHECKPOINT
        stale = checkpoint.exists() and made < checkpoint.stat().st_mtime
    except OSError as error:
        raise InputError(f"{ATTACK_FILE} must be readable; got {error.strerror}") from None
    return AttackReport.from_dict(raw, ATTACK_FILE).to_dict() | {"made": facts.moment(made), "stale": stale}


def _check_attacks(trained: Trained, attacks: Mapping[str, Any] | None, extent: ReportOptions) -> None:
    names = {task.name for task in trained.result.tasks}
    if attacks is not None and not {finding["task"] for finding in attacks["findings"]} <= names:
        raise InputError(f"findings in {ATTACK_FILE} must be of the run's tasks {sorted(names)}; got others")
    if extent.attacks is not None and not trained.result.keys:
        raise InputError("a run must have a secured task to be attacked; it has none")


def _summary(trained: Trained, task: str, answers: Sequence[AnswerLeak]) -> dict[str, Any]:
    """Return a secured task's figures that matter most, with the most that any open tasks tell of it."""
    figures = trained.metrics[task]
    worst = max((leak for leak in answers if leak.target == task), key=lambda leak: leak.gain, default=None)
    return {
        "task": task,
        "right_key": figures.right_key,
        "closed": max(figures.no_key, figures.wrong_key),
        "chance": figures.chance,
        "worst_leak": None if worst is None else _answer_leak(worst),
    }


# --- leaks ----------------------------------------------------------------------------------------------------------


def _leaks(trained: Trained, labels: Sequence[LabelLeak], answers: Sequence[AnswerLeak]) -> dict[str, Any]:
    decoupling = trained.result.decoupling
    return {
        "beta": None if decoupling is None else decoupling.beta,
        "decoupled": {} if decoupling is None else decoupling.by_closed(),
        "labels": [asdict(leak) | {"gain": leak.gain} for leak in labels],
        "answers": [_answer_leak(leak) for leak in answers],
        "matrix": _matrix(trained, answers),
    }


def _answer_leak(leak: AnswerLeak) -> dict[str, Any]:
    derived = {name: getattr(leak, name) for name in ("best", "gain", "beyond_labels", "standard_error")}
    return asdict(leak) | derived


def _matrix(trained: Trained, leaks: Sequence[AnswerLeak]) -> dict[str, Any]:
    """Return gains over the prior for each closed task (row) and each set of open tasks (column)."""
    rows = list(trained.result.keys)
    unprotected = tuple(task.name for task in trained.result.tasks if not task.secured)
    found = {(leak.target, leak.sources, leak.rule): leak for leak in leaks}
    # Title, open tasks, and whether all other secured ones are open beside them.
    columns: list[tuple[str, tuple[str, ...], bool]] = [(name, (name,), False) for name in unprotected]
    if len(rows) > 1:
        columns += [(f"{name} (its key)", (name,), False) for name in rows]
    if len(unprotected) > 1:
        columns.append(("all unprotected", unprotected, False))
    if len(rows) > 1 and len(unprotected) + len(rows) > 2:
        columns.append(("all others, with keys", unprotected, True))

    def leak(target: str, sources: tuple[str, ...], others: bool, rule: AnswerRule) -> AnswerLeak | None:
        more = tuple(name for name in rows if name != target) if others else ()
        return found.get((target, (*sources, *more), rule))

    def gains(rule: AnswerRule, gain: Callable[[AnswerLeak], float]) -> list[list[float | None]]:
        cells = [[leak(target, sources, others, rule) for _, sources, others in columns] for target in rows]
        return [[None if cell is None else gain(cell) for cell in row] for row in cells]

    matrix = {
        "true labels": gains("label", lambda leak: leak.labels - leak.prior),
        "released labels": gains("label", lambda leak: leak.gain),
        "released scores": gains("scores", lambda leak: leak.gain),
    }
    return {"rows": rows, "columns": [title for title, _, _ in columns], "gains": matrix}


# --- guarantees -----------------------------------------------------------------------------------------------------


def _guarantees(trained: Trained, stream: Stream) -> dict[str, Any]:
    result, dataset = trained.result, trained.dataset
    closed = predict(result.model, dataset.x_test)
    return {
        name: asdict(found)
        | {
            "release": {
                rule: _rule(
                    rule,
                    closed[name],
                    predict(result.model, stamp(dataset.x_test, [result.keys[name]]))[name],
                    dataset.y_test[name],
                    stream,
                )
                for rule in RELEASES
            }
        }
        for name, found in guarantees(result.model, dataset, result.keys).items()
    }


def _rule(rule: Release, closed: Scores, opened: Scores, y: Labels, stream: Stream) -> dict[str, float | None]:
    """Return what a rule of release saves and costs: closed and open accuracy, and an attacker's gain when closed."""
    rows = guessable(y)
    gain = attack(release(closed, rule, stream)[rows], y[rows]).gain if len(rows) else None
    greatest = accuracy(opened, y)
    with_key = released_accuracy(opened, y, rule)
    return {
        "no_key": released_accuracy(closed, y, rule),
        "attackers_gain": gain,
        "right_key": with_key,
        "cost": greatest - with_key,
    }
