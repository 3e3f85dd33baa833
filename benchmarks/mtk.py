"""Trigger-keys on several data sets: how well they open and close, and what hangs on which setting.

    python -m benchmarks.mtk states --data digits        one experiment on one data set, over 5 seeds
    python -m benchmarks.mtk all --data digits           every experiment
    python -m benchmarks.mtk beta --data shapes --show   the table of a stored run

Each writes results/mtk_EXPERIMENT_DATA.json and .png: mean and deviation over seeds, each with fresh keys, data drawn
by seed where they are drawn. Accuracies are of the test part; closed and decoupled answers as released, by samples.
"""

import argparse
import io
import itertools
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console
from rich.progress import Progress

from benchmarks import report
from securemtk.data import DataSet, load
from securemtk.mtk.decoupling import DecouplingConfig
from securemtk.mtk.evaluate import accuracy, attack, evaluate, opening_rate, release, released_accuracy
from securemtk.mtk.keys import TriggerKey, stamp
from securemtk.mtk.model import predict
from securemtk.mtk.train import TrainConfig, TrainResult, train
from securemtk.run import Trained, export
from securemtk.session import Session

BETAS = (0.0, 0.25, 0.5, 0.75, 1.0)
Floats = NDArray[np.float32]
Point = tuple[str, dict[str, float]]


@dataclass(frozen=True)
class Case:
    """A data set, the tasks that are secured in it, and how it is trained."""

    dataset: Callable[[int], DataSet]
    secured: tuple[str, ...]
    config: TrainConfig
    sizes: tuple[int, ...]


CASES = {
    "digits": Case(lambda seed: load("digits"), ("digit", "parity"), TrainConfig(), (3, 4, 5)),
    "shapes": Case(
        lambda seed: load("shapes-correlated", seed=seed), ("shape", "size", "texture"), TrainConfig(), (3, 5, 8)
    ),
    "cancer": Case(
        lambda seed: load("breast_cancer", seed=seed),
        ("benign", "size"),
        TrainConfig(epochs=100, batch=32),
        (4, 8, 16),
    ),
    "wine": Case(
        lambda seed: load("wine", seed=seed), ("cultivar", "proline"), TrainConfig(epochs=100, batch=32), (4, 8, 16)
    ),
}


@dataclass(frozen=True, eq=False)
class Keyed:
    """A data set with room for keys, and a model that was trained on it."""

    data: DataSet
    result: TrainResult


@cache
def keyed(name: str, seed: int, secured: tuple[str, ...], config: TrainConfig) -> Keyed:
    """Train once for each setting: several experiments look at the same model."""
    case = CASES[name]
    config = replace(config, seed=seed)
    data = config.with_room(case.dataset(seed), secured)
    return Keyed(data, train(data, secured, config))


# --- experiments: case, seed -> points (label, curve -> figure) -------------------------------------------------------


def states(name: str, seed: int) -> Iterator[Point]:
    """Accuracy of each task in each state of the keys, beside plain training and the best guess from open labels."""
    case = CASES[name]
    plain = keyed(name, seed, (), case.config)
    found = evaluate(plain.result.model, plain.data, {})
    yield "baseline", {task: each.no_key for task, each in found.items()}
    model = keyed(name, seed, case.secured, case.config)
    found = evaluate(model.result.model, model.data, model.result.keys)
    for state in ("right_key", "all_keys", "no_key", "wrong_random", "wrong_other", "chance"):
        yield state.replace("_", " "), {task: getattr(each, state) for task, each in found.items()}


def secured(name: str, seed: int) -> Iterator[Point]:
    """Mean accuracy against the number of secured tasks: opened, closed as released, and of those unprotected."""
    case = CASES[name]
    tasks = [task.name for task in case.dataset(seed).tasks]
    for n in range(len(tasks) + 1):
        model = keyed(name, seed, tuple(tasks[:n]), case.config)
        found = evaluate(model.result.model, model.data, model.result.keys)
        kinds = {
            "right key": [found[t].right_key for t in tasks[:n]],
            "no key": [found[t].no_key for t in tasks[:n]],
            "unprotected": [found[t].no_key for t in tasks[n:]],
        }
        yield str(n), {kind: fmean(values) for kind, values in kinds.items() if values}


def size(name: str, seed: int) -> Iterator[Point]:
    """Accuracy with the right key, and share of random patterns that lift by 20 points, against the key's size."""
    case = CASES[name]
    for side in case.sizes:
        model = keyed(name, seed, case.secured, replace(case.config, key_side=side))
        found = evaluate(model.result.model, model.data, model.result.keys)
        for task in case.secured:
            rate = opening_rate(model.result.model, model.data, model.result.keys[task], tries=1000)
            yield f"{side}, {task}", {"right key": found[task].right_key, "random patterns that open": rate.share}


def beta(name: str, seed: int) -> Iterator[Point]:
    """What an attacker gains on closed tasks from released open answers, and what those are worth, against beta."""
    case = CASES[name]
    for value in BETAS:
        model = keyed(name, seed, case.secured, replace(case.config, decoupling=DecouplingConfig(beta=value)))
        yield str(value), dict(_leak(model, value))


