"""Keys at a split point: the user runs the first layer in the clear, keys go into its maps, the rest is encrypted.

    python -m examples.split_user

The first layer is of a network that was trained without keys, and public: the user computes the maps of an image with
it. What crosses to the cloud are shares of these maps. The authority adds the key of the task that the user may ask.
"""

import tempfile
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import numpy as np
import torch
from torch import nn

from securemtk.data import DataSet, load
from securemtk.data.base import Samples
from securemtk.mtk.evaluation.evaluate import accuracy, evaluate
from securemtk.mtk.keys.key import stamp
from securemtk.mtk.training.model import image_trunk, predict
from securemtk.mtk.training.train import TrainConfig, train
from securemtk.privynet.split_point import SplitPoint
from securemtk.runs.run_folder import KEY_SUFFIX, Trained, export
from securemtk.serving.session import Model, Scores, Session
from securemtk.support.progress import progress_bar

SECURED = ("digit", "parity")
LAYERS = 3  # convolution, batch normalisation, ReLU
ROOM = 4  # rows below each map: two keys of 4x4 stand side by side in its 8 columns
N_ASKED = 100


# --- who trains -----------------------------------------------------------------------------------------------------


def plain_network(images: DataSet, config: TrainConfig) -> tuple[nn.Sequential, dict[str, float]]:
    """Train without keys; return the first layer, which becomes public, and the accuracies of the whole network."""
    with progress_bar("without keys") as bar:
        model = train(images, config=config, progress=bar).model
    layers = list(model.trunk.children())[:LAYERS]
    return nn.Sequential(*layers), {name: task.no_key for name, task in evaluate(model, images, {}).items()}


def keyed_on_maps(images: DataSet, split: SplitPoint, config: TrainConfig) -> Trained:
    """Train the rest on the maps that cross the split, with keys in them."""
    maps = split.dataset(images)
    channels, height, width = maps.shape
    torch.manual_seed(config.seed)
    # As if there were no room: for more than 8 rows it would halve the resolution.
    trunk = image_trunk((channels, height - split.room, width))
    with progress_bar("with keys in the maps") as bar:
        result = train(maps, SECURED, config, trunk=trunk, progress=bar)
    return Trained(maps, result, evaluate(result.model, maps, result.keys))


def handed_out(trained: Trained, folder: Path) -> tuple[Path, Path]:
    """Write the bundle, for the cloud, and the keys, for the authority; return their folders."""
    bundle, keys = folder / "bundle", folder / "keys"
    export(trained, bundle)
    keys.mkdir()
    for name, key in trained.result.keys.items():
        key.save(keys / f"{name}{KEY_SUFFIX}")
    return bundle, keys


# --- who asks -------------------------------------------------------------------------------------------------------


def ask(model: Model, split: SplitPoint, images: Samples, keys: Sequence[str]) -> Scores:
    """Return the scores of images (n, 1, 16, 16): local part in the clear at the user, the rest under encryption."""
    return model.predict(split.maps(images), open_tasks=keys)


# --- both -----------------------------------------------------------------------------------------------------------


def expected(trained: Trained, split: SplitPoint, images: Samples, keys: Sequence[str]) -> Scores:
    """Return what the network answers in the clear, of those tasks that are open under these keys."""
    scores = predict(trained.result.model, stamp(split.maps(images), [trained.result.keys[name] for name in keys]))
    return {task.name: scores[task.name] for task in trained.result.tasks if not task.secured or task.name in keys}


def main() -> None:
    """Train, hand out, ask in every state of the keys, and compare."""
    images, config = load("digits"), TrainConfig()
    local, baseline = plain_network(images, config)
    split = SplitPoint.fit(local, images, room=ROOM)
    trained = keyed_on_maps(images, split, config)
    print(f"what crosses: {trained.dataset.shape} in [{split.low:.2f}, {split.high:.2f}]")
    for name, figures in trained.metrics.items():
        print(
            f"{name:>8}: plain network {baseline[name]:.3f}, right key {figures.right_key:.3f}, "
            f"no key {figures.no_key:.3f}, random pattern {figures.wrong_random:.3f}"
        )
    x, y = images.x_test[:N_ASKED], images.y_test
    with tempfile.TemporaryDirectory() as folder:
        bundle, keys = handed_out(trained, Path(folder))
        with closing(Session(key_files=keys)) as session:
            model = session.load(bundle)
            for granted in ((), *((name,) for name in SECURED), SECURED):
                scores = ask(model, split, x, granted)
                plain = expected(trained, split, x, granted)
                difference = max(float(np.abs(scores[name] - plain[name]).max()) for name in plain)
                if difference > 0.02:
                    raise SystemExit(f"open answers must be those in the clear; they differ by {difference}")
                right = ", ".join(f"{name} {accuracy(s, y[name][:N_ASKED]):.2f}" for name, s in scores.items())
                print(f"encrypted, {' and '.join(granted) or 'no'} key: {right}; {session.cost}")


if __name__ == "__main__":
    main()
