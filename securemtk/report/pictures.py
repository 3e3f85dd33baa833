"""Pictures of results. A key's pattern is never drawn: a grey box stands for it."""

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter
from numpy.typing import NDArray

from protocols.running.runner import LayerCost

# Okabe and Ito's colours, told apart by colour-blind readers.
GREY, BLUE, ORANGE, GREEN, RED, SKY = "#999999", "#0072b2", "#e69f00", "#009e73", "#d55e00", "#56b4e9"
STATES = {
    "baseline": ("plain baseline", GREY),
    "no_key": ("no key", RED),
    "wrong_key": ("wrong key", ORANGE),
    "right_key": ("right key", SKY),
    "encrypted": ("right key, encrypted", BLUE),
}
CLASS_NAMES = {"parity": ("even", "odd"), "large": ("0-4", "5-9")}
DPI = 150


@dataclass(frozen=True)
class Sample:
    """One encrypted question and its answers.

    Args:
        image: (H, W), as the user holds it: without any key.
        keys: tasks whose keys were granted.
        answers: task -> class of the greatest revealed score.
        truths: task -> true class.
        is_open: task -> whether the answer is one.
    """

    image: NDArray[np.float32]
    keys: tuple[str, ...]
    answers: Mapping[str, int]
    truths: Mapping[str, int]
    is_open: Mapping[str, bool]


def draw_demo(
    tasks: Mapping[str, Mapping[str, Any]],
    samples: Sequence[Sample],
    masks: Mapping[str, NDArray[np.bool_]],
    layers: Sequence[LayerCost],
) -> bytes:
    """Draw accuracy by key state, encrypted questions with their answers, and where the time goes.

    Args:
        tasks: as in demo.json.
        samples: in order of their state of the keys, the same number for each.
        masks: task -> (H, W), where its key lies; only the frame around it is drawn.
        layers: cost by layer of one prediction.

    Returns:
        A PNG file.
    """
    figure = Figure(figsize=(13, 7), dpi=DPI, layout="constrained")
    left, right = _panels(figure.subfigures(1, 2, width_ratios=(1.25, 1)))
    above, below = left.subplots(2, 1, height_ratios=(1.6, 1))
    _accuracies(above, tasks)
    above.legend(ncols=3, fontsize=8, loc="lower center", bbox_to_anchor=(0.5, -0.42), frameon=False)
    _layers(below, layers)
    _questions(right, samples, masks)
    out = io.BytesIO()
    # Without a date the same figures give the same bytes.
    figure.savefig(out, format="png", metadata={"Software": None})
    return out.getvalue()


def _panels(found: Any) -> Any:
    # matplotlib's annotation knows the case of a single one only.
    return found


def _accuracies(
    axes: Axes, tasks: Mapping[str, Mapping[str, Any]], states: Mapping[str, tuple[str, str]] = STATES
) -> None:
    width = 0.8 / len(states)
    for k, (state, (label, colour)) in enumerate(states.items()):
        places = np.arange(len(tasks)) + (k - (len(states) - 1) / 2) * width
        values = [100 * task[state] for task in tasks.values()]
        bars = axes.bar(places, values, 0.92 * width, color=colour, label=label)
        axes.bar_label(bars, fmt="%.0f", fontsize=8, padding=1)
    for i, task in enumerate(tasks.values()):
        chance = 100 * task["chance"]
        axes.hlines(chance, i - 0.45, i + 0.45, colors="black", linestyles="dashed", linewidth=1)
    axes.plot([], [], color="black", linestyle="dashed", linewidth=1, label="what open tasks tell")
    axes.set_xticks(range(len(tasks)), [f"{n}\n({'secured' if t['secured'] else 'open'})" for n, t in tasks.items()])
    axes.set_ylim(0, 112)
    axes.set_yticks(range(0, 101, 20))
    axes.set_ylabel("right answers, %")
    axes.set_title("Each secured task answers only to its own key", loc="left", fontweight="bold")
    axes.spines[["top", "right"]].set_visible(False)


def _layers(axes: Axes, layers: Sequence[LayerCost]) -> None:
    layers = [layer for layer in layers if layer.bytes or layer.rounds]
    names = [layer.op for layer in layers]
    seconds = [layer.seconds for layer in layers]
    bars = axes.barh(range(len(layers)), seconds, color=BLUE)
    notes = [f" {layer.bytes / 1e6:.1f} MB" + (f", {layer.rounds} rounds" if layer.rounds else "") for layer in layers]
    axes.bar_label(bars, notes, fontsize=7)
    axes.set_yticks(range(len(layers)), names, fontsize=7)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.35 * max(seconds, default=1.0))
    axes.set_xlabel("seconds online, all questions at once")
    axes.set_title("Where the time goes", loc="left", fontweight="bold")
    axes.spines[["top", "right"]].set_visible(False)


