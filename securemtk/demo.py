"""The whole way in one call: train, release, and ask under encryption, on real handwritten digits.

Two models are trained by the same loop: a plain multi-task baseline, and a keyed one whose tasks `digit` and `parity`
are secured. The keyed one becomes a bundle; a session answers the whole test part under encryption with no key and with
each key, and every answer is compared with onnxruntime on the same input.
"""

import json
import logging
import platform
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from securemtk.data import DataSet
from securemtk.data.base import Labels
from securemtk.mtk.evaluation.evaluate import accuracy, attack, evaluate, opening_rate
from securemtk.mtk.keys.key import stamp
from securemtk.mtk.training.train import TrainConfig, train
from securemtk.onnx.manifest import MODEL, Manifest
from securemtk.onnx.model.runtime import start
from securemtk.report.encrypted import CostFigures
from securemtk.report.pictures import Sample, draw_demo
from securemtk.runs.places import KEYS
from securemtk.runs.run_folder import Trained, export, task_figures, train_run
from securemtk.serving.session import PredictionCost, Session
from securemtk.support.files import check_new_folder, new_folder, write_whole
from securemtk.support.progress import progress_bar

DATASET, SECURED = "digits", ("digit", "parity")
FIGURES, DETAILS, PICTURE, BUNDLE, INPUT = "demo.json", "details.json", "demo.png", "bundle", "x.npy"
N_SHOWN, N_GUESSED, N_MORE = 4, 50, 720

TaskScores = Mapping[str, NDArray[np.float32]]
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TaskFigures:
    """What the demo shows of one task; all but `secured` are shares of the test part that are answered rightly.

    Args:
        secured: whether the task has a key.
        chance: the best guess from the true labels of the unprotected tasks.
        baseline: plain multi-task training.
        no_key, right_key, wrong_key: keyed model in the clear; a closed task's answers as released.
        encrypted: under encryption, with the task's key where it has one.
    """

    secured: bool
    chance: float
    baseline: float
    no_key: float
    right_key: float
    wrong_key: float
    encrypted: float


@dataclass(frozen=True, kw_only=True)
class Figures(CostFigures):
    """What the demo shows; the content of demo.json. Costs are of one prediction of the whole test part.

    Args:
        tasks: by name.
        agreement: share of test samples on which every open task's label is the one that onnxruntime gives, in every
            state of the keys.
        max_difference: greatest difference of an open task's score from onnxruntime's.
        samples: size of the test part.
    """

    tasks: Mapping[str, TaskFigures]
    agreement: float
    max_difference: float
    samples: int


@dataclass
class Clock:
    """Seconds by stage."""

    stages: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Log and time one stage."""
        log.info("%s ...", name)
        begin = time.perf_counter()
        yield
        self.stages[name] = round(time.perf_counter() - begin, 3)


@dataclass(frozen=True)
class EncryptedAnswer:
    """One encrypted prediction of the test part.

    Args:
        keys: tasks whose keys were granted.
        scores: what was revealed.
        plain: onnxruntime's scores for the same input with the same keys in it.
        cost: of the prediction.
    """

    keys: tuple[str, ...]
    scores: TaskScores
    plain: TaskScores
    cost: PredictionCost


def run_demo(folder: Path, config: TrainConfig | None = None) -> Figures:
    """Run the demo, and leave its results in a folder.

    Args:
        folder: absent, empty, or of an older demo, which is replaced when everything has gone well. Afterwards it is a
            run (see `securemtk.runs.run_folder`) that also holds bundle/, x.npy (a few test samples),
            demo.json, details.json and demo.png.
        config: of both trainings; `TrainConfig()` when absent.

    Returns:
        The figures of demo.json.

    Raises:
        InputError: the folder holds something else.
        ProtocolAbort: a role failed.
        OSError: the disk refuses.
    """
    clock = Clock()
    replaceable = (FIGURES, DETAILS, PICTURE)
    check_new_folder(folder, replaceable=replaceable)
    with new_folder(folder, replaceable=replaceable) as work:
        with clock.stage("train the keyed model"), progress_bar("keyed model") as bar:
            trained = train_run(work, DATASET, SECURED, config, progress=bar)
        with closing(Session(key_files=work / KEYS)) as session, ThreadPoolExecutor(1) as background:
            # Training keeps one core busy: keeper and authority start on the other one.
            started = background.submit(session.start)
            baseline = _baseline(trained.dataset, config, clock)
            with clock.stage("export the bundle"):
                manifest = export(trained, work / BUNDLE)
                np.save(work / INPUT, trained.dataset.x_test[:N_SHOWN])
            with clock.stage("wait for keeper and authority"):
                started.result()
            asked, more = _ask(session, work, trained, clock)
        figures = _figures(trained, baseline, asked)
        with clock.stage("attack what is closed"):
            details = _details(trained, manifest, asked, more)
        with clock.stage("draw the picture"):
            picture = draw_demo(
                {name: asdict(task) for name, task in figures.tasks.items()},
                _samples(trained, asked),
                {name: key.mask[0] for name, key in trained.result.keys.items()},
                _median(asked).cost.layers,
            )
            write_whole(work / PICTURE, picture)
        write_whole(work / DETAILS, (json.dumps(details | {"seconds": clock.stages}, indent=1) + "\n").encode())
        write_whole(work / FIGURES, (json.dumps(asdict(figures), indent=1) + "\n").encode())
    return figures


def _baseline(dataset: DataSet, config: TrainConfig | None, clock: Clock) -> dict[str, float]:
    """Return each task's accuracy after plain multi-task training by the same loop."""
    with clock.stage("train the plain baseline"), progress_bar("baseline") as bar:
        model = train(dataset, config=config, progress=bar).model
        return {name: task.right_key for name, task in evaluate(model, dataset, {}).items()}


