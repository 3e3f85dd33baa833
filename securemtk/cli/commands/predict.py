"""`securemtk predict`."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from protocols.errors import InputError, KeyRefused
from securemtk.cli.inputs import read_input
from securemtk.cli.options import Json, PassphraseFile
from securemtk.cli.secrets import header_of, key_files_in, passphrase_of
from securemtk.cli.tables import SHOWN_ROWS, emit, rows_table, say, status
from securemtk.serving.config import Config
from securemtk.serving.session import Model, PredictionCost, Scores, Session
from securemtk.support.files import check_file, write_whole

app = typer.Typer(add_completion=False)


@app.command(epilog="Example:  securemtk predict digits.bundle x.npy --key-files runs/digits --open-task digit --json")
def predict(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="This is the folder of a bundle or an ONNX file.")],
    x: Annotated[
        Path,
        typer.Argument(
            metavar="X", help="This is a .npy of float32 (n, ...), or for several inputs a .npz by their names."
        ),
    ],
    open_task: Annotated[
        list[str] | None,
        typer.Option(help="Open this secured task with its key; the option may be given several times."),
    ] = None,
    key_files: Annotated[
        list[Path] | None,
        typer.Option(
            help="Let the authority hold these keys: a key file, a folder of them or a run; may be given several times."
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Write all scores to this .npz file.")] = None,
    passphrase_file: PassphraseFile = None,
    grants: Annotated[
        Path | None, typer.Option(help="Let this file, which `keys grant` wrote, say who may use which key.")
    ] = None,
    user: Annotated[str | None, typer.Option(help="Ask under this name, where there are grants.")] = None,
    protocol: Annotated[
        str | None, typer.Option(help="Compute with these protocols, fss or crypten; the default is that of Session.")
    ] = None,
    keeper_port: Annotated[
        int, typer.Option(help="Listen on this port; 0 stands for any that is free.")
    ] = Config.keeper_port,
    authority_port: Annotated[
        int, typer.Option(help="Listen on this port; 0 stands for any that is free.")
    ] = Config.authority_port,
    timeout_s: Annotated[
        float, typer.Option(help="Give a role up when it was silent for so many seconds.")
    ] = Config.timeout_s,
    check_first: Annotated[
        bool,
        typer.Option(
            "--check", help="For the model's owner: run the model on X here first, and stop if answers would err."
        ),
    ] = False,
    as_json: Json = False,
) -> None:
    """Ask a model under encryption: this process sees X and the scores, and neither weights nor keys."""
    if not model.exists():
        raise InputError(f"the model must be a bundle or ONNX file that is there; got {str(model)!r}")
    arrays = read_input(x)
    files = key_files_in(key_files) if key_files else []
    opened = list(dict.fromkeys(open_task or ()))
    _check_keys(opened, files)
    passphrase = passphrase_of(files, passphrase_file)
    if out is not None:
        check_file(out, "--out")
    config = Config(keeper_port=keeper_port, authority_port=authority_port, timeout_s=timeout_s)
    choice: dict[str, Any] = {} if protocol is None else {"protocol": protocol}
    with Session(config, key_files=files, passphrase=passphrase, grants=grants, user=user, **choice) as session:
        with status("load the model"):
            loaded = session.load(model)
        with status("predict under encryption"):
            scores = loaded.predict(arrays, open_tasks=opened, check=check_first)
    if out is not None:
        buffer = io.BytesIO()
        np.savez(buffer, allow_pickle=False, **scores)
        write_whole(out, buffer.getvalue())
    answer = _answer(loaded, scores, opened, session.cost)
    emit(as_json, answer, lambda: _answer_tables(answer, session.cost))


def _check_keys(opened: Sequence[str], files: Sequence[Path]) -> None:
    """Refuse early what the authority would: starting a session takes seconds."""
    held = {str(header_of(file)["task"]) for file in files}
    if files and not opened:
        raise InputError(
            f"--key-files must come with the tasks to open; name some of {', '.join(sorted(held))} by --open-task"
        )
    if missing := [task for task in opened if task not in held]:
        raise KeyRefused(f"--key-files must hold the key of each task to open; there is none for {', '.join(missing)}")


def _answer(model: Model, scores: Scores, opened: Sequence[str], cost: PredictionCost) -> dict[str, Any]:
    closed = {task.name for task in model.tasks if task.secured and task.name not in opened}
    names = {task.name: task.labels for task in model.tasks}
    outputs = {
        name: {
            "open": name not in closed,
            "labels": values.argmax(axis=1).tolist() if values.ndim == 2 else None,
            "names": names.get(name),
            "scores": values.tolist(),
        }
        for name, values in scores.items()
    }
    return {"outputs": outputs, "cost": cost.to_dict()}


def _shown(output: Mapping[str, Any]) -> list[Any]:
    """Return labels as people read them: by the names of classes where there are such."""
    names = output["names"]
    return [names[label] if names else label for label in output["labels"]]


def _answer_tables(answer: Mapping[str, Any], cost: PredictionCost) -> None:
    outputs = answer["outputs"]
    titles = {name: name if output["open"] else f"{name} (closed: noise)" for name, output in outputs.items()}
    labelled = {name: _shown(output) for name, output in outputs.items() if output["labels"] is not None}
    n = max((len(labels) for labels in labelled.values()), default=0)
    rows = [
        {"sample": i} | {titles[name]: labels[i] for name, labels in labelled.items()}
        for i in range(min(n, SHOWN_ROWS))
    ]
    rows_table("labels", rows)
    if n > SHOWN_ROWS:
        say(f"and {n - SHOWN_ROWS} more: --json or --out gives all of them, with scores")
    say(str(cost))
