"""`securemtk keys revoke`."""

from typing import Annotated

import typer

from securemtk.cli.grants import show_grants
from securemtk.cli.options import GrantsFile, Json
from securemtk.mtk.keys.grants import Ledger

app = typer.Typer(add_completion=False)


@app.command(epilog="Example:  securemtk keys revoke grants.json --user ann --task digit")
def revoke_grants(
    grants: GrantsFile,
    grant: Annotated[str | None, typer.Option("--id", help="Revoke the grant with this id.")] = None,
    user: Annotated[str | None, typer.Option(help="Revoke all grants of this user.")] = None,
    task: Annotated[str | None, typer.Option(help="Revoke all grants of this task.")] = None,
    model_id: Annotated[str | None, typer.Option(help="Revoke all grants of this model.")] = None,
    as_json: Json = False,
) -> None:
    """Revoke the grants that match all that is given; they hold no more from an authority's next request on."""
    ledger = Ledger(grants)
    show_grants(as_json, ledger.revoke(id=grant, user=user, model_id=model_id, task=task), ledger)
