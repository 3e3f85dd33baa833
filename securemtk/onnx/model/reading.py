"""Read an ONNX file as what it is: bytes from somebody else.

The result is plain data: weights inside the model, functions inlined, nodes in order, every name made once. Nothing
outside the file's own folder is opened, and nothing of it runs.
"""

import math
import os
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath

import numpy as np
import onnx
import onnx.checker
import onnx.defs
import onnx.inliner
import onnx.numpy_helper
import onnx.version_converter
from google.protobuf.message import DecodeError, Message  # type: ignore[import-untyped]
from numpy.typing import NDArray
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto

from protocols.errors import BundleError, InputError
from securemtk.onnx.model import classical
from securemtk.onnx.model.opsets import opset_of, settle_opsets
from securemtk.onnx.model.problems import Problem, UnsupportedNodes, foreseen
from securemtk.support.files import no_waiting, read_regular

Source = str | os.PathLike[str] | bytes
Proto = ModelProto  # for those who pass a model on and do not look into it: only this package imports onnx

OLDEST_OPSET = 9
NEWEST_OPSET: int = onnx.defs.onnx_opset_version()
# A protobuf message, and so whatever onnx and onnxruntime exchange, ends at 2 GiB.
MAX_BYTES = (1 << 31) - 1
# Functions that call functions grow without bound when inlined; onnx follows calls no deeper.
_MAX_NODES = 200_000
_MAX_CALLS = 100
# Attributes that may be infinite, or larger than any axis: constants, bounds of a clip, and ends of a slice.
_FREE_FLOATS = ("Constant", "Clip", "Pad")
_FREE_INTS = ("Constant", "Slice")
_INTS = range(-(1 << 31), 1 << 31)


def read_bytes(path: str | os.PathLike[str], *, limit: int = MAX_BYTES) -> bytes:
    """Return the bytes of a regular file of at most `limit` bytes; raise BundleError otherwise.

    Args:
        path: of the file.
        limit: how many bytes it may have.
    """
    name = os.fspath(path)
    try:
        return read_regular(name, limit, repr(name))
    except InputError as error:
        raise BundleError(str(error)) from None
    except OSError as error:
        raise BundleError(f"{name!r} cannot be read: {error.strerror}") from None


def read_proto(source: Source) -> ModelProto:
    """Return a self-contained, sorted and checked model.

    Args:
        source: path of an ONNX file (external data beside it is read), or its bytes (external data is refused).

    Returns:
        A model of opset 9 or later, raised to 9 where the file's is older, whose default domain is written "", without
        local functions and external data.

    Raises:
        BundleError: the file is missing, not ONNX, truncated, inconsistent, cyclic, of an opset that is unknown or that
            onnx cannot raise to 9, or its external data is missing or lies outside its folder.
        UnsupportedNodes: the file has sparse initializers, or what nobody foresaw.
    """
    folder = None if isinstance(source, bytes) else Path(source).absolute().parent
    data = source if isinstance(source, bytes) else read_bytes(source)
    with foreseen():
        return _understood(data, folder)


def _understood(data: bytes, folder: Path | None) -> ModelProto:
    model = _parse(data)
    _load_external(model, folder)
    _normalise_domains(model)
    model = _inline(model)
    if classical.is_used(model):
        # What stands in their place is made of their attributes, which must be there and of the right kind.
        _sort(model.graph)
        _check(model)
        model = classical.standardised(model)
    _check_opset(model)
    if model.graph.sparse_initializer:
        names = [t.values.name for t in model.graph.sparse_initializer]
        remedy = "store them as ordinary initializers"
        raise UnsupportedNodes([Problem(n, "initializer", "sparse initializers are not read", remedy) for n in names])
    _sort(model.graph)
    _check_attributes(model.graph)
    _check(model)
    return model if opset_of(model) >= OLDEST_OPSET else _raised(model)


def self_contained(source: Source) -> bytes:
    """Return the bytes of a model with its external data inside; raise as `read_proto` does."""
    if isinstance(source, bytes):
        return source
    data = read_bytes(source)
    with foreseen():
        model = _parse(data)
        return data if not _load_external(model, Path(source).absolute().parent) else model.SerializeToString()


def initializer(tensor: TensorProto) -> NDArray[np.generic]:
    """Return a tensor's values; raise BundleError when its data do not fill its shape."""
    try:
        return np.asarray(onnx.numpy_helper.to_array(tensor))
    except (ValueError, TypeError, KeyError) as error:
        raise BundleError(f"initializer {tensor.name!r} must hold data of its shape; {error}") from None


