"""Trigger-keys on several data sets: how well they open and close, and what hangs on which setting.

    python -m benchmarks.mtk states --data digits        one experiment on one data set, over 5 seeds
    python -m benchmarks.mtk all --data digits           every experiment that is not costly, each model trained once
    python -m benchmarks.mtk beta --data shapes --show   the table of a stored run

Each writes results/mtk_EXPERIMENT_DATA.json and .png: mean and deviation over seeds, each with fresh keys, data drawn
by seed where they are drawn. Accuracies are of the test part; closed and decoupled answers as released, by samples.
"""

import argparse
import itertools
import json
import multiprocessing
import os
import textwrap
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from multiprocessing.queues import SimpleQueue
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks import report
from benchmarks.mtk.experiments import CASES, EXPERIMENTS, Bench, Point

# What stands on the horizontal axis of these has an order.
ORDERED = ("beta", "similarity", "secured")
Rows = list[tuple[str, dict[str, list[float]]]]
Done = tuple[int, str, list[Point]]

_queue: "SimpleQueue[Done]"


# --- running ----------------------------------------------------------------------------------------------------------


def run(data: str, names: Sequence[str], seeds: int, jobs: int) -> Iterator[tuple[str, list[list[Point]]]]:
    """Run experiments, each seed in a process of its own, and give each experiment's points once all seeds have it.

    Args:
        data: name among `CASES`.
        names: among `EXPERIMENTS`.
        seeds: number of seeds, from 0.
        jobs: processes at once.

    Yields:
        Experiment and its points, one list for each seed, in order.
    """
    context = multiprocessing.get_context("spawn")
    queue: SimpleQueue[Done] = context.SimpleQueue()
    found: dict[str, dict[int, list[Point]]] = {name: {} for name in names}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with (
        Progress(*columns, console=Console(stderr=True)) as progress,
        ProcessPoolExecutor(jobs, context, _start, (queue,)) as pool,
    ):
        line = progress.add_task(f"{data}: experiments of all seeds", total=seeds * len(names))
        futures = [pool.submit(_measure, data, list(names), seed) for seed in range(seeds)]
        while futures or not queue.empty():
            futures = _still(futures)
            while not queue.empty():
                seed, name, points = queue.get()
                found[name][seed] = points
                progress.advance(line)
                if len(found[name]) == seeds:
                    yield name, [found[name][seed] for seed in range(seeds)]


def _still(futures: list[Future[None]]) -> list[Future[None]]:
    """Wait a moment; return those that run still, and raise what ended one of them."""
    done, running = wait(futures, timeout=0.2)
    for each in done:
        each.result()
    return list(running)


def _start(queue: "SimpleQueue[Done]") -> None:
    global _queue
    _queue = queue
    torch.set_num_threads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End this worker at once when the run was killed: an experiment goes on for minutes otherwise."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
    os._exit(1)


def _measure(data: str, names: list[str], seed: int) -> None:
    bench = Bench(data, seed)
    for name in names:
        _queue.put((seed, name, list(EXPERIMENTS[name](bench))))


# --- tables and pictures ----------------------------------------------------------------------------------------------


def gathered(runs: Sequence[Sequence[Point]]) -> Rows:
    """Return for each label and curve the figures of all seeds."""
    rows: Rows = []
    for points in zip(*runs, strict=True):
        curves = {curve: [figures[curve] for _, figures in points] for curve in points[0][1]}
        rows.append((points[0][0], curves))
    return rows


def table(rows: Sequence[tuple[str, Mapping[str, Sequence[float]]]]) -> str:
    """Return the Markdown table: mean over seeds, deviation behind it."""
    curves = list(dict.fromkeys(itertools.chain.from_iterable(row for _, row in rows)))

    def cell(values: Sequence[float] | None) -> str:
        if values is None:
            return ""
        if max(values) > 1.5:
            return f"{fmean(values):,.0f}"
        digits = 3 if max(map(abs, values)) >= 0.001 or not any(values) else 5
        return f"{fmean(values):.{digits}f}" + (f" ± {stdev(values):.{digits}f}" if len(values) > 1 else "")

    return report.table(["", *curves], [[label, *(cell(row.get(curve)) for curve in curves)] for label, row in rows])


