"""How long an encrypted prediction takes: ours over the real session, beside stock CrypTen and SPU, in one run.

    python -m benchmarks.latency --models mlp,cnn,vgg16 --batch 4,4,1 --peers --repeats 7
    python -m benchmarks.latency --throughput                    cnn at batch 1 to 256
    python -m benchmarks.latency --show                          the tables of the last run again

The systems take turns; in each turn a system's processes start, warm up, are measured and end, so that no two systems
are in memory at the same time. Writes results/latency.json and .png, and prints Markdown tables. docs/benchmarks.md
says how to read them.
"""

import argparse
import json
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
from benchmarks.costs import key_bytes, keys_table
from benchmarks.latency import ours
from benchmarks.latency.processes import RunnerError, run_json, terminate_as_interrupt
from benchmarks.networks.models import NETWORKS
from benchmarks.networks.onnx_models import run_float, to_onnx
from benchmarks.peers import setup_spu
from protocols.errors import InputError

OURS, CRYPTEN, SPU = "ours", "crypten", "spu"
TITLES = {CRYPTEN: "stock CrypTen", SPU: "SPU semi2k"}
THROUGHPUT_BATCHES = (1, 4, 16, 64, 256)
# What is asked for: times faster online than CrypTen, than SPU, and with the dealer than the better one; rounds.
GOALS = {("mlp", 4): (30, 10, 5, 8), ("cnn", 4): (30, 18, 5, 19), ("vgg16", 1): (18, 40, 4, 64)}
# Predictions of ours for each run of a peer: they are short, and their tail is of interest.
OURS_FOR_EACH = 3
OURS_WARMUP, PEER_WARMUP, THROUGHPUT_WARMUP = 3, 1, 1


@dataclass(frozen=True)
class Job:
    """One network at one batch size."""

    model: str
    batch: int


@dataclass(frozen=True)
class Settings:
    """What a run does.

    Args:
        jobs: networks and batch sizes.
        peers: other systems to measure beside ours.
        repeats: measured runs of each peer.
        ours: measured predictions of ours.
        warmup: predictions of ours in each turn that are not counted.
        turns: how often each system has its turn; runs are dealt out evenly.
        timeout_s: longest time for one turn.
        prepared: whether ours is measured also with the correlations made before.
    """

    jobs: tuple[Job, ...]
    peers: tuple[str, ...]
    repeats: int
    ours: int
    warmup: int
    turns: int
    timeout_s: float
    prepared: bool = True

    def to_dict(self) -> dict[str, Any]:
        """Return what a reader of the results needs."""
        return {
            "peers": list(self.peers),
            "repeats": self.repeats,
            "ours": self.ours,
            "turns": self.turns,
            "warmup": {"ours": self.warmup, "peers": PEER_WARMUP},
        }


def share(total: int, turns: int, turn: int) -> int:
    """Return how many of `total` runs fall to one of `turns` turns."""
    return total // turns + (turn < total % turns)


def command(system: str, job: Job, folder: Path, warmup: int, repeats: int, *, prepared: bool = True) -> list[str]:
    """Return the command that gives a system one turn; `prepared` as in `ours.measure`."""
    counts = ["--warmup", str(warmup), "--repeats", str(repeats)]
    if system == OURS:
        return [
            sys.executable,
            "-m",
            "benchmarks.latency.ours",
            str(folder),
            *counts,
            *(() if prepared else ("--on-demand",)),
        ]
    python = str(setup_spu.PYTHON) if system == SPU else sys.executable
    return [python, "-m", f"benchmarks.peers.{system}_peer", job.model, str(job.batch), *counts]


