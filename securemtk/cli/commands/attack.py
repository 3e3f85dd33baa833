"""`securemtk attack`."""

import json
import logging
from pathlib import Path
from typing import Annotated

import typer

from protocols.errors import InputError
from securemtk.cli.options import Json, PassphraseFile, RunFolder
from securemtk.cli.secrets import passphrase_of
from securemtk.cli.tables import emit, rows_table
from securemtk.mtk.attacks.base import Victim
from securemtk.mtk.attacks.suite import ATTACKS, AttackReport, Effort, check_attacks, run_attacks
from securemtk.report.document import ATTACK_FILE
from securemtk.report.pictures import draw_attacks
from securemtk.runs.places import KEYS
from securemtk.runs.run_folder import open_run, read_run
from securemtk.support.files import check_file, whole_file
from securemtk.support.progress import progress_bar

log = logging.getLogger("securemtk")
app = typer.Typer(add_completion=False)


@app.command(epilog="Example:  securemtk attack runs/digits --only guess,invert --tries 100000")
def attack(
    folder: RunFolder,
    only: Annotated[
        str, typer.Option(help=f"Run some of {', '.join(ATTACKS)}, with commas; without it all of them run.")
    ] = "",
    tries: Annotated[int, typer.Option(min=1, help="Try so many random patterns in each key's place.")] = Effort.tries,
    queries: Annotated[
        int, typer.Option(min=1, help="Ask so many queries in each key inversion by queries.")
    ] = Effort.queries,
    steps: Annotated[
        int, typer.Option(min=1, help="Take so many steps in each key inversion by gradient.")
    ] = Effort.steps,
    restarts: Annotated[
        int, typer.Option(min=1, help="Begin each of them anew from so many random starts.")
    ] = Effort.restarts,
    seed: Annotated[int, typer.Option(min=0, help="Draw guesses, starts and samples from this seed.")] = 0,
    out: Annotated[
        Path | None,
        typer.Option(help="Write the results here, a .json file, and a .png beside it; by default they go into RUN."),
    ] = (None),
    passphrase_file: PassphraseFile = None,
    as_json: Json = False,
) -> None:
    """Attack a run: guess and invert keys, infer closed tasks, fine-tune the stolen trunk, tell members.

    Writes attack.json and attack.png. What each attack shows and does not show: docs/attacks.md.
    """
    target = folder / ATTACK_FILE if out is None else out
    if target.suffix != ".json":
        raise InputError(f"--out must name a .json file; got {str(target)!r}")
    picture = target.with_suffix(".png")
    names = [name.strip() for name in only.split(",") if name.strip()]
    effort = Effort(tries, queries, steps, restarts)
    check_attacks(names)
    if out is None:
        read_run(folder)
    for file in (target, picture):
        check_file(file, "--out" if out is not None else file.name)
    trained = open_run(folder, passphrase_of([folder / KEYS], passphrase_file))
    victim = Victim(trained.result.model, trained.dataset, trained.result.keys)
    with progress_bar("attack") as bar:
        found = run_attacks(victim, names, effort=effort, seed=seed, progress=bar)
    document = found.to_dict()
    with whole_file(target) as first, whole_file(picture) as second:
        first.write((json.dumps(document, indent=1) + "\n").encode())
        second.write(draw_attacks(document["findings"]))
    emit(as_json, document, lambda: _attack_tables(found))
    log.info("written: %s and %s", target, picture.name)


def _attack_tables(found: AttackReport) -> None:
    for name, seconds in found.seconds.items():
        rows = [
            {"task": f.task, "what": f.what, "figure": f"{f.figure:.3g}", "chance": f"{f.chance:.3g}", "": f.meaning}
            for f in found.findings
            if f.attack == name
        ]
        rows_table(f"{name}, {seconds:.0f} s", rows)
