"""`securemtk keys lock`."""

from pathlib import Path
from typing import Annotated

import typer

from securemtk.cli.options import Json
from securemtk.cli.secrets import header_of, key_files_in, passphrase_from, passphrase_of
from securemtk.cli.tables import emit, rows_table
from securemtk.mtk.keys.key import load as load_key

app = typer.Typer(add_completion=False)


@app.command(epilog="Example:  securemtk keys lock runs/digits/keys")
def lock_keys(
    paths: Annotated[
        list[Path], typer.Argument(metavar="PATH...", help="These are key files, folders of them, or runs.")
    ],
    passphrase_file: Annotated[
        Path | None, typer.Option(help="Take the present passphrase from the first line of this file.")
    ] = None,
    new_passphrase_file: Annotated[
        Path | None, typer.Option(help="Take the new passphrase from the first line of this file.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Encrypt keys under a new passphrase (scrypt, AES-256-GCM), each file whole or not at all."""
    files = key_files_in(paths)
    present = passphrase_of(files, passphrase_file)
    # All are opened before the first is written: a wrong passphrase changes none.
    opened = [(file, load_key(file, present)) for file in files]
    new = passphrase_from(new_passphrase_file, needed=True, fresh=True, what="new passphrase")
    for file, key in opened:
        key.save(file, new)
    found = [header_of(file) for file in files]
    emit(as_json, {"keys": found}, lambda: rows_table("keys", found))
