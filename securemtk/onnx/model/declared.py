"""What a file declares of a model's inputs and outputs, and what is given in its place: shapes, and values."""

import shlex
from collections.abc import Mapping

import numpy as np
import onnx
import onnx.helper
import onnx.numpy_helper
from onnx import ModelProto, ValueInfoProto

from protocols.errors import InputError, ShapeError
from protocols.program.program import Shape
from securemtk.onnx.model.graph import Array, ValueInfo
from securemtk.onnx.model.reading import Source, interface

Declared = tuple[str, list[int | str], str]


def fixed_shapes(model: ModelProto, given: Mapping[str, Shape]) -> dict[str, Shape] | None:
    """Return the whole shape of each input of a model, given or from the file; None where one is not fixed.

    Args:
        model: whose inputs.
        given: input name -> whole shape.

    Raises:
        ShapeError: a given shape contradicts the file.
    """
    shapes: dict[str, Shape] = {}
    for x in inputs_of(model):
        if x.name in given:
            shapes[x.name] = tuple(given[x.name])
            _check_shape(f"the shape of input {x.name!r}", x, shapes[x.name])
            continue
        if not _is_fixed(x):
            return None
        shapes[x.name] = tuple(d.dim_value for d in x.type.tensor_type.shape.dim)
    return shapes


def shapes_remedy(model: ModelProto) -> str:
    """Return how the sizes that a model's file leaves free are given, in words."""
    return _told(inputs_of(model))


def _told(inputs: list[ValueInfoProto]) -> str:
    """Return what gives the shapes of inputs, on the command line and in Python: N for each size that is free."""
    open_ones = [x for x in inputs if x.type.HasField("tensor_type") and not _is_fixed(x)] or inputs
    forms = {x.name: [str(d.dim_value or "N") for d in x.type.tensor_type.shape.dim] for x in open_ones}
    options = " ".join("--shape " + shlex.quote(f"{name}={','.join(sizes)}") for name, sizes in forms.items())
    shapes = ", ".join(f"{name!r}: ({', '.join(sizes)}{',' * (len(sizes) == 1)})" for name, sizes in forms.items())
    return f"give them with check {options}, in Python with shapes={{{shapes}}}, a number for each N"


def _is_fixed(x: ValueInfoProto) -> bool:
    kind = x.type.tensor_type
    return bool(kind.HasField("shape")) and all(d.HasField("dim_value") and d.dim_value > 0 for d in kind.shape.dim)


def shapes_at(model: ModelProto, batch: int) -> dict[str, Shape] | None:
    """Return the whole shape of each input for a batch; None where the file leaves more than the first axis free.

    Args:
        model: whose inputs.
        batch: takes the place of a free first axis.
    """
    shapes: dict[str, Shape] = {}
    for x in inputs_of(model):
        sizes = [d.dim_value if d.HasField("dim_value") else None for d in x.type.tensor_type.shape.dim]
        rest = tuple(n for n in sizes[1:] if n is not None)
        if not sizes or len(rest) < len(sizes) - 1 or 0 in sizes:
            return None
        shapes[x.name] = (batch if sizes[0] is None else sizes[0], *rest)
    return shapes


def bound(model: ModelProto, values: Mapping[str, Array]) -> ModelProto:
    """Return the model with some of its inputs made constants.

    Args:
        model: is not changed.
        values: input name -> array of the input's type and shape.

    Raises:
        InputError: a value's type or shape is not that of the input.
    """
    copy: ModelProto = ModelProto.FromString(model.SerializeToString())
    made = [_as_declared(x, values[x.name]) for x in inputs_of(model) if x.name in values]
    kept = [x for x in copy.graph.input if x.name not in values]
    del copy.graph.input[:]
    copy.graph.input.extend(kept)
    copy.graph.initializer.extend(made)
    return copy


def inputs_of(model: ModelProto) -> list[ValueInfoProto]:
    """Return the inputs that no initializer fills."""
    weights = {t.name for t in model.graph.initializer}
    return [x for x in model.graph.input if x.name not in weights]


