"""A session of one model with onnxruntime's calls, for people who come from there."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from protocols.errors import InputError
from securemtk.config import Config
from securemtk.session import Model, PredictionCost, Session


@dataclass(frozen=True)
class NodeArg:
    """An input or output, as onnxruntime describes it.

    Args:
        name: of the value.
        shape: with "batch" as its free first axis.
        type: "tensor(float)".
    """

    name: str
    shape: list[int | str]
    type: str = "tensor(float)"


class InferenceSession:
    """Runs one ONNX model under encryption, called as `onnxruntime.InferenceSession` is.

    >>> session = InferenceSession("model.onnx")                       # doctest: +SKIP
    >>> (scores,) = session.run(None, {"input": x})                    # float32, as onnxruntime returns it

    Args:
        path_or_bytes: ONNX file, bundle folder, or the bytes of an ONNX file.
        config: passed to `Session`.
        keys: the authority's keys, for a bundle with secured tasks; `open_tasks` names those to use.
        open_tasks: secured tasks that `run` opens.
        protocol: passed to `Session`.

    Raises:
        as `Session.load`.

    Close it, or use it as a context manager; otherwise its processes end with the interpreter.
    """

    def __init__(
        self,
        path_or_bytes: str | os.PathLike[str] | bytes,
        *,
        config: Config | None = None,
        keys: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | None = None,
        open_tasks: Sequence[str] = (),
        protocol: str | None = None,
    ) -> None:
        options: dict[str, Any] = {} if protocol is None else {"protocol": protocol}
        self._session = Session(config, keys=keys, **options)
        self._open_tasks = tuple(open_tasks)
        try:
            self._model: Model = self._session.load(path_or_bytes)
        except BaseException:
            self._session.close()
            raise

    @property
    def cost(self) -> PredictionCost:
        """Cost of the last `run`."""
        return self._session.cost

    def get_inputs(self) -> list[NodeArg]:
        """Return the model's inputs."""
        return [NodeArg(name, ["batch", *shape]) for name, shape in self._model.program.inputs.items()]

    def get_outputs(self) -> list[NodeArg]:
        """Return the model's outputs."""
        program = self._model.program
        return [NodeArg(name, ["batch", *program.shape(name)]) for name in program.outputs]

    def run(self, output_names: Sequence[str] | None, input_feed: Mapping[str, Any]) -> list[NDArray[np.float32]]:
        """Return the named outputs (all, in the model's order, for None) for a batch.

        Args:
            output_names: names of outputs, or None.
            input_feed: name -> float array (n, *sample).

        Raises:
            InputError: an unknown output; otherwise as `Model.predict`.
        """
        known = list(self._model.program.outputs)
        names = known if output_names is None else list(output_names)
        unknown = [name for name in names if name not in known]
        if unknown:
            raise InputError(f"outputs must be among {', '.join(known)}; got {', '.join(map(repr, unknown))}")
        scores = self._model.predict(dict(input_feed), keys=self._open_tasks)
        return [scores[name] for name in names]

    def close(self) -> None:
        """End the roles."""
        self._session.close()

    def __enter__(self) -> "InferenceSession":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
