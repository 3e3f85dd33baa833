"""Rewrites of an ONNX file that keep its function and take out of the way what they can."""

import contextlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx
import onnx.defs
import onnx.helper
import onnx.numpy_helper
import onnx.shape_inference
import onnx.version_converter
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, ValueInfoProto

from protocols.errors import BundleError, SecureError, UnsupportedError
from securemtk.onnx.importer import understand
from securemtk.onnx.model import runtime
from securemtk.onnx.model.analyse import MOST_NUMBERS
from securemtk.onnx.model.classical import standardised
from securemtk.onnx.model.graph import Graph
from securemtk.onnx.model.opsets import opset_of, settle_opsets
from securemtk.onnx.model.problems import foreseen
from securemtk.onnx.model.reading import (
    MAX_BYTES,
    OLDEST_OPSET,
    Source,
    captured,
    free_sizes,
    read_proto,
    self_contained,
)

# Outputs of both files may differ by so much, for constants are computed in another order.
TOLERANCE = 1e-4
# A folded constant with more elements than this stays a node: the file would grow without use.
_MOST_ELEMENTS = 1 << 22
# Operators whose axes became an input: since which opset.
_AXES_INPUT = {"ReduceSum": 13, "Squeeze": 13, "Unsqueeze": 13} | dict.fromkeys(
    (
        "ReduceL1",
        "ReduceL2",
        "ReduceLogSum",
        "ReduceLogSumExp",
        "ReduceMax",
        "ReduceMean",
        "ReduceMin",
        "ReduceProd",
        "ReduceSumSquare",
    ),
    18,
)
Array = NDArray[np.generic]


@dataclass(frozen=True)
class Fixed:
    """A rewritten model.

    Args:
        data: the ONNX file, self-contained.
        rewrites: what was done, in words; empty where there was nothing to do.
    """

    data: bytes = field(repr=False)
    rewrites: tuple[str, ...]


def fix(source: Source) -> Fixed:
    """Rewrite a model where that keeps its function, and check that it does.

    Operators of ai.onnx.ml become those of the standard, old opsets are converted, functions inlined, external data
    taken in, misplaced axes moved, constants folded, Dropout and Identity removed, what nothing uses dropped, shapes
    inferred, and a fixed batch freed. onnxruntime then runs both files on random inputs.

    Args:
        source: path of an ONNX file, or its bytes.

    Raises:
        BundleError: the file cannot be read as an ONNX model, or the result is above 2 GiB.
        UnsupportedError: onnxruntime does not run the model, so that nothing could be compared, or the results differ.
    """
    data = self_contained(source)
    with foreseen():
        return _fixed(data, has_external=_has_external(source))


def _fixed(data: bytes, *, has_external: bool) -> Fixed:
    try:
        raw = onnx.load_model_from_string(data)
    except (DecodeError, ValueError):
        raise BundleError("the file must be a whole ONNX model; it is damaged, truncated or of another kind") from None
    settle_opsets(raw)
    free_sizes(raw)
    done: list[str] = []
    if has_external:
        done.append("took the external data into the file")
    if (standard := standardised(raw)) is not raw:
        raw = standard
        done.append("wrote operators of ai.onnx.ml as operators of the standard")
    _move_axes(raw, done)
    raw = _newer(raw, done)
    # What the file said so far; onnxruntime refuses some of what was just mended.
    before = raw.SerializeToString()
    if raw.functions:
        done.append(f"inlined {len(raw.functions)} functions of the model")
    model = read_proto(before)
    _fold(model, done)
    _skip_nodes(model, done)
    _drop_unused(model, done)
    candidates = [(model, done)]
    if (freed := _with_free_batch(model)) is not None:
        candidates.insert(0, (freed, [*done, "freed the batch"]))
    for candidate, rewrites in candidates:
        result = _with_shapes(candidate, rewrites)
        if result.ByteSize() > MAX_BYTES:
            raise BundleError(f"a rewritten model must be at most {MAX_BYTES} bytes; got {result.ByteSize()}")
        fixed = result.SerializeToString(deterministic=True)
        if _agree(before, fixed, raw):
            return Fixed(fixed if rewrites else data, tuple(rewrites))
    raise UnsupportedError("the rewritten model must answer as the given one; onnxruntime finds that it does not")