def _questions(figure: SubFigure, samples: Sequence[Sample], masks: Mapping[str, NDArray[np.bool_]]) -> None:
    states = list(dict.fromkeys(sample.keys for sample in samples))
    columns = len(samples) // len(states)
    figure.suptitle("Encrypted questions, revealed answers", fontweight="bold")
    grid = figure.subplots(len(states), columns, squeeze=False)
    for row, keys in enumerate(states):
        shown = [sample for sample in samples if sample.keys == keys]
        for axes, sample in zip(grid[row], shown, strict=True):
            _question(axes, sample, masks)
        title = f"key: {', '.join(keys)}" if keys else "no key"
        grid[row, 0].set_ylabel(title, fontsize=10, fontweight="bold")


def _question(axes: Axes, sample: Sample, masks: Mapping[str, NDArray[np.bool_]]) -> None:
    axes.imshow(sample.image, cmap="gray", vmin=0, vmax=1)
    for task in sample.keys:
        rows, columns = np.nonzero(masks[task])
        corner = (columns.min() - 0.5, rows.min() - 0.5)
        size = (int(np.ptp(columns)) + 1, int(np.ptp(rows)) + 1)
        axes.add_patch(Rectangle(corner, *size, facecolor=GREY, edgecolor=ORANGE, hatch="xxx", linewidth=2))
    axes.set_xticks([])
    axes.set_yticks([])
    for line, (task, answer) in enumerate(sample.answers.items()):
        shown = CLASS_NAMES[task][answer] if task in CLASS_NAMES else str(answer)
        if sample.is_open[task]:
            colour, text = (GREEN if answer == sample.truths[task] else RED), f"{task}: {shown}"
        else:
            colour, text = GREY, f"{task}: {shown} (noise)"
        axes.text(
            0.5, -0.05 - 0.13 * line, text, transform=axes.transAxes, color=colour, fontsize=9, ha="center", va="top"
        )


# --- attacks --------------------------------------------------------------------------------------------------------

Found = Mapping[str, Any]
Panel = Callable[[Axes, Sequence[Found], Mapping[str, str]], None]
NEAR = ("10% wrong", "20% wrong", "30% wrong", "50% wrong", "noise 5%", "noise 10%", "noise 20%")


def draw_attacks(findings: Sequence[Found]) -> bytes:
    """Draw a panel for each attack that was run; no pattern is drawn, neither a key's nor one that was found.

    Args:
        findings: as in attack.json, of at least one attack.

    Returns:
        A PNG file.
    """
    sorts: tuple[tuple[str, Panel, Callable[[Found], bool]], ...] = (
        ("Random patterns", _guesses, lambda f: "histogram" in f["details"]),
        ("Wrong keys", _wrong_keys, lambda f: "kinds" in f["details"]),
        ("Inverted keys", _inversions, lambda f: f["attack"] == "invert"),
        ("Inferred from all outputs", _inferences, lambda f: f["attack"] == "infer"),
        ("A new branch on the stolen trunk", _branches, lambda f: f["attack"] == "finetune"),
        ("Membership of the training part", _memberships, lambda f: f["attack"] == "membership"),
    )
    panels = {title: (draw, [f for f in findings if chosen(f)]) for title, draw, chosen in sorts}
    panels = {title: panel for title, panel in panels.items() if panel[1]}
    palette = (BLUE, ORANGE, GREEN, RED, SKY, GREY)
    tasks = list(dict.fromkeys(f["task"] for f in findings))
    colours = {task: palette[i % len(palette)] for i, task in enumerate(tasks)}
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(6 * columns, 4.6 * rows), dpi=DPI, layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes, (title, (draw, found)) in zip(grid, panels.items(), strict=False):
        draw(axes, found, colours)
        axes.set_title(title, loc="left", fontweight="bold")
        axes.spines[["top", "right"]].set_visible(False)
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
    out = io.BytesIO()
    figure.savefig(out, format="png", metadata={"Software": None})
    return out.getvalue()


