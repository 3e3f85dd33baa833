"""A session of one model with onnxruntime's calls, for people who come from there."""

import os
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from protocols.errors import InputError, NeedsInputs, UnsupportedError
from securemtk.onnx.bundle import read_bundle
from securemtk.onnx.model.declared import declared, dtype_of, sizes_of
from securemtk.onnx.model.graph import ValueInfo
from securemtk.onnx.model.reading import overridable
from securemtk.serving import onnxruntime_options
from securemtk.serving.config import Config
from securemtk.serving.onnxruntime_options import ModelMetadata
from securemtk.serving.session import Model, PredictionCost, Session


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

    Every argument and method of onnxruntime's is here. It means the same, or is refused by a sentence:
    docs/onnxruntime.md says which. The parties compute on the CPU: a list of providers without it is refused, and of
    one that would prefer others a `ProviderWarning` says that they are not used.

    A model that does not keep its batch as the first axis of every activation is understood anew for each set of
    shapes that `run` is given. Inputs that say shapes, axes, counts or places (as `securemtk.onnx.model.public` lists
    them) are taken in the clear, with a `PublicInputWarning` unless they are named in `public`.

    Args:
        path_or_bytes: ONNX file, bundle folder, or the bytes of an ONNX file.
        sess_options, providers, provider_options: as onnxruntime's; `securemtk.serving.onnxruntime_options` says what
            is refused.
        config: passed to `Session`.
        key_files: the authority's keys, for a bundle with secured tasks; `open_tasks` names those to use.
        open_tasks: secured tasks that `run` opens.
        protocol: passed to `Session`.
        check: passed to `Model.predict` by each `run`: for the owner of the model.
        public: names of inputs whose values keeper and authority may see; no warning for these.
        enable_fallback, disabled_optimizers, read_config_from_model: as onnxruntime's. There is nothing to fall back
            to, and no optimiser changes what a model computes; the last must be 0.

    Raises:
        TypeError: options of another type, or a keyword that onnxruntime does not have.
        UnsupportedError: options that cannot be honoured; otherwise as `Session.load`.

    Close it, or use it as a context manager; otherwise its processes end with the interpreter.
    """

    def __init__(
        self,
        path_or_bytes: str | os.PathLike[str] | bytes,
        sess_options: Any = None,
        providers: Sequence[Any] | None = None,
        provider_options: Sequence[Mapping[Any, Any]] | None = None,
        *,
        config: Config | None = None,
        key_files: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | None = None,
        open_tasks: Sequence[str] = (),
        protocol: str | None = None,
        check: bool = False,
        public: Sequence[str] = (),
        **keywords: Any,
    ) -> None:
        onnxruntime_options.check_keywords(keywords)
        onnxruntime_options.check_providers(providers, provider_options)
        self._options = onnxruntime_options.check_session_options(sess_options, with_providers=bool(providers))
        choice: dict[str, Any] = {} if protocol is None else {"protocol": protocol}
        self._session = Session(config, key_files=key_files, **choice)
        # One run at a time; `run_async` has a thread of its own, made when it is first called.
        self._lock = threading.RLock()
        self._background: ThreadPoolExecutor | None = None
        self._check = check
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

    def get_overridable_initializers(self) -> list[NodeArg]:
        """Return the inputs that have a default in the file. They keep it: `run` takes no others."""
        return [_declared(x.name, sizes_of(x), dtype_of(x)) for x in overridable(self._file())]

    def get_modelmeta(self) -> ModelMetadata:
        """Return what the file says of itself; of a bundle, its cloud.onnx."""
        return onnxruntime_options.metadata(self._file())

    def get_session_options(self) -> Any:
        """Return the onnxruntime.SessionOptions that were given, or fresh ones."""
        return self._options

    def get_providers(self) -> list[str]:
        """Return ["CPUExecutionProvider"]."""
        return [onnxruntime_options.CPU]

    def get_provider_options(self) -> dict[str, dict[str, str]]:
        """Return no options for the CPU, as onnxruntime does."""
        return {onnxruntime_options.CPU: {}}

    def set_providers(
        self, providers: Sequence[Any] | None = None, provider_options: Sequence[Mapping[Any, Any]] | None = None
    ) -> None:
        """Take another list of providers as the constructor does; nothing changes, for it must have the CPU."""
        onnxruntime_options.check_providers(providers, provider_options)

    def disable_fallback(self) -> None:
        """Do nothing: a run that fails is never repeated elsewhere."""

    def enable_fallback(self) -> None:
        """Do nothing: there is no other provider, and a run that fails is never repeated in the clear."""

    def run(
        self, output_names: Sequence[str] | None, input_feed: Mapping[str, Any], run_options: Any = None
    ) -> list[NDArray[Any]]:
        """Return the named outputs (all, in the model's order, for None or no name) for a batch.

        Args:
            output_names: names of outputs, or None.
            input_feed: name -> array, nested list or onnxruntime.OrtValue; integers and truth values are taken as
                numbers.
            run_options: an onnxruntime.RunOptions, or None. A run that has begun is not interrupted by them.

        Returns:
            Arrays of the dtypes that the model declares.

        Raises:
            TypeError: as `securemtk.serving.onnxruntime_options.check_run_options`.
            InputError: an unknown output.
            WrongProcess: this process is a fork of the one that made the session.
            Otherwise as `Model.predict` and, where shapes decide, `Session.load`.
        """
        self._session._require_here()
        onnxruntime_options.check_run_options(run_options)
        with self._lock:
            return self._run(
                output_names, {name: onnxruntime_options.plain(value) for name, value in input_feed.items()}
            )

    def _run(self, output_names: Sequence[str] | None, input_feed: Mapping[str, Any]) -> list[NDArray[Any]]:
        model, feed = self._fitting(input_feed)
        infos = {x.name: x for x in model.outputs}
        names = list(output_names or infos)
        unknown = [name for name in names if name not in infos]
        if unknown:
            raise InputError(f"outputs must be among {', '.join(infos)}; got {', '.join(map(repr, unknown))}")
        scores = model.predict(
            {k: _numbers(v) for k, v in feed.items()}, open_tasks=self._open_tasks, check=self._check
        )
        return [_typed(scores[name], infos[name].dtype) for name in names]

    def run_async(
        self,
        output_names: Sequence[str] | None,
        input_feed: Mapping[str, Any],
        callback: Callable[[list[NDArray[Any]], Any, str], object],
        user_data: Any,
        run_options: Any = None,
    ) -> None:
        """Run in a thread of this session's, one call after another, and call back from there.

        Args:
            output_names, input_feed, run_options: as in `run`. The feed is read before this returns.
            callback: outputs (none after an error), `user_data`, what went wrong ("" if nothing).
            user_data: handed to the callback.

        Raises:
            TypeError, InputError: as `check_run_options`; whatever else `run` raises, the callback is told.
        """
        onnxruntime_options.check_run_options(run_options)
        feed = {name: np.array(onnxruntime_options.plain(value)) for name, value in input_feed.items()}

        def work() -> None:
            outputs: list[NDArray[Any]] = []
            error = ""
            try:
                outputs = self.run(output_names, feed)
            except Exception as raised:  # the callback hears of it, or nobody
                error = str(raised) or type(raised).__name__
            callback(outputs, user_data, error)

        with self._lock:
            if self._background is None:
                self._background = ThreadPoolExecutor(1, thread_name_prefix="securemtk-run-async")
            self._background.submit(work)

    def run_with_ort_values(
        self, output_names: Sequence[str] | None, input_dict_ort_values: Mapping[str, Any], run_options: Any = None
    ) -> list[Any]:
        """Return what `run` returns as onnxruntime.OrtValue on the CPU; the inputs are such, too."""
        return onnxruntime_options.ort_values(self.run(output_names, input_dict_ort_values, run_options))

    def get_input_memory_infos(self) -> list[Any]:
        """Return for each input that it is fed from the memory of the CPU."""
        return onnxruntime_options.memory_infos(len(self.get_inputs()))

    def get_output_memory_infos(self) -> list[Any]:
        """Return for each output that it comes into the memory of the CPU."""
        return onnxruntime_options.memory_infos(len(self.get_outputs()))

    def end_profiling(self) -> str:
        """Return "", the name of no file, as onnxruntime does where nothing is profiled. `cost` tells what was paid."""
        return ""

    def get_profiling_start_time_ns(self) -> int:
        """Return 0, as onnxruntime does where nothing is profiled."""
        return 0

    def get_tuning_results(self) -> list[Any]:
        """Return none, as onnxruntime does on the CPU."""
        return []

    def set_tuning_results(self, results: Sequence[Any], *, error_on_invalid: bool = False) -> None:
        """Take no results; UnsupportedError for others, which would be of another provider."""
        if results:
            _refuse("set_tuning_results", "the parties' kernels are not tuned")

    def set_ep_dynamic_options(self, options: Mapping[str, str]) -> None:
        """Raise UnsupportedError, as onnxruntime refuses it on the CPU."""
        _refuse("set_ep_dynamic_options", "the parties compute on the CPU, which has none")

    def release_captured_graph(self, graph_annotation_id: int = 0) -> None:
        """Do nothing, as onnxruntime on the CPU: no graph is captured."""

    def io_binding(self) -> NoReturn:
        """Raise UnsupportedError: an input becomes shares, which lie in no buffer that could be bound."""
        _refuse("io_binding", _BOUND)

    def run_with_iobinding(self, iobinding: Any, run_options: Any = None) -> NoReturn:
        """Raise UnsupportedError, as `io_binding`."""
        _refuse("run_with_iobinding", _BOUND)

    def run_with_ortvaluevector(
        self, run_options: Any, feed_names: Any, feeds: Any, fetch_names: Any, fetches: Any, fetch_devices: Any
    ) -> NoReturn:
        """Raise UnsupportedError, as `io_binding`."""
        _refuse("run_with_ortvaluevector", _BOUND)

    def create_ortvalue_from_shape_and_type(
        self, shape: Sequence[int], element_type: Any, device_type: str, device_id: int = 0, vendor_id: int = -1
    ) -> NoReturn:
        """Raise UnsupportedError, as `io_binding`."""
        _refuse("create_ortvalue_from_shape_and_type", _BOUND)

    def get_input_epdevices(self) -> NoReturn:
        """Raise UnsupportedError: no device of onnxruntime's takes the inputs."""
        _refuse("get_input_epdevices", "the parties compute, and no device of onnxruntime's")

    def get_provider_graph_assignment_info(self) -> NoReturn:
        """Raise UnsupportedError: no node is assigned to a provider."""
        _refuse(
            "get_provider_graph_assignment_info", "the parties compute every node; .cost tells what each layer cost"
        )

    def _file(self) -> str | os.PathLike[str] | bytes:
        if isinstance(self._source, bytes) or not os.path.isdir(self._source):
            return self._source
        return read_bundle(self._source)[1]

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
        """End the roles, after the runs of `run_async` that are under way."""
        if self._background is not None:
            self._background.shutdown(wait=True)
        self._session.close()

    def __enter__(self) -> "InferenceSession":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


_BOUND = "an input becomes shares, which lie in no buffer that could be bound; call run"


def _refuse(method: str, why: str) -> NoReturn:
    raise UnsupportedError(f"InferenceSession.{method} must not be called: {why}")


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