def measure(job: Job, settings: Settings, advance: Callable[[str], None]) -> dict[str, Any]:
    """Give every system its turns on one network; return what latency.json says of it.

    Args:
        job: the network.
        settings: how often.
        advance: told what has its turn next, once for each turn.

    Raises:
        RunnerError: a system failed twice in the same turn.
    """
    answers: dict[str, list[dict[str, Any]]] = {system: [] for system in (OURS, *settings.peers)}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _prepare(job, folder)
        for turn in range(settings.turns):
            order = list(answers)
            # Nobody is always the first, or always after the same one.
            for system in order[turn % len(order) :] + order[: turn % len(order)]:
                advance(f"{job.model} {job.batch}: {system}")
                total, warmup = (settings.ours, settings.warmup) if system == OURS else (settings.repeats, PEER_WARMUP)
                repeats = share(total, settings.turns, turn)
                answers[system].append(
                    _turn(command(system, job, folder, warmup, repeats, prepared=settings.prepared), settings.timeout_s)
                )
    return _result(job, answers)


def _prepare(job: Job, folder: Path) -> None:
    network = NETWORKS[job.model]
    model, x = to_onnx(network, job.model), network.inputs(job.batch)
    ours.prepare(folder, model, x, run_float(model, x))


def _turn(command: Sequence[str], timeout_s: float) -> dict[str, Any]:
    try:
        return run_json(command, timeout_s)
    except RunnerError:
        # A port may have been taken between its choice and its use.
        return run_json(command, timeout_s)


