"""What a run is made of and measured with: plain values without secrets, host names or paths."""

import importlib.metadata
import os
import platform
import shutil
import subprocess
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from securemtk.data.base import DataSet
from securemtk.mtk.keys.key import TriggerKey
from securemtk.mtk.training.model import MultiTaskModel
from securemtk.mtk.training.train import TrainResult

LIBRARIES = ("securemtk", "torch", "onnx", "onnxruntime", "numpy", "scikit-learn", "crypten")
LEFT_OUT = "(a path, left out)"

_ROOT = Path(__file__).resolve().parents[2]
_GIT_SECONDS = 10


def data_facts(dataset: DataSet, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return name, sizes and the loader's options of a data set, without the paths among them.

    Args:
        dataset: as it was loaded.
        options: of its loader.
    """
    return {
        "name": dataset.name,
        "shape": list(dataset.shape),
        "low": dataset.low,
        "high": dataset.high,
        "train": len(dataset.x_train),
        "test": len(dataset.x_test),
        "left_out": len(dataset.left_out),
        "options": {name: _without_paths(value) for name, value in options.items()},
    }


def task_facts(dataset: DataSet, result: TrainResult) -> list[dict[str, Any]]:
    """Return of each task its name, classes, whether it is secured, and shares of classes in the training part.

    Args:
        dataset: as it was loaded.
        result: of the training.
    """
    return [
        {
            "name": task.name,
            "secured": task.secured,
            "classes": task.classes,
            "class_names": list(task.labels or map(str, range(task.classes))),
            "shares": dataset.shares(task.name).tolist(),
            "labelled": int(dataset.known(task.name).sum()),
        }
        for task in result.tasks
    ]


def model_facts(model: MultiTaskModel) -> dict[str, int]:
    """Return the size of a model: parameters, and comparisons (ReLUs) that a sample passes."""
    parameters = sum(p.numel() for p in model.parameters())
    return {"parameters": parameters, "comparisons": model.comparisons()}


def key_facts(key: TriggerKey, dataset: DataSet) -> dict[str, Any]:
    """Return size and place of a key, never its pattern: rows and columns from 0 of an image, names of a table's.

    Args:
        key: its mask is told, its pattern is not.
        dataset: names the columns of a table.
    """
    facts: dict[str, Any] = {"values": int(key.mask.sum()), "of": int(key.mask.size), "bits": 8 * int(key.mask.sum())}
    if key.mask.ndim == 3:
        _, rows, columns = np.nonzero(key.mask)
        return facts | {
            "rows": [int(rows.min()), int(rows.max())],
            "columns": [int(columns.min()), int(columns.max())],
        }
    names = None if dataset.columns is None else dataset.columns.names
    places = np.flatnonzero(key.mask)
    return facts | {"features": [str(i) if names is None else names[i] for i in places]}


def versions() -> dict[str, str]:
    """Return the versions of python and of the libraries that matter, and our commit where this is a checkout."""
    found = {"python": platform.python_version()} | {name: _version(name) for name in LIBRARIES}
    commit = _commit()
    return found | ({} if commit is None else {"commit": commit})


def machine() -> dict[str, str | int]:
    """Return what times depend on; no host name."""
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)),
        "load": round(os.getloadavg()[0]),
    }


def moment(seconds: float | None = None) -> str:
    """Return a time of this system, seconds since 1970, as text in UTC; that of now when absent."""
    when = datetime.now(UTC) if seconds is None else datetime.fromtimestamp(seconds, UTC)
    return when.strftime("%Y-%m-%d %H:%M UTC")


def _without_paths(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(name): _without_paths(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_without_paths(each) for each in value]
    return LEFT_OUT if isinstance(value, str) and (os.sep in value or "\\" in value) else value


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def _commit() -> str | None:
    """Return the commit of the checkout that this file is in, with "-dirty" where the tree differs from it."""
    git = shutil.which("git")
    # An installed package may lie inside somebody else's checkout.
    if git is None or not (_ROOT / ".git").exists():
        return None
    command = [git, "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        found = subprocess.run(
            command, cwd=_ROOT, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL,
            timeout=_GIT_SECONDS,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() or None


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or "unknown"
