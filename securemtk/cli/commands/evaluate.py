"""`securemtk evaluate`."""

from typing import Annotated

import typer

from securemtk.cli.evaluation import show_evaluation
from securemtk.cli.options import Json, PassphraseFile, RunFolder
from securemtk.cli.secrets import passphrase_of
from securemtk.runs.places import KEYS
from securemtk.runs.run_folder import open_run

app = typer.Typer(add_completion=False)


@app.command(epilog="Example:  securemtk evaluate runs/digits --tries 1000")
def evaluate(
    folder: RunFolder,
    tries: Annotated[int, typer.Option(min=0, help="Try so many random patterns in each key's place.")] = 0,
    passphrase_file: PassphraseFile = None,
    as_json: Json = False,
) -> None:
    """Measure a run on its test part: no key, right key, wrong keys, all keys; and guesses of the keys."""
    trained = open_run(folder, passphrase_of([folder / KEYS], passphrase_file))
    show_evaluation(as_json, trained, tries)