def _as_declared(x: ValueInfoProto, value: Array) -> onnx.TensorProto:
    array, dtype = np.asarray(value), dtype_of(x)
    if dtype == "unknown" or not np.can_cast(array.dtype, dtype, "same_kind"):
        raise InputError(f"public input {x.name!r} must be an array of {dtype}; got {array.dtype}")
    _check_shape(f"the shape of public input {x.name!r}", x, array.shape, least=0)
    return onnx.numpy_helper.from_array(array.astype(dtype), x.name)


def _check_shape(what: str, x: ValueInfoProto, shape: Shape, least: int = 1) -> None:
    """Raise ShapeError unless a shape has the sizes that the file fixes, each at least `least`."""
    kind = x.type.tensor_type
    sizes = [d.dim_value if d.HasField("dim_value") else None for d in kind.shape.dim]
    fits = not kind.HasField("shape") or len(sizes) == len(shape)
    others = any(n not in (None, m) for n, m in zip(sizes, shape, strict=False))
    if not fits or min(shape, default=least) < least or others:
        names = [d.dim_param or (d.dim_value if d.HasField("dim_value") else "?") for d in kind.shape.dim]
        form = ", ".join(map(str, names))
        raise ShapeError(f"{what} must be of the form ({form}), at least {least}; got {tuple(shape)}")


def batch_first(inputs: list[ValueInfoProto]) -> tuple[tuple[ValueInfo, ...], int | None]:
    """Return the inputs without their batch axis, and the batch if the model fixes it."""
    if not inputs:
        raise ShapeError("a model must have at least one input; got none")
    infos: list[ValueInfo] = []
    batches: set[int] = set()
    for x in inputs:
        kind = x.type.tensor_type
        if dtype_of(x) == "unknown" or not kind.HasField("shape") or not kind.shape.dim:
            raise ShapeError(f"input {x.name!r} must be an array of known type and rank, batch first")
        first, *rest = kind.shape.dim
        if first.HasField("dim_value"):
            batches.add(first.dim_value)
        for axis, dim in enumerate(rest, 1):
            if not dim.HasField("dim_value") or dim.dim_value < 1:
                what = dim.dim_param or (dim.dim_value if dim.HasField("dim_value") else "?")
                raise ShapeError(
                    f"axis {axis} of input {x.name!r} must have a fixed size of at least 1; got {what!r}; only the "
                    f"batch may be free: {_told(inputs)}, or export again with fixed sizes"
                )
        infos.append(ValueInfo(x.name, tuple(d.dim_value for d in rest), dtype_of(x)))
    if len(batches) > 1 or batches & {0}:
        raise ShapeError(f"the first axis of every input must be the batch, free or the same; got {sorted(batches)}")
    return tuple(infos), next(iter(batches), None)


def sizes_of(x: ValueInfoProto) -> list[int | str]:
    """Return the sizes that a value is declared with; a name, or "?", for one that is free."""
    sizes = x.type.tensor_type.shape.dim
    return [d.dim_value if d.HasField("dim_value") else d.dim_param or "?" for d in sizes]


def dtype_of(x: ValueInfoProto) -> str:
    """Return the name of a value's numpy type, "unknown" where there is none."""
    try:
        return np.dtype(onnx.helper.tensor_dtype_to_np_dtype(x.type.tensor_type.elem_type)).name
    except KeyError:
        return "unknown"


def declared(source: Source) -> tuple[list[Declared], list[Declared]]:
    """Return name, shape and dtype of a model's inputs and outputs as its file declares them; free sizes are names.

    Raises:
        BundleError: the file is missing or no ONNX model.
    """

    def said(x: ValueInfoProto) -> Declared:
        return x.name, sizes_of(x), dtype_of(x)

    inputs, outputs = interface(source)
    return [said(x) for x in inputs], [said(x) for x in outputs]
