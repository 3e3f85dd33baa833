"""Operators of ai.onnx.ml, which converters of scikit-learn write: read as what they mean in operators of the standard.

A classifier's classes are part of its program, which is public. Their names, where they are texts, are not computed
with: such a label is the place of its class in the model's list.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx.helper
import onnx.numpy_helper
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto

from securemtk.onnx.model.opsets import opset_of

DOMAIN = "ai.onnx.ml"
# A file without operators of the standard need not name a version of it.
_OPSET = 13
# Since which opset reductions of this kind take their axes as an input.
_AXES_INPUT = 18
_TRANSFORMS = {"NONE": "Identity", "SOFTMAX": "Softmax", "LOGISTIC": "Sigmoid"}


class _Writer:
    """Nodes of the standard in the place of one of ai.onnx.ml."""

    def __init__(self, node: NodeProto, model: ModelProto, opset: int) -> None:
        self.node, self.model, self.opset = node, model, opset
        self.attrs = _attributes(node)
        self.nodes: list[NodeProto] = []

    def constant(self, value: NDArray[Any]) -> str:
        """Add an initializer."""
        name = f"{self.node.output[0]}/constant {len(self.model.graph.initializer)}"
        self.model.graph.initializer.append(onnx.numpy_helper.from_array(value, name))
        return name

    def add(self, op: str, *inputs: str, output: str = "", **attrs: Any) -> str:
        """Add a node; return the name of what it makes."""
        output = output or f"{self.node.output[0]}/{op} {len(self.nodes)}"
        # onnxruntime wants names of their own for nodes.
        name = f"{self.node.name or f'{self.node.op_type} {self.node.output[0]}'}/{op}"
        if any(name == node.name for node in self.nodes):
            name = f"{name} {len(self.nodes)}"
        self.nodes.append(onnx.helper.make_node(op, inputs, [output], name=name, **attrs))
        return output

    def floats(self) -> str:
        """Return the first input in float32."""
        return self.add("Cast", self.node.input[0], to=TensorProto.FLOAT)

    def reduced(self, op: str, x: str) -> str:
        """Reduce the last axis to 1."""
        if self.opset >= _AXES_INPUT:
            return self.add(op, x, self.constant(np.array([-1])), keepdims=1)
        return self.add(op, x, axes=[-1], keepdims=1)

    def linear(self, k: int) -> str:
        """Return x times the coefficients, k rows of them, and the intercepts."""
        weight = np.array(self.attrs["coefficients"], np.float32).reshape(k, -1).T
        bias = np.array(self.attrs.get("intercepts") or [0.0] * k, np.float32)
        return self.add("Gemm", self.floats(), self.constant(weight.copy()), self.constant(bias))

    def transformed(self, scores: str, output: str) -> str:
        """Apply the post-transform."""
        op = _TRANSFORMS[_text(self.attrs.get("post_transform", b"NONE"))]
        return self.add(op, scores, output=output, **({"axis": 1} if op == "Softmax" else {}))

    def maker(self, name: str) -> NodeProto | None:
        """Return the node that makes a value."""
        return next((n for n in self.model.graph.node if name in n.output), None)

    def value(self, name: str) -> NDArray[Any] | None:
        """Return an initializer."""
        found = next((t for t in self.model.graph.initializer if t.name == name), None)
        return None if found is None else np.asarray(onnx.numpy_helper.to_array(found))

    def is_only_reshaped(self, name: str) -> bool:
        """Return whether a value, cast or not, gets a constant shape that does not depend on its own, and only that."""
        graph = self.model.graph
        users = [n for n in graph.node if name in n.input]
        inner = any(a.HasField("g") or a.graphs for n in graph.node for a in n.attribute)
        if inner or not users or name in {x.name for x in graph.output}:
            return False
        return all(self._reshapes(n) or (n.op_type == "Cast" and self.is_only_reshaped(n.output[0])) for n in users)

    def _reshapes(self, node: NodeProto) -> bool:
        shape = self.value(node.input[1]) if node.op_type == "Reshape" and not node.domain else None
        # A 0 would take a size of what is reshaped.
        return shape is not None and bool(shape.all())


Rewrite = Callable[[_Writer], None]
REWRITES: dict[str, Rewrite] = {}


def _rewrite(function: Rewrite) -> Rewrite:
    REWRITES["".join(word.title() for word in function.__name__.split("_"))] = function
    return function


def _attributes(node: NodeProto) -> dict[str, Any]:
    return {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}


def _text(value: Any) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)


def refusal(op_type: str, attrs: Mapping[str, Any]) -> tuple[str, str] | None:
    """Return why an operator of ai.onnx.ml is not understood, and what to do; None where it is."""
    if op_type not in REWRITES:
        remedy = "of scikit-learn use linear models, MLPs and scalers, or run this part of the model in the clear"
        return f"operator {op_type!r} of domain {DOMAIN!r} is not supported", remedy
    transform = _text(attrs.get("post_transform", "NONE"))
    if transform not in _TRANSFORMS:
        return f"post_transform must be one of {', '.join(_TRANSFORMS)}; got {transform}", "apply it to the scores"
    if op_type not in ("LinearClassifier", "LinearRegressor"):
        return None
    n, n_coefficients = len(attrs.get("intercepts", ())), len(attrs.get("coefficients", ()))
    rows = n if op_type == "LinearClassifier" else int(attrs.get("targets", 1))
    if op_type == "LinearClassifier" and n < 2:
        return "it must have an intercept for each of two or more classes", "write both classes of two"
    if op_type == "LinearClassifier" and n not in (len(attrs.get(f"classlabels_{x}", ())) for x in ("ints", "strings")):
        return f"it must have a label for each of its {n} classes", "write as many labels as intercepts"
    if rows < 1 or not n_coefficients or n_coefficients % rows or n not in (0, rows):
        got = f"{n_coefficients} coefficients and {n} intercepts"
        return f"it must have a row of coefficients for each of {rows} results; got {got}", "mend its attributes"
    return None


def is_used(model: ModelProto) -> bool:
    """Return whether a model has nodes of this domain."""
    return any(node.domain == DOMAIN for node in model.graph.node)


def standardised(model: ModelProto) -> ModelProto:
    """Return a model in which the understood operators of ai.onnx.ml are operators of the standard.

    Outputs that were sequences of maps (ZipMap) are arrays with a column for each class, and labels that were texts
    are numbers, of type int64.

    Args:
        model: with the default domain written ""; local functions inlined.
    """
    if not is_used(model):
        return model
    made: ModelProto = ModelProto.FromString(model.SerializeToString())
    opset = opset_of(made)
    if not opset:
        opset = _OPSET
        made.opset_import.append(onnx.helper.make_opsetid("", opset))
    nodes: list[NodeProto] = []
    for node in made.graph.node:
        if node.domain != DOMAIN or refusal(node.op_type, _attributes(node)) is not None:
            nodes.append(node)
            continue
        writer = _Writer(node, made, opset)
        REWRITES[node.op_type](writer)
        nodes += writer.nodes
    nodes = [NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del made.graph.node[:]
    made.graph.node.extend(nodes)
    for output in made.graph.output:
        if output.type.WhichOneof("value") not in (None, "tensor_type"):
            output.type.tensor_type.elem_type = TensorProto.FLOAT
        elif output.type.tensor_type.elem_type == TensorProto.STRING:
            output.type.tensor_type.elem_type = TensorProto.INT64
    return made


def table_rows() -> list[tuple[str, str]]:
    """Return each operator's name and what of it is understood, for the table in docs/onnx.md."""
    return [(f"{DOMAIN}.{name}", (function.__doc__ or "").strip()) for name, function in REWRITES.items()]


