"""Options and arguments that several commands take."""

from pathlib import Path
from typing import Annotated

import typer

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout, and nothing else.")]
PassphraseFile = Annotated[
    Path | None,
    typer.Option(help="Take the first line of this file as the passphrase of the keys; without it you are asked."),
]
GrantsFile = Annotated[
    Path, typer.Argument(metavar="GRANTS", help="The file that an authority reads; its log stands beside it.")
]
RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="The folder that `securemtk train` has written.")]
