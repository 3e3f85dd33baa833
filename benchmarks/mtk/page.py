"""Writes docs/mtk_results.md from the stored results of `benchmarks.mtk`, and draws them anew.

python -m benchmarks.mtk.page
"""

import argparse
import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev

from scipy.stats import combine_pvalues

from benchmarks import report
from benchmarks.mtk.experiments import CASES, EXPERIMENTS
from benchmarks.mtk.run import Rows, draw, paths, stored, table
from securemtk.mtk.attacks.base import share_bounds

PAGE = report.ROOT / "docs" / "mtk_results.md"
SHOWN = ("digits", "shapes", "cancer")
TITLES = {"digits": "digits", "shapes": "shapes, correlated", "cancer": "breast cancer (table)", "wine": "wine (table)"}
Table = dict[str, dict[str, list[float]]]


@dataclass(frozen=True)
class Line:
    """One thing that was asked of keyed models, and what was measured on one data set.

    Args:
        asked: the demand, with its limit.
        measured: the figure that decides, and where it is from.
        kept: whether the demand is met.
    """

    asked: str
    measured: str
    kept: bool


def lines(data: str, folder: Path = report.RESULTS) -> Iterator[Line]:
    """Give the demands on one data set; those whose results are not stored are left out."""
    found = {name: _stored(name, data, folder) for name in EXPERIMENTS}
    secured = CASES[data].secured
    if states := found["states"]:
        yield from _of_states(states, secured)
    if released := found["released"]:
        yield from _of_released(released)
    if guess := found["guess"]:
        yield _of_guess(guess)
    if encrypted := found["encrypted"]:
        yield _of_encrypted(encrypted)
    if beta := found["beta"]:
        yield from _of_beta(beta)


def _stored(experiment: str, data: str, folder: Path) -> Table:
    path = paths(experiment, data, folder)[0]
    return dict(stored(path)) if path.exists() else {}


def _worst(name: str, figures: dict[str, list[float]], limit: float, asked: str) -> Line:
    """Return the line of the greatest mean among figures in points, each a list over seeds."""
    task = max(figures, key=lambda t: fmean(figures[t]))
    values = [100 * value for value in figures[task]]
    spread = f" ± {stdev(values):.2f}" if len(values) > 1 else ""
    return Line(asked, f"{name} {fmean(values):.2f}{spread} points ({task})", fmean(values) <= 100 * limit)


def _less(a: dict[str, list[float]], b: dict[str, list[float]], tasks: list[str]) -> dict[str, list[float]]:
    return {task: [x - y for x, y in zip(a[task], b[task], strict=True)] for task in tasks}


def _of_states(states: Table, secured: tuple[str, ...]) -> Iterator[Line]:
    base, right, none = states["baseline"], states["right key"], states["no key"]
    keyed = list(secured)
    loss = _less(base, right, keyed)
    yield _worst("under it by", loss, 0.015, "right key within 1.5 points of plain training")
    yield _worst(
        "under them by", _less(right, states["all keys"], keyed), 0.01, "all keys at once as good as single ones"
    )
    wrong = {
        f"{task}, {kind}": values
        for kind in ("wrong random", "wrong other")
        for task, values in _less(states[kind], none, keyed).items()
    }
    yield _worst("over it by", wrong, 0.01, "wrong key as no key")
    open_tasks = [task for task in base if task not in secured]
    kinds = ("no key", "right key", "all keys", "wrong random", "wrong other")
    lost = {f"{t}, {kind}": v for kind in kinds for t, v in _less(base, states[kind], open_tasks).items()}
    yield _worst("under it by", lost, 0.01, "unprotected tasks within 1 point of plain training in every key state")


def _of_released(released: Table) -> Iterator[Line]:
    guess = {label: [a - b for a, b in zip(row["accuracy"], row["open labels alone"], strict=True)]
             for label, row in released.items()}  # fmt: skip
    asked = "closed, as released in plain, within 3 points of what open tasks tell"
    yield _worst("over it by", guess, 0.03, f"{asked}: the answer itself")
    added = {label: row["closed answers add"] for label, row in released.items()}
    yield _worst("closed answers add", added, 0.03, f"{asked}: attackers who see all that is released")


