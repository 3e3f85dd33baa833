"""What keys at a split point cost, and what room for them in the maps brings, on digits.

    python -m benchmarks.mtk.split                  table on stdout, results/mtk_split.json
    python -m benchmarks.mtk.split --seeds 1 --sides 16 --name one_seed

The local part is the first layer of the plain network, or a convolution whose weights were drawn and never trained.
"""

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from statistics import fmean
from typing import Any

import torch
from torch import nn

from benchmarks.report import RESULTS, header, table, write_json
from securemtk.data import DataSet, load
from securemtk.mtk.evaluation.evaluate import evaluate, opening_rate
from securemtk.mtk.training.model import image_trunk
from securemtk.mtk.training.train import TrainConfig, train
from securemtk.privynet.split_point import SplitPoint

SECURED = ("digit", "parity")
ROOMS = (0, 4)
LOCALS = ("first layer", "drawn")
CHANNELS, LAYERS = 16, 3
HEAD = ("side", "local part", "room", "points under the plain network, right key", "all keys")


def measure(images: DataSet, seed: int) -> list[dict[str, Any]]:
    """Train the plain network and the keyed rest behind each local part with each room; return a row for each."""
    config = TrainConfig(seed=seed)
    plain = train(images, config=config).model
    baseline = {name: task.no_key for name, task in evaluate(plain, images, {}).items()}
    torch.manual_seed(seed)
    drawn = nn.Sequential(nn.Conv2d(1, CHANNELS, 3, stride=2, padding=1), nn.ReLU())
    parts = (nn.Sequential(*list(plain.trunk.children())[:LAYERS]), drawn)
    rows = []
    for name, local in zip(LOCALS, parts, strict=True):
        for room in ROOMS:
            split = SplitPoint.fit(local, images, room=room)
            maps = split.dataset(images)
            channels, height, width = maps.shape
            torch.manual_seed(seed)
            keyed = train(maps, SECURED, config, trunk=image_trunk((channels, height - room, width)))
            rows.append(
                {
                    "local": name,
                    "room": room,
                    "seed": seed,
                    "range": [split.low, split.high],
                    "baseline": baseline,
                    "states": {t: asdict(r) for t, r in evaluate(keyed.model, maps, keyed.keys).items()},
                    "opening": {t: opening_rate(keyed.model, maps, k).share for t, k in keyed.keys.items()},
                    "comparisons": keyed.model.comparisons(),
                }
            )
    return rows


def summary(rows: Sequence[dict[str, Any]]) -> str:
    """Return a Markdown table: digit / parity / large, each the mean over seeds and the worst of them in brackets."""

    def cell(values: Sequence[float], form: str) -> str:
        return f"{fmean(values):{form}} ({max(values):{form}})"

    def under(mine: Sequence[dict[str, Any]], state: str) -> str:
        losses = {t: [100 * (r["baseline"][t] - r["states"][t][state]) for r in mine] for t in mine[0]["states"]}
        return " / ".join(cell(values, ".1f") for values in losses.values())

    lines = []
    for side, local, room in dict.fromkeys((r["side"], r["local"], r["room"]) for r in rows):
        mine = [r for r in rows if (r["side"], r["local"], r["room"]) == (side, local, room)]
        closed = " / ".join(cell([r["states"][t]["no_key"] for r in mine], ".3f") for t in SECURED)
        opening = f"{max(r['opening'][t] for r in mine for t in SECURED):.3f}"
        lines.append([f"{side}", local, f"{room}", under(mine, "right_key"), under(mine, "all_keys"), closed, opening])
        lines[-1].append(f"{mine[0]['comparisons']:,}")
    return table((*HEAD, "no key", "most random patterns that open", "ReLUs"), lines)


def main() -> None:
    """Measure, write the results, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--sides", type=int, nargs="+", default=[11, 16], help="of the digits in their 16x16 pixels")
    parser.add_argument("--name", default="", help="suffix of the file of results")
    chosen = parser.parse_args()
    rows: list[dict[str, Any]] = []
    head = header("python -m benchmarks.mtk.split", vars(chosen))
    for seed in range(chosen.seeds):
        for side in chosen.sides:
            rows += [{"side": side} | row for row in measure(load("digits", side=side), seed)]
            write_json(RESULTS / f"mtk_split{'_' * bool(chosen.name)}{chosen.name}.json", head | {"rows": rows})
    print(summary(rows))


if __name__ == "__main__":
    main()
