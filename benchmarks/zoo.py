"""Networks that people really have, exported by both of torch's exporters, imported and run encrypted, batch 1.

    python -m benchmarks.zoo                       all of them; writes results/zoo.json and docs/models.md
    python -m benchmarks.zoo resnet18 transformer  these alone; prints the table

Each run is the real session: three processes, mutual TLS. Memory is the peak of each process, Python and its libraries
(about 0.4 GB each) included. Times are of a single prediction, the first after a small one that warms the roles up.
"""

import argparse
import contextlib
import io
import json
import subprocess
import sys
import warnings
from typing import Any

import numpy as np
import onnxruntime
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks import report
from benchmarks.latency.ours import peak_bytes
from benchmarks.networks import zoo_models
from securemtk.serving.config import Config
from securemtk.serving.onnxruntime_api import InferenceSession

DOCUMENT = report.ROOT / "docs" / "models.md"
HEAD = """# Models that were run

Made by `python -m benchmarks.zoo`: networks written in torch with random weights, exported by both of its exporters,
imported, and run encrypted with one sample over the real session (three processes, one machine, mutual TLS). The error
is the largest absolute difference from onnxruntime, beside the largest score. Memory is the peak of keeper, user and
authority together.
"""


def measure(name: str, exporter: str) -> dict[str, Any]:
    """Export, import and run one network; return what the table says of it."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        # The exporters warn of things that concern other models.
        warnings.simplefilter("ignore")
        data = zoo_models.export(zoo_models.build(name), zoo_models.samples(name, 2), exporter)
    x = zoo_models.samples(name, 1, seed=1).numpy()
    (expected,) = onnxruntime.InferenceSession(data).run(None, {"x": x})
    with InferenceSession(data, config=Config(ahead=0, timeout_s=600)) as session:
        (scores,) = session.run(None, {"x": x})
        cost, whole = session.cost, session.whole
        peaks = [peak_bytes(pid) for pid in session.pids.values()] + [peak_bytes("self")]
    return {
        "model": name,
        "exporter": exporter,
        "megabytes": len(data) / 1e6,
        "whole": whole,
        "online_s": cost.online_s,
        "offline_s": cost.offline_s,
        "online_bytes": cost.online_bytes,
        "offline_bytes": cost.offline_bytes,
        "rounds": cost.rounds,
        "error": float(np.abs(scores - expected).max()),
        "largest": float(np.abs(expected).max()),
        "same_choice": bool((scores.argmax(1) == expected.argmax(1)).all()),
        "peak_bytes": sum(peaks),
    }


def table(runs: list[dict[str, Any]]) -> str:
    """Return the Markdown table of all runs."""
    rows = [
        [
            run["model"],
            run["exporter"],
            "whole" if run["whole"] else "samples",
            f"{run['error']:.1e} of {run['largest']:.2g}",
            report.seconds(run["online_s"]),
            report.seconds(run["offline_s"]),
            report.megabytes(run["online_bytes"]),
            report.megabytes(run["offline_bytes"]),
            str(run["rounds"]),
            report.megabytes(run["peak_bytes"]),
        ]
        for run in runs
    ]
    head = ["model", "exporter", "understood by", "largest error", "online", "offline", "online", "offline", "rounds"]
    return report.table([*head, "memory, all"], rows)


def _in_process(name: str, exporter: str) -> dict[str, Any]:
    # A process of its own: the peak memory of one network says nothing of the next.
    command = [sys.executable, "-m", "benchmarks.zoo", "--one", name, exporter]
    done = subprocess.run(command, cwd=report.ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"benchmarks.zoo: {name} by {exporter} failed:\n{done.stderr.strip()}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.zoo", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", help="networks; all without")
    parser.add_argument("--exporter", choices=zoo_models.EXPORTERS, help="one exporter instead of both")
    parser.add_argument("--one", nargs=2, metavar=("NAME", "EXPORTER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(*options.one)))
        return
    try:
        chosen = zoo_models.names(options.names)
    except ValueError as error:
        parser.error(str(error))
    exporters = [options.exporter] if options.exporter else list(zoo_models.EXPORTERS)
    content = report.header("python -m benchmarks.zoo", {}) | {"runs": []}
    columns = (TextColumn("{task.description:32}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("start", total=len(chosen) * len(exporters))
        for name in chosen:
            for exporter in exporters:
                progress.update(task, description=f"{name} by {exporter}")
                content["runs"].append(_in_process(name, exporter))
                progress.advance(task)
    text = table(content["runs"])
    print(text)
    if not options.names and not options.exporter:
        report.write_json(report.RESULTS / "zoo.json", content)
        report.write(DOCUMENT, f"{HEAD}\n{text}\n")


if __name__ == "__main__":
    main()