def _guesses(axes: Axes, found: Sequence[Found], colours: Mapping[str, str]) -> None:
    for f in (f for f in found if "no other key" in f["what"]):
        details, task = f["details"], f["task"]
        counts = np.array(details["histogram"])
        edges = np.linspace(0, 100, len(counts) + 1)
        label = f"{task}: {details['opened']} of {details['tries']:,} open"
        axes.stairs(counts, edges, fill=True, color=colours[task], alpha=0.7, label=label)
        axes.axvline(100 * details["threshold"], color=colours[task], linestyle="dashed", linewidth=1)
        axes.axvline(100 * details["right"], color=colours[task], linewidth=1.5)
    axes.plot([], [], color="black", linestyle="dashed", linewidth=1, label="counts as open")
    axes.plot([], [], color="black", linewidth=1.5, label="right key")
    axes.set_yscale("log")
    axes.set_ylim(bottom=0.7)
    axes.set_xlim(0, 100)
    axes.set_xlabel("probability of the true label, %")
    axes.set_ylabel("patterns")
    axes.legend(fontsize=7, loc="center right", bbox_to_anchor=(0.96, 0.5))


def _wrong_keys(axes: Axes, found: Sequence[Found], colours: Mapping[str, str]) -> None:
    tasks = list(dict.fromkeys(f["task"] for f in found))
    names: list[str] = []
    for k, task in enumerate(tasks):
        rows: dict[str, tuple[float, float]] = {}
        for f in (f for f in found if f["task"] == task):
            kinds = f["details"]["kinds"]
            near = {name: (kind["mean"], kind["best"]) for name, kind in kinds.items() if name in NEAR}
            means, bests = ([kind[name] for kind in kinds.values()] for name in ("mean", "best"))
            rows |= near or {f["details"]["group"]: (float(np.mean(means)), max(bests))}
            threshold = f["details"]["threshold"]
        names = list(dict.fromkeys([*names, *rows]))
        places = np.array([names.index(name) for name in rows]) + 0.16 * (k - (len(tasks) - 1) / 2)
        mean, best = 100 * np.array(list(rows.values())).T
        axes.hlines(places, mean, best, color=colours[task], linewidth=1)
        axes.plot(best, places, "o", color=colours[task], markersize=5, label=task)
        axes.plot(mean, places, "|", color=colours[task], markersize=9)
        axes.axvline(100 * threshold, color=colours[task], linestyle="dashed", linewidth=1)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, 102)
    axes.set_xlabel("right answers as released, % (from mean to best; dashed: counts as open)")
    axes.legend(fontsize=8, frameon=False)


def _bars(axes: Axes, rows: Sequence[tuple[str, float, float, str]], chance: str) -> None:
    """Draw horizontal bars, (label, figure, chance, colour), figures and chances in [0, 1]."""
    labels, figures, chances, colours = zip(*rows, strict=True)
    places = range(len(rows))
    axes.barh(places, [100 * value for value in figures], color=colours)
    axes.plot([100 * value for value in chances], places, "k|", markersize=11, markeredgewidth=2)
    for place, figure, mark in zip(places, figures, chances, strict=True):
        axes.text(100 * max(figure, mark) + 2, place, f"{100 * figure:.0f}", fontsize=8, va="center")
    axes.set_yticks(places, labels, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, 112)
    axes.set_xlabel(f"right answers, % (black: {chance})")


def _inversions(axes: Axes, found: Sequence[Found], colours: Mapping[str, str]) -> None:
    rows = [
        (f"{f['task']}, {f['what'].split(':')[0]}", f["figure"], f["details"]["threshold"], colours[f["task"]])
        for f in found
    ]
    _bars(axes, rows, "counts as open")


def _inferences(axes: Axes, found: Sequence[Found], colours: Mapping[str, str]) -> None:
    rows = [
        (f"{f['task']}, {f['details']['rule']}, {f['details']['state']}", f["figure"], f["chance"], colours[f["task"]])
        for f in found
    ]
    _bars(axes, rows, "what true open labels tell")


def _branches(axes: Axes, found: Sequence[Found], colours: Mapping[str, str]) -> None:
    for task in dict.fromkeys(f["task"] for f in found):
        mine = [f for f in found if f["task"] == task]
        n = [f["details"]["labelled"] for f in mine]
        axes.plot(n, [100 * f["figure"] for f in mine], "o-", color=colours[task], label=f"{task}, stolen trunk")
        axes.plot(n, [100 * f["chance"] for f in mine], "s--", color=colours[task], label=f"{task}, from scratch")
    axes.set_xscale("log")
    axes.set_xticks(n, [str(value) for value in n])
    axes.minorticks_off()
    axes.set_ylim(0, 102)
    axes.set_xlabel("labelled samples")
    axes.set_ylabel("right answers, %")
    axes.legend(fontsize=8, frameon=False, loc="lower right")


