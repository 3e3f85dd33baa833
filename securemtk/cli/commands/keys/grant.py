"""`securemtk keys grant`."""

from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from protocols.errors import InputError
from securemtk.cli.grants import show_grants
from securemtk.cli.options import GrantsFile, Json
from securemtk.cli.secrets import header_of, key_files_in
from securemtk.mtk.keys.grants import Ledger

app = typer.Typer(add_completion=False)


@app.command(epilog="Example:  securemtk keys grant grants.json runs/digits/keys --user ann --uses 100")
def grant_keys(
    grants: GrantsFile,
    paths: Annotated[
        list[Path], typer.Argument(metavar="PATH...", help="These are key files, folders of them, or runs.")
    ],
    user: Annotated[
        str,
        typer.Option(help="Grant to this name, which stands in the certificate of whoever asks: Session(user=...)."),
    ],
    not_before: Annotated[
        str | None,
        typer.Option(help="Begin then, in ISO 8601; without a zone it is UTC. Without it the grant begins at once."),
    ] = None,
    until: Annotated[
        str | None,
        typer.Option(help="End then, in ISO 8601; without a zone it is UTC. Without it the grant has no end."),
    ] = None,
    uses: Annotated[
        int | None, typer.Option(help="Allow so many samples in all; without it any number may be asked.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Let a user open the tasks of keys; running authorities honour it from their next request on."""
    ledger = Ledger(grants)
    found = [header_of(file) for file in key_files_in(paths)]
    limits: dict[str, Any] = {"not_before": _moment(not_before), "until": _moment(until), "uses": uses}
    given = [ledger.grant(user, str(key["model_id"]), str(key["task"]), **limits) for key in found]
    show_grants(as_json, given, ledger)


def _moment(text: str | None) -> datetime | None:
    if text is None:
        return None
    try:
        read = datetime.fromisoformat(text)
    except ValueError:
        raise InputError(f"a time must be ISO 8601, such as 2026-12-31T18:00; got {text!r}") from None
    return read if read.tzinfo is not None else read.replace(tzinfo=UTC)
