"""How well trigger-keys open and close tasks on real digits, over several seeds.

    python -m benchmarks.mtk_digits                  table on stdout, results/mtk_digits.json
    python -m benchmarks.mtk_digits --decoys 0 --seeds 2 --name no_decoys

Each seed trains a plain baseline and a keyed model with fresh keys, and measures both on the test split.
"""

import argparse
import json
import os
import platform
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from statistics import fmean

import numpy as np
import torch

from protocols.prg import Stream
from securemtk.data import DataSet, load
from securemtk.mtk.answers import answer_stats, draw_answers
from securemtk.mtk.assembler import AssemblerConfig
from securemtk.mtk.evaluate import Release, attack, evaluate, opening_rate, probabilities, release
from securemtk.mtk.model import predict
from securemtk.mtk.train import TrainConfig, TrainResult, train

ROOT = Path(__file__).parent
SECURED = ("digit", "parity")
RULES: tuple[Release, ...] = ("sampled", "rounded", "raw")
# Draws of the authority's noise for each test sample: enough rows to see a gain of one point.
NOISE_DRAWS = 2


def measure(dataset: DataSet, config: TrainConfig) -> dict[str, object]:
    """Train baseline and keyed model with one seed and return everything the table needs."""
    start, cpu = time.perf_counter(), time.process_time()
    plain = train(dataset, config=config)
    middle = time.perf_counter()
    keyed = train(dataset, secured=SECURED, config=config)
    end, cpu = time.perf_counter(), time.process_time() - cpu
    states = {rule: evaluate(keyed.model, dataset, keyed.keys, how=rule) for rule in RULES}
    scores = predict(keyed.model, dataset.x_test)
    return {
        "seed": config.seed,
        "seconds": {"baseline": middle - start, "keyed": end - middle},
        "cpu_seconds": cpu,
        "baseline": {t: r.no_key for t, r in evaluate(plain.model, dataset, {}).items()},
        "states": {rule: {t: asdict(r) for t, r in found.items()} for rule, found in states.items()},
        "opening": {
            rule: {t: asdict(opening_rate(keyed.model, dataset, keyed.keys[t], how=rule)) for t in SECURED}
            for rule in RULES
        },
        "attack": {
            rule: {t: attack(release(scores[t], rule), dataset.y_test[t]).gain for t in SECURED} for rule in RULES
        },
        "attack_on_open_scores": {
            t: attack(scores["large"], dataset.y_test[t], [dataset.y_test["large"]]).gain for t in SECURED
        },
        "attack_on_noise": {t: _noise_gain(dataset, keyed, t) for t in SECURED},
        "kl": {t: float(-np.log(probabilities(scores[t]) * scores[t].shape[1]).mean()) for t in SECURED},
        "largest_score": float(max(np.abs(s).max() for s in scores.values())),
        "comparisons": keyed.model.comparisons(),
    }


def _noise_gain(dataset: DataSet, keyed: TrainResult, task: str) -> float:
    """Return an attacker's gain from what the authority answers for a closed task: it can only be chance."""
    y = np.tile(dataset.y_test[task], NOISE_DRAWS)
    stats = answer_stats(keyed.model, dataset, keyed.keys)[task]
    return attack(draw_answers(stats, len(y), Stream()), y).gain


def table(runs: Sequence[dict[str, object]]) -> str:
    """Return the Markdown table: mean over seeds, and the worst of them in brackets."""
    raw = json.loads(json.dumps(runs))

    def cell(values: Sequence[float], *, high_is_bad: bool, form: str = ".3f") -> str:
        return f"{fmean(values):{form}} ({max(values) if high_is_bad else min(values):{form}})"

    lines = ["| | " + " | ".join((*SECURED, "large")) + " |", "| --- |" + " --- |" * 3]

    def row(name: str, *cells: str) -> None:
        lines.append(f"| {name} | " + " | ".join((*cells, *[""] * (3 - len(cells)))) + " |")

    tasks = (*SECURED, "large")
    row("chance (best guess from true open labels)", *(f"{raw[0]['states']['raw'][t]['chance']:.3f}" for t in tasks))
    row("plain baseline", *(cell([r["baseline"][t] for r in raw], high_is_bad=False) for t in tasks))
    for state in ("right_key", "all_keys"):
        row(
            state.replace("_", " "),
            *(cell([r["states"]["sampled"][t][state] for r in raw], high_is_bad=False) for t in tasks),
        )
    row(
        "baseline - right key, points",
        *(
            cell([100 * (r["baseline"][t] - r["states"]["sampled"][t]["right_key"]) for r in raw], high_is_bad=True)
            for t in tasks
        ),
    )
    for rule in RULES:
        for state in ("no_key", "wrong_random", "wrong_other"):
            row(
                f"{state.replace('_', ' ')}, {rule}",
                *(
                    cell([r["states"][rule][t][state] for r in raw], high_is_bad=t in SECURED)
                    for t in (tasks if rule == "sampled" else SECURED)
                ),
            )
    for rule in RULES:
        row(
            f"share of 1,000 random patterns that lift by 20 points, {rule}",
            *(cell([r["opening"][rule][t]["share"] for r in raw], high_is_bad=True) for t in SECURED),
        )
    for rule in RULES:
        row(
            f"attacker's gain, no key, {rule}",
            *(cell([r["attack"][rule][t] for r in raw], high_is_bad=True) for t in SECURED),
        )
    for name, title, form in (
        ("attack_on_noise", "attacker's gain from the authority's noise", ".3f"),
        ("attack_on_open_scores", "attacker's gain from the raw scores of large alone, over its label", ".3f"),
        ("kl", "KL(uniform, closed answer), nats", ".0e"),
    ):
        row(title, *(cell([r[name][t] for r in raw], high_is_bad=True, form=form) for t in SECURED))
    seconds = [sum(r["seconds"].values()) for r in raw]
    lines.append("")
    lines.append(
        f"{len(raw)} seeds; both trainings {fmean(seconds):.0f} s on average, {max(seconds):.0f} s at most, "
        f"{fmean(r['cpu_seconds'] for r in raw):.0f} s of one core; "
        f"largest score {max(r['largest_score'] for r in raw):.1f}; {raw[0]['comparisons']} comparisons a sample."
    )
    return "\n".join(lines)


def _machine() -> dict[str, object]:
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return found.stdout.strip() or "unknown"


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
        file.write(text)
    os.replace(file.name, path)


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.mtk_digits", description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=6, help="number of seeds, 0, 1, ...")
    parser.add_argument("--epochs", type=int, default=TrainConfig.epochs)
    parser.add_argument("--side", type=int, default=11, help="side of the digit in its 16x16 pixels")
    parser.add_argument("--decoys", type=int, default=AssemblerConfig.decoys, help="decoy copies of each sample")
    parser.add_argument("--targets", default=AssemblerConfig.targets, choices=("soft", "random"))
    parser.add_argument("--name", default="mtk_digits", help="of the file in benchmarks/results")
    options = parser.parse_args()
    config = TrainConfig(
        epochs=options.epochs, assembler=AssemblerConfig(targets=options.targets, decoys=options.decoys)
    )
    dataset = load("digits", side=options.side)
    runs = []
    for seed in range(options.seeds):
        runs.append(measure(dataset, replace(config, seed=seed)))
        content = {
            "machine": _machine(),
            "commit": _commit(),
            "data": f"digits, side {options.side}",
            "config": asdict(config),
            "runs": runs,
        }
        _write(ROOT / "results" / f"{options.name}.json", json.dumps(content, indent=1) + "\n")
    print(table(runs))


if __name__ == "__main__":
    main()
