"""`securemtk export`."""

import json
from pathlib import Path
from typing import Annotated

import typer

from securemtk.cli.options import Json, PassphraseFile, RunFolder
from securemtk.cli.secrets import passphrase_of
from securemtk.cli.tables import emit, facts_table
from securemtk.onnx.bundle import check_bundle_target
from securemtk.runs.places import KEYS
from securemtk.runs.run_folder import export, open_run, read_run

app = typer.Typer(add_completion=False)


@app.command(epilog="Example:  securemtk export runs/digits digits.bundle")
def export_bundle(
    folder: RunFolder,
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="This folder is written; the keys stay out of it.")],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a bundle that is there.")] = False,
    passphrase_file: PassphraseFile = None,
    as_json: Json = False,
) -> None:
    """Release a run's model as a bundle: manifest.json and cloud.onnx."""
    read_run(folder)
    check_bundle_target(bundle, overwrite=overwrite)
    trained = open_run(folder, passphrase_of([folder / KEYS], passphrase_file))
    manifest = export(trained, bundle, overwrite=overwrite)
    public = json.loads(manifest.to_json())
    facts = {name: public[name] for name in ("model_id", "tasks", "input_name", "input_shape", "files")}
    emit(as_json, {"bundle": str(bundle)} | facts, lambda: facts_table("bundle", {"bundle": bundle} | facts))