def _result(job: Job, answers: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    mine = _merge(answers[OURS])
    peers = {
        system: {
            "version": parts[0]["version"],
            "seconds": report.summary([s for part in parts for s in part["seconds"]]),
            "error": max(part["error"] for part in parts),
        }
        for system, parts in answers.items()
        if system != OURS
    }
    medians = {system: peer["seconds"]["p50"] for system, peer in peers.items()}
    ratios: dict[str, Any] = {
        "online": {system: median / mine["online_s"]["p50"] for system, median in medians.items()},
        "total": {system: median / mine["total_s"]["p50"] for system, median in medians.items()},
    }
    if medians:
        ratios["total_against_better"] = min(ratios["total"].values())
    return {"model": job.model, "batch": job.batch, "ours": mine, "peers": peers, "ratios": ratios}


def _merge(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """Join the turns of ours: samples together, bytes and rounds of the last turn, the largest memory and error."""
    demand = [s for part in parts for s in part["demand_s"]]
    offline = [s for part in parts for s in part["offline_s"]]
    layers = [
        column[-1] | {"seconds": float(np.median([layer["seconds"] for layer in column]))}
        for column in zip(*(part["layers"] for part in parts), strict=True)
    ]
    return {
        "online_s": report.summary([s for part in parts for s in part["online_s"]]),
        "demand_s": report.summary(demand),
        "offline_s": report.summary(offline),
        "total_s": report.summary([a + b for a, b in zip(demand, offline, strict=True)]),
        "wall_s": report.summary([s for part in parts for s in part["wall_s"]]),
        "online_bytes": parts[-1]["online_bytes"],
        "offline_bytes": parts[-1]["offline_bytes"],
        "rounds": parts[-1]["rounds"],
        "chunks": parts[-1]["chunks"],
        "error": max(part["error"] for part in parts),
        "peak_bytes": {role: max(p["peak_bytes"][role] for p in parts) for role in parts[-1]["peak_bytes"]},
        "layers": layers,
    }


# --- tables and pictures --------------------------------------------------------------------------------------------


def times_table(runs: Sequence[dict[str, Any]]) -> str:
    """Return the Markdown table of times and ratios; the goals stand in brackets."""
    rows = []
    for run in runs:
        mine, goals = run["ours"], GOALS.get((run["model"], run["batch"]), (None,) * 4)
        online = mine["online_s"]
        cells = [f"{run['model']}, {run['batch']}", *(report.seconds(online[q]) for q in ("p50", "p90", "p99"))]
        cells += [report.seconds(mine[key]["p50"]) for key in ("demand_s", "total_s")]
        for system, goal in zip((CRYPTEN, SPU), goals[:2], strict=True):
            peer = run["peers"].get(system)
            if peer is None:
                cells += ["", ""]
            else:
                cells += [report.seconds(peer["seconds"]["p50"]), _times(run["ratios"]["online"][system], goal)]
        better = run["ratios"].get("total_against_better")
        cells.append("" if better is None else _times(better, goals[2]))
        rows.append(cells)
    head = ["model, batch", "online p50", "p90", "p99", "online on demand p50", "online + dealer p50"]
    head += ["stock CrypTen", "ratio", "SPU semi2k", "ratio", "online + dealer against the better"]
    return report.table(head, rows)


def _times(ratio: float, goal: int | None) -> str:
    return f"{ratio:.1f}x" + (f" ({goal}x)" if goal else "")


def costs_table(runs: Sequence[dict[str, Any]]) -> str:
    """Return the Markdown table of traffic, rounds, error and memory."""
    rows = []
    for run in runs:
        mine, goal = run["ours"], GOALS.get((run["model"], run["batch"]), (None,) * 4)[3]
        errors = [f"{TITLES[system].split()[-1]} {peer['error']:.1e}" for system, peer in run["peers"].items()]
        rows.append(
            [
                f"{run['model']}, {run['batch']}",
                str(mine["rounds"]) + (f" ({goal})" if goal else ""),
                report.megabytes(mine["online_bytes"]),
                report.megabytes(mine["offline_bytes"]),
                f"{mine['error']:.1e}",
                ", ".join(errors),
                *(report.megabytes(mine["peak_bytes"][role]) for role in ("keeper", "user", "authority")),
            ]
        )
    head = ["model, batch", "rounds", "online", "offline", "largest error", "of peers"]
    return report.table([*head, "keeper's memory", "user's", "authority's"], rows)


def layers_table(run: dict[str, Any]) -> str:
    """Return the Markdown table of one network's layers."""
    rows = [
        [layer["name"], layer["op"], f"{layer['seconds'] * 1e3:.2f} ms", f"{layer['bytes']:,}", str(layer["rounds"])]
        for layer in run["ours"]["layers"]
    ]
    return report.table(["layer", "operator", "seconds at the user", "bytes both ways", "rounds"], rows)


def tables(content: dict[str, Any]) -> str:
    """Return everything that a run found, as Markdown."""
    about = content["machine"]
    lines = [
        f"{about['cpu']}, {about['cores']} cores; Python {about['python']}, torch {about['torch']}; commit "
        f"{content['commit']}, {content['date']}; load before the run {about['load_1min']:.1f}.",
        times_table(content["runs"]),
        costs_table(content["runs"]),
        "Key material of a comparison, in bytes:",
        keys_table(content["key_bytes"]),
        *(f"{run['model']}, batch {run['batch']}:\n\n{layers_table(run)}" for run in content["runs"]),
    ]
    return "\n\n".join(lines)


def draw(content: dict[str, Any], path: Path) -> None:
    """Draw medians as bars on a logarithmic scale, with ratios to our online time."""
    runs = content["runs"]
    series: list[tuple[str, str, Callable[[dict[str, Any]], float | None]]] = [
        ("securemtk, online", "#1b7837", lambda run: run["ours"]["online_s"]["p50"]),
        ("securemtk, online + dealer", "#a6dba0", lambda run: run["ours"]["total_s"]["p50"]),
        ("stock CrypTen", "#762a83", lambda run: _median(run, CRYPTEN)),
        ("SPU semi2k", "#c2a5cf", lambda run: _median(run, SPU)),
    ]
    drawn = [(title, colour, list(map(of, runs))) for title, colour, of in series]
    drawn = [(title, colour, values) for title, colour, values in drawn if any(values)]
    width = 0.8 / len(drawn)
    with report.picture(path, width=2.5 + 1.8 * len(runs)) as (axes,):
        for i, (title, colour, values) in enumerate(drawn):
            for j, value in enumerate(values):
                if value is None:
                    continue
                x = j + (i - (len(drawn) - 1) / 2) * width
                axes.bar(x, value, width * 0.94, color=colour, label=title if j == 0 else None)
                ratio = value / runs[j]["ours"]["online_s"]["p50"]
                label = report.seconds(value) + (f"\n{ratio:.1f}x" if i else "")
                axes.annotate(label, (x, value), (0, 2), textcoords="offset points", ha="center", fontsize=7)
        axes.set_yscale("log")
        low, high = axes.get_ylim()
        axes.set_ylim(low / 2, high * 2)
        axes.set_xticks(range(len(runs)), [f"{run['model']}, batch {run['batch']}" for run in runs])
        axes.set_ylabel("seconds, median")
        axes.set_title(
            f"{content['machine']['cpu']}, {content['machine']['cores']} cores, one machine, mutual TLS (ours)",
            fontsize=8,
        )
        axes.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.08), ncols=4, fontsize=8)


