"""A loaded model: what the user may know of it, and what it answers."""

import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from protocols import limits
from protocols.errors import InputError, RangeError, RangeWarning, UnmeasuredWarning
from protocols.on_demand import Late
from protocols.primitives import ring
from protocols.program.program import Program
from securemtk.onnx.manifest import Manifest
from securemtk.onnx.model.graph import ValueInfo
from securemtk.onnx.model.inputs import input_arrays
from securemtk.tasks import Task

# Needed where this process reads a model itself, and large.
bundle, examine = Late("securemtk.onnx.bundle"), Late("securemtk.onnx.examine")

Scores = dict[str, NDArray[np.float32]]


@dataclass(frozen=True)
class LoadedModel:
    """What the keeper tells of a model that it has loaded, all of it public.

    Args:
        number: of the model in its session.
        program: what is computed.
        manifest: of a bundle; None for a plain ONNX file.
        inputs, outputs: as the ONNX file declares them.
    """

    number: int
    program: Program
    manifest: Manifest | None
    inputs: tuple[ValueInfo, ...]
    outputs: tuple[ValueInfo, ...]

    @property
    def gated(self) -> bool:
        """Whether any task is secured."""
        return self.manifest is not None and any(task.secured for task in self.manifest.tasks)


class Predictor(Protocol):
    """Who makes a model's predictions: a session, as its models see it."""

    @property
    def protocol(self) -> str:
        """Name of the protocol."""

    @property
    def comparison_bits(self) -> int:
        """Width of comparisons."""

    def require_here(self) -> None:
        """Raise WrongProcess in a fork of the process that made it."""

    def predict(self, model: LoadedModel, inputs: Mapping[str, Tensor], open_tasks: tuple[str, ...]) -> Scores:
        """Return the scores of a batch, encoded in fixed point."""

    def prepare(self, model: LoadedModel, batch: int, open_tasks: tuple[str, ...], predictions: int) -> None:
        """Order correlations of coming predictions."""


@dataclass(frozen=True)
class ModelSource:
    """What a model was loaded from, and what was told of its inputs: for whoever wants to see it in the clear."""

    source: str | os.PathLike[str] | bytes = field(repr=False)
    shapes: Mapping[str, Sequence[int]] | None = None
    public: Mapping[str, NDArray[Any]] = field(default_factory=dict, repr=False)

    def unmeasured(self) -> str:
        """Return what to say of a model of whose values nobody knows."""
        name = "MODEL" if isinstance(self.source, bytes) else os.fspath(self.source)
        return (
            "no sample of this model's data was ever measured: where a value leaves the range of fixed point its "
            f"answer is wrong, and nothing shows it. Run: securemtk check {name} --sample x.npy, or predict(x, "
            "check=True)"
        )


