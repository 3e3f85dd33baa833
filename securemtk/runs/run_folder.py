"""A training run as a folder, and its release as a bundle.

    run.json        data set, secured tasks, settings; the measured accuracies once the training has ended
    checkpoint.pt   weights and optimizer after the last epoch
    keys/TASK.key   one trigger-key for each secured task, mode 0600

The keys are written before the training begins, so that a run that was interrupted can be resumed.
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from protocols.errors import InputError
from protocols.primitives.prg import Stream
from securemtk import data
from securemtk.data import DataSet
from securemtk.data.base import Images
from securemtk.mtk.evaluation.answer_fit import answer_stats
from securemtk.mtk.evaluation.evaluate import TaskResult, evaluate
from securemtk.mtk.keys.key import MODEL_ID_BYTES, TriggerKey, stamp
from securemtk.mtk.keys.key import load as load_key
from securemtk.mtk.training.train import TrainConfig, TrainResult, train
from securemtk.onnx.bundle import check_bundle_target, write_bundle
from securemtk.onnx.export import export_onnx
from securemtk.onnx.manifest import Manifest
from securemtk.runs.places import CHECKPOINT, KEY_SUFFIX, KEYS, RUN
from securemtk.support.documents import parse_json, read
from securemtk.support.files import check_file, check_new_folder, new_folder, write_whole
from securemtk.support.progress import Progress, silent

FORMAT = 1


@dataclass(frozen=True)
class Run:
    """What a run is made of; everything in it is public.

    Args:
        dataset: name of the data set.
        secured: names of the secured tasks.
        config: settings of the training.
        metrics: task name -> measured accuracies, as in `TaskResult`; absent before the training has ended.
        options: of the data set's loader; JSON values.
    """

    dataset: str
    secured: tuple[str, ...]
    config: TrainConfig
    metrics: Mapping[str, Mapping[str, Any]] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> str:
        """Return the text of run.json."""
        return json.dumps({"format": FORMAT} | asdict(self), indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "Run":
        """Read what `to_json` wrote; raise InputError for anything else."""
        raw = parse_json(text, RUN)
        if not isinstance(raw, dict) or raw.pop("format", None) != FORMAT:
            raise InputError(f"{RUN} must be a table of format {FORMAT}, as written by train; got another")
        return read(cls, raw, RUN)


@dataclass(frozen=True)
class Trained:
    """A run in memory.

    Args:
        dataset: what it was trained on.
        result: model, tasks and keys.
        metrics: task name -> accuracies on the test part.
    """

    dataset: DataSet
    result: TrainResult
    metrics: Mapping[str, TaskResult]


def train_run(
    folder: str | os.PathLike[str],
    dataset: str = "digits",
    secured: Sequence[str] = (),
    config: TrainConfig | None = None,
    *,
    options: Mapping[str, Any] | None = None,
    passphrase: str | None = None,
    resume: bool = False,
    progress: Progress = silent,
) -> Trained:
    """Train a keyed model and keep it, its keys and its accuracies in a folder.

    Args:
        folder: of the run; new or empty.
        dataset: name of a data set.
        secured: names of the tasks that get a key.
        config: `TrainConfig()` when absent.
        options: of the data set's loader, such as its path; values that JSON has.
        passphrase: locks the key files.
        resume: go on with the run in `folder`, which must be of the same data set, tasks and settings.
        progress: hears of each epoch, as `train` does.

    Returns:
        The trained model with its keys.

    Raises:
        InputError: an unknown name, a folder that is not new, or, with `resume`, of another run.
        KeyRefused: with `resume`, a key file is absent, damaged or locked by another passphrase.
        OSError: the disk refuses; every file that is there is whole, and `resume` goes on from the last epoch.

    Example:
        >>> trained = train_run("run", "digits", ["digit", "parity"])  # doctest: +SKIP
        >>> sorted(trained.result.keys)                                # doctest: +SKIP
        ['digit', 'parity']
    """
    chosen = TrainConfig() if config is None else config
    wanted = Run(dataset, tuple(secured), chosen, options=_plain(options or {}))
    loaded = chosen.with_room(data.load(dataset, **wanted.options), wanted.secured)
    path = Path(os.path.abspath(folder))
    if not resume:
        _prepare(path, wanted, loaded, passphrase)
    elif replace(read_run(path), metrics=None) != wanted:
        raise InputError(f"{os.fspath(folder)!r} must be a run of the same data set, tasks and settings to be resumed")
    # The last of what is written: better refused before the training than after it.
    check_file(path / RUN, "the run's file")
    keys = _load_keys(path, wanted, passphrase)
    result = train(loaded, wanted.secured, wanted.config, keys=keys, checkpoint=path / CHECKPOINT, progress=progress)
    metrics = evaluate(result.model, loaded, keys)
    done = replace(wanted, metrics={name: task_figures(figures) for name, figures in metrics.items()})
    write_whole(path / RUN, done.to_json().encode())
    return Trained(loaded, result, metrics)


def open_run(folder: str | os.PathLike[str], passphrase: str | None = None) -> Trained:
    """Read a run that has ended, and measure it again.

    Args:
        folder: of the run.
        passphrase: of the key files; None where they are not locked.

    Raises:
        InputError: the folder holds no run, or one that has not ended.
        KeyRefused: a key file is absent, damaged, or locked by another passphrase.
    """
    path = Path(os.path.abspath(folder))
    run = read_run(path)
    if run.metrics is None:
        raise InputError(f"{os.fspath(folder)!r} must be a run that has ended; resume its training first")
    loaded = run.config.with_room(data.load(run.dataset, **run.options), run.secured)
    keys = _load_keys(path, run, passphrase)
    # A checkpoint of the last epoch leaves nothing to train: this reads and checks it.
    result = train(loaded, run.secured, run.config, keys=keys, checkpoint=path / CHECKPOINT)
    return Trained(loaded, result, evaluate(result.model, loaded, keys))


def export(trained: Trained, folder: str | os.PathLike[str], *, overwrite: bool = False) -> Manifest:
    """Write a trained model as a bundle, whole or not at all. Its keys stay out.

    Args:
        trained: from `train_run` or `open_run`.
        folder: of the bundle; its parent must exist.
        overwrite: replace a bundle that is there.

    Raises:
        BundleError: the folder is there already, or the disk refuses.
        UnsupportedError: the model has layers that cannot run under encryption.
        RangeError: a weight, or a value on the training samples, is outside fixed point.
    """
    check_bundle_target(folder, overwrite=overwrite)
    result, dataset = trained.result, trained.dataset
    leaks = {} if result.decoupling is None else result.decoupling.by_closed()
    sources = sorted({name for names in leaks.values() for name in names})
    stats = answer_stats(result.model, dataset, dict(result.keys), sources)
    example = torch.from_numpy(dataset.x_train[:2])
    return write_bundle(
        folder,
        export_onnx(result.model, example, [task.name for task in result.tasks]),
        model_id=_model_id(result.keys),
        tasks=result.tasks,
        input_name="input",
        input_shape=dataset.shape,
        low=dataset.low,
        high=dataset.high,
        answers={name: each.to_dict() for name, each in stats.items()},
        decoupling={"beta": result.decoupling.beta, "leaks": leaks} if result.decoupling is not None else None,
        samples=_asked(dataset, list(result.keys.values())),
        overwrite=overwrite,
    )


def _asked(dataset: DataSet, keys: Sequence[TriggerKey]) -> Iterator[Images]:
    """Give the training samples as a model gets them: without a key, with each of them, and with all."""
    for stamped in ([], *([key] for key in keys), *([keys] if len(keys) > 1 else [])):
        yield stamp(dataset.x_train, stamped)


def _plain(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return options as run.json gives them back."""
    try:
        plain: dict[str, Any] = json.loads(json.dumps(dict(options)))
    except TypeError as error:
        raise InputError(f"options of a data set must be values that JSON has; got another ({error})") from None
    return plain