def _median(run: dict[str, Any], system: str) -> float | None:
    peer = run["peers"].get(system)
    return None if peer is None else float(peer["seconds"]["p50"])


def throughput_table(runs: Sequence[dict[str, Any]]) -> str:
    """Return the Markdown table of time for each sample and memory by batch size."""
    rows = []
    for run in runs:
        mine, n = run["ours"], run["batch"]
        rows.append(
            [
                f"{run['model']}, {n}",
                str(mine["chunks"]),
                f"{mine['online_s']['p50'] / n * 1e3:.2f} ms",
                f"{mine['total_s']['p50'] / n * 1e3:.2f} ms",
                *(report.megabytes(mine["peak_bytes"][role]) for role in ("keeper", "user", "authority")),
            ]
        )
    head = ["model, batch", "chunks", "online, each sample", "online + dealer, each sample"]
    return report.table([*head, "keeper's memory", "user's", "authority's"], rows)


def draw_throughput(content: dict[str, Any], path: Path) -> None:
    """Draw time for each sample, and peak memory, against the batch size."""
    runs = content["runs"]
    batches = [run["batch"] for run in runs]
    with report.picture(path, panels=2, width=8.5, height=3.5) as (left, right):
        for key, title in (("online_s", "online"), ("total_s", "online + dealer")):
            values = [run["ours"][key]["p50"] / run["batch"] * 1e3 for run in runs]
            left.plot(batches, values, marker="o", label=title)
        left.set_yscale("log")
        left.set_ylabel("milliseconds for each sample, median")
        for role in ("keeper", "user", "authority"):
            right.plot(batches, [run["ours"]["peak_bytes"][role] / 2**20 for run in runs], marker="o", label=role)
        right.set_ylabel("peak memory, MiB")
        right.set_ylim(bottom=0)
        for axes in (left, right):
            axes.set_xscale("log", base=2)
            axes.set_xticks(batches, [str(n) for n in batches])
            axes.set_xlabel("batch size")
            axes.legend(frameon=False)
            axes.grid(alpha=0.3)


# --- command line ---------------------------------------------------------------------------------------------------