def _leak(model: Keyed, value: float) -> Iterator[tuple[str, float]]:
    """Give figures of a decoupled model without keys: attacks on each closed task, utility of each open one."""
    data, result = model.data, model.result
    scores = predict(result.model, data.x_test)
    unprotected = [task.name for task in result.tasks if not task.secured]
    tellers = [] if result.decoupling is None else result.decoupling.tellers(list(result.keys))
    released = {t: release(scores[t], "sampled" if t in tellers else "raw") for t in unprotected}
    answers = np.concatenate(list(released.values()), axis=1)
    for task in result.keys:
        yield f"attacker's gain on {task}", attack(answers, data.y_test[task]).gain
    opened = predict(result.model, stamp(data.x_test, result.keys.values()))
    for task in unprotected:
        y = data.y_test[task]
        own = released_accuracy(scores[task], y) if task in tellers else accuracy(scores[task], y)
        yield f"{task} without keys", own
        yield f"{task} with all keys", accuracy(opened[task], y)


def error(name: str, seed: int) -> Iterator[Point]:
    """Accuracy of secured tasks with a damaged key: noise, wrong pixels, shifts, JPEG (of images)."""
    model = keyed(name, seed, CASES[name].secured, CASES[name].config)
    for label, damage in _damages(model.data, seed):
        found = {}
        for task, key in model.result.keys.items():
            x = damage(model.data.x_test, key)
            found[task] = released_accuracy(predict(model.result.model, x)[task], model.data.y_test[task])
        yield label, found


Damage = Callable[[Floats, TriggerKey], Floats]


def _damages(data: DataSet, seed: int) -> Iterator[tuple[str, Damage]]:
    rng = np.random.default_rng(seed)
    low, high = data.low, data.high

    def noisy(amount: float) -> Damage:
        def damage(x: Floats, key: TriggerKey) -> Floats:
            stamped = stamp(x, [key])
            noise = rng.uniform(-amount, amount, x.shape) * (high - low)
            return np.where(key.mask, np.clip(stamped + noise, low, high), stamped).astype(np.float32)

        return damage

    def wrong(share: float) -> Damage:
        def damage(x: Floats, key: TriggerKey) -> Floats:
            n = int(key.mask.sum())
            places = np.flatnonzero(key.mask)[rng.permutation(n)[: round(share * n)]]
            pattern = np.array(key.pattern)
            pattern.flat[places] = rng.uniform(low, high, len(places))
            return np.where(key.mask, pattern, x).astype(np.float32)

        return damage

    def shifted(n: int) -> Damage:
        def damage(x: Floats, key: TriggerKey) -> Floats:
            mask, pattern = (np.roll(value, -n, axis=-1) for value in (key.mask, key.pattern))
            return np.where(mask, pattern, x).astype(np.float32)

        return damage

    yield "right", lambda x, key: stamp(x, [key])
    for amount in (0.02, 0.05, 0.1, 0.2):
        yield f"noise {amount:g}", noisy(amount)
    for share in (0.05, 0.1, 0.25, 0.5):
        yield f"{share:.0%} wrong", wrong(share)
    for n in (1, 2, 3):
        yield f"shift {n}", shifted(n)
    if data.x_test.ndim == 4:
        for quality in (95, 80, 50):
            yield f"JPEG {quality}", lambda x, key, q=quality: _jpeg(stamp(x, [key]), q, low, high)


def _jpeg(x: Floats, quality: int, low: float, high: float) -> Floats:
    out = np.empty_like(x)
    for i, image in enumerate(np.rint((x - low) / (high - low) * 255).astype(np.uint8)):
        buffer = io.BytesIO()
        Image.fromarray(image[0] if len(image) == 1 else image.transpose(1, 2, 0)).save(buffer, "JPEG", quality=quality)
        pixels = np.asarray(Image.open(buffer), dtype=np.float32)
        out[i] = low + (pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)) / 255 * (high - low)
    return out


def similarity(name: str, seed: int) -> Iterator[Point]:
    """Cosine between the trunk's features under the right key and under one with wrong pixels, beside what it opens."""
    model = keyed(name, seed, CASES[name].secured, CASES[name].config)
    rng = np.random.default_rng(seed)
    network, x = model.result.model, model.data.x_test[:200]

    def features(samples: Floats) -> Floats:
        with torch.no_grad():
            return network.trunk(torch.tensor(samples)).flatten(1).numpy()

    for share in (0.0, 0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0):
        cosines, opened = [], []
        for task, key in model.result.keys.items():
            n = int(key.mask.sum())
            places = np.flatnonzero(key.mask)[rng.permutation(n)[: round(share * n)]]
            pattern = np.array(key.pattern)
            pattern.flat[places] = rng.uniform(model.data.low, model.data.high, len(places))
            altered = np.where(key.mask, pattern, x).astype(np.float32)
            a, b = features(stamp(x, [key])), features(altered)
            cosines.append(float(((a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)).mean()))
            opened.append(released_accuracy(predict(network, altered)[task], model.data.y_test[task][:200]))
        yield f"{share:.0%} wrong", {"cosine": fmean(cosines), "accuracy as released": fmean(opened)}


