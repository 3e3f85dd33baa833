"""`securemtk keys log`."""

import logging
from dataclasses import asdict
from typing import Annotated, Any

import typer

from protocols.errors import InputError
from securemtk.cli.options import GrantsFile, Json
from securemtk.cli.tables import emit, facts_table, rows_table
from securemtk.mtk.keys.audit import read as read_log
from securemtk.mtk.keys.grants import Ledger

log = logging.getLogger("securemtk")
app = typer.Typer(add_completion=False)


@app.command(epilog="Example:  securemtk keys log grants.json --verify")
def show_log(
    grants: GrantsFile,
    verify: Annotated[bool, typer.Option("--verify", help="Tell only whether it is as it was written.")] = False,
    head: Annotated[str | None, typer.Option(help="Require that this head, noted before, is still there.")] = None,
    as_json: Json = False,
) -> None:
    """Show who used which key when, and what was refused. Exit status 3 where the log is not as it was written."""
    path = Ledger(grants).log_path
    try:
        entries, verdict = read_log(path, head)
    except FileNotFoundError:
        raise InputError(f"there must be a log of these grants, {path.name!r}; there is none") from None
    if verdict.broken is not None:
        raise InputError(
            f"the log {path.name!r} must be as it was written; line {verdict.broken} is not, those before it are"
        )
    if not verdict.known:
        raise InputError(f"the log {path.name!r} must hold the head that was noted before; lines are gone")
    if verdict.torn:
        log.warning("the last line was cut off, as by a crash; it counts for nothing")
    document: dict[str, Any] = {"log": str(path)} | asdict(verdict)
    # What fits beside each other; --json has the rest.
    columns = ("time", "event", "user", "task", "reason", "batch")

    def show() -> None:
        if not verify:
            rows = [{name: str(entry.get(name, "")) for name in columns} for entry in entries]
            rows_table("log", [row | {"time": row["time"][:19]} for row in rows])
        facts_table("as it was written", document)

    emit(as_json, document if verify else document | {"entries": entries}, show)
