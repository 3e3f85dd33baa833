"""Pictures of results. A key's pattern is never drawn: a grey box stands for it."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.patches import Rectangle
from numpy.typing import NDArray

from protocols.runner import LayerCost

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
    _layers(below, layers)
    _questions(right, samples, masks)
    out = io.BytesIO()
    # Without a date the same figures give the same bytes.
    figure.savefig(out, format="png", metadata={"Software": None})
    return out.getvalue()


def _panels(found: Any) -> Any:
    # matplotlib's annotation knows the case of a single one only.
    return found


def _accuracies(axes: Axes, tasks: Mapping[str, Mapping[str, Any]]) -> None:
    width = 0.8 / len(STATES)
    for k, (state, (label, colour)) in enumerate(STATES.items()):
        places = np.arange(len(tasks)) + (k - (len(STATES) - 1) / 2) * width
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
    axes.legend(ncols=3, fontsize=8, loc="lower center", bbox_to_anchor=(0.5, -0.42), frameon=False)
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
