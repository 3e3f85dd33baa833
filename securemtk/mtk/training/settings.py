"""Settings of a training as plain values: what stands in run.json and in a user's configuration file."""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from protocols.errors import InputError
from securemtk.mtk.training.train import TrainConfig
from securemtk.support.documents import parse_json, read


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
        raw = parse_json(text, path.name) if path.suffix == ".json" else tomllib.loads(text)
    except (OSError, ValueError) as error:
        raise InputError(f"{path.name} must be a readable TOML or JSON file; {error}") from None
    return read(TrainFile, raw, path.name)


def train_config(raw: Any) -> TrainConfig:
    """Return the settings that `dataclasses.asdict` made plain values of; what is left out has its default.

    Raises:
        InputError: a setting is unknown, of the wrong kind or out of its range.
    """
    return read(TrainConfig, raw, "train")