def _has_external(source: Source) -> bool:
    if isinstance(source, bytes):
        return False
    model = onnx.load_model(source, load_external_data=False)
    return any(onnx.external_data_helper.uses_external_data(t) for t in model.graph.initializer)


# --- before the file can be read ------------------------------------------------------------------------------------


def _move_axes(model: ModelProto, done: list[str]) -> None:
    """Move axes from an attribute to the input that the model's opset wants."""
    moved = 0
    for node in model.graph.node:
        if node.domain not in ("", "ai.onnx") or opset_of(model) < _AXES_INPUT.get(node.op_type, 1 << 30):
            continue
        for attribute in [a for a in node.attribute if a.name == "axes"]:
            name = f"{node.output[0]}/axes"
            model.graph.initializer.append(onnx.numpy_helper.from_array(np.array(attribute.ints, np.int64), name))
            node.input.extend([""] * (1 - len(node.input)))
            node.input.append(name)
            node.attribute.remove(attribute)
            moved += 1
    if moved:
        done.append(f"moved the axes of {moved} nodes to where opset {opset_of(model)} has them")


def _newer(model: ModelProto, done: list[str]) -> ModelProto:
    old = opset_of(model)
    if not 0 < old < OLDEST_OPSET:
        return model
    try:
        model = onnx.version_converter.convert_version(model, OLDEST_OPSET)
    except (*runtime.ERRORS, onnx.version_converter.ConvertError, KeyError) as error:
        reason = (str(error).splitlines() or [""])[0][:200]
        raise UnsupportedError(f"opset {old} must be converted to {OLDEST_OPSET}; onnx says: {reason}") from None
    done.append(f"converted opset {old} to {OLDEST_OPSET}")
    return model


# --- rewrites -------------------------------------------------------------------------------------------------------


def _graph_of(model: ModelProto) -> Graph | None:
    """Return what is known of a model's values; None where that is nothing."""
    with contextlib.suppress(SecureError):
        graph = understand(ModelProto.FromString(model.SerializeToString())).graph
        return graph if graph.failure is None else None
    return None


def _fold(model: ModelProto, done: list[str]) -> None:
    graph = _graph_of(model)
    if graph is None:
        return
    weights = {t.name for t in model.graph.initializer}
    known = {
        name: value
        for name, value in graph.constants.items()
        if name not in weights and name not in graph.outputs and value.size <= _MOST_ELEMENTS
    }
    kept: list[NodeProto] = []
    gone: list[NodeProto] = []
    for node in model.graph.node:
        (gone if node.output and all(not x or x in known for x in node.output) else kept).append(node)
    folded = sum(node.op_type != "Constant" for node in gone)
    if not gone:
        return
    gone = [NodeProto.FromString(node.SerializeToString()) for node in gone]
    _keep(model, kept)
    used = _used(model)
    for name in (x for node in gone for x in node.output if x in used):
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(known[name]), name))
    if folded:
        done.append(f"computed {folded} nodes that do not depend on the input's numbers")
    if len(gone) > folded:
        done.append(f"made initializers of {len(gone) - folded} Constant nodes")


