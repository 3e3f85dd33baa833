"""`securemtk keys list`."""

from pathlib import Path
from typing import Annotated

import typer

from securemtk.cli.options import Json
from securemtk.cli.secrets import header_of, key_files_in
from securemtk.cli.tables import emit, rows_table

app = typer.Typer(add_completion=False)


@app.command(epilog="Example:  securemtk keys list runs/digits/keys")
def list_keys(
    paths: Annotated[
        list[Path], typer.Argument(metavar="PATH...", help="These are key files, folders of them, or runs.")
    ],
    as_json: Json = False,
) -> None:
    """Show of each key its task, its model and whether it is locked; never what it is."""
    found = [header_of(file) for file in key_files_in(paths)]
    emit(as_json, {"keys": found}, lambda: rows_table("keys", found))
