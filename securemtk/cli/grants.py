"""Grants, as the commands of keys show them."""

from collections.abc import Sequence

from securemtk.cli.tables import emit, rows_table
from securemtk.mtk.keys.grants import Grant, Ledger


def show_grants(as_json: bool, grants: Sequence[Grant], ledger: Ledger) -> None:
    """Print grants, each with the samples that were asked under it."""
    used = ledger.used()
    rows = [grant.to_dict() | {"used": used.get(grant.id, 0)} for grant in grants]
    emit(as_json, {"grants": rows}, lambda: rows_table("grants", rows))
