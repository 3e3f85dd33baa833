"""Exact products modulo 2**64 in one thread: GMAC/s of every candidate, by size and regime.

    python -m benchmarks.kernels
    python -m benchmarks.kernels --only conv --repeats 11

Regimes: "small" has weights of 18 bits, as a keeper's encoded ones; "full" has uniform weights, as a dealer's. Inputs
are uniform. Candidates take turns, each is first compared with torch's int64, and a figure is the product counted
plainly (images x outputs x sum length) over the median time; Karatsuba does fewer. The time is that of the thread on
its core, as machines are shared; results/kernels.json has it and the elapsed time, every run of both.
"""

import argparse
import contextlib
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numba
import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks import limbs, report
from protocols.errors import ShapeError
from protocols.primitives import kernels

REGIMES = {"small": 18, "full": 64}
# int8 products are measured up to so many MAC only: without VNNI they are slower than everything else.
INT8_MOST = 1_000_000
CANDIDATES = ("torch int64", "plain numba", "float64 limbs", "int8 limbs", "tiles", "karatsuba", "depthwise", "chosen")


@dataclass(frozen=True)
class Case:
    """One product: a matmul (batch, k) x (k, n) has kernel 0, a convolution a side of its kernel."""

    name: str
    batch: int
    k: int
    n: int
    side: int = 1
    kernel: int = 0
    stride: int = 1
    groups: int = 1

    @property
    def macs(self) -> int:
        """Products to add up, counted plainly."""
        if not self.kernel:
            return self.batch * self.k * self.n
        out = (self.side + 2 * (self.kernel // 2) - self.kernel) // self.stride + 1
        return self.batch * self.n * self.k // self.groups * self.kernel**2 * out**2


def conv(name: str, batch: int, k: int, n: int, side: int, kernel: int = 3, **more: int) -> Case:
    """Return a convolution that pads by half its kernel."""
    return Case(f"{name} {k}->{n} at {side}", batch, k, n, side, kernel, **more)


MATRICES = [(4, 2048, 64), (4, 784, 128), (4, 128, 128), (1, 512, 512), (64, 784, 128)]
CASES = [
    *(Case(f"matmul {k}x{n}", batch, k, n) for batch, k, n in MATRICES),
    conv("conv cnn", 4, 3, 16, 32),
    conv("conv cnn", 4, 16, 32, 16),
    conv("conv vgg", 1, 3, 64, 32),
    conv("conv vgg", 1, 64, 64, 32),
    conv("conv vgg", 1, 64, 128, 16),
    conv("conv vgg", 1, 128, 128, 16),
    conv("conv vgg", 1, 128, 256, 8),
    conv("conv vgg", 1, 256, 256, 8),
    conv("conv vgg", 1, 256, 512, 4),
    conv("conv vgg", 1, 512, 512, 4),
    conv("conv vgg", 1, 512, 512, 2),
    conv("conv 1x1", 1, 64, 128, 16, kernel=1),
    conv("conv stride 2", 1, 64, 128, 16, stride=2),
    conv("conv depthwise", 1, 64, 64, 16, groups=64),
]


@numba.njit(nogil=True)
def _plain(x: Any, w: Any, out: Any) -> None:
    """Multiply by three loops, the inner one along neighbours, as LLVM vectorises it by itself."""
    for i in range(x.shape[0]):
        row = out[i]
        row[:] = 0
        for k in range(x.shape[1]):
            factor, weights = x[i, k], w[k]
            for j in range(row.shape[0]):
                row[j] += factor * weights[j]


def plain_matmul(x: Tensor, w: Tensor) -> Tensor:
    """Return x @ w by `_plain`."""
    out = torch.empty(len(x), w.shape[1], dtype=torch.int64)
    _plain(x.numpy(), w.numpy(), out.numpy())
    return out


def int8_matmul(x: Tensor, parts: list[Tensor]) -> Tensor:
    """Return x @ w, w given as signed limbs of 8 bits, by int8 products with int32 sums (exact below 2**17 terms)."""
    out = torch.zeros(len(x), parts[0].shape[1], dtype=torch.int64)
    for i, limb in enumerate(limbs.limbs_of(x, 8)):
        limb = limb.to(torch.int8)
        for j, part in enumerate(parts[: 8 - i]):
            out += torch._int_mm(limb, part).to(torch.int64) << (8 * (i + j))
    return out


def unfolded(case: Case, x: Tensor) -> Tensor:
    """Return the rows (image, line, column) of x by torch's unfold on padded images."""
    half = case.kernel // 2
    padded = F.pad(x, (half, half, half, half))
    view = padded.unfold(2, case.kernel, case.stride).unfold(3, case.kernel, case.stride)
    return view.permute(0, 2, 3, 1, 4, 5).reshape(-1, case.k * case.kernel**2)


def candidates(case: Case, x: Tensor, w: Tensor) -> dict[str, Callable[[], Tensor]]:
    """Return what there is to measure; all give the same numbers, convolutions perhaps as rows (pixel, output)."""
    if not case.kernel:
        used = 3 if int(w.abs().max()) < 2**22 else 8
        parts = [part.to(torch.int8) for part in limbs.limbs_of(w, 8)[:used]]
        by_limbs, tiles = limbs.matmul(w), kernels.prepare_matmul(w)
        found: dict[str, Callable[[], Tensor]] = {
            "torch int64": lambda: x @ w,
            "plain numba": lambda: plain_matmul(x, w),
            "float64 limbs": lambda: by_limbs(x),
            "tiles": lambda: tiles.apply(x),
        }
        if case.macs < INT8_MOST:
            found["int8 limbs"] = lambda: int8_matmul(x, parts)
        return found
    attributes: dict[str, Any] = {
        "stride": (case.stride,) * 2,
        "pads": (case.kernel // 2,) * 4,
        "groups": case.groups,
    }
    found = {"chosen": partial(kernels.prepare_conv2d(w, size=(case.side, case.side), **attributes).apply, x)}
    found["float64 limbs"] = partial(limbs.conv2d(w, **attributes), x)
    for method in kernels.METHODS:
        with contextlib.suppress(ShapeError):  # not a convolution of that method's kind
            found[method] = partial(kernels.prepare_conv2d(w, method=method, **attributes).apply, x)
    if case.groups == 1:
        matrix = w.reshape(case.n, -1).T.contiguous()
        found["torch int64"] = lambda: unfolded(case, x) @ matrix
        found["plain numba"] = lambda: plain_matmul(unfolded(case, x), matrix)
    return found


def measure(case: Case, regime: str, repeats: int) -> dict[str, Any]:
    """Return the rates and times of every candidate that gives the right product."""
    rng = np.random.default_rng(0)
    bits = REGIMES[regime] - 1
    shape = (case.batch, case.k) if not case.kernel else (case.batch, case.k, case.side, case.side)
    x = torch.from_numpy(rng.integers(-(2**63), 2**63, shape, dtype=np.int64))
    form = (case.k, case.n) if not case.kernel else (case.n, case.k // case.groups, case.kernel, case.kernel)
    w = torch.from_numpy(rng.integers(-(2**bits), 2**bits, form, dtype=np.int64))
    found = candidates(case, x, w)
    expected = found["torch int64" if "torch int64" in found else "float64 limbs"]()
    for name, product in found.items():
        made = product()
        rows = made if made.shape == expected.shape else made.permute(0, 2, 3, 1).reshape(expected.shape)
        if not torch.equal(rows, expected):
            raise SystemExit(f"{name} is wrong for {case} in regime {regime}")
    times: dict[str, list[float]] = {name: [] for name in found}
    elapsed: dict[str, list[float]] = {name: [] for name in found}
    for _ in range(repeats):
        for name, product in found.items():
            start, begun = time.thread_time(), time.perf_counter()
            product()
            times[name].append(time.thread_time() - start)
            elapsed[name].append(time.perf_counter() - begun)
    rates = {name: case.macs / float(np.median(t)) / 1e9 for name, t in times.items()}
    best = {name: case.macs / min(t) / 1e9 for name, t in times.items()}
    return {
        "name": case.name,
        "batch": case.batch,
        "regime": regime,
        "mmac": case.macs / 1e6,
        "gmac_per_s": rates,
        "gmac_per_s_best": best,
        "seconds": {name: report.summary(t) for name, t in times.items()},
        "elapsed_seconds": {name: report.summary(t) for name, t in elapsed.items()},
    }


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """Return GMAC/s by candidate: median, and the best run in brackets."""
    shown = Table(title="GMAC/s, one thread: median (best)")
    for title in ("product", "regime", "MMAC", *CANDIDATES):
        shown.add_column(title, justify="left" if title in ("product", "regime") else "right")
    for row in rows:
        cells = [
            f"{row['gmac_per_s'][c]:.2f} ({row['gmac_per_s_best'][c]:.1f})" if c in row["gmac_per_s"] else ""
            for c in CANDIDATES
        ]
        shown.add_row(f"{row['name']} x{row['batch']}", row["regime"], f"{row['mmac']:.2f}", *cells)
    return shown


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print the table, write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7, help="runs of each candidate (default 7)")
    parser.add_argument("--only", default="", help="measure products whose name contains this")
    parser.add_argument("--out", default=str(report.RESULTS / "kernels.json"), help="file of results")
    options = parser.parse_args(arguments)
    report.check_outputs(Path(options.out))
    torch.set_num_threads(1)
    kernels.warm()
    rows = [measure(case, regime, options.repeats) for case in CASES if options.only in case.name for regime in REGIMES]
    console = Console(width=None if os.isatty(1) else 200)
    console.print(table(rows))
    content = report.header("python -m benchmarks.kernels", {"repeats": options.repeats, "threads": 1})
    report.write_json(Path(options.out), {**content, "numba": numba.__version__, "products": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
