"""What callers of onnxruntime say when they make and run a session: whether it holds here, and what the file answers.

Nothing that is said is passed over in silence: it is honoured, has no bearing on the answers, or is refused.
docs/onnxruntime.md has the list.
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from protocols.errors import InputError, UnsupportedError
from securemtk.onnx.model.reading import Source, header
from securemtk.support.silence import silently

with silently("onnxruntime"):
    import onnxruntime

CPU = "CPUExecutionProvider"


class ProviderWarning(UserWarning):
    """A provider that the caller would have preferred to the CPU is not used."""


@dataclass(frozen=True)
class ModelMetadata:
    """What a file says of its model, under onnxruntime's names.

    Args:
        producer_name: of what wrote it.
        graph_name: of its graph.
        domain: of its author, such as "org.example".
        description: of the model.
        graph_description: of the graph.
        version: of the model; 0 where the file has none.
        custom_metadata_map: further entries.
    """

    producer_name: str = ""
    graph_name: str = ""
    domain: str = ""
    description: str = ""
    graph_description: str = ""
    version: int = 0
    custom_metadata_map: Mapping[str, str] = field(default_factory=dict)


def metadata(source: Source) -> ModelMetadata:
    """Return what a file, or its bytes, says of its model.

    Raises:
        BundleError: the file is missing or no ONNX model.
    """
    model = header(source)
    return ModelMetadata(
        producer_name=model.producer_name,
        graph_name=model.graph.name,
        domain=model.domain,
        description=model.doc_string,
        graph_description=model.graph.doc_string,
        version=model.model_version,
        custom_metadata_map={entry.key: entry.value for entry in model.metadata_props},
    )


def check_providers(providers: Any, options: Any, *, stacklevel: int = 3) -> None:
    """Take a list of execution providers that has the CPU in it, as names or as (name, options); None is the CPU.

    Options of the CPU have no meaning in onnxruntime either.

    Raises:
        InputError: it is no such list, or `options` are given without it, twice, or not one for each.
        UnsupportedError: it leaves no place for the CPU, where the parties compute.

    Warns:
        ProviderWarning: a provider that comes before the CPU is not used.
    """
    if isinstance(providers, str) or not isinstance(providers or (), Sequence):
        raise InputError(f"providers must be a list of names; got {type(providers).__name__}")
    named = [_provider(entry) for entry in providers or ()]
    if options:
        fits = isinstance(options, Sequence) and all(isinstance(x, Mapping) for x in options)
        if not fits or len(options) != len(named) or any(own for _, own in named):
            raise InputError("provider_options must be one dict for each provider, and stand nowhere else")
    names = [name for name, _ in named]
    if names and CPU not in names:
        raise UnsupportedError(f"providers must have {CPU} among them: the parties compute on the CPU; got {names}")
    if unused := names[: names.index(CPU)] if names else []:
        text = f"the parties compute on the CPU: {', '.join(unused)} before {CPU} is not used"
        warnings.warn(text, ProviderWarning, stacklevel=stacklevel)


def _provider(entry: Any) -> tuple[str, Mapping[str, Any]]:
    name, own = entry if isinstance(entry, tuple) and len(entry) == 2 else (entry, {})
    if not isinstance(name, str) or not isinstance(own, Mapping):
        raise InputError(f"a provider must be a name, or a name and a dict of options; got {type(entry).__name__}")
    return name, own


# Of session options: what only says how onnxruntime computes, and with how much memory and talk.
HARMLESS = (
    *("enable_cpu_mem_arena", "enable_mem_pattern", "enable_mem_reuse", "execution_mode", "execution_order"),
    *("graph_optimization_level", "inter_op_num_threads", "intra_op_num_threads", "use_per_session_threads"),
    *("log_severity_level", "log_verbosity_level", "logid", "profile_file_prefix"),
)
RUN_HARMLESS = ("log_severity_level", "log_verbosity_level", "logid", "only_execute_path_to_fetches")
# What changes the answers or asks for a file: its one value that we can honour, and why there is no other.
BOUND: Mapping[str, tuple[Any, str]] = {
    "enable_profiling": (False, "nothing is profiled; the cost of a run, layer by layer, is in .cost"),
    "optimized_model_filepath": ("", "the model is not onnxruntime's; securemtk check --fix writes a rewritten one"),
    "use_deterministic_compute": (False, "the last bit of fixed point is rounded at random"),
}
# Entries that a program may have added, which can be asked for by name only.
ENTRIES: Mapping[str, tuple[tuple[str, ...], str]] = {
    "session.load_model_format": (("ONNX",), "only ONNX files are read"),
    "session.save_model_format": ((), "no model is written"),
    "session.record_ep_graph_assignment_info": (("0",), "no node is assigned to an execution provider"),
    "session.use_ort_model_bytes_directly": (("0",), "only ONNX files are read"),
    "ep.context_enable": (("0",), "no model is compiled for a device"),
}


def check_session_options(options: Any, *, with_providers: bool) -> Any:
    """Return session options that hold here, fresh ones for None.

    Args:
        options: an onnxruntime.SessionOptions, or None.
        with_providers: whether the caller names providers besides, which then count alone.

    Raises:
        TypeError: they are something else.
        UnsupportedError: something in them changes answers, or asks for a file, in a way that we do not have.
    """
    if options is None:
        return onnxruntime.SessionOptions()
    if not isinstance(options, onnxruntime.SessionOptions):
        raise TypeError(f"sess_options must be an onnxruntime.SessionOptions or None; got {type(options).__name__}")
    for name, (value, why) in BOUND.items():
        if getattr(options, name, value) != value:
            raise UnsupportedError(f"sess_options.{name} must be {value!r}: {why}; got {getattr(options, name)!r}")
    if strange := _changed(options, onnxruntime.SessionOptions(), {*HARMLESS, *BOUND}):
        raise UnsupportedError(f"sess_options.{strange} must be left as it is: what it means here is not known")
    for name, (values, why) in ENTRIES.items():
        entry = _entry(options.get_session_config_entry, name)
        if entry is not None and entry not in values:
            raise UnsupportedError(f"sess_options must not set {name}: {why}; got {entry!r}")
    if not with_providers and getattr(options, "has_providers", bool)():
        raise UnsupportedError("sess_options must name no providers of its own: the parties compute on the CPU")
    return options


def check_keywords(keywords: Mapping[str, Any]) -> None:
    """Take the further keywords of onnxruntime's constructor.

    Raises:
        TypeError: it has none of that name. (onnxruntime itself passes over it.)
        UnsupportedError: the model's file shall say how it is run.
    """
    unknown = sorted(set(keywords) - {"enable_fallback", "disabled_optimizers", "read_config_from_model"})
    if unknown:
        raise TypeError(f"InferenceSession() got an unexpected keyword argument {unknown[0]!r}")
    if int(keywords.get("read_config_from_model", 0)):
        raise UnsupportedError("read_config_from_model must be 0: what a file says of its session is not read")


def check_run_options(options: Any) -> None:
    """Take the options of one run: what it logs, and by what name.

    Raises:
        TypeError: they are no onnxruntime.RunOptions.
        InputError: they say that the run is to end.
        UnsupportedError: they have a field that is not known here, and it is set.
    """
    if options is None:
        return
    if not isinstance(options, onnxruntime.RunOptions):
        raise TypeError(f"run_options must be an onnxruntime.RunOptions or None; got {type(options).__name__}")
    if strange := _changed(options, onnxruntime.RunOptions(), {*RUN_HARMLESS, "terminate"}):
        raise UnsupportedError(f"run_options.{strange} must be left as it is: what it means here is not known")
    if options.terminate:
        raise InputError("run_options.terminate must be False for a run to begin; got True")


def plain(value: Any) -> Any:
    """Return what a program may feed to onnxruntime, an OrtValue or nested lists, as an array; others as they are."""
    if isinstance(value, onnxruntime.OrtValue):
        return value.numpy()
    return np.asarray(value) if isinstance(value, list) else value


def ort_values(arrays: Sequence[NDArray[Any]]) -> list[Any]:
    """Return arrays as onnxruntime.OrtValue on the CPU."""
    return [onnxruntime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array)) for array in arrays]


def memory_infos(n: int) -> list[Any]:
    """Return for each of n arrays where it lies as onnxruntime says it: in the memory of the CPU."""
    kind, place = onnxruntime.OrtAllocatorType.ORT_DEVICE_ALLOCATOR, onnxruntime.OrtMemType.DEFAULT
    return [onnxruntime.OrtMemoryInfo("Cpu", kind, 0, place) for _ in range(n)]


def _changed(options: Any, fresh: Any, known: set[str]) -> str | None:
    """Return a field that we do not know and that is not as in fresh options: of a newer onnxruntime."""
    for name in dir(fresh):
        value = getattr(fresh, name)
        if not (name.startswith("_") or name in known or callable(value)) and getattr(options, name) != value:
            return name
    return None


def _entry(ask: Any, name: str) -> str | None:
    try:
        return str(ask(name))
    except RuntimeError:  # nobody set it
        return None
