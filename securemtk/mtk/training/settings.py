"""Settings of a training as plain values: what stands in run.json and in a user's configuration file."""

import json
import tomllib
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from protocols.errors import InputError
from securemtk.mtk.training.assembler import AssemblerConfig
from securemtk.mtk.training.decoupling import DecouplingConfig
from securemtk.mtk.training.train import TrainConfig

T = TypeVar("T")
_NESTED: dict[str, type[Any]] = {"assembler": AssemblerConfig, "decoupling": DecouplingConfig}
_KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a text", tuple: "a list of numbers"}


@dataclass(frozen=True)
class TrainFile:
    """What a configuration file asks for.

    Args:
        dataset: name of the data set, None where the file names none.
        secured: names of the tasks that get a key.
        options: of the data set's loader.
        train: settings of the training.
    """

    dataset: str | None = None
    secured: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    train: TrainConfig = field(default_factory=TrainConfig)


def read_config(path: Path) -> TrainFile:
    """Read a configuration file, TOML or (by its suffix) JSON: dataset, secured, options, and a table train.

    Tables train.assembler and train.decoupling are `AssemblerConfig` and `DecouplingConfig`; all that is left out has
    its default.

    Raises:
        InputError: the file cannot be read, or a setting is unknown, of the wrong kind or out of its range.
    """
    try:
        text = path.read_text()
        raw = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except (OSError, ValueError) as error:
        raise InputError(f"{path.name} must be a readable TOML or JSON file; {error}") from None
    if not isinstance(raw, dict):
        raise InputError(f"{path.name} must hold settings; got a {type(raw).__name__}")
    known = [f.name for f in fields(TrainFile)]
    if unknown := sorted(set(raw) - set(known)):
        raise InputError(f"{path.name} must hold settings among {', '.join(known)}; got {', '.join(unknown)}")
    dataset, secured, options = raw.get("dataset"), raw.get("secured", []), raw.get("options", {})
    if not isinstance(dataset, str | None):
        raise InputError(f"dataset must be a name; got {dataset!r}")
    if not isinstance(secured, list) or not all(isinstance(name, str) for name in secured):
        raise InputError(f"secured must be a list of names; got {secured!r}")
    if not isinstance(options, dict):
        raise InputError(f"options must be a table; got {options!r}")
    return TrainFile(dataset, tuple(secured), options, train_config(raw.get("train", {})))


def train_config(raw: Any) -> TrainConfig:
    """Return the settings that `dataclasses.asdict` made plain values of; what is left out has its default.

    Raises:
        InputError: a setting is unknown, of the wrong kind or out of its range.
    """
    return _made(TrainConfig, raw, "train")


def _made(kind: type[T], raw: Any, where: str) -> T:
    if not isinstance(raw, Mapping):
        raise InputError(f"{where} must be a table of settings; got {raw!r}")
    known = {f.name: f for f in fields(kind)}  # type: ignore[arg-type]
    if unknown := sorted(set(raw) - set(known)):
        raise InputError(f"{where} must have settings among {', '.join(known)}; got {', '.join(map(str, unknown))}")
    values = {}
    for name, value in raw.items():
        if name in _NESTED:
            values[name] = _made(_NESTED[name], value, f"{where}.{name}")
        else:
            values[name] = _checked(f"{where}.{name}", value, known[name].default)
    return kind(**values)


def _checked(name: str, value: Any, default: Any) -> Any:
    """Return a setting as its default is; raise InputError where it is of another kind."""
    value = tuple(value) if isinstance(value, list) else value
    if default is None or default is MISSING:
        if value is None or (isinstance(value, int) and not isinstance(value, bool)):
            return value
        raise InputError(f"{name} must be a whole number; got {value!r}")
    kind = type(default)
    fits = isinstance(value, int | float) if kind is float else isinstance(value, kind)
    if not fits or (isinstance(value, bool) and kind is not bool):
        raise InputError(f"{name} must be {_KINDS[kind]}; got {value!r}")
    if kind is tuple and (len(value) != len(default) or not all(isinstance(x, int | float) for x in value)):
        raise InputError(f"{name} must be {len(default)} numbers; got {list(value)!r}")
    return value