def run(settings: Settings, *, throughput: bool, output: Path) -> dict[str, Any]:
    """Measure everything; write the JSON file after each network, and the picture at the end."""
    name = "throughput" if throughput else "latency"
    report.check_outputs(output / f"{name}.json", output / f"{name}.png")
    content = report.header(_command_line(), settings.to_dict())
    content |= {"runs": []} if throughput else {"key_bytes": key_bytes(), "runs": []}
    turns = len(settings.jobs) * settings.turns * (1 + len(settings.peers))
    columns = (TextColumn("{task.description:24}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("start", total=turns)
        done = -1

        def advance(what: str) -> None:
            nonlocal done
            done += 1
            progress.update(task, description=what, completed=done)

        for job in settings.jobs:
            content["runs"].append(measure(job, settings, advance))
            report.write_json(output / f"{name}.json", content)
    (draw_throughput if throughput else draw)(content, output / f"{name}.png")
    return content


def _command_line() -> str:
    return " ".join(["python -m benchmarks.latency", *_without_output(sys.argv[1:])])


def _without_output(arguments: Sequence[str]) -> list[str]:
    """Leave the output folder out: it may name this machine's folders."""
    kept = list(arguments)
    while "--output" in kept:
        del kept[kept.index("--output") : kept.index("--output") + 2]
    return [a for a in kept if not a.startswith("--output=")]


def _names(known: Sequence[str], what: str) -> Callable[[str], tuple[str, ...]]:
    def parse(text: str) -> tuple[str, ...]:
        names = tuple(text.split(","))
        unknown = [name for name in names if name not in known]
        if unknown:
            raise argparse.ArgumentTypeError(f"{what} must be of {', '.join(known)}; got {', '.join(unknown)}")
        return names

    return parse


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of 1 or more; got {text!r}")
    return int(text)


def _batches(text: str) -> tuple[int, ...]:
    return tuple(map(_positive, text.split(",")))


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line into `settings`, `throughput`, `show` and `output`; exit with status 2 on errors."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.latency", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", type=_names(tuple(NETWORKS), "models"), help="networks, such as mlp,cnn")
    parser.add_argument("--batch", type=_batches, help="batch size for each model, or one for all")
    parser.add_argument(
        "--peers",
        nargs="?",
        const=(CRYPTEN, SPU),
        default=(),
        type=_names((CRYPTEN, SPU), "peers"),
        help="measure the peers as well: both, or those named",
    )
    parser.add_argument("--repeats", type=_positive, help="measured runs; default 7, with --throughput 3")
    parser.add_argument(
        "--ours", type=_positive, help=f"measured predictions of ours; default {OURS_FOR_EACH} times --repeats"
    )
    parser.add_argument(
        "--turns", type=_positive, default=2, help="turns of each system, to which runs are dealt evenly"
    )
    parser.add_argument("--timeout", type=_positive, default=600, help="longest time for one turn, in seconds")
    parser.add_argument("--throughput", action="store_true", help="one model at several batch sizes, ours alone")
    parser.add_argument("--show", action="store_true", help="print the tables of a stored run; measure nothing")
    parser.add_argument("--output", type=Path, default=report.RESULTS, help="folder of the results")
    options = parser.parse_args(arguments)
    try:
        options.settings = _settings(options)
    except ValueError as error:
        parser.error(str(error))
    return options


def _settings(options: argparse.Namespace) -> Settings:
    """Put defaults in; raise ValueError where options do not fit together."""
    models = options.models or (("cnn",) if options.throughput else ("mlp", "cnn", "vgg16"))
    batches = options.batch or (THROUGHPUT_BATCHES if options.throughput else (4, 4, 1) if not options.models else (1,))
    repeats = options.repeats or (3 if options.throughput else 7)
    if options.throughput:
        if len(models) != 1 or options.peers:
            raise ValueError("--throughput takes one model and no peers")
        jobs = tuple(Job(models[0], batch) for batch in batches)
        return Settings(jobs, (), 0, options.ours or repeats, THROUGHPUT_WARMUP, 1, options.timeout, prepared=False)
    if len(batches) not in (1, len(models)):
        raise ValueError(f"--batch must name one size, or one for each of {len(models)} models; got {len(batches)}")
    if SPU in options.peers and not setup_spu.PYTHON.exists():
        raise ValueError("SPU needs its own environment; make it with: python -m benchmarks.peers.setup_spu")
    jobs = tuple(Job(*pair) for pair in zip(models, batches * (len(models) // len(batches)), strict=True))
    predictions = options.ours or OURS_FOR_EACH * repeats
    turns = min(options.turns, repeats, predictions)
    return Settings(jobs, options.peers, repeats, predictions, OURS_WARMUP, turns, options.timeout)


def main() -> None:
    """Run from the command line."""
    options = parse(sys.argv[1:])
    terminate_as_interrupt()
    name = "throughput" if options.throughput else "latency"
    try:
        if options.show:
            content = json.loads((options.output / f"{name}.json").read_text())
        else:
            content = run(options.settings, throughput=options.throughput, output=options.output)
    except KeyboardInterrupt:
        sys.exit(130)
    except (RunnerError, InputError, OSError) as error:
        sys.exit(f"benchmarks.latency: {error}")
    print(throughput_table(content["runs"]) if options.throughput else tables(content))


if __name__ == "__main__":
    main()