class Model:
    """A loaded model: what the user may know of it, and `predict`.

    Made by `Session.load`.
    """

    def __init__(self, predictor: Predictor, loaded: LoadedModel, source: ModelSource) -> None:
        self._predictor, self._loaded, self._source = predictor, loaded, source
        self._examiner: Any = None
        self._measured = self.manifest is not None and self.manifest.headroom is not None

    @property
    def program(self) -> Program:
        """What is computed, without the weights."""
        return self._loaded.program

    @property
    def manifest(self) -> Manifest | None:
        """The manifest of a bundle; None for a plain ONNX file."""
        return self._loaded.manifest

    @property
    def inputs(self) -> tuple[ValueInfo, ...]:
        """The inputs, as the ONNX file declares them."""
        return self._loaded.inputs

    @property
    def outputs(self) -> tuple[ValueInfo, ...]:
        """The outputs, as the ONNX file declares them."""
        return self._loaded.outputs

    @property
    def tasks(self) -> tuple[Task, ...]:
        """The tasks of a bundle; empty for a plain ONNX file."""
        return () if self.manifest is None else self.manifest.tasks

    @property
    def gated(self) -> bool:
        """Whether any task is secured."""
        return self._loaded.gated

    def predict(self, x: Any, open_tasks: Sequence[str] = (), *, check: bool = False) -> Scores:
        """Return the scores of every output, computed without showing the input, the weights or the keys.

        Args:
            x: float array or tensor of shape (n, *sample), n >= 1; for a model with several inputs a
                mapping of names to such arrays with the same n. A model that was understood as a whole
                (`program.whole`) takes arrays of its own shapes, and returns such.
            open_tasks: names of secured tasks to open with the authority's keys.
            check: whether this process reads the model's file and runs it on x in the clear first, to see whether the
                answers will be right: for the owner of the model. Trigger-keys are not part of that.

        Returns:
            Output name -> float32 array of shape (n, ...). A secured task without its key gives noise
            drawn by the authority.

        Raises:
            ShapeError, RangeError: the input does not fit or, with `check`, answers would be wrong: values beyond
                what fixed point holds, or an output more than 1 % of its largest value from onnxruntime's. Nothing
                was sent.
            InputError: an unknown or unprotected task in `open_tasks`; nothing was sent.
            WrongProcess: this process is a fork of the one that made the session; nothing was sent.
            KeyRefused: the authority holds no fitting key or, with grants, this user may not use it now; the session
                lives on. Of a batch that runs in chunks the first ones may have been counted as used.
            ProtocolAbort: a role failed; the session is dead.

        Warns:
            UnmeasuredWarning: at the first prediction of a model of whose values nobody has measured any; once.
            RangeWarning: with `check`, layers of which few bits are left.

        Values inside the network are not checked otherwise, for nobody sees them: see docs/ranges.md.

        Cost: see `Session.cost` afterwards.
        Security: the keeper sees neither input nor scores nor which tasks are open; the authority sees
            the batch size and which keys were asked for; the user sees the scores.
        """
        return self._answer(x, open_tasks, check=check)

    def labels(
        self, x: Any, open_tasks: Sequence[str] = (), *, numbers: bool = False, check: bool = False
    ) -> dict[str, NDArray[Any]]:
        """Return the most likely class of every task, computed as `predict` computes scores.

        Args:
            x, open_tasks, check: as in `predict`.
            numbers: whether classes are numbers, counted from 0, also where they have names.

        Returns:
            Task name -> array of shape (n,): the names of classes as texts, int64 for a task whose classes have none
            (see `Task.labels`); of classes with equal scores the first. A secured task without its key gives the
            labels of noise drawn by the authority.

        Raises:
            InputError: the model has no tasks, so that nothing says that its outputs are scores of classes; nothing
                was sent. Otherwise as `predict`.

        Warns:
            As `predict`.

        Cost: that of `predict`.
        Security: that of `predict`: this process sees the scores of which it takes the largest.
        """
        self._require_tasks("labels")
        scores = self._answer(x, open_tasks, check=check)
        found = {name: value.argmax(-1).astype(np.int64) for name, value in scores.items()}
        named = {} if numbers else {task.name: np.array(task.labels) for task in self.tasks if task.labels is not None}
        return {name: named[name][value] if name in named else value for name, value in found.items()}

    def probabilities(self, x: Any, open_tasks: Sequence[str] = (), *, check: bool = False) -> Scores:
        """Return the softmax of every task's scores, computed as `predict` computes scores.

        The softmax itself is taken here, in the clear, of what `predict` returns.

        Args:
            x, open_tasks, check: as in `predict`.

        Returns:
            Task name -> float32 array of shape (n, classes), in the order of `Task.labels`; each row sums to 1 up to
            rounding. A secured task without its key gives the softmax of noise drawn by the authority.

        Raises, Warns, Cost, Security: as `labels`.
        """
        self._require_tasks("probabilities")
        return {name: _softmax(value) for name, value in self._answer(x, open_tasks, check=check).items()}

    def prepare(self, batch: int, open_tasks: Sequence[str] = (), predictions: int = 1) -> None:
        """Order the correlations of coming predictions, and return at once; they are made in the background.

        A prediction that is asked next with the same batch and tasks finds them ready. Any other request throws them
        away, for correlations are dealt for one plan.

        Args:
            batch: number of samples.
            open_tasks: as in `predict`.
            predictions: how many predictions; each costs memory at keeper and user, or with `Config.store` disk.

        Raises:
            InputError: a number below 1, an unknown or unprotected task in `open_tasks`; nothing was sent.
            WrongProcess: as `predict`.
            ProtocolAbort: a role failed; the session is dead.

        Security: the keeper sees the batch sizes, and whether what was ordered is used or thrown away; so order for
            other tasks only where the keeper may know that they changed.
        """
        self._predictor.require_here()
        names = self._check_tasks(open_tasks)
        if not all(isinstance(n, int | np.integer) and n >= 1 for n in (batch, predictions)):
            raise InputError(f"batch and predictions must be whole numbers, 1 or more; got {batch} and {predictions}")
        self._predictor.prepare(self._loaded, int(batch), names, int(predictions))

    def _answer(self, x: Any, open_tasks: Sequence[str], *, check: bool) -> Scores:
        """Return the scores; called by the methods that the user calls, to whose caller warnings point."""
        self._predictor.require_here()
        names = self._check_tasks(open_tasks)
        arrays = self._arrays(x)
        if check:
            self._examine(x)
        elif not self._measured:
            warnings.warn(self._source.unmeasured(), UnmeasuredWarning, stacklevel=3)
        self._measured = True
        scores = self._predictor.predict(self._loaded, arrays, names)
        return {name: value[0] for name, value in scores.items()} if self.program.whole else scores

    def _require_tasks(self, what: str) -> None:
        if not self.tasks:
            raise InputError(f"a model must have tasks to give {what}; this one is a plain ONNX file: see predict")

    def _check_tasks(self, open_tasks: Sequence[str]) -> tuple[str, ...]:
        """Return the names, each once; they are read once, for an iterator has them no second time."""
        if isinstance(open_tasks, str):
            raise InputError(f"open_tasks must be a sequence of task names; got the text {open_tasks!r}")
        tasks = {task.name: task for task in self.tasks}
        names = tuple(dict.fromkeys(open_tasks))
        for name in names:
            if name not in tasks:
                known = ", ".join(tasks) or "none: this model has no tasks"
                raise InputError(f"open_tasks must be among the model's tasks ({known}); got {name!r}")
            if not tasks[name].secured:
                raise InputError(f"task {name!r} is unprotected and takes no key")
        return names

    def _examine(self, x: Any) -> None:
        """Raise RangeError unless the model's file says that answers on x will be right; warn where bits are few."""
        if self._examiner is None:
            source = self._source.source
            data = source if isinstance(source, bytes) else bundle.read_model(source)[1]
            self._examiner = examine.Examiner(data, self._source.shapes, self._source.public)
        found = self._examiner.examine(self._inputs(x), self._predictor.protocol, self._predictor.comparison_bits)
        if wrong := found.wrong():
            raise RangeError("; ".join([wrong, *found.hints()]))
        for text in found.hints():
            warnings.warn(text, RangeWarning, stacklevel=4)

    def _arrays(self, x: Any) -> dict[str, Tensor]:
        return {name: ring.encode(array, what=f"input {name!r}") for name, array in self._inputs(x).items()}

    def _inputs(self, x: Any) -> dict[str, NDArray[np.floating]]:
        bounds = {} if self.manifest is None else {"low": self.manifest.low, "high": self.manifest.high}
        bounds["limit"] = limits.input_limit(self._predictor.comparison_bits)
        return input_arrays(self.program.inputs, x, **bounds, whole=self.program.whole)


def _softmax(scores: NDArray[np.float32]) -> NDArray[np.float32]:
    return torch.softmax(torch.from_numpy(scores.astype(np.float64)), -1).to(torch.float32).numpy()
