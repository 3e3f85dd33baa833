"""onnxruntime, held so that it only computes: no optimiser, no operator library, no record, no word, within limits."""

import functools
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import onnx
import onnx.defs
import onnx.helper
import onnx.version_converter
from onnx import ModelProto, TensorProto, ValueInfoProto
from onnx.reference import ReferenceEvaluator

from protocols.errors import BundleError
from securemtk.onnx.model.opsets import opset_of
from securemtk.onnx.model.reading import NEWEST_OPSET, OLDEST_OPSET
from securemtk.support.silence import silently

with silently("onnxruntime"):
    import onnxruntime
    from onnxruntime.capi import onnxruntime_pybind11_state as ort_errors

ERRORS = (
    ort_errors.Fail,
    ort_errors.InvalidArgument,
    ort_errors.InvalidGraph,
    ort_errors.InvalidProtobuf,
    ort_errors.NotImplemented,
    ort_errors.RuntimeException,
    onnx.version_converter.ConvertError,
    RuntimeError,
    ValueError,
)
# onnxruntime reads no newer format, and nothing that we read depends on it.
IR_VERSION = 10
# What somebody else's model may take of this machine while it is understood: it may ask for any amount.
MAX_MEMORY = 3 << 30
MAX_SECONDS = 60.0


class TooCostly(BundleError):
    """To run the model once in the clear takes more memory or time than is granted."""


def start(model: bytes, *, optimise: bool = True, bounded: bool = False) -> onnxruntime.InferenceSession:
    """Return an onnxruntime session on the CPU that loads no operator library and writes nothing to stderr.

    Args:
        model: the bytes of an ONNX file.
        optimise: whether onnxruntime may rewrite it.
        bounded: whether it gets no more than MAX_MEMORY bytes, shared by all such sessions; for `run`.

    Raises:
        one of ERRORS: onnxruntime refuses the model.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    if not optimise:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    if bounded:
        _bound_memory()
        options.add_session_config_entry("session.use_env_allocators", "1")
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def prober(model: ModelProto) -> Callable[[Sequence[str], Mapping[str, Any]], list[Any]]:
    """Return what computes values of a model, unoptimised, from its inputs; inputs of other names are left out.

    onnxruntime lacks some numeric types of some operators, and opsets newer than itself: onnx's own reference, which is
    slow, takes its place there.

    Raises:
        one of `ERRORS`: the model is not valid; the returned function raises as `run`.
    """
    names = {x.name for x in model.graph.input}
    try:
        session: Any = start(runnable(model).SerializeToString(), optimise=False, bounded=True)
    except (ort_errors.NotImplemented, onnx.version_converter.ConvertError, RuntimeError):
        # RuntimeError: an attribute that only the newer opset has.
        session = ReferenceEvaluator(model)

    def probe(wanted: Sequence[str], values: Mapping[str, Any]) -> list[Any]:
        try:
            known = {k: v for k, v in values.items() if k in names}
            if isinstance(session, ReferenceEvaluator):
                return list(session.run(list(wanted), known))
            return run(session, list(wanted), known)
        except (TypeError, IndexError, KeyError) as error:
            raise ValueError(str(error)) from None

    return probe


def run(session: onnxruntime.InferenceSession, names: Sequence[str] | None, feeds: Mapping[str, Any]) -> list[Any]:
    """Run a session within MAX_SECONDS; return its outputs.

    Raises:
        TooCostly: it takes longer, or more memory than a bounded session has.
        another of ERRORS: onnxruntime cannot run it.
    """
    options = onnxruntime.RunOptions()
    options.log_severity_level = 4
    options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
    timer = threading.Timer(MAX_SECONDS, setattr, (options, "terminate", True))
    timer.daemon = True
    timer.start()
    try:
        made: list[Any] = session.run(names, dict(feeds), options)
    except (*ERRORS, MemoryError) as error:
        if options.terminate:
            raise TooCostly(f"the model must run once in the clear within {MAX_SECONDS:g} s; it takes longer") from None
        if isinstance(error, MemoryError) or _ALLOCATION.search(str(error)):
            most = MAX_MEMORY >> 30
            raise TooCostly(f"the model must run once in the clear within {most} GiB; it asks for more") from None
        raise
    finally:
        timer.cancel()
    return made


_ALLOCATION = re.compile(r"allocate memory|Available memory|would require more than")


@functools.cache
def _bound_memory() -> None:
    """Give bounded sessions one allocator with a limit; there is one for each process."""
    # What its allocator has to say goes past the sessions' own loggers.
    onnxruntime.set_default_logger_severity(4)
    kind = onnxruntime.OrtAllocatorType.ORT_ARENA_ALLOCATOR
    place = onnxruntime.OrtMemoryInfo("Cpu", kind, 0, onnxruntime.OrtMemType.DEFAULT)
    # Strategy 1: as much as is asked for, and no power of two.
    limits = {"max_mem": MAX_MEMORY, "arena_extend_strategy": 1}
    onnxruntime.create_and_register_allocator(place, onnxruntime.OrtArenaCfg(limits))


def reason(error: Exception) -> str:
    """Return what an error of onnxruntime says, without its source files."""
    text = (str(error).strip().splitlines() or [type(error).__name__])[0]
    # onnxruntime names its own source file and function before what it has to say.
    text = re.sub(r"/onnxruntime_src/\S+ .*?[)\]] (?=\w)", "", text.split(" : ", 3)[-1])
    return text[:300]


@functools.cache
def _newest_runnable() -> int:
    """Return the newest opset that this onnxruntime runs; it has no call that tells."""
    node = onnx.helper.make_node("Relu", ["x"], ["y"])
    x = onnx.helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])
    graph = onnx.helper.make_graph([node], "g", [x], [ValueInfoProto(name="y")])
    for opset in range(NEWEST_OPSET, OLDEST_OPSET, -1):
        imports = [onnx.helper.make_opsetid("", opset)]
        try:
            start(onnx.helper.make_model(graph, opset_imports=imports, ir_version=IR_VERSION).SerializeToString())
        except ERRORS:
            continue
        return opset
    return OLDEST_OPSET


def runnable(model: ModelProto) -> ModelProto:
    """Return the model in an opset that onnxruntime runs, when onnx knows a newer one."""
    opset, newest = opset_of(model), _newest_runnable()
    if opset <= newest:
        return model
    versions = {
        (n.op_type, onnx.defs.get_schema(n.op_type, v, "").since_version)
        for n in model.graph.node
        for v in (opset, newest)
        if n.domain == "" and onnx.defs.has(n.op_type, v, "")
    }
    if len(versions) > len({name for name, _ in versions}):
        return onnx.version_converter.convert_version(model, newest)
    for entry in model.opset_import:
        entry.version = newest if entry.domain == "" else entry.version
    return model