def task_figures(result: TaskResult) -> dict[str, Any]:
    """Return a task's accuracies as JSON values, the worse kind of wrong key included."""
    return asdict(result) | {"wrong_key": result.wrong_key}


def _prepare(path: Path, run: Run, dataset: DataSet, passphrase: str | None) -> None:
    for name in run.secured:
        dataset.task(name)
    check_new_folder(path)
    with new_folder(path) as work:
        (work / KEYS).mkdir(mode=0o700)
        if run.secured:
            for name, key in run.config.draw_keys(dataset, run.secured).items():
                key.save(work / KEYS / f"{name}{KEY_SUFFIX}", passphrase)
        write_whole(work / RUN, run.to_json().encode())


def read_run(folder: str | os.PathLike[str]) -> Run:
    """Read what a folder says of its run; raise InputError where it holds none."""
    path = Path(os.path.abspath(folder))
    try:
        # A named pipe would wait for a writer.
        text = (path / RUN).read_text() if (path / RUN).is_file() else None
    except (OSError, UnicodeDecodeError):
        text = None
    if text is None:
        raise InputError(f"{path.name!r} must be the folder of a run; it has no readable {RUN}")
    return Run.from_json(text)


def _load_keys(path: Path, run: Run, passphrase: str | None) -> dict[str, TriggerKey]:
    return {name: load_key(path / KEYS / f"{name}{KEY_SUFFIX}", passphrase) for name in run.secured}


def _model_id(keys: Mapping[str, TriggerKey]) -> str:
    for key in keys.values():
        return key.model_id
    return Stream().bytes(MODEL_ID_BYTES).hex()