def _memberships(axes: Axes, found: Sequence[Found], colours: Mapping[str, str]) -> None:
    names = list(found[0]["details"]["areas"])
    for k, f in enumerate(found):
        places = np.arange(len(names)) + 0.16 * (k - (len(found) - 1) / 2)
        error = 2 * f["details"]["standard_error"]
        label = f"{f['task']} ({'closed' if f['details']['closed'] else 'open'})"
        areas = list(f["details"]["areas"].values())
        axes.errorbar(places, areas, error, fmt="o", color=colours[f["task"]], capsize=3, label=label)
    axes.axhline(0.5, color="black", linestyle="dashed", linewidth=1, label="chance")
    axes.set_xticks(range(len(names)), names)
    axes.set_ylim(0.35, 1.02)
    axes.set_ylabel("area under the ROC curve (two standard errors)")
    axes.legend(fontsize=8, frameon=False)


# --- reports --------------------------------------------------------------------------------------------------------

KEY_STATES = {
    "no_key": STATES["no_key"],
    "wrong_random": ("random pattern", GREY),
    "wrong_other": ("another key", STATES["wrong_key"][1]),
    "right_key": STATES["right_key"],
    "all_keys": ("all keys", BLUE),
}
Gains = Sequence[Sequence[float | None]]
# Inches.
WIDEST = 30.0


def draw_states(tasks: Mapping[str, Mapping[str, Any]]) -> bytes:
    """Draw the accuracy of each task in each state of the keys, and what open tasks tell of it.

    Args:
        tasks: by name, the fields of `TaskResult`.

    Returns:
        An SVG file.
    """
    figure = Figure(figsize=(min(max(6.0, 1.9 * len(tasks) + 1), WIDEST), 4.5), layout="constrained")
    axes = figure.subplots()
    _accuracies(axes, tasks, KEY_STATES)
    axes.set_title("Right answers by state of the keys", loc="left", fontweight="bold")
    figure.legend(ncols=3, fontsize=8, loc="outside lower center", frameon=False)
    return _svg(figure)


def draw_leaks(panels: Mapping[str, Gains], rows: Sequence[str], columns: Sequence[str]) -> bytes:
    """Draw what open tasks add to a guess of closed ones, one heat map for each kind of knowledge.

    Args:
        panels: title -> for each row and column the gain over the prior, a share; None where there is none.
        rows: the closed tasks.
        columns: what is open.

    Returns:
        An SVG file.
    """
    width, height = 1.3 + 0.6 * len(columns), 2.4 + 0.45 * len(rows)
    abreast = 1 if width * len(panels) > WIDEST else len(panels)
    below = len(panels) // abreast
    size = (min(max(9.0, width * abreast), WIDEST), height * below)
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(below, abreast, sharey=True, sharex=True, squeeze=False).ravel()
    image = None
    for axes, (title, gains) in zip(grid, panels.items(), strict=True):
        values = np.array([[np.nan if gain is None else 100 * gain for gain in row] for row in gains])
        image = axes.imshow(values, cmap="Blues", vmin=0, vmax=50, aspect="auto")
        for i, j in zip(*np.nonzero(np.isfinite(values)), strict=True):
            shade = "white" if values[i, j] > 30 else "black"
            axes.text(j, i, f"{values[i, j]:+.0f}", ha="center", va="center", color=shade, fontsize=9)
        axes.set_facecolor("#e6e6e6")
        axes.set_xticks(range(len(columns)), columns, rotation=40, ha="right", fontsize=8)
        axes.set_yticks(range(len(rows)), rows, fontsize=9)
        axes.set_title(title, loc="left", fontweight="bold", fontsize=10)
    grid[0].set_ylabel("closed task")
    if image is not None:
        points = FuncFormatter(lambda value, _: f"+{value:.0f}")
        figure.colorbar(image, ax=list(grid), extend="max", format=points, label="points over the prior")
    return _svg(figure)


def _svg(figure: Figure) -> bytes:
    out = io.BytesIO()
    # With a fixed salt and no date the same figures give the same bytes.
    with mpl.rc_context({"svg.hashsalt": "securemtk"}):
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    return out.getvalue()
