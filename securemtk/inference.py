"""A session of one model with onnxruntime's calls, for people who come from there."""

import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from protocols.errors import InputError, NeedsInputs
from securemtk.config import Config
from securemtk.onnx.graph import ValueInfo, declared
from securemtk.session import Model, PredictionCost, Session


@dataclass(frozen=True)
class NodeArg:
    """An input or output, as onnxruntime describes it.

    Args:
        name: of the value.
        shape: with "batch" as its first axis where that is free; of a model that `run` has to say more about, as the
            file declares it, with names for what it leaves free.
        type: such as "tensor(float)".
    """

    name: str
    shape: list[int | str]
    type: str = "tensor(float)"


class PublicInputWarning(UserWarning):
    """An input's values are shown to the keeper and the authority, because they say how the model computes."""


class InferenceSession:
    """Runs one ONNX model under encryption, called as `onnxruntime.InferenceSession` is.

    >>> session = InferenceSession("model.onnx")                       # doctest: +SKIP
    >>> (scores,) = session.run(None, {"input": x})                    # as onnxruntime returns it

    A model that does not keep its batch as the first axis of every activation is understood anew for each set of
    shapes that `run` is given. Inputs that say shapes, axes, counts or places (as `securemtk.onnx.public` lists them)
    are taken in the clear, with a `PublicInputWarning` unless they are named in `public`.

    Args:
        path_or_bytes: ONNX file, bundle folder, or the bytes of an ONNX file.
        config: passed to `Session`.
        keys: the authority's keys, for a bundle with secured tasks; `open_tasks` names those to use.
        open_tasks: secured tasks that `run` opens.
        protocol: passed to `Session`.
        public: names of inputs whose values keeper and authority may see; no warning for these.

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
        public: Sequence[str] = (),
    ) -> None:
        options: dict[str, Any] = {} if protocol is None else {"protocol": protocol}
        self._session = Session(config, keys=keys, **options)
        self._source, self._open_tasks, self._public = path_or_bytes, tuple(open_tasks), tuple(public)
        self._needs: NeedsInputs | None = None
        # A model that needs more of its inputs, by what it was given of them.
        self._models: dict[Any, Model] = {}
        self._model: Model | None = None
        try:
            self._model = self._session.load(path_or_bytes)
        except NeedsInputs as error:
            self._needs = error
        except BaseException:
            self._session.close()
            raise

    @property
    def cost(self) -> PredictionCost:
        """Cost of the last `run`."""
        return self._session.cost

    @property
    def pids(self) -> dict[str, int]:
        """Process numbers of keeper and authority."""
        return self._session.pids

    @property
    def whole(self) -> bool:
        """Whether the model of the last `run` was understood as a whole, for shapes of its own."""
        return self._model is not None and self._model.program.whole

    def get_inputs(self) -> list[NodeArg]:
        """Return the model's inputs."""
        if self._needs is not None or self._model is None:
            return [_declared(*x) for x in declared(self._source)[0]]
        return [_arg(x, self._model) for x in self._model.inputs]

    def get_outputs(self) -> list[NodeArg]:
        """Return the model's outputs, with the shapes of the last `run` where that had to say the inputs' shapes."""
        if self._model is None:
            return [_declared(*x) for x in declared(self._source)[1]]
        return [_arg(x, self._model) for x in self._model.outputs]

    def run(self, output_names: Sequence[str] | None, input_feed: Mapping[str, Any]) -> list[NDArray[Any]]:
        """Return the named outputs (all, in the model's order, for None) for a batch.

        Args:
            output_names: names of outputs, or None.
            input_feed: name -> array; integers and truth values are taken as numbers.

        Returns:
            Arrays of the dtypes that the model declares.

        Raises:
            InputError: an unknown output.
            WrongProcess: this process is a fork of the one that made the session.
            Otherwise as `Model.predict` and, where shapes decide, `Session.load`.
        """
        self._session._require_here()
        model, feed = self._fitting(input_feed)
        infos = {x.name: x for x in model.outputs}
        names = list(infos) if output_names is None else list(output_names)
        unknown = [name for name in names if name not in infos]
        if unknown:
            raise InputError(f"outputs must be among {', '.join(infos)}; got {', '.join(map(repr, unknown))}")
        scores = model.predict({k: _numbers(v) for k, v in feed.items()}, keys=self._open_tasks)
        return [_typed(scores[name], infos[name].dtype) for name in names]

    def _fitting(self, feed: Mapping[str, Any]) -> tuple[Model, dict[str, Any]]:
        """Return the model for what is fed, and what of that stays secret."""
        if self._needs is None and self._model is not None:
            return self._model, dict(feed)
        needs = self._needs or NeedsInputs("")
        missing = [name for name in needs.public if name not in feed]
        if missing:
            raise InputError(f"the inputs must hold {', '.join(missing)}, which say how the model computes")
        public = {name: np.asarray(feed[name]) for name in needs.public}
        secret = {name: value for name, value in feed.items() if name not in public}
        shapes = {name: np.shape(value) for name, value in secret.items()} if needs.shapes else None
        key = (repr(shapes), tuple((k, v.dtype.str, v.shape, v.tobytes()) for k, v in public.items()))
        if key not in self._models:
            told = [name for name in public if name not in self._public]
            if told:
                text = f"the values of {', '.join(told)} are shown to keeper and authority: they say how it computes"
                warnings.warn(text, PublicInputWarning, stacklevel=3)
            self._models[key] = self._session.load(self._source, shapes=shapes, public=public)
        self._model = self._models[key]
        return self._model, secret

    def close(self) -> None:
        """End the roles."""
        self._session.close()

    def __enter__(self) -> "InferenceSession":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


_TYPES = {"float32": "float", "float64": "double"}


def _arg(info: ValueInfo, model: Model) -> NodeArg:
    shape: list[int | str] = [] if model.program.whole else ["batch"]
    return NodeArg(info.name, [*shape, *(info.shape or ())], f"tensor({_type(info.dtype)})")


def _declared(name: str, shape: list[int | str], dtype: str) -> NodeArg:
    return NodeArg(name, shape, f"tensor({_type(dtype)})")


def _type(dtype: str) -> str:
    return _TYPES.get(dtype, dtype)


def _numbers(value: Any) -> Any:
    """Return integers and truth values as float64, which holds all that fixed point does."""
    array = np.asarray(value) if isinstance(value, np.generic | int | float | bool) else value
    return array.astype(np.float64) if isinstance(array, np.ndarray) and array.dtype.kind in "iub" else array


def _typed(scores: NDArray[np.float32], dtype: str) -> NDArray[Any]:
    if dtype.startswith("float") or dtype == "unknown":
        return scores.astype(dtype if dtype != "unknown" else "float32", copy=False)
    return np.rint(scores).astype(dtype)
