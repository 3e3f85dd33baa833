"""Training: one loop on accelerate, for the keyed model and for the plain baseline, on CPU, GPU or several of them."""

import io
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.functional import affine_grid, cross_entropy, grid_sample

from protocols.errors import InputError, KeyRefused
from securemtk.data.base import DataSet
from securemtk.mtk.keys.file_stores import HeldKeys
from securemtk.mtk.keys.key import DEFAULT_COLUMNS, TriggerKey, draw_keys
from securemtk.mtk.training.agents import DataDistributor, KeyDistributor, ModelKeeper
from securemtk.mtk.training.assembler import Assembler, AssemblerConfig, Batch
from securemtk.mtk.training.decoupling import Decoupling, DecouplingConfig, decouple
from securemtk.mtk.training.model import MultiTaskModel
from securemtk.support.files import check_file, write_whole
from securemtk.support.progress import Progress, silent
from securemtk.tasks import Task

# Samples on which random patterns are judged before each epoch.
_MINED_ON = 4


@dataclass(frozen=True)
class TrainConfig:
    """How to train.

    Args:
        epochs: passes over the training samples. When absent 30, or as many as make 400 steps, for a table 1,200:
            fewer leave wrong keys that open.
        batch: samples a step and device; each becomes `Assembler.copies` rows. When absent 96, or a twelfth of the
            samples, but at least 16.
        lr: greatest learning rate of the one-cycle schedule [Smi18], with AdamW.
        weight_decay: of AdamW.
        warmup: share of the steps in which the rate rises.
        closed_weight: weight in the loss of a closed task's rows. Near the uniform law the cross entropy is flat, and
            more weight closes tighter; much more costs accuracy with the key.
        augment: whether samples are turned, scaled and moved a little before keys are stamped.
        seed: of initial weights, order, augmentation and decoys, never of keys.
        threads: torch's threads while training. More of them gain little on networks of this size, lose much where
            other processes want the cores, and make the result depend on their number. 0 leaves torch's setting.
        balance: whether classes that are rare among the training labels weigh as much in the loss as frequent ones.
        key_side, key_place: as `draw_keys` takes them.
        assembler: what the keyed training set consists of.
        decoupling: how much unprotected tasks may tell of closed ones.
    """

    epochs: int | None = None
    batch: int | None = None
    lr: float = 6e-3
    weight_decay: float = 0.2
    warmup: float = 0.2
    closed_weight: float = 2.0
    augment: bool = True
    seed: int = 0
    threads: int = 1
    balance: bool = False
    key_side: int | None = None
    key_place: str = "bottom-right"
    assembler: AssemblerConfig = field(default_factory=AssemblerConfig)
    decoupling: DecouplingConfig = field(default_factory=DecouplingConfig)

    def __post_init__(self) -> None:
        if any(value is not None and value < 1 for value in (self.epochs, self.batch)):
            raise InputError(f"epochs and batch must be at least 1; got {self.epochs} and {self.batch}")
        if self.threads < 0:
            raise InputError(f"threads must not be negative; got {self.threads}")
        if not (self.lr > 0 and self.closed_weight > 0 and self.weight_decay >= 0 and 0 < self.warmup < 1):
            raise InputError("lr and closed_weight must be positive, weight_decay not negative, warmup in (0, 1)")

    def length(self, dataset: DataSet) -> tuple[int, int]:
        """Return epochs and batch: as they are set, or as the data set wants them."""
        n = len(dataset.x_train)
        batch = self.batch or min(n, 96, max(16, n // 12))
        least = 1200 if len(dataset.shape) == 1 else 400
        return self.epochs or max(30, math.ceil(least / max(1, n // batch))), batch

    def with_room(self, dataset: DataSet, secured: Sequence[str]) -> DataSet:
        """Return the data set with room for the keys: a table gets columns for them, an image has it.

        Args:
            dataset: as loaded.
            secured: names of the tasks that get a key.
        """
        if len(dataset.shape) != 1 or not secured:
            return dataset
        return dataset.with_key_columns(len(secured) * (self.key_side or DEFAULT_COLUMNS))

    def draw_keys(self, dataset: DataSet, secured: Sequence[str]) -> dict[str, TriggerKey]:
        """Draw a key for each secured task, as this config says.

        Args:
            dataset: gives the shape and range of samples.
            secured: names of the tasks.
        """
        if not secured:
            return {}
        low, high = dataset.low, dataset.high
        side = self.key_side or (dataset.key_columns // len(secured) or None)
        return draw_keys(secured, dataset.shape, side=side, place=self.key_place, low=low, high=high)


@dataclass(frozen=True, eq=False)
class TrainResult:
    """A trained model.

    Args:
        model: on the CPU, in evaluation mode.
        tasks: the data set's tasks, now with `secured` set.
        keys: task name -> key, for the secured tasks.
        losses: mean loss of each epoch, nats, summed over tasks.
        decoupling: which unprotected tasks do not always answer truly; None where all do.
    """

    model: MultiTaskModel
    tasks: tuple[Task, ...]
    keys: Mapping[str, TriggerKey]
    losses: tuple[float, ...]
    decoupling: Decoupling | None = None


def train(
    dataset: DataSet,
    secured: Sequence[str] = (),
    config: TrainConfig | None = None,
    *,
    keys: Mapping[str, TriggerKey] | None = None,
    trunk: nn.Module | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    progress: Progress = silent,
) -> TrainResult:
    """Train a multi-task model whose secured tasks answer truly only when their key is in the input.

    Without secured tasks this is plain multi-task training, by the same loop: the baseline.

    Args:
        dataset: its training part is used, its test part is not.
        secured: names of the tasks to secure.
        config: `TrainConfig()` when absent.
        keys: one for each secured task; drawn from the operating system when absent, by a single process only.
        trunk: module (n, *sample) -> (n, ...) to train in place; `image_trunk` or `table_trunk` when absent.
        checkpoint: file written after each epoch (whole or not at all). Where it exists training goes on from it,
            with the same result as without the interruption. Needs `keys` where tasks are secured: it holds none.
        progress: told after each epoch which it was and its mean loss (nats); see `progress_bar`.

    Returns:
        The model with its keys.

    Raises:
        InputError: an unknown task, a batch greater than the training part, or a checkpoint of another training.
        KeyRefused: keys do not fit the secured tasks, or are missing beside a checkpoint or other processes.

    Example:
        >>> from securemtk.data import load
        >>> result = train(load("digits"), secured=["digit", "parity"], config=TrainConfig(epochs=1))
        >>> sorted(result.keys)
        ['digit', 'parity']
    """
    config = TrainConfig() if config is None else config
    for name in secured:
        dataset.task(name)
    tasks = tuple(replace(task, secured=task.name in secured) for task in dataset.tasks)
    accelerator = Accelerator()
    if keys is None:
        if secured and (checkpoint is not None or accelerator.num_processes > 1):
            raise KeyRefused("a checkpoint and several processes need one set of keys: draw_keys first and pass them")
        keys = KeyDistributor(HeldKeys(config.draw_keys(dataset, secured).values())).for_training()
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        model = MultiTaskModel(tasks, dataset.shape, trunk=trunk)
    _lay_out(model, torch.channels_last)
    decoupling = decouple(dataset, secured, config.decoupling)
    path = None if checkpoint is None else Path(checkpoint)
    training = _Training(accelerator, model, dataset, keys, config, decoupling, path)
    with _threads(config.threads):
        for epoch in training.run():
            if training.accelerator.is_main_process:
                loss = training.losses[-1]
                progress(f"epoch {epoch} of {training.epochs}, loss {loss:.3f}", epoch / training.epochs)
    return TrainResult(training.finished(), tasks, dict(keys), tuple(training.losses), decoupling)


def _lay_out(model: MultiTaskModel, memory_format: torch.memory_format) -> None:
    """Lay the kernels of convolutions out in memory, in place; the keeper's batches are channels last."""
    for parameter in model.parameters():
        if parameter.ndim == 4:
            parameter.data = parameter.data.contiguous(memory_format=memory_format)


@contextmanager
def _threads(n: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(n or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class _Training:
    """The state of one training: everything that a checkpoint holds, and where it runs."""

    def __init__(
        self,
        accelerator: Accelerator,
        model: MultiTaskModel,
        dataset: DataSet,
        keys: Mapping[str, TriggerKey],
        config: TrainConfig,
        decoupling: Decoupling | None,
        checkpoint: Path | None,
    ) -> None:
        self.accelerator, self.config, self.checkpoint = accelerator, config, checkpoint
        device = accelerator.device
        limits = {"low": dataset.low, "high": dataset.high}
        self.assembler = Assembler(model.tasks, keys, config.assembler, **limits, device=device, decoupling=decoupling)
        self.data = DataDistributor(dataset, model.tasks, device)
        drawn = torch.rand((len(self.data), len(model.tasks)), generator=_generator("cpu", config.seed, 0, 0))
        self.fixed = drawn.to(device)
        self.weights = [_class_weights(torch.tensor(dataset.y_train[t.name]), t.classes) for t in model.tasks]
        self.augment = augmented if config.augment and dataset.x_train.ndim == 4 else None
        self.epochs, self.batch = config.length(dataset)
        self.steps = len(self.data) // (self.batch * self.accelerator.num_processes)
        if self.steps == 0:
            raise InputError(f"batch must be at most the training part; got {self.batch} of {len(self.data)} samples")
        optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=config.weight_decay, fused=True)
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, config.lr, total_steps=self.epochs * self.steps, pct_start=config.warmup
        )
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
        self.keeper = ModelKeeper(self.model, self.optimizer, self.schedule, self.accelerator.backward)
        self.losses: list[float] = []
        # What must be equal for a checkpoint to be of this training. It names keys by their model, never by value.
        self.about = json.dumps(
            {
                "config": asdict(config),
                "data": [dataset.name, len(self.data), *dataset.shape],
                "tasks": [{"name": t.name, "classes": t.classes, "secured": t.secured} for t in model.tasks],
                "keys": {name: key.model_id for name, key in sorted(keys.items())},
                "processes": self.accelerator.num_processes,
            }
        )

    def run(self) -> Iterator[int]:
        """Train epoch by epoch, from the checkpoint where there is one; give the number of each that is over."""
        self._resume()
        left = range(len(self.losses), self.epochs)
        if left and self.checkpoint is not None and self.accelerator.is_main_process:
            check_file(self.checkpoint, "a checkpoint")
        for number in left:
            self.losses.append(self._epoch(number))
            self._save()
            yield number + 1

    def finished(self) -> MultiTaskModel:
        """Return the model on the CPU, in evaluation mode."""
        model = self.accelerator.unwrap_model(self.model)
        if not isinstance(model, MultiTaskModel):
            raise TypeError(f"accelerate must give the model back; got {type(model).__name__}")
        _lay_out(model, torch.contiguous_format)
        return model.cpu().eval()

    def _epoch(self, number: int) -> float:
        accelerator, batch = self.accelerator, self.batch
        # Seeds that depend on the epoch alone make a resumed training equal to an uninterrupted one.
        order = _generator("cpu", self.config.seed, number, 0)
        permutation = torch.randperm(len(self.data), generator=order).to(accelerator.device)
        generator = _generator(accelerator.device, self.config.seed, number, 1 + accelerator.process_index)
        self.assembler.mine(self.data.rows(permutation[:_MINED_ON])[0], self.keeper.answer, generator)
        total = torch.zeros((), device=accelerator.device)
        for step in range(self.steps):
            start = (step * accelerator.num_processes + accelerator.process_index) * batch
            rows = permutation[start : start + batch]
            keyed = self.assembler.batch(*self.data.rows(rows), generator, self.augment, self.fixed[rows])
            total += self.keeper.learn(keyed, self._loss)
        mean: float = float(accelerator.reduce(total, "mean").item()) / self.steps
        if not math.isfinite(mean):
            raise InputError(f"training must stay finite; got loss {mean} in epoch {number + 1}: lower lr")
        return mean

    def _loss(self, scores: Sequence[Tensor], keyed: Batch) -> Tensor:
        """Return for each task the mean cross entropy over the rows whose sample has a label, summed over tasks."""
        weights = torch.where(keyed.opened, self._open_weights(keyed), self.config.closed_weight)
        weights = weights * keyed.known * (len(keyed.known) / keyed.known.sum(dim=0).clamp(min=1))
        each = [cross_entropy(s, t, reduction="none") for s, t in zip(scores, keyed.targets, strict=True)]
        return (torch.stack(each, dim=1) * weights).sum(dim=1).mean()

    def _open_weights(self, keyed: Batch) -> Tensor:
        """Return the weight of each row's true class in each task: (r, tasks), or 1 without balance."""
        if not self.config.balance:
            return torch.ones(())
        columns = [w.to(t.device)[t.argmax(1)] for w, t in zip(self.weights, keyed.targets, strict=True)]
        return torch.stack(columns, dim=1)

    def _save(self) -> None:
        if self.checkpoint is None or not self.accelerator.is_main_process:
            return
        state = {
            "about": self.about,
            "losses": self.losses,
            "model": self.accelerator.unwrap_model(self.model).state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
        }
        # Through memory: torch hides the disk's refusal behind an error of its own.
        content = io.BytesIO()
        torch.save(state, content)
        write_whole(self.checkpoint, content.getvalue())

    def _resume(self) -> None:
        if self.checkpoint is None or not self.checkpoint.exists():
            return
        state = _read_checkpoint(self.checkpoint)
        if not _is_equal(state.get("about"), self.about):
            raise InputError(f"{self.checkpoint.name} must be of this training; got one of other data, keys or config")
        self.accelerator.unwrap_model(self.model).load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.losses = [float(loss) for loss in state["losses"]]


def augmented(x: Tensor, generator: torch.Generator) -> Tensor:
    """Return samples turned by up to 11 degrees, scaled by up to 12 % and moved by up to 3.75 % of their side.

    Args:
        x: float32 (n, C, H, W) without keys: this would move them.
        generator: on the same device as x.
    """

    def between(bound: float, *axes: int) -> Tensor:
        return (2 * torch.rand((len(x), *axes), generator=generator, device=x.device) - 1) * bound

    angle, scale = between(0.2), 1 + between(0.12)
    grid = torch.zeros(len(x), 2, 3, device=x.device)
    grid[:, 0, 0] = grid[:, 1, 1] = scale * angle.cos()
    grid[:, 1, 0] = scale * angle.sin()
    grid[:, 0, 1] = -grid[:, 1, 0]
    grid[:, :, 2] = between(0.075, 2)
    return grid_sample(
        x, affine_grid(grid, list(x.shape), align_corners=False), padding_mode="border", align_corners=False
    )


def _class_weights(y: Tensor, classes: int) -> Tensor:
    """Return for each class how much its samples weigh when all classes shall together weigh the same."""
    counts = torch.bincount(y[y >= 0], minlength=classes).clamp(min=1)
    return counts.sum() / (classes * counts)


def _generator(device: torch.device | str, seed: int, epoch: int, stream: int) -> torch.Generator:
    # Distinct seeds for distinct (seed, epoch, stream); ordinary training randomness, no secret hangs on it.
    return torch.Generator(device).manual_seed((seed << 40) + (epoch << 16) + stream)


def _is_equal(found: object, text: str) -> bool:
    """Return whether two JSON texts say the same; a whole number is the same setting with a point and without."""
    try:
        return bool(isinstance(found, str) and json.loads(found) == json.loads(text))
    except (ValueError, RecursionError):
        return False


def _read_checkpoint(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise InputError(f"{path.name} must be a checkpoint of train; it is no regular file")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    # torch raises whatever its zip reader and its restricted unpickler come across.
    except Exception as error:
        raise InputError(f"{path.name} must be a checkpoint of train; got {type(error).__name__}") from None
    if not isinstance(state, dict):
        raise InputError(f"{path.name} must be a checkpoint of train; got something else")
    return state