def _skip_nodes(model: ModelProto, done: list[str]) -> None:
    """Remove Identity, and Dropout outside training, where that takes no name that somebody needs."""
    outputs = {x.name for x in model.graph.output}
    inner = {name for node in model.graph.node for name in captured(node)}
    made = {x for node in model.graph.node for x in node.output}
    used = _used(model) | outputs
    names: dict[str, str] = {}

    def now(name: str) -> str:
        while name in names:
            name = names[name]
        return name

    removed: dict[str, int] = {}
    kept: list[NodeProto] = []
    for node in model.graph.node:
        if not _does_nothing(node, used) or inner & {node.input[0], node.output[0]}:
            kept.append(node)
            continue
        source, target = now(node.input[0]), now(node.output[0])
        if target not in outputs:
            names[target] = source
        elif source in made and source not in outputs and source not in inner:
            # An output of the model keeps its name, so that its maker takes it.
            names[source] = target
        else:
            kept.append(node)
            continue
        removed[node.op_type] = removed.get(node.op_type, 0) + 1
    for node in kept:
        node.input[:] = [now(x) for x in node.input]
        node.output[:] = [now(x) for x in node.output]
    _keep(model, kept)
    done.extend(f"removed {n} {op_type} nodes" for op_type, n in removed.items())


def _does_nothing(node: NodeProto, used: set[str]) -> bool:
    if node.domain or node.op_type not in ("Identity", "Dropout"):
        return False
    if len([x for x in node.output if x]) > 1:
        return not used.intersection(node.output[1:])
    # Where a training mode is given it may be true.
    return len(node.input) < 3 or not node.input[2]


def _drop_unused(model: ModelProto, done: list[str]) -> None:
    n_nodes = 0
    while True:
        needed = _used(model) | {x.name for x in model.graph.output}
        kept = [node for node in model.graph.node if needed.intersection(node.output)]
        if len(kept) == len(model.graph.node):
            break
        n_nodes += len(model.graph.node) - len(kept)
        _keep(model, kept)
    dropped = [t for t in model.graph.initializer if t.name not in needed]
    for tensor in dropped:
        model.graph.initializer.remove(tensor)
    names = {t.name for t in dropped}
    weights = {t.name for t in model.graph.initializer} | names
    for x in [x for x in model.graph.input if x.name in weights]:
        model.graph.input.remove(x)
    if n_nodes:
        done.append(f"dropped {n_nodes} nodes that no output needs")
    if names:
        done.append(f"dropped {len(names)} initializers that nothing uses")


def _with_free_batch(model: ModelProto) -> ModelProto | None:
    """Return the model with a free batch; None where it is free, or samples do not keep apart."""
    graph = _graph_of(model)
    if graph is None or graph.batch is None or graph.whole:
        return None
    freed: ModelProto = ModelProto.FromString(model.SerializeToString())
    shapes = {t.name: t for t in freed.graph.initializer}
    for node in freed.graph.node:
        made = graph.shapes.get(node.output[0])
        if node.op_type != "Reshape" or node.domain or made is None or node.input[1] not in shapes:
            continue
        name = f"{node.output[0]}/free_shape"
        freed.graph.initializer.append(onnx.numpy_helper.from_array(np.array([-1, *made], np.int64), name))
        node.input[1] = name
    for x in (*freed.graph.input, *freed.graph.output):
        dims = x.type.tensor_type.shape.dim
        if dims and x.name not in shapes:
            dims[0].dim_param = "batch"
    _drop_unused(freed, [])
    return freed


def _with_shapes(model: ModelProto, done: list[str]) -> ModelProto:
    """Return the model with the shapes of its values; adds to `done` where the file had fewer."""
    result: ModelProto = ModelProto.FromString(model.SerializeToString())
    names = {x for node in result.graph.node for x in node.output}
    before = len({x.name for x in result.graph.value_info} & names)
    del result.graph.value_info[:]
    for x in result.graph.output:
        if not all(d.dim_value or d.dim_param for d in x.type.tensor_type.shape.dim):
            x.type.tensor_type.ClearField("shape")
    try:
        inferred = onnx.shape_inference.infer_shapes(result, data_prop=True)
    except (onnx.shape_inference.InferenceError, RuntimeError, ValueError):
        return result
    if len(inferred.graph.value_info) > before:
        done.append(f"inferred the shapes of {len(inferred.graph.value_info)} values")
    return inferred


