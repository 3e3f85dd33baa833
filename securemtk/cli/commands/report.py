"""`securemtk report`."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from securemtk.cli.options import Json, PassphraseFile, RunFolder
from securemtk.cli.secrets import passphrase_of
from securemtk.cli.tables import accuracy_table, emit, percent, rows_table
from securemtk.mtk.attacks.suite import Effort
from securemtk.report.document import ReportOptions, measure_report, read_attacks
from securemtk.report.page import PAGE, check_drawing, check_target, write_report
from securemtk.runs.places import KEYS
from securemtk.runs.run_folder import read_run
from securemtk.support.progress import progress_bar

log = logging.getLogger("securemtk")
app = typer.Typer(add_completion=False)


@app.command(epilog="Example:  securemtk report runs/digits --output digits.html")
def report_run(
    folder: RunFolder,
    output: Annotated[
        Path | None,
        typer.Option(help="Write the page here, an .html file, and its .json beside it; by default they go into RUN."),
    ] = None,
    attack: Annotated[
        bool, typer.Option("--attack", help="Attack the run anew (minutes); else what `securemtk attack` left in RUN.")
    ] = False,
    encrypted: Annotated[
        bool, typer.Option("--encrypted/--no-encrypted", help="Ask the run under encryption, or leave that out.")
    ] = True,
    samples: Annotated[
        int, typer.Option(min=1, help="Ask so many test samples under encryption in each state of the keys.")
    ] = ReportOptions.samples,
    seed: Annotated[
        int, typer.Option(min=0, help="Start attackers, and the noise that they meet, from this seed.")
    ] = 0,
    passphrase_file: PassphraseFile = None,
    as_json: Json = False,
) -> None:
    """Report on a run in one HTML page and its JSON: accuracy, leaks, attacks, guarantees, costs, threat model.

    Nothing of a key but its size and place is in it: docs/report.md.
    """
    page = folder / PAGE if output is None else output
    read_run(folder)
    beside = check_target(page)
    found = None if attack else read_attacks(folder)
    if found is not None:
        check_drawing(found)
    extent = ReportOptions(encrypted, samples, attacks=Effort() if attack else None, seed=seed)
    passphrase = passphrase_of([folder / KEYS], passphrase_file)
    with progress_bar("report") as bar:
        document = measure_report(folder, passphrase=passphrase, extent=extent, attacks=found, progress=bar)
    write_report(document, page)
    emit(as_json, document, lambda: _report_tables(document))
    log.info("written: %s and %s", page, beside.name)


def _report_tables(document: Mapping[str, Any]) -> None:
    names = ("chance", "no_key", "right_key", "wrong_random", "wrong_other", "all_keys")
    accuracy_table(document["accuracy"], {name: name.replace("_", " ") for name in names})
    rows = [
        {"closed": leak["target"], "open": ", ".join(leak["sources"]), "released": leak["rule"]}
        | {"prior": percent(leak["prior"]), "attacker": percent(leak["best"]), "gain": percent(leak["gain"])}
        for leak in document["leaks"]["answers"]
    ]
    rows_table("what open tasks tell of closed ones, %", rows)
    if document["encrypted"] is not None:
        costs = [
            {"at once": cost["batch"], "online, ms": f"{1e3 * cost['online_s']:.1f}"}
            | {"offline, ms": f"{1e3 * cost['offline_s']:.1f}", "online, MB": f"{cost['online_bytes'] / 1e6:.2f}"}
            | {"offline, MB": f"{cost['offline_bytes'] / 1e6:.1f}", "rounds": cost["rounds"]}
            for cost in document["encrypted"]["costs"]
        ]
        rows_table("encrypted predictions with all keys", costs)
