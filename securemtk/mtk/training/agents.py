"""The four agents of training and use: each has a narrow interface, and none holds keys, data and model together.

    DataDistributor  samples and labels                      never a key, never a weight
    KeyDistributor   keys, grants and the log of their use   never a sample, never a weight
    Assembler        keys; samples pass through it           never a weight (`securemtk.mtk.training.assembler`)
    ModelKeeper      weights; keyed batches pass through it  never a key, never a sample as it was

`securemtk.mtk.training.train.train` is their composition in one process, and whoever runs that process has everything.
So they do not protect against it; they say which part of the code may touch what, so that each can move to a host of
its own. And what passes through an agent tells it something: the assembler sees samples and labels while it joins
them, and a model keeper that looks at its batches can find the keys, for these are what stays the same from row to row.

Source: [Wan24], docs/method.md#agents; grants and log are ours.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from securemtk.data.base import DataSet
from securemtk.mtk.keys.distributor import KeyDistributor
from securemtk.mtk.training.assembler import Batch
from securemtk.tasks import Task

__all__ = ["DataDistributor", "KeyDistributor", "ModelKeeper"]

Loss = Callable[[Sequence[Tensor], Batch], Tensor]


class DataDistributor:
    """Holds the training samples and their labels, and hands out rows of them.

    Args:
        dataset: its training part is held, its test part is not.
        tasks: whose labels, in this order.
        device: where the samples lie. Small data sets: all of it, and a batch is one indexing operation.
    """

    def __init__(self, dataset: DataSet, tasks: Sequence[Task], device: torch.device | str = "cpu") -> None:
        self._x = torch.tensor(dataset.x_train).to(device)
        self._labels = torch.stack([torch.tensor(dataset.y_train[task.name]) for task in tasks], dim=1).to(device)

    def __len__(self) -> int:
        return len(self._x)

    def rows(self, places: Tensor) -> tuple[Tensor, Tensor]:
        """Return samples and labels for the assembler.

        Args:
            places: int64 (n,), indices of samples.

        Returns:
            float32 (n, C, H, W), and int64 (n, tasks).
        """
        return self._x[places], self._labels[places]


class ModelKeeper:
    """Holds the network, trains it on keyed batches, and answers.

    Args:
        model: (n, C, H, W) -> scores (n, classes) of each task.
        optimizer: of its weights.
        schedule: of the learning rate, a step for each batch.
        backward: `Tensor.backward` or accelerate's.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        schedule: torch.optim.lr_scheduler.LRScheduler,
        backward: Callable[[Tensor], object] = Tensor.backward,
    ) -> None:
        self._model, self._optimizer, self._schedule, self._backward = model, optimizer, schedule, backward

    def learn(self, batch: Batch, loss_of: Loss) -> Tensor:
        """Take one step on a keyed batch, and return its loss, nats (); nothing of the batch is kept.

        Args:
            batch: from the assembler.
            loss_of: gives the loss of scores on a batch.
        """
        self._model.train()
        loss = loss_of(self._model(_channels_last(batch.x)), batch)
        self._optimizer.zero_grad()
        self._backward(loss)
        self._optimizer.step()
        self._schedule.step()
        return loss.detach()

    def answer(self, x: Tensor) -> Sequence[Tensor]:
        """Return the scores (n, classes) of each task for samples that somebody else has stamped, or has not."""
        self._model.eval()
        with torch.no_grad():
            scores: Sequence[Tensor] = self._model(_channels_last(x))
        return scores


def _channels_last(x: Tensor) -> Tensor:
    """Return images in the memory format in which convolutions on a CPU take a quarter less time."""
    return x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x