def draw(rows: Sequence[tuple[str, Mapping[str, Sequence[float]]]], name: str, path: Path) -> None:
    """Draw the figures of an experiment with one deviation over seeds to each side: lines over what has an order.

    Counts are left out, and figures of another kind than the others: divergences, bounds, p values.
    """
    rows = [row for row in rows if not any(word in row[0] for word in ("nats", "bound", "independence"))]
    shares = [(label, {c: v for c, v in row.items() if max(v) <= 1.5}) for label, row in rows]
    curves = list(dict.fromkeys(itertools.chain.from_iterable(row for _, row in shares)))
    title = textwrap.fill((EXPERIMENTS[name].__doc__ or "").splitlines()[0], 80)
    with report.picture(path, width=max(7.0, 0.7 * len(shares) + 3)) as (axes,):
        for i, curve in enumerate(curves):
            at = [k for k, (_, row) in enumerate(shares) if curve in row]
            values = [shares[k][1][curve] for k in at]
            spread = [stdev(v) if len(v) > 1 else 0.0 for v in values]
            aside = 0.0 if name in ORDERED else 0.5 * ((i + 0.5) / len(curves) - 0.5)
            how = "-" if name in ORDERED else ""
            places = [k + aside for k in at]
            axes.errorbar(places, [fmean(v) for v in values], spread, marker="o", capsize=3, ls=how, label=curve)
        axes.set_xticks(range(len(shares)), [label for label, _ in shares], rotation=30, ha="right", fontsize=8)
        axes.set_ylim(-0.08, 1.05)
        axes.grid(axis="y", alpha=0.3)
        axes.set_title(title, fontsize=9, loc="left")
        axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))


def paths(experiment: str, data: str, folder: Path) -> tuple[Path, Path]:
    """Return where results and picture of an experiment lie."""
    stem = f"mtk_{experiment}_{data}"
    return folder / f"{stem}.json", folder / f"{stem}.png"


def stored(path: Path) -> Rows:
    """Return the rows of a stored run."""
    content: dict[str, Any] = json.loads(path.read_text())
    return [(str(label), dict(row)) for label, row in content["rows"]]


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.mtk", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("experiment", choices=(*EXPERIMENTS, "all"))
    parser.add_argument("--data", choices=tuple(CASES), default="digits")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="seeds that run at once")
    parser.add_argument("--show", action="store_true", help="print the table of a stored run; measure nothing")
    parser.add_argument("--output", type=Path, default=report.RESULTS, help="folder of the results")
    options = parser.parse_args()
    if min(options.seeds, options.jobs) < 1:
        parser.error(f"--seeds and --jobs must be at least 1; got {options.seeds} and {options.jobs}")
    chosen = [options.experiment]
    if options.experiment == "all":
        chosen = [name for name in EXPERIMENTS if name not in CASES[options.data].costly]
    if not options.show:
        report.check_outputs(*(path for name in chosen for path in paths(name, options.data, options.output)))
        settings = {"seeds": options.seeds, "jobs": options.jobs}
        command = f"python -m benchmarks.mtk {options.experiment} --data {options.data} --seeds {options.seeds}"
        head = report.header(command, settings)
        start = time.perf_counter()
        for name, runs in run(options.data, chosen, options.seeds, options.jobs):
            where, picture = paths(name, options.data, options.output)
            spent = {"seconds_since_start": round(time.perf_counter() - start, 1)}
            report.write_json(where, head | spent | {"rows": gathered(runs)})
            draw(stored(where), name, picture)
    for name in chosen:
        where, _ = paths(name, options.data, options.output)
        if not where.exists():
            parser.error(f"{name} must have been run on {options.data}; {where.name} is not there")
        print(f"{name}, {options.data}:\n\n{table(stored(where))}\n")


if __name__ == "__main__":
    main()