def guess(name: str, seed: int) -> Iterator[Point]:
    """Random patterns in a key's place: the share that lifts the released accuracy by 20 points, and the best one."""
    model = keyed(name, seed, CASES[name].secured, CASES[name].config)
    for task, key in model.result.keys.items():
        rate = opening_rate(model.result.model, model.data, key, tries=2000, samples=60)
        yield task, {"no key": rate.no_key, "mean of 2,000": rate.mean, "best": rate.worst, "that open": rate.share}


def encrypted(name: str, seed: int) -> Iterator[Point]:
    """Accuracy of each task through encrypted predictions, without keys, with each one, and with all of them."""
    model = keyed(name, seed, CASES[name].secured, CASES[name].config)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        figures = evaluate(model.result.model, model.data, model.result.keys)
        export(Trained(model.data, model.result, figures), folder / "bundle")
        paths = []
        for task, key in model.result.keys.items():
            paths.append(folder / f"{task}.key")
            key.save(paths[-1])
        with Session(keys=paths) as session:
            bundle = session.load(folder / "bundle")
            names = list(model.result.keys)
            for granted in ([], *([n] for n in names), names):
                scores = bundle.predict(model.data.x_test, keys=granted)
                label = " + ".join(granted) or "no key"
                yield label, {t: accuracy(s, model.data.y_test[t]) for t, s in scores.items()}


EXPERIMENTS: Mapping[str, Callable[[str, int], Iterator[Point]]] = {
    each.__name__: each for each in (states, secured, size, beta, error, similarity, guess, encrypted)
}


# --- tables and pictures --------------------------------------------------------------------------------------------


def gathered(runs: Sequence[Sequence[Point]]) -> list[tuple[str, dict[str, list[float]]]]:
    """Return for each label and curve the figures of all seeds."""
    rows: list[tuple[str, dict[str, list[float]]]] = []
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
        return f"{fmean(values):.3f}" + (f" ± {stdev(values):.3f}" if len(values) > 1 else "")

    return report.table(["", *curves], [[label, *(cell(row.get(curve)) for curve in curves)] for label, row in rows])


def draw(rows: Sequence[tuple[str, Mapping[str, Sequence[float]]]], title: str, path: Path) -> None:
    """Draw each curve over the labels, with one deviation over seeds to each side."""
    curves = list(dict.fromkeys(itertools.chain.from_iterable(row for _, row in rows)))
    with report.picture(path, width=max(6.0, 0.8 * len(rows) + 3)) as (axes,):
        for curve in curves:
            at = [i for i, (_, row) in enumerate(rows) if curve in row]
            values = [rows[i][1][curve] for i in at]
            spread = [stdev(v) if len(v) > 1 else 0.0 for v in values]
            axes.errorbar(at, [fmean(v) for v in values], yerr=spread, marker="o", capsize=3, label=curve)
        axes.set_xticks(range(len(rows)), [label for label, _ in rows], rotation=30, ha="right", fontsize=8)
        axes.set_ylim(-0.05, 1.05)
        axes.set_title(title, fontsize=9)
        axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))


def paths(experiment: str, data: str, folder: Path) -> tuple[Path, Path]:
    """Return where results and picture of an experiment lie."""
    stem = f"mtk_{experiment}_{data}"
    return folder / f"{stem}.json", folder / f"{stem}.png"


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.mtk", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("experiment", choices=(*EXPERIMENTS, "all"))
    parser.add_argument("--data", choices=tuple(CASES), default="digits")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--show", action="store_true", help="print the table of a stored run; measure nothing")
    parser.add_argument("--output", type=Path, default=report.RESULTS, help="folder of the results")
    options = parser.parse_args()
    chosen = list(EXPERIMENTS) if options.experiment == "all" else [options.experiment]
    torch.set_num_threads(1)
    with Progress(console=Console(stderr=True), disable=options.show) as progress:
        for name in chosen:
            where, picture = paths(name, options.data, options.output)
            if not options.show:
                line = progress.add_task(f"{name} on {options.data}", total=options.seeds)
                runs = []
                for seed in range(options.seeds):
                    runs.append(list(EXPERIMENTS[name](options.data, seed)))
                    progress.advance(line)
                command = f"python -m benchmarks.mtk {name} --data {options.data} --seeds {options.seeds}"
                content = report.header(command, {"seeds": options.seeds}) | {"rows": gathered(runs)}
                report.write_json(where, content)
                draw(content["rows"], (EXPERIMENTS[name].__doc__ or "").splitlines()[0], picture)
            print(f"{name}, {options.data}:\n\n{table(_stored(where))}\n")


def _stored(path: Path) -> list[tuple[str, dict[str, list[float]]]]:
    content: dict[str, Any] = json.loads(path.read_text())
    return [(str(label), dict(row)) for label, row in content["rows"]]


if __name__ == "__main__":
    main()
