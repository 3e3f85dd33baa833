"""How long what comes before the first answer takes: imports, the command line, the roles of a session.

    python -m benchmarks.start --beside ../older-checkout        this build and another one, turn by turn
    python -m benchmarks.start --show                            the table of the last run again

Each step is a fresh interpreter, in the checkout's folder and with the checkout first on its path. Builds take turns,
first the one and then the other; one round before the first is not counted, so that bytecode and compiled loops are
there. Writes results/start.json and prints a Markdown table.
"""

import argparse
import configparser
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks import report
from securemtk.onnx.export import export_onnx

RESULT = Path(__file__).parent / "results" / "start.json"
# Runs in a session's process: times from its start to what the caller waits for, and what the roles have computed.
ROLES = """
import json, sys, time, warnings
import numpy as np
from securemtk import Session

def computed(session):
    fields = [open(f"/proc/{pid}/stat").read().rpartition(")")[2].split() for pid in session.pids.values()]
    return sum(int(f[11]) + int(f[12]) for f in fields) / 100

warnings.simplefilter("ignore")
begin = time.perf_counter()
with Session() as session:
    connected, at_connected = time.perf_counter() - begin, computed(session)
    model = session.load(sys.argv[1])
    loaded = time.perf_counter() - begin
    model.predict(np.ones((1, 4), np.float32))
    answered, at_answered = time.perf_counter() - begin, computed(session)
print(json.dumps([connected, at_connected, loaded, answered, at_answered]))
"""
# Name of a row -> what it is.
ROWS = {
    "python": "`python -c pass`",
    "torch": "`import torch`",
    "securemtk": "`import securemtk`",
    "session": "`from securemtk import Session`",
    "help": "`securemtk --help`",
    "check": "`securemtk check` of a small network",
    "connected": "session: its roles connected",
    "loaded": "session: a small network loaded",
    "answered": "session: the first answer",
}


def program(checkout: Path) -> str:
    """Return Python code that is a checkout's command line."""
    parser = configparser.ConfigParser()
    parser.read(checkout / "setup.cfg")
    _, _, target = parser["options.entry_points"]["console_scripts"].partition("securemtk = ")
    module, _, name = target.strip().partition(":")
    return f"from {module} import {name}; {name}()"


def steps(checkout: Path, model: Path) -> dict[str, list[str]]:
    """Return step -> the arguments of a Python interpreter."""
    securemtk = program(checkout)
    return {
        "python": ["-c", "pass"],
        "torch": ["-c", "import torch"],
        "securemtk": ["-c", "import securemtk"],
        "session": ["-c", "from securemtk import Session"],
        "help": ["-c", securemtk, "--help"],
        "check": ["-c", securemtk, "check", str(model)],
        "roles": ["-c", ROLES, str(model)],
    }


def run(checkout: Path, arguments: Sequence[str]) -> tuple[float, float, str]:
    """Run an interpreter; return its seconds, those that it computed, and what it printed."""
    env = os.environ | {"PYTHONPATH": str(checkout)}
    begin = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, *arguments],
        cwd=checkout,
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    if process.stdout is None:
        raise RuntimeError("a process must have a pipe to print to; it has none")
    with process.stdout as stdout:
        said = stdout.read()
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"python {' '.join(arguments)[:80]!r} must end with status 0; got {process.returncode}")
    return time.perf_counter() - begin, used.ru_utime + used.ru_stime, said


def once(checkout: Path, model: Path) -> dict[str, tuple[float, float]]:
    """Return row -> (seconds, seconds computed) of one round; of a session those of its roles together."""
    found = {}
    for name, arguments in steps(checkout, model).items():
        wall, cpu, said = run(checkout, arguments)
        if name != "roles":
            found[name] = (wall, cpu)
            continue
        connected, at_connected, loaded, answered, at_answered = json.loads(said)
        found |= {"connected": (connected, at_connected), "loaded": (loaded, float("nan"))}
        found["answered"] = (answered, at_answered)
    return found


def measure(checkouts: dict[str, Path], model: Path, repeats: int) -> dict[str, Any]:
    """Return build -> row -> medians and samples, builds taking turns."""
    rounds: dict[str, list[dict[str, tuple[float, float]]]] = {name: [] for name in checkouts}
    for turn in range(repeats + 1):
        for name in list(checkouts) if turn % 2 else list(reversed(checkouts)):
            print(f"round {turn} of {repeats}: {name}", file=sys.stderr)
            found = once(checkouts[name], model)
            if turn:
                rounds[name].append(found)
    return {
        name: {
            row: {
                "wall_s": float(np.median([r[row][0] for r in taken])),
                "cpu_s": None if row == "loaded" else float(np.median([r[row][1] for r in taken])),
                "samples": [list(r[row]) if row != "loaded" else [r[row][0], None] for r in taken],
            }
            for row in ROWS
        }
        for name, taken in rounds.items()
    }


def show(document: dict[str, Any]) -> str:
    """Return the Markdown table of a run: medians, each as seconds passed and, in brackets, computed."""
    builds = document["builds"]

    def cell(figures: dict[str, Any]) -> str:
        computed = "" if figures["cpu_s"] is None else f" ({report.seconds(figures['cpu_s'])})"
        return report.seconds(figures["wall_s"]) + computed

    head = ["passed (computed)", *(f"{name}, {document['commits'][name]}" for name in builds)]
    return report.table(head, [[title, *(cell(rows[row]) for rows in builds.values())] for row, title in ROWS.items()])


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.start", description=__doc__)
    parser.add_argument("--beside", type=Path, help="root of another checkout, measured in turn with this one")
    parser.add_argument("--repeats", type=int, default=5, help="rounds that are counted")
    parser.add_argument("--show", action="store_true", help="print the table of the last run")
    given = parser.parse_args(arguments)
    if given.show:
        print(show(json.loads(RESULT.read_text())))
        return
    report.check_outputs(RESULT)
    checkouts = {"this build": report.ROOT} | ({"beside": given.beside.resolve()} if given.beside else {})
    document = report.header("python -m benchmarks.start", {"repeats": given.repeats})
    document["commits"] = {name: report.commit(path) for name, path in checkouts.items()}
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model.onnx"
        torch.manual_seed(0)
        export_onnx(nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)), torch.randn(2, 4), ["y"], model)
        document["builds"] = measure(checkouts, model, given.repeats)
    report.write_json(RESULT, document)
    print(show(document))


if __name__ == "__main__":
    main()