def interface(source: Source) -> tuple[list[ValueInfoProto], list[ValueInfoProto]]:
    """Return the inputs and outputs of a model as its file declares them, without inputs that have a default.

    Raises:
        BundleError: the file is missing or no ONNX model.
    """
    with foreseen():
        graph = header(source).graph
        weights = {t.name for t in graph.initializer}
        return [x for x in graph.input if x.name not in weights], list(graph.output)


def overridable(source: Source) -> list[ValueInfoProto]:
    """Return the inputs of a model that have a default in its file; raise as `interface` does."""
    graph = header(source).graph
    weights = {t.name for t in graph.initializer}
    return [x for x in graph.input if x.name in weights]


def header(source: Source) -> ModelProto:
    """Return a model as its file has it, without external data; raise as `interface` does."""
    return _parse(source if isinstance(source, bytes) else read_bytes(source))


def captured(node: NodeProto) -> set[str]:
    """Return the names that a node's sub-graphs take from around it."""
    names: set[str] = set()
    for graph in _subgraphs(node):
        own = {x.name for x in graph.input} | {x.name for x in graph.initializer}
        used = {x.name for x in graph.output}
        for inner in graph.node:
            used |= set(inner.input) | captured(inner)
            own |= set(inner.output)
        names |= used - own
    return names - {""}


def _parse(data: bytes) -> ModelProto:
    if not data:
        raise BundleError("an ONNX file must not be empty; got 0 bytes")
    if len(data) > MAX_BYTES:
        raise BundleError(f"an ONNX file must be at most {MAX_BYTES} bytes; got {len(data)}")
    try:
        model = onnx.load_model_from_string(data)
    except (DecodeError, ValueError):
        raise BundleError("the file must be a whole ONNX model; it is damaged, truncated or of another kind") from None
    model.ClearField("training_info")
    _check_texts(model)
    free_sizes(model)
    if not model.ir_version or not model.graph.node or not model.graph.output:
        raise BundleError("the file must be a whole ONNX model; it has no graph with nodes and outputs")
    return model


def free_sizes(model: ModelProto) -> None:
    """Take sizes below 0, as Paddle's exporter writes for those that are free, for what onnxruntime does: no size."""
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        for dim in value.type.tensor_type.shape.dim if value.type.HasField("tensor_type") else ():
            if dim.dim_value < 0:
                dim.ClearField("dim_value")


def _subgraphs(node: NodeProto) -> Iterator[GraphProto]:
    for attribute in node.attribute:
        if attribute.type == AttributeProto.GRAPH:
            yield attribute.g
        yield from attribute.graphs


def _tensors(message: Message) -> Iterator[TensorProto]:
    """Yield every tensor at any depth of a message: initializers, attributes, sub-graphs, functions."""
    if isinstance(message, TensorProto):
        yield message
        return
    for field, value in message.ListFields():
        if field.message_type is not None:
            for item in [value] if isinstance(value, Message) else value:
                yield from _tensors(item)


def _check_texts(message: Message) -> None:
    """Refuse texts that are no UTF-8: protobuf hands them out as bytes."""
    for field, value in message.ListFields():
        several = value if isinstance(value, Iterable) and not isinstance(value, str | bytes) else [value]
        if field.message_type is not None:
            for item in several:
                _check_texts(item)
        elif field.type == field.TYPE_STRING and any(isinstance(item, bytes) for item in several):
            raise BundleError("the file must be a whole ONNX model; a name in it is no text")


def _load_external(model: ModelProto, folder: Path | None) -> bool:
    """Move external data into the model; return whether there was any."""
    external = [t for t in _tensors(model) if t.data_location == TensorProto.EXTERNAL or t.external_data]
    room = MAX_BYTES - model.ByteSize() if external else 0
    for tensor in external:
        if folder is None:
            raise BundleError(f"a model given as bytes must hold its data; tensor {tensor.name!r} lies in another file")
        # Many tensors may name one large file: what they hold together counts.
        tensor.raw_data = _external_bytes(tensor, folder, room)
        room -= len(tensor.raw_data)
        tensor.data_location = TensorProto.DEFAULT
        del tensor.external_data[:]
    return bool(external)


