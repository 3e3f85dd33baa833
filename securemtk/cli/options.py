"""Options and arguments that several commands take."""

from pathlib import Path
from typing import Annotated

import typer

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout, and nothing else.")]
PassphraseFile = Annotated[
    Path | None, typer.Option(help="File whose first line is the passphrase of the keys; asked for when absent.")
]
GrantsFile = Annotated[
    Path, typer.Argument(metavar="GRANTS", help="File that an authority reads; its log stands beside it.")
]
RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="Folder that `securemtk train` has written.")]
