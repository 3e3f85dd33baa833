"""Time securemtk on one ONNX file over the real session: mutual TLS, three processes, this one being the user.

    python -m benchmarks.ours FOLDER --repeats 5

FOLDER holds model.onnx, input.npy and expected.npy (`prepare` writes them). Prints one JSON line.
"""

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.models import Floats
from securemtk.config import Config
from securemtk.session import PredictionCost, Session, chunk_size

MODEL, INPUT, EXPECTED = "model.onnx", "input.npy", "expected.npy"


def prepare(folder: Path, model: bytes, x: Floats, expected: Floats) -> None:
    """Write what `measure` reads."""
    (folder / MODEL).write_bytes(model)
    np.save(folder / INPUT, x)
    np.save(folder / EXPECTED, expected)


def peak_bytes(pid: int | str) -> int:
    """Return the largest resident memory that a process has had, from /proc."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc must give the peak memory (VmHWM) of a process; it does not")


def measure(session: Session, folder: Path, warmup: int, repeats: int) -> dict[str, Any]:
    """Load a model and predict again and again.

    Args:
        session: of any protocol.
        folder: from `prepare`.
        warmup: predictions that are not counted.
        repeats: predictions that are.

    Returns:
        Lists with a value for each counted prediction (online_s, offline_s, wall_s), bytes and rounds of the last one
        (they are the same for all), layers with their median seconds, the number of chunks in which a batch runs, and
        the largest absolute error of all.
    """
    x, expected = np.load(folder / INPUT), np.load(folder / EXPECTED)
    model = session.load(folder / MODEL)
    costs: list[PredictionCost] = []
    wall_s: list[float] = []
    error = 0.0
    for _ in range(warmup + repeats):
        start = time.perf_counter()
        (scores,) = model.predict(x).values()
        wall_s.append(time.perf_counter() - start)
        costs.append(session.cost)
        error = max(error, float(np.abs(scores - expected).max()))
    costs, wall_s = costs[warmup:], wall_s[warmup:]
    return {
        "online_s": [cost.online_s for cost in costs],
        "offline_s": [cost.offline_s for cost in costs],
        "wall_s": wall_s,
        "online_bytes": costs[-1].online_bytes,
        "offline_bytes": costs[-1].offline_bytes,
        "rounds": costs[-1].rounds,
        "error": error,
        "chunks": math.ceil(len(x) / chunk_size(model.program, len(x), Config().chunk_elements)),
        "layers": _layers(costs),
    }


def _layers(costs: list[PredictionCost]) -> list[dict[str, Any]]:
    columns = zip(*(cost.layers for cost in costs), strict=True)
    return [
        {
            "name": column[-1].name,
            "op": column[-1].op,
            "seconds": float(np.median([layer.seconds for layer in column])),
            "bytes": column[-1].bytes,
            "rounds": column[-1].rounds,
        }
        for column in columns
    ]


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ours", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--warmup", type=int, default=2, help="predictions that are not counted")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--protocol", default="fss", choices=("fss", "crypten"))
    options = parser.parse_args()
    with Session(protocol=options.protocol) as session:
        measured = measure(session, options.folder, options.warmup, options.repeats)
        measured["peak_bytes"] = {role: peak_bytes(pid) for role, pid in session.pids.items()}
        measured["peak_bytes"]["user"] = peak_bytes("self")
    print(json.dumps(measured))


if __name__ == "__main__":
    main()