def _of_guess(guess: Table) -> Line:
    opened = {task: (int(sum(row["opened"])), int(sum(row["tries"]))) for task, row in guess.items()}
    task = max(opened, key=lambda t: opened[t][0])
    n, tries = opened[task]
    upper = share_bounds(n, tries)[1]
    measured = f"at most {n} of {tries:,} ({task}; share below {upper:.1e} with 95 % confidence)"
    return Line("random patterns open in fewer than 1 of 100,000 tries", measured, n / tries < 1e-5)


def _of_encrypted(encrypted: Table) -> Line:
    rows = {label: row for label, row in encrypted.items() if "independence" in label}
    found = [p for row in rows.values() for values in row.values() for p in values]
    together = float(combine_pvalues(found).pvalue)
    n = sum(int(label.split()[0].replace(",", "")) for label in rows) // 2 * len(next(iter(rows.values())).popitem()[1])
    measured = f"{n:,} answers a task: least p {min(found):.3f} of {len(found)} tests, together (Fisher) {together:.2f}"
    return Line("closed, encrypted, exactly noise: independent of label and network", measured, together > 0.01)


def _of_beta(beta: Table) -> Iterator[Line]:
    tasks = [curve for curve in next(iter(beta.values())) if curve.startswith("attacker's gain")]
    none = {curve.removeprefix("attacker's gain on "): beta["0.0"][curve] for curve in tasks}
    yield _worst("gain", none, 0.03, "decoupled with beta = 0: attackers on all open outputs gain at most 3 points")
    back = {}
    for curve in next(iter(beta.values())):
        if curve.endswith("with all keys"):
            continue
        # Whoever gains less than nothing does better with the best guess: that is a gain of 0.
        means = [max(0.0, fmean(row[curve])) for row in beta.values()]
        back[curve] = [max(0.0, *(a - b for a, b in itertools.pairwise(means)))]
    yield _worst("largest step back", back, 0.01, "the trade-off over beta is monotone (within 1 point)")


def page(folder: Path = report.RESULTS) -> str:
    """Return the page as Markdown."""
    parts = [
        "# Keyed models: what was asked, and what was measured",
        "Made by `python -m benchmarks.mtk.page` from `benchmarks/results/mtk_*.json`; each of those names the command "
        "that remakes it, the commit and the machine. Mean and deviation over seeds, each with fresh keys. What the "
        "columns mean stands in `benchmarks/mtk/experiments.py`; what follows from them in [mtk.md](mtk.md). Lines of "
        "the first tables show the task (and state) that does worst.",
    ]
    for data in SHOWN:
        found = list(lines(data, folder))
        if not found:
            continue
        parts.append(f"## {TITLES[data]}: secured {', '.join(CASES[data].secured)}")
        rows = [[line.asked, line.measured, "yes" if line.kept else "**no**"] for line in found]
        parts.append(report.table(["asked", "measured", "kept"], rows))
    for data in CASES:
        for name in EXPERIMENTS:
            where, picture = paths(name, data, folder)
            if where.exists():
                parts += list(_section(name, data, stored(where), json.loads(where.read_text()), picture))
    return "\n\n".join(parts) + "\n"


def _section(name: str, data: str, rows: Rows, content: dict[str, object], picture: Path) -> Iterator[str]:
    yield f"## {TITLES[data]}: {name}"
    yield f"{(EXPERIMENTS[name].__doc__ or '').splitlines()[0]} `{content['command']}`"
    yield table(rows)
    if picture.exists():
        yield f"![{name} on {data}](../benchmarks/results/{picture.name})"


def main() -> None:
    """Run from the command line."""
    argparse.ArgumentParser(
        prog="python -m benchmarks.mtk.page", description=(__doc__ or "").splitlines()[0]
    ).parse_args()
    for data, name in itertools.product(CASES, EXPERIMENTS):
        where, picture = paths(name, data, report.RESULTS)
        if where.exists():
            draw(stored(where), name, picture)
    report.write(PAGE, page())
    print(f"written: {PAGE.relative_to(report.ROOT)}")


if __name__ == "__main__":
    main()