def _labels(writer: _Writer, places: str, classes: NDArray[Any] | None, output: str) -> None:
    """Make labels of places among classes; None for texts."""
    if classes is None or np.array_equal(classes, np.arange(len(classes))):
        made = TensorProto.INT64 if classes is None else onnx.helper.np_dtype_to_tensor_dtype(classes.dtype)
        writer.add("Cast", places, output=output, to=made)
    else:
        writer.add("Gather", writer.constant(classes), places, output=output)


@_rewrite
def linear_classifier(writer: _Writer) -> None:
    """Two classes or more, post_transform NONE, SOFTMAX or LOGISTIC; a label that is a text is its class's number."""
    label, scores = (*writer.node.output, "")[:2]
    made = writer.linear(len(writer.attrs["intercepts"]))
    if label:
        places = writer.add("ArgMax", made, axis=1, keepdims=0)
        numbers = writer.attrs.get("classlabels_ints")
        _labels(writer, places, None if numbers is None else np.array(numbers, np.int64), label)
    if scores:
        writer.transformed(made, scores)


@_rewrite
def linear_regressor(writer: _Writer) -> None:
    """Any targets, post_transform NONE, SOFTMAX or LOGISTIC, which as in onnxruntime do nothing to a single target."""
    targets, output = int(writer.attrs.get("targets", 1)), writer.node.output[0]
    made = writer.linear(targets)
    if targets == 1:
        writer.add("Identity", made, output=output)
    else:
        writer.transformed(made, output)


