"""What every benchmark writes: machine, commit, quantiles, files that are there whole or not at all."""

import io
import json
import os
import platform
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from securemtk.support.files import check_file, write_whole

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
QUANTILES = (50, 90, 99)


def machine() -> dict[str, object]:
    """Return what the figures depend on; no host name."""
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "load_1min": os.getloadavg()[0],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
    }


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or "unknown"


def commit(root: Path = ROOT) -> str:
    """Return the commit of a checkout, with "-dirty" where the tree differs from it."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    found = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    return found.stdout.strip() or "unknown"


def header(command: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Return the fields with which every file of results begins."""
    return {
        "command": command,
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": commit(),
        "machine": machine(),
        "settings": settings,
    }


def summary(samples: Sequence[float]) -> dict[str, Any]:
    """Return n, quantiles, extremes and the samples themselves."""
    quantiles = {f"p{q}": float(np.percentile(samples, q)) for q in QUANTILES}
    return {"n": len(samples), **quantiles, "min": min(samples), "max": max(samples), "samples": list(samples)}


# --- files ----------------------------------------------------------------------------------------------------------


def check_outputs(*paths: Path) -> None:
    """Make the folders of files to be written, and refuse before the work what cannot be written.

    Raises:
        InputError: as `securemtk.support.files.check_file`.
        OSError: the disk refuses.
    """
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        check_file(path)


def write(path: Path, content: str | bytes) -> None:
    """Write a text or bytes, whole or not at all; absent folders are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, content.encode() if isinstance(content, str) else content)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write JSON."""
    write(path, json.dumps(content, indent=1) + "\n")


def write_picture(path: Path, figure: Figure) -> None:
    """Write a picture as PNG."""
    data = io.BytesIO()
    figure.savefig(data, format="png", metadata={"Software": None})
    write(path, data.getvalue())


@contextmanager
def picture(path: Path, panels: int = 1, width: float = 7.0, height: float = 4.5) -> Iterator[list[Axes]]:
    """Give axes side by side; write them as PNG afterwards."""
    with mpl.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
        yield list(np.atleast_1d(figure.subplots(1, panels)))
        write_picture(path, figure)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def seconds(value: float) -> str:
    """Return a time with a fitting unit and two or three digits."""
    if value >= 1:
        return f"{value:.2f} s"
    return f"{value * 1e3:.0f} ms" if value >= 0.1 else f"{value * 1e3:.1f} ms"


def megabytes(value: float) -> str:
    """Return bytes as MB (10**6)."""
    return f"{value / 1e6:.0f} MB" if value >= 1e7 else f"{value / 1e6:.2f} MB"