def _external_bytes(tensor: TensorProto, folder: Path, room: int) -> bytes:
    entries = {entry.key: entry.value for entry in tensor.external_data}
    location = entries.get("location", "")
    parts = PurePosixPath(location).parts
    what = f"external data {location[:100]!r} of tensor {tensor.name!r}"
    if not parts or location.startswith("/") or ".." in parts or "\\" in location or "\0" in location:
        raise BundleError(f"{what} must lie in the model's folder")
    path = folder
    try:
        for part in parts:
            path = path / part
            if path.is_symlink():
                raise BundleError(f"{what} must be a file, not a symbolic link")
    except OSError as error:
        raise BundleError(f"{what} cannot be read: {error.strerror}") from None
    try:
        offset, length = int(entries.get("offset", "0")), int(entries.get("length", "-1"))
    except ValueError:
        raise BundleError(f"{what} must have whole numbers as offset and length") from None
    if offset < 0 or length < -1:
        raise BundleError(f"{what} must have an offset and length of at least 0")
    try:
        with open(path, "rb", opener=no_waiting) as file:
            facts = os.fstat(file.fileno())
            end = facts.st_size if length == -1 else offset + length
            if not stat.S_ISREG(facts.st_mode) or not offset <= end <= facts.st_size:
                raise BundleError(f"{what} must be a regular file that holds bytes {offset} to {end}")
            if end - offset > room:
                raise BundleError(f"a model with its external data must be at most {MAX_BYTES} bytes; {what} has more")
            file.seek(offset)
            return file.read(end - offset)
    except OSError as error:
        raise BundleError(f"{what} cannot be read: {error.strerror}") from None


def _normalise_domains(model: ModelProto) -> None:
    """Write the default domain as "" everywhere; it may also be called "ai.onnx"."""

    def visit(nodes: Iterator[NodeProto]) -> None:
        for node in nodes:
            node.domain = "" if node.domain == "ai.onnx" else node.domain
            for graph in _subgraphs(node):
                visit(iter(graph.node))

    visit(iter(model.graph.node))
    for function in model.functions:
        visit(iter(function.node))
    settle_opsets(model)


def _check_opset(model: ModelProto) -> None:
    opset = opset_of(model)
    if not 1 <= opset <= NEWEST_OPSET:
        raise BundleError(
            f"the model's opset must lie in 1..{NEWEST_OPSET}; got {opset or 'none'}; "
            "export it again with another opset_version, or convert it with onnx.version_converter"
        )


def _raised(model: ModelProto) -> ModelProto:
    """Return a model of an old opset in the oldest one that the importer knows."""
    opset = opset_of(model)
    if all(_is_unchanged(node, opset) for node in model.graph.node):
        for entry in model.opset_import:
            entry.version = OLDEST_OPSET if entry.domain == "" else entry.version
        return model
    try:
        made = onnx.version_converter.convert_version(model, OLDEST_OPSET)
    except (onnx.version_converter.ConvertError, RuntimeError, ValueError, KeyError) as error:
        raise BundleError(
            f"a model of opset {opset} must be one that onnx converts to {OLDEST_OPSET}; export it again with a later "
            f"opset_version; onnx says: {_first_line(error)}"
        ) from None
    _sort(made.graph)
    _check(made)
    return made


def _is_unchanged(node: NodeProto, opset: int) -> bool:
    """Return whether a node's operator is the same in an old opset and in the oldest that the importer knows."""
    if node.domain or any(True for _ in _subgraphs(node)):
        return False
    known = [v for v in (opset, OLDEST_OPSET) if onnx.defs.has(node.op_type, v, "")]
    return len({onnx.defs.get_schema(node.op_type, v, "").since_version for v in known}) == 1 and len(known) == 2


def _inline(model: ModelProto) -> ModelProto:
    """Replace calls of the model's own functions by their bodies."""
    if not model.functions:
        return model
    bodies = {(f.domain, f.name): f for f in model.functions}
    sizes: dict[tuple[str, str], float] = {}

    def size(nodes: Iterable[NodeProto], calls: int) -> float:
        if calls > _MAX_CALLS:
            return math.inf
        total = 0.0
        for node in nodes:
            key = (node.domain, node.op_type)
            if key in bodies and key not in sizes:
                sizes[key] = math.inf  # stays, and so is seen, when the function reaches itself
                sizes[key] = size(bodies[key].node, calls + 1)
            total += sizes.get(key, 1) + sum(size(graph.node, calls) for graph in _subgraphs(node))
        return total

    if size(model.graph.node, 0) > _MAX_NODES:
        raise BundleError(
            f"functions must not call themselves, and expand to at most {_MAX_NODES} nodes in {_MAX_CALLS} calls"
        )
    try:
        return onnx.inliner.inline_local_functions(model)
    except (RuntimeError, ValueError, onnx.checker.ValidationError) as error:
        raise BundleError(f"the model's functions cannot be inlined: {_first_line(error)}") from None