def _keep(model: ModelProto, nodes: Sequence[NodeProto]) -> None:
    kept = [NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del model.graph.node[:]
    model.graph.node.extend(kept)


def _used(model: ModelProto) -> set[str]:
    return {name for node in model.graph.node for name in (*node.input, *captured(node))} - {""}


# --- comparison -----------------------------------------------------------------------------------------------------

Run = Callable[[Mapping[str, Array]], list[Array]]


def _agree(before: bytes, after: bytes, model: ModelProto) -> bool:
    """Tell whether both files give the same outputs: on the batch that the first one takes, and on other ones."""
    old = _runner(before)
    try:
        new = _runner(after)
    except UnsupportedError:
        return False
    weights = {t.name for t in model.graph.initializer}
    inputs = [x for x in model.graph.input if x.name not in weights]
    fixed = [x.type.tensor_type.shape.dim[0].dim_value for x in inputs if x.type.tensor_type.shape.dim]
    batch = max(fixed, default=0)
    for n in (batch,) if batch else (1, 3):
        fed = {x.name: _sample(x, n, seed) for seed, x in enumerate(inputs)}
        expected = _answer(old, fed)
        try:
            if not _close(expected, _answer(new, fed)):
                return False
            if batch and _is_free(after):
                rows = [{name: x[i : i + 1] for name, x in fed.items()} for i in range(n)]
                apart = [_answer(new, row) for row in rows]
                twice = _answer(new, {name: np.concatenate([x, x]) for name, x in fed.items()})
                together = [np.concatenate(parts) for parts in zip(*apart, strict=True)]
                doubled = [np.concatenate([x, x]) for x in expected]
                if not (_close(expected, together) and _close(doubled, twice)):
                    return False
        except UnsupportedError:
            return False
    return True


def _runner(data: bytes) -> Run:
    try:
        session = runtime.start(runtime.runnable(_readable(data)).SerializeToString(), optimise=False, bounded=True)
    except runtime.ERRORS as error:
        raise UnsupportedError(
            f"a model must run in onnxruntime to be rewritten, for both are compared; it says: {runtime.reason(error)}"
        ) from None
    return lambda fed: runtime.run(session, None, fed)


def _readable(data: bytes) -> ModelProto:
    model = onnx.load_model_from_string(data)
    model.ir_version = min(model.ir_version, runtime.IR_VERSION)
    return model


def _answer(run: Run, fed: Mapping[str, Array]) -> list[Array]:
    try:
        return [np.asarray(x) for x in run(fed)]
    except runtime.ERRORS as error:
        raise UnsupportedError(
            f"a model must run on random inputs; onnxruntime says: {runtime.reason(error)}"
        ) from None


def _is_free(data: bytes) -> bool:
    model = onnx.load_model_from_string(data)
    dims = [x.type.tensor_type.shape.dim for x in model.graph.input]
    return all(d and not d[0].HasField("dim_value") for d in dims)


def _sample(x: ValueInfoProto, batch: int, seed: int) -> Array:
    kind = x.type.tensor_type
    shape = [d.dim_value or (batch if axis == 0 else 4) for axis, d in enumerate(kind.shape.dim)]
    if math.prod(shape) > MOST_NUMBERS:
        raise UnsupportedError(f"input {x.name!r} must hold at most {MOST_NUMBERS} numbers to be tried; got {shape}")
    numbers = np.random.default_rng(seed).standard_normal(shape)
    dtype = onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type)
    return np.asarray(numbers if np.dtype(dtype).kind == "f" else np.abs(numbers)).astype(dtype)


def _close(expected: Iterable[Array], found: Iterable[Array]) -> bool:
    return all(
        x.shape == y.shape and x.dtype == y.dtype and np.allclose(x, y, rtol=TOLERANCE, atol=TOLERANCE, equal_nan=True)
        for x, y in zip(expected, found, strict=True)
    )
