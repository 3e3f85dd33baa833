"""A run asked under encryption: how right it is in each state of the keys, and what a prediction costs."""

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import numpy as np

from protocols.errors import InputError
from securemtk.data.base import MISSING, Labels
from securemtk.mtk.evaluation.evaluate import accuracy
from securemtk.mtk.keys.key import stamp
from securemtk.mtk.training.model import Scores, predict
from securemtk.onnx.manifest import MODEL
from securemtk.runs.places import KEYS
from securemtk.runs.run_folder import Trained, export
from securemtk.serving.session import Model, PredictionCost, Session
from securemtk.support.progress import Progress


@dataclass(frozen=True)
class KeyState:
    """Encrypted predictions in one state of the keys.

    Args:
        keys: secured tasks whose keys were granted.
        accuracy: task -> share of right answers as revealed; None where no sample has a label.
        agreement: task -> share of labels as from the same model in the clear, of those tasks that always answer.
        max_difference: greatest difference of a score of theirs from that in the clear; None where there are none.
    """

    keys: tuple[str, ...]
    accuracy: Mapping[str, float | None]
    agreement: Mapping[str, float]
    max_difference: float | None


@dataclass(frozen=True, kw_only=True)
class CostFigures:
    """The figures of a `PredictionCost` that are shown: seconds are medians, bytes and rounds are exact."""

    online_s: float
    offline_s: float
    online_bytes: int
    offline_bytes: int
    rounds: int

    @classmethod
    def of(cls, costs: Sequence[PredictionCost]) -> "CostFigures":
        """Return the figures of one or more predictions of equal samples and keys."""
        return CostFigures(
            online_s=median(cost.online_s for cost in costs),
            offline_s=median(cost.offline_s for cost in costs),
            online_bytes=costs[-1].online_bytes,
            offline_bytes=costs[-1].offline_bytes,
            rounds=costs[-1].rounds,
        )


@dataclass(frozen=True, kw_only=True)
class BatchCost(CostFigures):
    """What one prediction costs.

    Args:
        batch: samples at once.
        repeats: predictions measured, after one that was not.
    """

    batch: int
    repeats: int


@dataclass(frozen=True)
class Encrypted:
    """What encrypted predictions of a run have shown.

    Args:
        protocol: by which they were computed.
        samples: test samples asked in each state of the keys.
        model_bytes: size of the released ONNX file.
        states: no key, each key, all keys.
        costs: by batch.
    """

    protocol: str
    samples: int
    model_bytes: int
    states: tuple[KeyState, ...]
    costs: tuple[BatchCost, ...]


def measure_encrypted(
    folder: Path,
    trained: Trained,
    *,
    passphrase: str | None = None,
    samples: int = 200,
    batches: Sequence[int] = (1, 16),
    repeats: int = 5,
    progress: Progress,
) -> Encrypted:
    """Release a run to a bundle that is removed afterwards, and ask it in a session on this machine.

    Args:
        folder: of the run; the authority reads the keys there.
        trained: the run, read.
        passphrase: of the keys.
        samples: test samples to ask in each state of the keys; all of them where there are less.
        batches: sizes of the predictions whose cost is measured; greater ones than the test part are left out.
        repeats: predictions of each size.
        progress: told what goes on, and the share of it that is done.

    Raises:
        InputError: a number is less than 1; or as `Session`.
        UnsupportedError, RangeError: as `export`.
        ProtocolAbort: a role failed.
    """
    if min(samples, repeats, *batches) < 1:
        raise InputError(f"samples, repeats and batches must be at least 1; got {samples}, {repeats}, {list(batches)}")
    names = list(trained.result.keys)
    held = list(dict.fromkeys([(), *((name,) for name in names), tuple(names)]))
    sizes = [batch for batch in batches if batch <= len(trained.dataset.x_test)]
    progress("release the run", 0.0)
    with tempfile.TemporaryDirectory() as scratch:
        bundle = Path(scratch) / "bundle"
        export(trained, bundle)
        with Session(key_files=folder / KEYS if names else None, passphrase=passphrase) as session:
            model = session.load(bundle)
            states, costs, steps = [], [], len(held) + len(sizes) + 1
            for number, keys in enumerate(held, 1):
                progress(f"ask encrypted with {', '.join(keys) or 'no'} key", number / steps)
                states.append(_state(model, trained, keys, samples))
            for number, batch in enumerate(sizes, 1 + len(held)):
                progress(f"encrypted predictions of {batch}", number / steps)
                costs.append(_cost(session, model, trained.dataset.x_test[:batch], names, repeats))
        size = (bundle / MODEL).stat().st_size
    return Encrypted("fss", min(samples, len(trained.dataset.x_test)), size, tuple(states), tuple(costs))


def _state(model: Model, trained: Trained, keys: tuple[str, ...], samples: int) -> KeyState:
    result, dataset = trained.result, trained.dataset
    x = dataset.x_test[:samples]
    scores = model.predict(x, open_tasks=keys)
    plain = predict(result.model, stamp(x, [result.keys[name] for name in keys]))
    closed = [name for name in result.keys if name not in keys]
    always = [
        task.name
        for task in result.tasks
        if task.name not in closed and (result.decoupling is None or result.decoupling.opening(task.name, closed) == 1)
    ]
    return KeyState(
        keys=keys,
        accuracy={name: _accuracy(scores[name], dataset.y_test[name][:samples]) for name in scores},
        agreement={name: float((scores[name].argmax(1) == plain[name].argmax(1)).mean()) for name in always},
        max_difference=max((float(np.abs(scores[name] - plain[name]).max()) for name in always), default=None),
    )


def _accuracy(scores: Scores, y: Labels) -> float | None:
    return accuracy(scores, y) if (y != MISSING).any() else None


def _cost(session: Session, model: Model, x: Scores, keys: Sequence[str], repeats: int) -> BatchCost:
    model.predict(x, open_tasks=keys)
    costs = []
    for _ in range(repeats):
        model.predict(x, open_tasks=keys)
        costs.append(session.cost)
    return BatchCost(batch=len(x), repeats=repeats, **asdict(CostFigures.of(costs)))