def _sort(graph: GraphProto) -> None:
    """Put nodes in an order in which each input is made before it is used; refuse cycles and names made twice."""
    made = {x.name for x in graph.input} | {x.name for x in graph.initializer} | {""}
    makers = {name: i for i, node in enumerate(graph.node) for name in node.output if name}
    if len(makers) != sum(bool(name) for node in graph.node for name in node.output) or made & makers.keys():
        raise BundleError("every value of a graph must be made once; one name is made twice")
    nodes = list(graph.node)
    needs = [{*node.input, *captured(node)} - made for node in nodes]
    for node, needed in zip(nodes, needs, strict=True):
        if unknown := {name for name in needed if name not in makers}:
            raise BundleError(f"node {node.name or node.op_type!r} uses {sorted(unknown)[0]!r}, which nothing makes")
    if unknown := {x.name for x in graph.output} - made - makers.keys():
        raise BundleError(f"output {sorted(unknown)[0]!r} is made by no node")
    order = _topological([{makers[name] for name in needed} for needed in needs])
    if len(order) < len(needs):
        stuck = [graph.node[i].name or graph.node[i].op_type for i in sorted(set(range(len(needs))) - set(order))]
        raise BundleError(f"a graph must not have a cycle; these nodes are on one or behind it: {stuck[:5]}")
    if order != list(range(len(order))):
        ordered = [NodeProto.FromString(nodes[i].SerializeToString()) for i in order]
        del graph.node[:]
        graph.node.extend(ordered)


def _topological(needs: list[set[int]]) -> list[int]:
    """Return indices so that each follows those it needs, as near to the given order as can be; stop at a cycle."""
    waiting = [len(needed) for needed in needs]
    users: list[list[int]] = [[] for _ in needs]
    for i, needed in enumerate(needs):
        for j in needed:
            users[j].append(i)
    order: list[int] = []
    ready = [i for i in reversed(range(len(needs))) if not waiting[i]]
    while ready:
        i = ready.pop()
        order.append(i)
        for user in reversed(users[i]):
            waiting[user] -= 1
            if not waiting[user]:
                ready.append(user)
    in_order = all(max(needed, default=-1) < i for i, needed in enumerate(needs))
    return list(range(len(needs))) if in_order else order


def _check_attributes(graph: GraphProto) -> None:
    """Refuse numbers that no operator means: onnxruntime cuts some of them to 32 bits, or divides by what is left."""
    for node in graph.node:
        for attribute in node.attribute if node.domain == "" else ():
            what = f"attribute {attribute.name!r} of node {node.name or node.op_type!r}"
            if attribute.ref_attr_name:
                raise BundleError(f"{what} must have a value; it refers to an attribute of a function")
            floats = (attribute.f, *attribute.floats)
            if node.op_type not in _FREE_FLOATS and not all(map(math.isfinite, floats)):
                raise BundleError(f"{what} must be finite; got {next(x for x in floats if not math.isfinite(x))}")
            if node.op_type not in _FREE_INTS:
                for number in (attribute.i, *attribute.ints):
                    if number not in _INTS:
                        raise BundleError(f"{what} must be a number of 32 bits; got {number}")
        for inner in _subgraphs(node):
            _check_attributes(inner)


def _check(model: ModelProto) -> None:
    """Let onnx check the model; operators that onnx does not know are left to the importer to report."""
    copy = ModelProto.FromString(model.SerializeToString())
    opset = opset_of(model)
    unknown = False
    for node in copy.graph.node:
        known = node.domain or onnx.defs.has(node.op_type, opset, "")
        # A deprecated operator, such as GroupNormalization 18, is still what exporters wrote and onnxruntime runs.
        if not known or (not node.domain and onnx.defs.get_schema(node.op_type, opset, "").deprecated):
            node.domain, unknown = "unknown", True
    for value in (*copy.graph.input, *copy.graph.output):
        # The checker wants a type and rank that onnxruntime finds out by itself.
        if value.type.WhichOneof("value") in (None, "tensor_type"):
            value.type.tensor_type.elem_type = value.type.tensor_type.elem_type or TensorProto.FLOAT
            value.type.tensor_type.shape.SetInParent()
    if unknown and not any(x.domain == "unknown" for x in copy.opset_import):
        copy.opset_import.append(onnx.helper.make_opsetid("unknown", 1))
    try:
        onnx.checker.check_model(copy)
    except (onnx.checker.ValidationError, ValueError, RuntimeError) as error:
        raise BundleError(f"the file must be a valid ONNX model; onnx says: {_first_line(error)}") from None


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
