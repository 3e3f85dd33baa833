"""`securemtk demo`."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from securemtk.cli.options import Json
from securemtk.cli.tables import accuracy_table, emit, percent, plain
from securemtk.demo import DETAILS, FIGURES, PICTURE, Figures, run_demo

app = typer.Typer(add_completion=False)


@app.command(epilog="Example:  securemtk demo --out runs/demo")
def demo(
    out: Annotated[
        Path, typer.Option(help="Write the results into this folder; an older demo there is replaced.")
    ] = Path("runs/demo"),
    as_json: Json = False,
) -> None:
    """Train, release and ask under encryption, on handwritten digits: everything in one go, in about a minute."""
    figures = run_demo(out)
    emit(as_json, asdict(figures), lambda: _demo_table(figures, out))


def _demo_table(figures: Figures, out: Path) -> None:
    columns = {"chance": "chance", "baseline": "baseline", "no_key": "no key", "right_key": "right key"}
    columns |= {"wrong_key": "wrong key", "encrypted": "encrypted"}
    accuracy_table({name: asdict(task) for name, task in figures.tasks.items()}, columns)
    lines = [
        f"encrypted  {figures.samples} questions at once, each secured task with its key",
        f"online     {figures.online_s:.2f} s, {figures.online_bytes / 1e6:.1f} MB, {figures.rounds} rounds",
        f"offline    {figures.offline_s:.2f} s, {figures.offline_bytes / 1e6:.1f} MB, before the questions are known",
        f"agreement  {percent(figures.agreement)} % of labels as from onnxruntime,"
        f" scores within {figures.max_difference:.5f}",
        f"written    {out}/: {FIGURES}, {DETAILS}, {PICTURE}, bundle/, keys/",
    ]
    plain("\n".join(lines))
