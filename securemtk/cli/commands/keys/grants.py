"""`securemtk keys grants`."""

import typer

from securemtk.cli.grants import show_grants
from securemtk.cli.options import GrantsFile, Json
from securemtk.mtk.keys.grants import Ledger

app = typer.Typer(add_completion=False)


@app.command(epilog="Example:  securemtk keys grants grants.json")
def list_grants(grants: GrantsFile, as_json: Json = False) -> None:
    """Show all grants, those past included, and how many samples were asked under each."""
    ledger = Ledger(grants)
    # Before the log is opened, which makes it where there is none.
    ledger.require()
    show_grants(as_json, ledger.grants(), ledger)