@_rewrite
def scaler(writer: _Writer) -> None:
    """Any offset and scale."""
    offset, scale = (np.array(writer.attrs.get(x, ()), np.float32) for x in ("offset", "scale"))
    x = writer.floats()
    if offset.size:
        x = writer.add("Sub", x, writer.constant(offset))
    if scale.size:
        x = writer.add("Mul", x, writer.constant(scale))
    writer.add("Identity", x, output=writer.node.output[0])


@_rewrite
def normalizer(writer: _Writer) -> None:
    """All norms, up to 16,383 (MAX: of the largest value, as in onnxruntime; L2: as `LpNormalization`); \
nothing happens behind a softmax."""
    source, output = writer.node.input[0], writer.node.output[0]
    norm = _text(writer.attrs.get("norm", b"MAX"))
    maker = writer.maker(source)
    if norm == "L1" and maker is not None and _text(_attributes(maker).get("post_transform")) == "SOFTMAX":
        writer.add("Identity", source, output=output)
        return
    x = writer.floats()
    if norm == "L2":
        writer.add("LpNormalization", x, output=output, axis=-1, p=2)
        return
    if norm == "L1":
        size = writer.reduced("ReduceL1", x)
    else:
        # As onnxruntime: the largest value, not the largest magnitude; a row whose largest is 0 stays what it is.
        largest = writer.reduced("ReduceMax", x)
        nonzero = writer.add("Greater", writer.add("Abs", largest), writer.constant(np.array(0.0, np.float32)))
        zero = writer.add("Cast", writer.add("Not", nonzero), to=TensorProto.FLOAT)
        size = writer.add("Add", largest, zero)
    writer.add("Div", x, size, output=output)


@_rewrite
def zip_map(writer: _Writer) -> None:
    """The result is not a list of dicts but an array, with a column for each class in the model's order."""
    writer.add("Identity", writer.node.input[0], output=writer.node.output[0])


@_rewrite
def array_feature_extractor(writer: _Writer) -> None:
    """A constant index; or a secret one into a row of constants, as `Gather`: texts stay their places."""
    (source, places), output = writer.node.input, writer.node.output[0]
    classes = writer.value(source)
    if classes is None or classes.ndim > 2 or classes.size != classes.shape[-1]:
        flat = writer.add("Reshape", places, writer.constant(np.array([-1])))
        writer.add("Gather", source, flat, output=output, axis=-1)
        return
    # The result is a row, (1, n); where it gets another shape at once, samples stay the first axis without the detour.
    flattened = writer.is_only_reshaped(output)
    made = output if flattened else f"{output}/row"
    _labels(writer, places, None if classes.dtype.kind not in "iuf" else classes.ravel(), made)
    if not flattened:
        writer.add("Reshape", made, writer.constant(np.array([1, -1])), output=output)


@_rewrite
def binarizer(writer: _Writer) -> None:
    """Any threshold."""
    threshold = np.array(writer.attrs.get("threshold", 0.0), np.float32)
    above = writer.add("Greater", writer.floats(), writer.constant(threshold))
    writer.add("Cast", above, output=writer.node.output[0], to=TensorProto.FLOAT)
