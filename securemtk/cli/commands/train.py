"""`securemtk train`."""

import json
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from protocols.errors import InputError
from securemtk.cli.evaluation import show_evaluation
from securemtk.cli.options import Json, PassphraseFile
from securemtk.cli.secrets import passphrase_from
from securemtk.data import DATA_SETS
from securemtk.mtk.training.settings import TrainFile, read_config
from securemtk.runs.run_folder import train_run
from securemtk.support.progress import progress_bar

log = logging.getLogger("securemtk")
app = typer.Typer(add_completion=False)


@app.command(epilog="Example:  securemtk train digits --secure digit --secure parity --out runs/digits")
def train(
    out: Annotated[
        Path, typer.Option(help="Write checkpoint, keys and accuracies into this folder, which is new or empty.")
    ],
    dataset: Annotated[
        str | None, typer.Argument(help=f"{', '.join(DATA_SETS)}; docs/data.md tells what they are.")
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            help="Read all settings from this TOML or JSON file (docs/mtk.md); options given here come before it."
        ),
    ] = None,
    secure: Annotated[
        list[str] | None, typer.Option(help="Give this task a key; the option may be given several times.")
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=VALUE", help="Set an option of the data set, such as path=FOLDER; may be given several times."
        ),
    ] = None,
    epochs: Annotated[int | None, typer.Option(help="Pass so many times over the training samples.")] = None,
    batch: Annotated[int | None, typer.Option(help="Take so many samples in each step.")] = None,
    lr: Annotated[float | None, typer.Option(help="Let the learning rate rise to this.")] = None,
    beta: Annotated[
        float | None, typer.Option(help="Let open tasks that tell of a closed one answer truly so often, 0 to 1.")
    ] = None,
    decoys: Annotated[int | None, typer.Option(help="Make so many copies of each sample with a wrong key.")] = None,
    seed: Annotated[
        int | None, typer.Option(help="Draw weights, order and decoys from this seed; keys come from the system.")
    ] = None,
    lock: Annotated[bool, typer.Option("--lock", help="Lock the keys under a passphrase.")] = False,
    passphrase_file: PassphraseFile = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted run of the same call.")] = False,
    as_json: Json = False,
) -> None:
    """Train a model whose secured tasks answer truly only to their keys."""
    wanted = TrainFile() if config is None else read_config(config)
    name = dataset or wanted.dataset
    if name is None:
        raise InputError("a data set must be named, as argument or in the configuration file")
    given: dict[str, Any] = {"epochs": epochs, "batch": batch, "lr": lr, "seed": seed}
    settings = replace(wanted.train, **{k: v for k, v in given.items() if v is not None})
    if decoys is not None:
        settings = replace(settings, assembler=replace(settings.assembler, decoys=decoys))
    if beta is not None:
        settings = replace(settings, decoupling=replace(settings.decoupling, beta=beta))
    passphrase = passphrase_from(passphrase_file, needed=lock, fresh=not resume)
    with progress_bar(f"train on {name}") as bar:
        trained = train_run(
            out,
            name,
            tuple(secure or wanted.secured),
            settings,
            options=dict(wanted.options) | _data_options(data or ()),
            passphrase=passphrase,
            resume=resume,
            progress=bar,
        )
    show_evaluation(as_json, trained)
    log.info("written: %s", out)


def _data_options(texts: Sequence[str]) -> dict[str, Any]:
    """Read options NAME=VALUE: VALUE as JSON where it is such, as names where it has commas, else as a text."""
    options: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not (name and equals) or name in options:
            raise InputError(f"--data must be NAME=VALUE, each name once; got {text!r}")
        try:
            options[name] = json.loads(value)
        except ValueError:
            options[name] = value.split(",") if "," in value else value
    return options
