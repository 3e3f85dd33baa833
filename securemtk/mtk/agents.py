"""The four agents of training and use: each has a narrow interface, and none holds keys, data and model together.

    DataDistributor  samples and labels                      never a key, never a weight
    KeyDistributor   keys, grants and the log of their use   never a sample, never a weight
    Assembler        keys; samples pass through it           never a weight (`securemtk.mtk.assembler`)
    ModelKeeper      weights; keyed batches pass through it  never a key, never a sample as it was

`securemtk.mtk.train.train` is their composition in one process, and whoever runs that process has everything. So they
do not protect against it; they say which part of the code may touch what, so that each can move to a host of its own.
And what passes through an agent tells it something: the assembler sees samples and labels while it joins them, and a
model keeper that looks at its batches can find the keys, for these are what stays the same from row to row.

Source: [Wan21], the roles of section 8 of the digest; grants and log are ours.
"""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from protocols.errors import KeyRefused
from securemtk.data.base import DataSet
from securemtk.mtk.assembler import Batch
from securemtk.mtk.grants import Asked, Ledger
from securemtk.mtk.keys import TriggerKey, draw_keys
from securemtk.tasks import Task

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

    def hand(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return samples and labels for the assembler.

        Args:
            rows: int64 (n,), indices of samples.

        Returns:
            float32 (n, C, H, W), and int64 (n, tasks).
        """
        return self._x[rows], self._labels[rows]


class KeyDistributor:
    """Holds keys, decides who may use them, and gives them out: in training to the assembler, later to the dealer.

    Args:
        keys: all keys that it may give out, of any number of models.
        ledger: grants and the log of uses; without one everybody who can ask may use every key, and nothing is logged.
    """

    def __init__(self, keys: Iterable[TriggerKey], ledger: Ledger | None = None) -> None:
        self._keys = tuple(keys)
        self._ledger = ledger

    @classmethod
    def draw(cls, tasks: Sequence[str], shape: Sequence[int], *, low: float, high: float) -> "KeyDistributor":
        """Make new keys for tasks, as `draw_keys`: it learns of the samples their shape and range alone."""
        return cls(draw_keys(tasks, shape, low=low, high=high).values() if tasks else ())

    @property
    def guarded(self) -> bool:
        """Whether keys are given out only under grants."""
        return self._ledger is not None

    def for_training(self) -> dict[str, TriggerKey]:
        """Return the keys by task, for the assembler of a model of one's own: before there is anybody to grant to."""
        return {key.task: key for key in self._keys}

    def find(self, asked: Asked) -> list[TriggerKey]:
        """Return the keys of the tasks asked for; whoever uses them calls `permit` first.

        Raises:
            KeyRefused: there is none for a task, or one of another model; this is logged as well.
        """
        return [self._find(asked, task) for task in asked.tasks]

    def permit(self, asked: Asked, *, use: bool) -> None:
        """Decide whether keys may be used, as `Ledger.permit`: when this returns it is logged, and they may.

        Raises:
            KeyRefused: they may not.
        """
        if self._ledger is not None:
            self._ledger.permit(asked, use=use)

    def _find(self, asked: Asked, task: str) -> TriggerKey:
        of_task = [key for key in self._keys if key.task == task]
        for key in of_task:
            if key.model_id == asked.model_id:
                return key
        if self._ledger is not None:
            self._ledger.refuse(asked, task, "no key")
        if of_task:
            raise KeyRefused(f"the key of task {task!r} must be of this model; the authority's is of another one")
        raise KeyRefused(f"the authority must hold a key of task {task!r}; it holds none")


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
        loss = loss_of(self._model(batch.x), batch)
        self._optimizer.zero_grad()
        self._backward(loss)
        self._optimizer.step()
        self._schedule.step()
        return loss.detach()

    def answer(self, x: Tensor) -> Sequence[Tensor]:
        """Return the scores (n, classes) of each task for samples that somebody else has stamped, or has not."""
        self._model.eval()
        with torch.no_grad():
            scores: Sequence[Tensor] = self._model(x)
        return scores
