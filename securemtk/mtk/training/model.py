"""The network: one trunk shared by all tasks, and one branch for each.

It is made for secure computation, where a comparison costs a hundred times a multiplication and every layer of
them one or two rounds: strided convolutions instead of pooling, three layers of ReLU, batch normalisation that
folds into the convolutions on export.

Source: trunk and branches, [Wan21] figure 1; docs/method.md#facts; the layers are ours.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from protocols.errors import InputError, ShapeError
from securemtk.tasks import Task

LEAST_SIDE = 8

Scores = NDArray[np.float32]

_BATCH = 4096


def image_trunk(shape: Sequence[int], width: int = 16) -> nn.Sequential:
    """Return strided convolutions, to sides of 16 at most and on to 4, each with batch normalisation and ReLU.

    Args:
        shape: (C, H, W) of one sample, H and W at least 8.
        width: channels of the first convolution; each one has twice as many as the one before.

    Returns:
        A module (n, C, H, W) -> (n, F). At the default width: 1,536 ReLUs for sides up to 16 and 7,168 above, whatever
        the size of the image. Large or rich images deserve a trunk of their own.

    Raises:
        ShapeError: the shape is not that of an image of at least 8x8.
    """
    if len(shape) != 3 or shape[0] < 1 or min(shape[1:]) < LEAST_SIDE:
        raise ShapeError(f"shape must be (C, H, W) with H, W >= {LEAST_SIDE}; got {tuple(shape)}")
    channels, *sides = shape
    side, stride = max(sides), max(math.ceil(max(sides) / 16), 1 + (max(sides) > 8))
    layers: list[nn.Module] = []
    while True:
        kernel = stride + 1 + stride % 2
        # Without bias: the shift of the normalisation is one already.
        convolution = nn.Conv2d(channels, width, kernel, stride=stride, padding=kernel // 2, bias=False)
        layers += [convolution, nn.BatchNorm2d(width), nn.ReLU()]
        side = math.ceil(side / stride)
        if side <= 4:
            return nn.Sequential(*layers, nn.Flatten())
        channels, width, stride = width, 2 * width, 2


def table_trunk(features: int, width: int = 128) -> nn.Sequential:
    """Return two dense layers with batch normalisation and ReLU for rows of a table.

    Args:
        features: columns of the table, those of the keys included.
        width: of both layers.

    Returns:
        A module (n, features) -> (n, width).
    """
    return nn.Sequential(
        nn.Linear(features, width, bias=False),
        nn.BatchNorm1d(width),
        nn.ReLU(),
        nn.Linear(width, width, bias=False),
        nn.BatchNorm1d(width),
        nn.ReLU(),
    )


class MultiTaskModel(nn.Module):
    """A shared trunk h and for each task i a branch g_i: f_i(x) = g_i(h(x)).

    Args:
        tasks: one output each, in this order, with unique names.
        shape: (C, H, W) or (F,) of one sample.
        trunk: module (n, *shape) -> (n, ...); its output is flattened. `image_trunk` or `table_trunk` when absent.
        hidden: width of the one hidden layer of each branch. The branch needs one: it is where features and key meet.

    Raises:
        InputError: no tasks, or a name stands twice.
        ShapeError: the trunk does not take samples of this shape.

    Example:
        >>> model = MultiTaskModel((Task("digit", 10), Task("parity", 2)), (1, 16, 16))
        >>> [scores.shape for scores in model(torch.zeros(4, 1, 16, 16))]
        [torch.Size([4, 10]), torch.Size([4, 2])]
    """

    def __init__(
        self, tasks: Sequence[Task], shape: Sequence[int], *, trunk: nn.Module | None = None, hidden: int = 64
    ) -> None:
        super().__init__()
        names = [task.name for task in tasks]
        if not names or len(set(names)) != len(names):
            raise InputError(f"tasks must be one or more with unique names; got {names}")
        self.tasks = tuple(tasks)
        self.shape = tuple(shape)
        default = table_trunk(shape[0]) if len(shape) == 1 else image_trunk(shape)
        self.trunk = default if trunk is None else trunk
        features = _probe(self.trunk, self.shape).numel()
        self.branches = nn.ModuleList(
            nn.Sequential(nn.Linear(features, hidden), nn.ReLU(), nn.Linear(hidden, task.classes)) for task in tasks
        )

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return for each task, in order, the scores (logits): float32 (n, classes)."""
        features = self.trunk(x).flatten(1)
        return tuple(branch(features) for branch in self.branches)

    def comparisons(self) -> int:
        """Return how many ReLUs one sample passes: what a secure prediction pays for."""
        counts: list[int] = []
        hooks = [
            module.register_forward_hook(lambda _module, _inputs, output: counts.append(output[0].numel()))
            for module in self.modules()
            if isinstance(module, nn.ReLU)
        ]
        _probe(self, self.shape)
        for hook in hooks:
            hook.remove()
        return sum(counts)


def predict(model: MultiTaskModel, x: NDArray[np.float32]) -> dict[str, Scores]:
    """Return the scores (logits) of each task, float32 (n, classes), computed in the clear.

    Args:
        model: in evaluation mode; it runs on the device where it lies.
        x: float32 (n, C, H, W) or (n, F), with whatever keys are stamped into it.

    Raises:
        ShapeError: samples are of another shape than the model's.
    """
    if tuple(x.shape[1:]) != model.shape:
        raise ShapeError(f"samples must be of shape {model.shape}; got {tuple(x.shape[1:])}")
    device = next(model.parameters()).device
    parts: list[tuple[torch.Tensor, ...]] = []
    with torch.no_grad():
        for start in range(0, len(x), _BATCH):
            parts.append(model(torch.tensor(x[start : start + _BATCH], device=device)))
    columns = zip(*parts, strict=True)
    return {task.name: torch.cat(c).cpu().numpy() for task, c in zip(model.tasks, columns, strict=True)}


def _probe(module: nn.Module, shape: Sequence[int]) -> Any:
    """Return the module's output for one black sample; leave the module as it was."""
    was_training = module.training
    parameter = next(module.parameters(), torch.empty(0))
    module.eval()
    try:
        with torch.no_grad():
            return module(torch.zeros(1, *shape, device=parameter.device))
    except RuntimeError as error:
        raise ShapeError(f"the trunk must take samples of shape {tuple(shape)}; got: {error}") from None
    finally:
        module.train(was_training)
