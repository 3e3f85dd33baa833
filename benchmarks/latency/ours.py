"""Time securemtk on one ONNX file over the real session: mutual TLS, three processes, this one being the user.

    python -m benchmarks.latency.ours FOLDER --repeats 5

FOLDER holds model.onnx, input.npy and expected.npy (`prepare` writes them). Prints one JSON line.
"""

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.networks.models import Floats
from protocols.program.program import chunk_size
from securemtk.serving.config import Config
from securemtk.serving.session import PredictionCost, Session

MODEL, INPUT, EXPECTED = "model.onnx", "input.npy", "expected.npy"
# Predictions in a row whose correlations are made together.
ROW = 4


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


def measure(session: Session, folder: Path, warmup: int, repeats: int, *, prepared: bool = True) -> dict[str, Any]:
    """Load a model and predict again and again.

    First on demand: the dealer begins when a prediction is asked for. Then in rows whose correlations were made before,
    as a service has them: the online phase alone. Either way one prediction follows the other, as the peers' do.

    Args:
        session: of any protocol, that makes nothing ahead by itself.
        folder: from `prepare`.
        warmup: predictions at first that are not counted.
        repeats: predictions of each kind that are.
        prepared: whether to measure that second kind; a batch that needs several chunks does without.

    Returns:
        Lists with a value for each counted prediction: online_s with the correlations made before (on demand
        without the second kind), and on demand demand_s (online), offline_s (from the request to the start) and wall_s;
        bytes and rounds of the last one (they are the same for all), layers with their median seconds, the number of
        chunks in which a batch runs, the peak memory of each role on demand, and the largest absolute error of all.
    """
    x, expected = np.load(folder / INPUT), np.load(folder / EXPECTED)
    model = session.load(folder / MODEL)
    wall_s: list[float] = []
    error = 0.0

    def predict() -> PredictionCost:
        nonlocal error
        start = time.perf_counter()
        (scores,) = model.predict(x).values()
        wall_s.append(time.perf_counter() - start)
        error = max(error, float(np.abs(scores - expected).max()))
        return session.cost

    def predict_row(n: int, dealing_s: float) -> list[PredictionCost]:
        model.prepare(len(x), predictions=n)
        # Long enough for the roles to be asleep again: nothing competes with the predictions.
        time.sleep(2 * n * dealing_s + 0.02)
        return [predict() for _ in range(n)]

    chunks = math.ceil(len(x) / chunk_size(model.program, len(x), Config().chunk_elements))
    demand = [predict() for _ in range(warmup + repeats)][warmup:]
    demand_wall_s = wall_s[warmup:]
    peaks = {role: peak_bytes(pid) for role, pid in session.pids.items()} | {"user": peak_bytes("self")}
    costs = demand
    if prepared and chunks == 1:
        dealing_s = max(cost.offline_s for cost in demand)
        rows = [min(ROW, repeats - begin) for begin in range(0, repeats, ROW)]
        costs = [cost for n in rows for cost in predict_row(n, dealing_s)]
    return {
        "online_s": [cost.online_s for cost in costs],
        "demand_s": [cost.online_s for cost in demand],
        "offline_s": [cost.offline_s for cost in demand],
        "wall_s": demand_wall_s,
        "online_bytes": demand[-1].online_bytes,
        "offline_bytes": demand[-1].offline_bytes,
        "rounds": demand[-1].rounds,
        "error": error,
        "peak_bytes": peaks,
        "chunks": chunks,
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
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.latency.ours", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--warmup", type=int, default=2, help="predictions that are not counted")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--protocol", default="fss", choices=("fss", "crypten"))
    parser.add_argument("--on-demand", action="store_true", help="make no correlations before")
    options = parser.parse_args()
    with Session(Config(ahead=0), protocol=options.protocol) as session:
        measured = measure(session, options.folder, options.warmup, options.repeats, prepared=not options.on_demand)
    print(json.dumps(measured))


if __name__ == "__main__":
    main()
