"""ReLU, max-pooling, convolution and matrix product against size, each as a network of one layer in a real session.

    python -m benchmarks.primitives
    python -m benchmarks.primitives --only relu,pool --largest 65536

A prediction shares the input, runs the layer and reveals the result; "base" is a network that only reshapes, so what a
layer adds is its time less that of base at the same size. Writes results/primitives.json and .png.
"""

import argparse
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks import report
from benchmarks.latency import ours
from benchmarks.latency.processes import terminate_as_interrupt
from benchmarks.networks.models import FLATTEN, POOL, RELU, Conv, Dense, Layer, Network
from benchmarks.networks.onnx_models import run_float, to_onnx
from securemtk.serving.config import Config
from securemtk.serving.session import Session

WARMUP = 2


@dataclass(frozen=True)
class Primitive:
    """A layer whose size grows.

    Args:
        title: for tables and pictures.
        unit: what is counted.
        sizes: sizes to measure, smallest first.
        network: returns the network of a size.
        count: returns how many units a size has.
    """

    title: str
    unit: str
    sizes: tuple[int, ...]
    network: Callable[[int], Network]
    count: Callable[[int], int]


def _image(size: int) -> tuple[int, int, int]:
    """Return 16 channels of the square picture that has `size` values, a power of 4 times 16."""
    side = round((size / 16) ** 0.5)
    return (16, side, side)


def _one(shape: tuple[int, ...], layer: Layer) -> Network:
    return Network(shape, (layer,))


_VALUES = (1 << 10, 1 << 12, 1 << 14, 1 << 16, 1 << 18)
PRIMITIVES = {
    "base": Primitive("share and reveal", "values", _VALUES, lambda n: _one(_image(n), FLATTEN), lambda n: n),
    "relu": Primitive("ReLU", "values", _VALUES, lambda n: _one(_image(n), RELU), lambda n: n),
    "pool": Primitive("max-pool 2x2", "values", _VALUES, lambda n: _one(_image(n), POOL), lambda n: n),
    # Channels grow on a picture of 32 x 32.
    "conv": Primitive(
        "conv 3x3, 32x32",
        "products",
        (4, 8, 16, 32, 64),
        lambda c: _one((c, 32, 32), Conv(c, c)),
        lambda c: 9 * c * c * 1024,
    ),
    "matmul": Primitive(
        "matmul, one row",
        "products",
        (128, 256, 512, 1024, 2048),
        lambda n: _one((n,), Dense(n, n)),
        lambda n: n * n,
    ),
}


def measure(session: Session, primitive: Primitive, size: int, repeats: int) -> dict[str, Any]:
    """Return what primitives.json says of one primitive at one size."""
    network = primitive.network(size)
    model, x = to_onnx(network, "primitive"), network.inputs(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        ours.prepare(folder, model, x, run_float(model, x))
        found = ours.measure(session, folder, WARMUP, repeats)
    total = np.add(found["demand_s"], found["offline_s"]).tolist()
    return {
        "size": size,
        "count": primitive.count(size),
        "online_s": report.summary(found["online_s"]),
        "offline_s": report.summary(found["offline_s"]),
        "total_s": report.summary(total),
        **{name: found[name] for name in ("online_bytes", "offline_bytes", "rounds", "error")},
    }


def table(content: dict[str, Any]) -> str:
    """Return the Markdown table of all primitives."""
    rows = [
        [
            PRIMITIVES[name].title,
            f"{run['count']:,} {PRIMITIVES[name].unit}",
            report.seconds(run["online_s"]["p50"]),
            report.seconds(run["offline_s"]["p50"]),
            f"{run['online_bytes']:,}",
            str(run["rounds"]),
            f"{run['error']:.0e}",
        ]
        for name, runs in content["primitives"].items()
        for run in runs
    ]
    return report.table(["network of one layer", "size", "online", "dealer", "online bytes", "rounds", "error"], rows)


def draw(content: dict[str, Any], path: Path) -> None:
    """Draw times against size: comparisons on the left, products on the right."""
    panels = ("values", "products")
    with report.picture(path, panels=2, width=9, height=4) as axes_of:
        for axes, unit in zip(axes_of, panels, strict=True):
            drawn = [name for name in content["primitives"] if PRIMITIVES[name].unit == unit]
            for i, name in enumerate(drawn):
                runs = content["primitives"][name]
                counts = [run["count"] for run in runs]
                for key, style, what in (("online_s", "o-", "online"), ("total_s", "o:", "online + dealer")):
                    milliseconds = [run[key]["p50"] * 1e3 for run in runs]
                    label = f"{PRIMITIVES[name].title}, {what}"
                    axes.plot(counts, milliseconds, style, color=f"C{i}", label=label, markersize=4)
            axes.set_xscale("log")
            axes.set_yscale("log")
            axes.set_xlabel(f"{unit} in the layer")
            axes.set_ylabel("milliseconds, median")
            axes.grid(alpha=0.3)
            if drawn:
                axes.legend(frameon=False, fontsize=7)


def run(names: Sequence[str], largest: int, repeats: int, output: Path) -> dict[str, Any]:
    """Measure the named primitives up to a number of values or products; write the results."""
    jobs = [(n, size) for n in names for size in PRIMITIVES[n].sizes if PRIMITIVES[n].count(size) <= largest]
    settings = {"warmup": WARMUP, "repeats": repeats}
    report.check_outputs(output / "primitives.json", output / "primitives.png")
    content = report.header(f"python -m benchmarks.primitives --repeats {repeats}", settings) | {"primitives": {}}
    columns = (TextColumn("{task.description:24}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with (
        Session(Config(ahead=0)) as session,
        Progress(*columns, console=Console(stderr=True), transient=True) as progress,
    ):
        task = progress.add_task("start", total=len(jobs))
        for name, size in jobs:
            progress.update(task, description=f"{name} {size}")
            content["primitives"].setdefault(name, []).append(measure(session, PRIMITIVES[name], size, repeats))
            progress.advance(task)
    report.write_json(output / "primitives.json", content)
    draw(content, output / "primitives.png")
    return content


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.primitives", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--only", default=",".join(PRIMITIVES), help="primitives to measure")
    parser.add_argument("--largest", type=int, default=1 << 30, help="leave out sizes with more values or products")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--output", type=Path, default=report.RESULTS, help="folder of the results")
    options = parser.parse_args()
    names = options.only.split(",")
    unknown = [name for name in names if name not in PRIMITIVES]
    if unknown or options.repeats < 1:
        parser.error(f"--only takes {', '.join(PRIMITIVES)}; --repeats 1 or more")
    terminate_as_interrupt()
    try:
        print(table(run(names, options.largest, options.repeats, options.output)))
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