def _ask(session: Session, work: Path, trained: Trained, clock: Clock) -> tuple[list[EncryptedAnswer], TaskScores]:
    """Answer the whole test part under encryption: with no key, then with each key alone.

    Returns:
        These, and scores of the first `N_MORE` training samples with no key. They are for the attackers: on the test
        part's answers alone their luck passes 3 points in one run of ten.
    """
    x, keys = trained.dataset.x_test, trained.result.keys
    plain = start((work / BUNDLE / MODEL).read_bytes())
    names = [task.name for task in trained.result.tasks]
    with clock.stage("load the bundle"):
        model = session.load(work / BUNDLE)
    asked = []
    for granted in ((), *((name,) for name in keys)):
        with clock.stage(f"ask {len(x)} encrypted questions with {granted[0] if granted else 'no'} key"):
            scores = model.predict(x, open_tasks=granted)
        log.info("  %s", session.cost)
        expected = plain.run(names, {"input": stamp(x, [keys[name] for name in granted])})
        asked.append(EncryptedAnswer(granted, scores, dict(zip(names, expected, strict=True)), session.cost))
    with clock.stage(f"ask {N_MORE} more with no key, for attackers"):
        return asked, model.predict(trained.dataset.x_train[:N_MORE])


def _figures(trained: Trained, baseline: Mapping[str, float], asked: Sequence[EncryptedAnswer]) -> Figures:
    tasks = {}
    for task in trained.result.tasks:
        measured = trained.metrics[task.name]
        wanted = (task.name,) if task.secured else ()
        scores = next(one.scores for one in asked if one.keys == wanted)
        tasks[task.name] = TaskFigures(
            secured=task.secured,
            chance=measured.chance,
            baseline=baseline[task.name],
            no_key=measured.no_key,
            right_key=measured.right_key,
            wrong_key=measured.wrong_key,
            encrypted=accuracy(scores[task.name], trained.dataset.y_test[task.name]),
        )
    agree = np.ones(len(trained.dataset.x_test), dtype=bool)
    difference = 0.0
    for name, one in _open(trained, asked):
        agree &= one.scores[name].argmax(axis=1) == one.plain[name].argmax(axis=1)
        difference = max(difference, float(np.abs(one.scores[name] - one.plain[name]).max()))
    return Figures(
        tasks=tasks,
        agreement=float(agree.mean()),
        max_difference=difference,
        samples=len(agree),
        **asdict(CostFigures.of([_median(asked).cost])),
    )


def _open(trained: Trained, asked: Sequence[EncryptedAnswer]) -> Iterator[tuple[str, EncryptedAnswer]]:
    """Give each open task of each prediction."""
    for one in asked:
        for task in trained.result.tasks:
            if not task.secured or task.name in one.keys:
                yield task.name, one


def _median(asked: Sequence[EncryptedAnswer]) -> EncryptedAnswer:
    return sorted(asked, key=lambda one: one.cost.online_s)[len(asked) // 2]


def _details(
    trained: Trained, manifest: Manifest, asked: Sequence[EncryptedAnswer], more: TaskScores
) -> dict[str, Any]:
    """Return what demo.json has no place for: each prediction's cost, attacks, guesses of keys, versions."""
    result, dataset = trained.result, trained.dataset
    attacks, openings = {}, {}
    for name, key in result.keys.items():
        closed = [one.scores[name] for one in asked if name not in one.keys]
        labels = [dataset.y_test[name]] * len(closed) + [dataset.y_train[name][:N_MORE]]
        attacks[name] = attack_closed(np.concatenate([*closed, more[name]]), np.concatenate(labels))
        openings[name] = asdict(opening_rate(result.model, dataset, key, samples=N_GUESSED))
    return {
        "predictions": [{"keys": list(one.keys)} | one.cost.to_dict() for one in asked],
        "attack_on_encrypted_closed_scores": attacks,
        "random_patterns": openings,
        "evaluation": {name: task_figures(figures) for name, figures in trained.metrics.items()},
        "comparisons_a_sample": result.model.comparisons(),
        "losses": list(result.losses),
        "versions": dict(manifest.versions) | {"machine": platform.machine()},
    }


def attack_closed(revealed: NDArray[np.float32], y: Labels) -> dict[str, Any]:
    """Let attackers with held-out labels learn a task from what was revealed of it while it was closed.

    Args:
        revealed: (n, classes) scores.
        y: int64 (n,) true labels.

    Returns:
        Accuracies of guessing and of the attackers, their gain, and its spread if all of it is luck: for the demo's
        1,440 answers 0.8 points at ten classes and 1.3 at two.
    """
    found = attack(revealed, y)
    luck = float(np.sqrt(found.chance * (1 - found.chance) / len(y)))
    return asdict(found) | {"gain": found.gain, "standard_error": luck, "answers": len(y)}


def _samples(trained: Trained, asked: Sequence[EncryptedAnswer]) -> list[Sample]:
    """Choose the first test samples of distinct digits, and what was revealed about them in each state of the keys."""
    dataset = trained.dataset
    _, first = np.unique(dataset.y_test["digit"], return_index=True)
    chosen = np.sort(first)[:N_SHOWN]
    is_open = {(name, one.keys) for name, one in _open(trained, asked)}
    return [
        Sample(
            image=dataset.x_test[i, 0],
            keys=one.keys,
            answers={name: int(scores[i].argmax()) for name, scores in one.scores.items()},
            truths={name: int(dataset.y_test[name][i]) for name in one.scores},
            is_open={name: (name, one.keys) in is_open for name in one.scores},
        )
        for one in asked
        for i in chosen
    ]
