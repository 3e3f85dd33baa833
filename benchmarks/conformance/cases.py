"""Cases for `benchmarks.conformance`: onnx's own tests, and generated ones for the attributes that real exports use."""

import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import onnx.version_converter
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, helper, numpy_helper
from onnx.backend.test.case.node import collect_testcases
from onnx.backend.test.loader import load_model_tests

Array = NDArray[Any]
IR_VERSION = 10

# The operators that were asked for.
# fmt: off
LISTED = (
    "Conv", "ConvTranspose", "Gemm", "MatMul", "Einsum", "Add", "Sub", "Mul", "Div", "Neg", "Abs", "Sign", "Min",
    "Max", "Pow", "Sqrt", "Reciprocal", "Exp", "Log", "Erf", "Relu", "LeakyRelu", "PRelu", "Elu", "Selu", "Clip",
    "HardSigmoid", "HardSwish", "Sigmoid", "Tanh", "Softplus", "Gelu", "Mish", "Softmax", "LogSoftmax", "MaxPool",
    "AveragePool", "GlobalAveragePool", "GlobalMaxPool", "LpPool", "BatchNormalization", "InstanceNormalization",
    "GroupNormalization", "LayerNormalization", "RMSNormalization", "LRN", "Flatten", "Reshape", "Transpose",
    "Squeeze", "Unsqueeze", "Concat", "Split", "Slice", "Gather", "Expand", "Tile", "Pad", "Resize", "DepthToSpace",
    "SpaceToDepth", "ReduceSum", "ReduceMean", "ReduceMax", "ReduceMin", "ReduceL1", "ReduceL2", "ReduceLogSumExp",
    "ReduceProd", "ReduceSumSquare", "ArgMax", "ArgMin", "TopK", "Where", "Greater", "Less", "Equal",
    "GreaterOrEqual", "LessOrEqual", "Not", "And", "Or", "Xor", "Cast", "Identity", "Dropout",
)
# fmt: on


@dataclass(frozen=True)
class Case:
    """A model with inputs.

    Args:
        name: of the case.
        op: the operator that it is about.
        source: "node" and "expanded" (onnx's tests of operators, and of their definitions by other operators),
            "torch" (onnx's tests made of torch modules), "generated", "weights" (the same with weights as inputs).
        model: the ONNX file.
        inputs: name -> value; anything that numpy or onnx has.
        expected: output name -> value, by whoever made the case; None where onnxruntime is to say it.
    """

    name: str
    op: str
    source: str
    model: bytes = field(repr=False)
    inputs: Mapping[str, Any] = field(repr=False)
    expected: Mapping[str, Any] | None = field(default=None, repr=False)


# --- onnx's own tests ------------------------------------------------------------------------------------------------


def node_cases(expanded: bool = True) -> Iterator[Case]:
    """Yield onnx's tests of single operators, and `expanded` those of their definitions by other operators."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with np.errstate(all="ignore"):
            found = collect_testcases(None)
    op = ""
    for test in found:
        is_expanded = "_expanded" in test.name
        # A definition follows the operator that it defines.
        if test.model is None or test.data_sets is None:
            continue
        op = op if is_expanded else test.model.graph.node[0].op_type
        if is_expanded and not expanded:
            continue
        inputs, outputs = test.data_sets[0]
        yield Case(
            test.name,
            op,
            "expanded" if is_expanded else "node",
            test.model.SerializeToString(),
            {x.name: _plain(v) for x, v in zip(test.model.graph.input, inputs, strict=False)},
            {x.name: _plain(v) for x, v in zip(test.model.graph.output, outputs, strict=False)},
        )


def _plain(value: Any) -> Any:
    return numpy_helper.to_array(value) if isinstance(value, TensorProto) else value


# By what a torch module's test is named after; the others by the operator's own name.
_MODULES = {
    "AvgPool": "AveragePool",
    "BatchNorm": "BatchNormalization",
    "ConstantPad": "Pad",
    "Embedding": "Gather",
    "GLU": "Split",
    "Linear": "Gemm",
    "MaxPool": "MaxPool",
    "Pad": "Pad",
    "PixelShuffle": "DepthToSpace",
    "PoissonNLL": "Exp",
    "ReflectionPad": "Pad",
    "ReplicationPad": "Pad",
    "Upsample": "Resize",
    "ZeroPad": "Pad",
}


def torch_cases() -> Iterator[Case]:
    """Yield onnx's tests made of torch modules, raised from their old opset to the oldest that we read."""
    for kind in ("pytorch-converted", "pytorch-operator"):
        for test in load_model_tests(kind=kind):
            if "multiparam" in test.name:
                continue  # broadcasts by the rules of an opset that we do not read, which no converter mends
            folder = Path(test.model_dir or "")
            model = onnx.load(folder / "model.onnx")
            try:
                model = _modern(model)
            except Exception:  # noqa: S112  onnx's converter raises all kinds; what it cannot raise is not our case
                continue
            weights = {t.name for t in model.graph.initializer}
            names = [x.name for x in model.graph.input if x.name not in weights]
            data = folder / "test_data_set_0"
            inputs = {name: _tensor(data / f"input_{i}.pb") for i, name in enumerate(names)}
            expected = {x.name: _tensor(data / f"output_{i}.pb") for i, x in enumerate(model.graph.output)}
            op = _operator_of(test.name, model)
            yield Case(test.name, op, "torch", model.SerializeToString(), inputs, expected)


def _modern(model: ModelProto) -> ModelProto:
    if model.opset_import[0].version < 13:
        model = onnx.version_converter.convert_version(model, 13)
    model.ir_version = IR_VERSION
    return model


def _tensor(path: Path) -> Array:
    tensor = TensorProto.FromString(path.read_bytes())
    return np.asarray(numpy_helper.to_array(tensor))


def _operator_of(name: str, model: ModelProto) -> str:
    """Return the operator that a torch module's test is about: the listed one of its name, or the model's first."""
    word = re.sub(r"^test_(operator_)?", "", name)
    for start, op in _MODULES.items():
        if word.lower().startswith(start.lower()):
            return op
    for op in LISTED:
        if word.lower().startswith(op.lower()):
            return op
    made = [n.op_type for n in model.graph.node if n.op_type in LISTED]
    return str((made or [model.graph.node[0].op_type])[0])


# --- generated cases -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Secret:
    """An input of a generated case: values drawn evenly between `low` and `high`, or whole numbers, or truth values."""

    shape: tuple[int, ...]
    low: float = -2.0
    high: float = 2.0
    dtype: str = "float32"
    free: bool = False

    def draw(self, seed: int) -> Array:
        """Return a value."""
        rng = np.random.default_rng(seed)
        if np.dtype(self.dtype).kind == "f":
            return rng.uniform(self.low, self.high, self.shape).astype(self.dtype)
        if self.dtype == "bool":
            return rng.integers(0, 2, self.shape).astype(bool)
        return rng.integers(int(self.low), int(self.high) + 1, self.shape).astype(self.dtype)


def generated_cases() -> Iterator[Case]:
    """Yield the cases of this file."""
    for table in (_linear, _elementwise, _logic, _pools, _norms, _shapes, _reductions, _composed):
        yield from table()


# Operators whose constants are what training makes: they may be inputs as well.
_WEIGHTED = (
    *("Conv", "ConvTranspose", "Gemm", "MatMul", "Einsum", "PRelu", "BatchNormalization", "InstanceNormalization"),
    *("GroupNormalization", "LayerNormalization", "RMSNormalization"),
)


def weight_cases() -> Iterator[Case]:
    """Yield the cases of this file that have weights, with each of these an input instead of a constant."""
    for case in generated_cases():
        model = ModelProto.FromString(case.model)
        constants = [t for t in model.graph.initializer if t.data_type == TensorProto.FLOAT]
        if case.op not in _WEIGHTED or not constants or any(d.dim_param for x in model.graph.input for d in _dims(x)):
            continue
        for t in constants:
            model.graph.initializer.remove(t)
        model.graph.input.extend(helper.make_tensor_value_info(t.name, t.data_type, t.dims) for t in constants)
        inputs = {**case.inputs, **{t.name: numpy_helper.to_array(t) for t in constants}}
        title = f"{case.name} with secret weights"
        yield Case(title, case.op, "weights", model.SerializeToString(), inputs)


def _dims(x: onnx.ValueInfoProto) -> Any:
    return x.type.tensor_type.shape.dim


def secret(*shape: int, low: float = -2.0, high: float = 2.0, dtype: str = "float32", free: bool = False) -> Secret:
    """Return an input."""
    return Secret(shape, low, high, dtype, free)


def weights(*shape: int, low: float = -1.0, high: float = 1.0) -> Array:
    """Return a float32 constant."""
    return np.random.default_rng(len(shape) + sum(shape)).uniform(low, high, shape).astype(np.float32)


def scalar(value: float, dtype: str = "float32") -> Array:
    """Return a constant without axes."""
    return np.array(value, dtype)


def ints(*values: int) -> Array:
    """Return an int64 constant."""
    return np.array(values, dtype=np.int64)


def made(op: str, *inputs: Secret | Array | None, opset: int = 18, outputs: int = 1, **attrs: Any) -> Case:
    """Return a case of one node: secret inputs, constants as initializers, None for an absent input."""
    names = ["" if x is None else f"x{i}" if isinstance(x, Secret) else f"c{i}" for i, x in enumerate(inputs)]
    node = helper.make_node(op, names, [f"y{i}" for i in range(outputs)], **attrs)
    given = {name: x for name, x in zip(names, inputs, strict=True) if isinstance(x, Secret)}
    constants = [numpy_helper.from_array(x, n) for n, x in zip(names, inputs, strict=True) if isinstance(x, np.ndarray)]
    infos = [
        helper.make_tensor_value_info(
            name, helper.np_dtype_to_tensor_dtype(np.dtype(x.dtype)), ["n", *x.shape[1:]] if x.free else x.shape
        )
        for name, x in given.items()
    ]
    results = [onnx.ValueInfoProto(name=name) for name in node.output]
    graph = helper.make_graph([node], "case", infos, results, constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=IR_VERSION)
    return Case(_title(op, inputs, opset, attrs), op, "generated", _typed(model), _drawn(given))


def composed(op: str, title: str, text: str, given: Mapping[str, Secret], opset: int = 18) -> Case:
    """Return a case in onnx's text form."""
    model = onnx.parser.parse_model(f'<ir_version: {IR_VERSION}, opset_import: ["": {opset}]> case {text}')
    return Case(title, op, "generated", model.SerializeToString(), _drawn(given))


def _drawn(given: Mapping[str, Secret]) -> dict[str, Array]:
    return {name: x.draw(i) for i, (name, x) in enumerate(given.items())}


def _typed(model: ModelProto) -> bytes:
    """Return the file with the types and shapes of its outputs, which the standard wants told."""
    inferred = onnx.shape_inference.infer_shapes(model)
    for x in inferred.graph.output:
        if not x.type.tensor_type.elem_type:
            # Of an operator that is a function nothing is inferred; ours of that kind keep type and shape.
            x.type.CopyFrom(inferred.graph.input[0].type)
    return bytes(inferred.SerializeToString())


def _title(op: str, inputs: Sequence[Secret | Array | None], opset: int, attrs: Mapping[str, Any]) -> str:
    parts = []
    for x in inputs:
        if isinstance(x, Secret):
            kind = "" if x.dtype == "float32" else f"{x.dtype} "
            range_ = "" if (x.low, x.high) == (-2, 2) else f" in {x.low:g}..{x.high:g}"
            parts.append(kind + "x".join(map(str, ("n", *x.shape[1:]) if x.free else x.shape)) + range_)
        elif x is None:
            parts.append("absent")
        else:
            is_told = x.size == 1 or (x.dtype.kind in "iu" and x.size < 9)
            parts.append(f"constant {x.tolist() if is_told else 'x'.join(map(str, x.shape))}")
    told = ", ".join(f"{k}={v}" for k, v in attrs.items())
    return f"{op}-{opset}({'; '.join(parts)})" + (f" {told}" if told else "")


def _linear() -> Iterator[Case]:
    image = secret(2, 4, 7, 6)
    for attrs in (
        {"kernel_shape": [3, 3]},
        {"pads": [1, 1, 1, 1]},
        {"pads": [0, 1, 2, 0], "strides": [2, 1]},
        {"dilations": [2, 2], "pads": [2, 2, 2, 2]},
        {"auto_pad": "SAME_UPPER", "strides": [2, 2]},
        {"auto_pad": "SAME_LOWER", "strides": [2, 2]},
        {"auto_pad": "VALID"},
    ):
        yield made("Conv", image, weights(6, 4, 3, 3), weights(6), **attrs)
    yield made("Conv", secret(2, 4, 7, 6, free=True), weights(6, 4, 3, 3), pads=[1, 1, 1, 1], opset=9)
    yield made("Conv", image, weights(6, 2, 3, 3), weights(6), group=2)
    yield made("Conv", image, weights(4, 1, 3, 3), group=4, pads=[1, 1, 1, 1])
    yield made("Conv", image, weights(8, 1, 3, 3), weights(8), group=4, strides=[2, 2], dilations=[1, 2])
    yield made("Conv", secret(2, 3, 9), weights(4, 3, 3), weights(4), pads=[1, 1], strides=[2])
    yield made("Conv", secret(2, 4, 9), weights(4, 1, 3), group=4, dilations=[2])
    yield made("Conv", secret(1, 3, 9), weights(4, 3, 4), auto_pad="SAME_LOWER")
    yield made("Conv", secret(1, 2, 5, 4, 5), weights(3, 2, 2, 3, 2), weights(3), pads=[0, 1, 0, 1, 1, 1])
    yield made("Conv", secret(1, 2, 5, 4, 5), weights(4, 1, 3, 3, 3), group=2, strides=[2, 1, 2], dilations=[1, 1, 2])
    yield made("Conv", secret(1, 2, 5, 4, 5), weights(2, 2, 3, 3, 3), auto_pad="SAME_UPPER")
    for attrs in (
        {},
        {"strides": [2, 2]},
        {"strides": [2, 2], "pads": [1, 1, 1, 1], "output_padding": [1, 1]},
        {"strides": [3, 2], "output_shape": [13, 9]},
        {"auto_pad": "SAME_UPPER", "strides": [2, 2]},
        {"auto_pad": "SAME_LOWER", "strides": [2, 2]},
        {"dilations": [2, 2]},
        {"pads": [0, 1, 2, 1]},
    ):
        yield made("ConvTranspose", secret(1, 3, 4, 4), weights(3, 2, 3, 3), weights(2), **attrs)
    yield made("ConvTranspose", secret(2, 4, 4, 4), weights(4, 2, 2, 2), weights(4), group=2, strides=[2, 2])
    yield made("ConvTranspose", secret(2, 4, 4, 4), weights(4, 1, 3, 3), group=4)
    yield made("ConvTranspose", secret(2, 3, 6), weights(3, 2, 3), strides=[2], pads=[1, 1])
    yield made("ConvTranspose", secret(1, 2, 3, 3, 3), weights(2, 2, 2, 2, 2), strides=[2, 2, 2])
    yield made("Gemm", secret(3, 5), weights(5, 4), weights(4))
    yield made("Gemm", secret(3, 5), weights(4, 5), weights(1, 4), transB=1, alpha=0.5, beta=2.0)
    yield made("Gemm", secret(3, 5), weights(5, 4))
    yield made("Gemm", secret(5, 3), weights(5, 4), weights(3, 1), transA=1)
    yield made("Gemm", secret(3, 5), secret(5, 4), secret(3, 4), alpha=0.25)
    yield made("Gemm", secret(3, 5), secret(4, 5), weights(4), transB=1)
    yield made("Gemm", weights(3, 5), secret(5, 4), weights(4))
    yield made("Gemm", secret(3, 5), weights(5, 4), scalar(0.5), opset=11)
    yield made("MatMul", secret(3, 5), weights(5, 4))
    yield made("MatMul", secret(2, 3, 5, free=True), weights(5, 4), opset=9)
    yield made("MatMul", secret(2, 3, 4, 5), weights(5, 4))
    yield made("MatMul", secret(2, 3, 5), weights(2, 5, 4))
    yield made("MatMul", secret(2, 3, 3, 5), weights(3, 5, 4))
    yield made("MatMul", secret(3, 5), weights(5))
    yield made("MatMul", weights(4, 3), secret(3, 5))
    yield made("MatMul", weights(4, 3), secret(2, 3, 5))
    yield made("MatMul", secret(2, 3, 5), secret(2, 5, 4))
    yield made("MatMul", secret(2, 2, 3, 5), secret(2, 2, 5, 4))
    yield made("MatMul", secret(2, 2, 3, 5), secret(2, 1, 5, 4))
    yield made("MatMul", secret(2, 3, 5), secret(5, 4))
    yield made("MatMul", secret(5), secret(5))
    yield made("MatMul", secret(3, 5), secret(5))
    for equation, shapes in {
        "bij,bjk->bik": ((2, 3, 4), (2, 4, 5)),
        "bhqd,bhkd->bhqk": ((1, 2, 3, 4), (1, 2, 3, 4)),
        "bhqk,bkhd->bqhd": ((1, 2, 3, 3), (1, 3, 2, 4)),
        "ij,jk": ((3, 4), (4, 5)),
        "...ij,...jk->...ik": ((2, 2, 3, 4), (2, 2, 4, 5)),
        "bi,bj->bij": ((2, 3), (2, 4)),
        "i,i->": ((4,), (4,)),
    }.items():
        yield made("Einsum", *(secret(*s) for s in shapes), equation=equation)
    yield made("Einsum", secret(2, 3, 4), weights(4, 5), equation="bij,jk->bik")
    yield made("Einsum", secret(2, 3, 4), weights(5, 4), equation="bij,kj->bik")
    yield made("Einsum", secret(2, 3, 4), equation="bij->bji")
    yield made("Einsum", secret(2, 3, 4), equation="bij->bi")
    yield made("Einsum", secret(3, 3), equation="ii->i")


_POSITIVE: dict[str, Any] = {"low": 0.25, "high": 8.0}
# Operator of one input -> the values that its cases are about.
_UNARY: Mapping[str, Mapping[str, Any]] = {
    "Neg": {},
    "Abs": {},
    "Sign": {},
    "Sqrt": {"low": 0.01, "high": 100.0},
    "Reciprocal": _POSITIVE,
    "Exp": {"low": -6.0, "high": 4.0},
    "Log": _POSITIVE,
    "Erf": {"low": -4.0, "high": 4.0},
    "Relu": {},
    "LeakyRelu": {},
    "Elu": {"low": -6.0},
    "Selu": {"low": -6.0},
    "HardSigmoid": {"low": -5.0, "high": 5.0},
    "HardSwish": {"low": -5.0, "high": 5.0},
    "Sigmoid": {"low": -9.0, "high": 9.0},
    "Tanh": {"low": -5.0, "high": 5.0},
    "Softplus": {"low": -9.0, "high": 9.0},
    "Mish": {"low": -9.0, "high": 9.0},
}


def _elementwise() -> Iterator[Case]:
    for op, values in _UNARY.items():
        yield made(op, secret(2, 3, 4, **values), opset=18)
        yield made(op, secret(6, free=True, **values), opset=14 if op == "HardSwish" else 18 if op == "Mish" else 9)
    yield made("Abs", secret(2, 5, low=-9, high=9, dtype="int32"))
    yield made("Sign", secret(2, 5, low=-1, high=1, dtype="int64"))
    yield made("Reciprocal", secret(2, 5, low=-8.0, high=-0.25))
    yield made("Exp", secret(2, 5, low=-20.0, high=-5.0))
    yield made("Log", secret(2, 5, low=0.01, high=1000.0))
    yield made("LeakyRelu", secret(2, 5), alpha=0.2)
    yield made("Elu", secret(2, 5, low=-4.0), alpha=0.5)
    yield made("Selu", secret(2, 5, low=-4.0), alpha=1.5, gamma=0.75)
    yield made("HardSigmoid", secret(2, 5, low=-5.0), alpha=0.16666667, beta=0.5)
    yield made("Gelu", secret(2, 5, low=-5.0, high=5.0), opset=20)
    yield made("Gelu", secret(2, 5, low=-5.0, high=5.0), opset=20, approximate="tanh")
    yield made("PRelu", secret(2, 3, 4, 4), weights(3, 1, 1))
    yield made("PRelu", secret(2, 3, 4, 4), weights(1), opset=9)
    yield made("PRelu", secret(2, 3), secret(2, 3))
    yield made("Clip", secret(2, 5), scalar(-0.5), scalar(1))
    yield made("Clip", secret(2, 5), None, scalar(1))
    yield made("Clip", secret(2, 5), scalar(0))
    yield made("Clip", secret(2, 5))
    yield made("Clip", secret(2, 5, low=-2, high=9), opset=9, min=0.0, max=6.0)
    yield made("Clip", secret(2, 5, low=-9, high=9, dtype="int64"), scalar(-2, "int64"), scalar(4, "int64"))
    for op in ("Add", "Sub", "Mul"):
        yield made(op, secret(2, 3, 4), secret(2, 3, 4))
        yield made(op, secret(2, 3, 4), secret(2, 1, 4))
        yield made(op, secret(2, 3, 4), secret(4))
        yield made(op, secret(3, 1), secret(1, 4))
        yield made(op, secret(2, 3, 4, free=True), weights(4), opset=9)
        yield made(op, weights(2, 3, 4), secret(2, 3, 4))
        yield made(op, secret(2, 3, 1), weights(3, 4))
        yield made(op, secret(3, 4, low=-9, high=9, dtype="int64"), secret(3, 4, low=-9, high=9, dtype="int64"))
        yield made(op, secret(2, 3), scalar(3))
    yield made("Mul", secret(2, 3, low=50, high=99), secret(2, 3, low=-99, high=99))
    yield made("Div", secret(2, 3, 4), weights(4, low=0.5, high=2.0))
    yield made("Div", secret(2, 3, 4, free=True), scalar(8), opset=9)
    yield made("Div", scalar(1), secret(2, 3, **_POSITIVE))
    yield made("Div", secret(2, 3), secret(2, 3, **_POSITIVE))
    yield made("Div", secret(2, 3, 4), secret(2, 1, 4, low=-8.0, high=-0.25))
    yield made("Div", secret(2, 3, low=-100, high=100), secret(2, 3, low=10, high=1000))
    yield made("Div", secret(3, 4, low=-20, high=20, dtype="int64"), ints(3))
    for op in ("Min", "Max"):
        yield made(op, secret(2, 3, 4), secret(2, 3, 4))
        yield made(op, secret(2, 3, 4), secret(3, 1), secret(4))
        yield made(op, secret(2, 3, 4, free=True), scalar(0.5), opset=9)
        yield made(op, secret(2, 3), weights(2, 3))
        yield made(op, secret(2, 3))
        yield made(op, secret(2, 3, low=-9, high=9, dtype="int32"), secret(2, 3, low=-9, high=9, dtype="int32"))
    for exponent in (0.0, 1.0, 2.0, 3.0, 4.0, 5.0):
        yield made("Pow", secret(2, 5), scalar(exponent))
    yield made("Pow", secret(2, 5), ints(2).reshape(()), opset=12)
    yield made("Pow", secret(2, 5), np.array([2.0], np.float32), opset=9)
    yield made("Pow", secret(2, 5, **_POSITIVE), scalar(0.5))
    yield made("Pow", secret(2, 5, **_POSITIVE), scalar(-1))
    yield made("Pow", secret(2, 5, **_POSITIVE), scalar(-0.5))
    yield made("Pow", secret(2, 3), np.array([1, 2, 3], np.float32))
    for op in ("Softmax", "LogSoftmax"):
        yield made(op, secret(3, 10, low=-5, high=5))
        yield made(op, secret(2, 3, 4), axis=1)
        yield made(op, secret(2, 3, 4), axis=0)
        yield made(op, secret(2, 2, 3, 4, free=True), axis=-1)
        yield made(op, secret(2, 3, 4), axis=1, opset=11)
        yield made(op, secret(2, 3, 4), opset=9)
        yield made(op, secret(2, 100, low=-8, high=8))
        yield made(op, secret(1, 1000, low=-8, high=8))
        yield made(op, secret(2, 5, low=-60, high=60))
        yield made(op, secret(2, 1))


def _logic() -> Iterator[Case]:
    numbers = secret(3, 4, low=-2, high=2, dtype="int64")
    truths = secret(3, 4, dtype="bool")
    for op in ("Greater", "Less", "Equal", "GreaterOrEqual", "LessOrEqual"):
        for opset in (18, 13):
            yield made(op, secret(2, 3, 4), secret(2, 3, 4), opset=opset)
        yield made(op, secret(2, 3, 4), secret(4))
        yield made(op, secret(2, 3, 4, free=True), scalar(0))
        yield made(op, weights(4), secret(2, 3, 4))
        yield made(op, numbers, numbers)
        yield made(op, numbers, ints(0, 1, -1, 2))
    yield made("Not", truths)
    for op in ("And", "Or", "Xor"):
        yield made(op, truths, truths)
        yield made(op, truths, secret(4, dtype="bool"))
        yield made(op, truths, np.array([True, False, True, False]))
    yield made("Equal", truths, truths)
    yield made("Where", secret(2, 3, dtype="bool"), secret(2, 3), secret(2, 3))
    yield made("Where", secret(2, 1, dtype="bool"), secret(2, 3), secret(3))
    yield made("Where", secret(2, 3, dtype="bool"), secret(2, 3), scalar(-100))
    yield made("Where", secret(2, 3, dtype="bool"), scalar(0), secret(2, 3))
    yield made("Where", secret(2, 3, dtype="bool"), scalar(1), scalar(0))
    yield made("Where", np.array([[True, False, True]]), secret(2, 3), secret(2, 3))
    yield made("Where", secret(2, 3, dtype="bool"), secret(2, 3, low=-9, high=9, dtype="int64"), ints(0))
    for to in (TensorProto.FLOAT, TensorProto.DOUBLE, TensorProto.INT64, TensorProto.BOOL):
        yield made("Cast", secret(2, 3, low=-9, high=9, dtype="int32"), to=to)
        yield made("Cast", secret(2, 3, low=-9, high=9), to=to)
        yield made("Cast", secret(2, 3, dtype="bool"), to=to)
    yield made("Cast", secret(2, 3, dtype="float64"), to=TensorProto.FLOAT, opset=9)
    yield made("Identity", secret(2, 3))
    yield made("Identity", secret(3, free=True), opset=9)
    yield made("Dropout", secret(2, 3))
    yield made("Dropout", secret(2, 3), scalar(0.3))
    yield made("Dropout", secret(2, 3), opset=9, ratio=0.3)
    yield made("Dropout", secret(2, 3), scalar(0.3), np.array(False))


def _pools() -> Iterator[Case]:
    for op in ("MaxPool", "AveragePool"):
        image = secret(2, 3, 7, 6)
        for attrs in (
            {},
            {"strides": [2, 2]},
            {"pads": [1, 1, 1, 1], "strides": [2, 2]},
            {"pads": [0, 1, 1, 0]},
            {"strides": [2, 2], "ceil_mode": 1},
            {"strides": [2, 2], "ceil_mode": 1, "pads": [1, 1, 1, 1]},
            {"auto_pad": "SAME_UPPER", "strides": [2, 2]},
            {"auto_pad": "SAME_LOWER", "strides": [2, 2]},
            {"auto_pad": "SAME_LOWER"},
            {"auto_pad": "VALID"},
            {"dilations": [2, 2]},
        ):
            if op == "MaxPool" or "dilations" not in attrs:
                yield made(op, image, kernel_shape=[3, 3], **attrs)
        yield made(op, secret(2, 3, 7, 6, free=True), kernel_shape=[2, 2], strides=[2, 2], opset=9)
        yield made(op, image, kernel_shape=[3, 2], strides=[1, 2], opset=11)
        yield made(op, secret(2, 3, 9), kernel_shape=[3], strides=[2], pads=[1, 1])
        yield made(op, secret(2, 3, 9), kernel_shape=[4], strides=[3], ceil_mode=1)
        yield made(op, secret(1, 2, 5, 4, 5), kernel_shape=[2, 2, 2], strides=[2, 2, 2])
        yield made(op, secret(1, 2, 5, 4, 5), kernel_shape=[3, 3, 3], pads=[1] * 6, strides=[2, 1, 2])
    image = secret(2, 3, 7, 6)
    pool: dict[str, Any] = {"kernel_shape": [3, 3], "count_include_pad": 1}
    yield made("AveragePool", image, **pool, pads=[1, 1, 1, 1])
    yield made("AveragePool", image, **pool, pads=[1, 1, 1, 1], strides=[2, 2], ceil_mode=1)
    yield made("AveragePool", image, **pool, auto_pad="SAME_UPPER", strides=[2, 2])
    yield made("AveragePool", image, kernel_shape=[2, 2], dilations=[2, 2], opset=19)
    yield made("AveragePool", secret(2, 3, 9), kernel_shape=[3], count_include_pad=1, pads=[1, 1])
    yield made("AveragePool", secret(1, 2, 5, 4, 5), kernel_shape=[2, 2, 2], count_include_pad=1, pads=[1] * 6)
    for op in ("GlobalAveragePool", "GlobalMaxPool"):
        for shape in ((2, 3, 5), (2, 3, 5, 4), (1, 2, 3, 4, 3)):
            yield made(op, secret(*shape))
        yield made(op, secret(2, 3, 5, 4, free=True), opset=9)
    for p in (1, 2):
        yield made("LpPool", secret(2, 3, 6, 6), kernel_shape=[2, 2], strides=[2, 2], p=p)
    yield made("LpPool", secret(2, 3, 6, 6), kernel_shape=[3, 3], p=1, pads=[1, 1, 1, 1])
    yield made("LpPool", secret(2, 3, 9), kernel_shape=[3], p=2)


def _norms() -> Iterator[Case]:
    def statistics(channels: int) -> tuple[Array, Array, Array, Array]:
        positive = weights(channels, low=0.5, high=2.0)
        return positive, weights(channels), weights(channels, low=-0.5, high=0.5), positive

    for shape in ((2, 3, 4, 5), (2, 3), (2, 3, 5), (1, 3, 2, 2, 2)):
        yield made("BatchNormalization", secret(*shape), *statistics(3))
    yield made("BatchNormalization", secret(2, 3, 4, 5, free=True), *statistics(3), opset=9, epsilon=1e-3)
    for epsilon in (1e-5, 1e-2):
        yield made("InstanceNormalization", secret(2, 3, 4, 5), weights(3), weights(3), epsilon=epsilon)
    yield made("InstanceNormalization", secret(2, 3, 9), weights(3), weights(3))
    yield made("GroupNormalization", secret(2, 4, 3, 3), weights(4), weights(4), num_groups=2, opset=21)
    yield made("GroupNormalization", secret(2, 4, 5), weights(4), weights(4), num_groups=1, opset=21, epsilon=1e-3)
    yield made("LayerNormalization", secret(2, 3, 8), weights(8), weights(8))
    yield made("LayerNormalization", secret(2, 3, 8, free=True), weights(8), axis=-1)
    yield made("LayerNormalization", secret(2, 3, 8), weights(3, 8), weights(3, 8), axis=1, epsilon=1e-3)
    yield made("LayerNormalization", secret(2, 64, low=-8, high=8), weights(64), weights(64))
    yield made("RMSNormalization", secret(2, 3, 8), weights(8), opset=23)
    yield made("RMSNormalization", secret(2, 3, 8), weights(3, 8), opset=23, axis=1, epsilon=1e-3)
    yield made("LRN", secret(2, 6, 3, 3), size=3)
    yield made("LRN", secret(2, 6, 3, 3), size=5, alpha=0.01, beta=0.5, bias=2.0)


def _shapes() -> Iterator[Case]:
    block = secret(2, 3, 4)
    for axis in (0, 1, 2, -1):
        yield made("Flatten", block, axis=axis)
    for shape in ((2, 12), (0, -1), (-1,), (6, 4), (2, 1, 3, 4), (4, 3, 2)):
        yield made("Reshape", block, ints(*shape))
    yield made("Reshape", secret(2, 3, 4, free=True), ints(-1, 12), opset=9)
    yield made("Reshape", secret(2, 3, 4, free=True), ints(0, 4, 3), opset=14, allowzero=0)
    for perm in ((0, 2, 1), (1, 0, 2), (2, 1, 0)):
        yield made("Transpose", block, perm=perm)
    yield made("Transpose", block)
    column = secret(2, 1, 3, 1)
    yield made("Squeeze", column, ints(1))
    yield made("Squeeze", column, ints(-1, 1))
    yield made("Squeeze", column)
    yield made("Squeeze", column, opset=11, axes=[1, 3])
    yield made("Squeeze", secret(1, 3), ints(0))
    yield made("Unsqueeze", block, ints(1))
    yield made("Unsqueeze", block, ints(0, -1))
    yield made("Unsqueeze", block, opset=11, axes=[1, 4])
    for axis in (0, 1, -1):
        yield made("Concat", block, block, block, axis=axis)
    yield made("Concat", block, weights(2, 1, 4), axis=1)
    yield made("Concat", weights(1, 3, 4), block, axis=0)
    yield made("Split", secret(2, 6, 4), outputs=3, axis=1, num_outputs=3)
    yield made("Split", secret(2, 7, 4), outputs=3, axis=1, num_outputs=3)
    yield made("Split", secret(2, 6, 4), ints(1, 2, 3), outputs=3, axis=1)
    yield made("Split", secret(4, 6), ints(1, 3), outputs=2)
    yield made("Split", secret(2, 6, 4), outputs=2, axis=-1, opset=11, split=[1, 3])
    yield made("Split", secret(2, 6, 4), outputs=2, axis=1, opset=9)
    rows = secret(5, 6, 4)
    yield made("Slice", rows, ints(1), ints(4), ints(1))
    yield made("Slice", rows, ints(0, 1), ints(3, 4))
    yield made("Slice", rows, ints(-3), ints(2**63 - 1), ints(-1))
    yield made("Slice", rows, ints(0), ints(6), ints(1), ints(2))
    yield made("Slice", rows, ints(-1), ints(-(2**63)), ints(1), ints(-2))
    yield made("Slice", rows, ints(1), ints(1000), ints(0))
    yield made("Slice", rows, opset=9, starts=[1, 0], ends=[3, -1], axes=[1, 2])
    yield made("Gather", rows, ints(0, 2, 2), axis=1)
    yield made("Gather", rows, ints(3).reshape(()), axis=1)
    yield made("Gather", rows, ints(-1, 0).reshape(1, 2), axis=-1)
    yield made("Gather", rows, ints(4, 0), axis=0)
    yield made("Gather", rows, np.array(1, np.int32), axis=2, opset=9)
    yield made("Expand", secret(2, 1, 4), ints(2, 3, 4))
    yield made("Expand", secret(3, 1), ints(2, 1, 4))
    yield made("Expand", secret(2, 3), ints(1, 1))
    yield made("Tile", block, ints(1, 2, 1))
    yield made("Tile", block, ints(2, 1, 3))
    image = secret(2, 3, 4, 4)
    around = ints(0, 0, 1, 2, 0, 0, 2, 1)
    half = scalar(0.5)
    for mode in ("constant", "reflect", "edge"):
        yield made("Pad", image, around, mode=mode)
        yield made("Pad", secret(3, 5), ints(0, 2, 0, 1), mode=mode)
        yield made("Pad", image, opset=9, mode=mode, pads=[0, 0, 1, 1, 0, 0, 1, 1])
    yield made("Pad", image, around, half)
    yield made("Pad", image, ints(1, 2), None, ints(3))
    yield made("Pad", image, ints(1, 1, 0, 1), half, ints(-1, 2), mode="constant")
    yield made("Pad", image, ints(0, 0, -1, 0, 0, 0, 0, -1))
    yield made("Pad", image, around, mode="wrap", opset=19)
    yield from _resizes()
    for mode in ("DCR", "CRD"):
        yield made("DepthToSpace", secret(2, 8, 2, 3), blocksize=2, mode=mode)
    yield made("DepthToSpace", secret(2, 8, 2, 3, free=True), blocksize=2, opset=9)
    yield made("SpaceToDepth", secret(2, 2, 4, 6), blocksize=2)


def _resizes() -> Iterator[Case]:
    image = secret(1, 2, 4, 5)

    def scales(*values: float) -> Array:
        return np.array(values, dtype=np.float32)

    for mode in ("nearest", "linear"):
        for form in ("half_pixel", "asymmetric", "align_corners", "pytorch_half_pixel"):
            yield made("Resize", image, None, scales(1, 1, 2, 2), mode=mode, coordinate_transformation_mode=form)
            yield made("Resize", image, None, None, ints(1, 2, 7, 3), mode=mode, coordinate_transformation_mode=form)
        yield made("Resize", image, scales(1, 1, 2, 2), mode=mode, opset=10)
        yield made("Resize", image, None, scales(1, 1, 0.5, 0.6), mode=mode)
        yield made("Resize", secret(1, 2, 5), None, scales(1, 1, 2), mode=mode)
        yield made("Resize", image, None, None, ints(6, 7), mode=mode, axes=[2, 3])
        yield made("Upsample", image, scales(1, 1, 2, 3), mode=mode, opset=9)
    for rounding in ("floor", "ceil", "round_prefer_floor", "round_prefer_ceil"):
        yield made(
            "Resize",
            image,
            None,
            scales(1, 1, 1.5, 2),
            mode="nearest",
            nearest_mode=rounding,
            coordinate_transformation_mode="asymmetric",
        )
    yield made("Resize", image, None, scales(1, 1, 0.5, 0.5), mode="linear", antialias=1)
    yield made("Resize", image, None, scales(1, 1, 2, 2), mode="cubic")


def _reductions() -> Iterator[Case]:
    by_input = {"ReduceSum": 13}
    values: Mapping[str, Mapping[str, Any]] = {"ReduceL2": {"low": 0.1}, "ReduceProd": {"low": 0.5, "high": 1.5}}
    for op in LISTED:
        if not op.startswith("Reduce"):
            continue
        block, opset = secret(2, 3, 4, **values.get(op, {})), by_input.get(op, 18)
        yield made(op, block, ints(1), opset=opset)
        yield made(op, block, ints(-1, 1), opset=opset, keepdims=0)
        yield made(op, block, ints(0), opset=opset, keepdims=0)
        yield made(op, block, opset=opset)
        yield made(op, block, opset=opset, keepdims=0)
        yield made(op, block, opset=opset, noop_with_empty_axes=1)
        yield made(op, block, opset=11, axes=[2], keepdims=0)
        yield made(op, secret(2, 3, 4, 5, free=True, **values.get(op, {})), opset=9, axes=[2, 3])
    yield made("ReduceMax", secret(2, 5, low=-9, high=9, dtype="int32"), ints(1))
    yield made("ReduceSum", secret(2, 5, low=-9, high=9, dtype="int64"), ints(1))
    for op in ("ArgMax", "ArgMin"):
        yield made(op, secret(2, 7), axis=1)
        yield made(op, secret(2, 7, 3), axis=1, keepdims=0)
        yield made(op, secret(2, 7, 3), axis=-1, opset=9)
        yield made(op, secret(2, 7), keepdims=0)
        for last in (0, 1):
            ties = secret(3, 6, low=0, high=2, dtype="int32")
            yield made(op, ties, axis=1, select_last_index=last)
    for largest in (1, 0):
        yield made("TopK", secret(2, 7), ints(1), outputs=2, largest=largest)
        yield made("TopK", secret(2, 7, 3), ints(1), outputs=2, axis=1, largest=largest)
    yield made("TopK", secret(2, 7), ints(1), outputs=2, opset=10)


def _composed() -> Iterator[Case]:
    x = {"x": secret(2, 8)}
    yield composed(
        "Gelu",
        "Gelu as torch's older exporter writes it",
        """(float[2,8] x) => (float[2,8] y) <float two = {1.4142135}, float one = {1.0}, float half = {0.5}> {
            a = Div(x, two)  b = Erf(a)  c = Add(b, one)  d = Mul(x, c)  y = Mul(d, half) }""",
        x,
    )
    yield composed(
        "RMSNormalization",
        "RMSNorm as torch exports it",
        """(float[2,8] x) => (float[2,8] y)
            <float two = {2.0}, float eps = {0.00001}, float one = {1.0}, int64[1] last = {-1}> {
            a = Pow(x, two)  b = ReduceMean<keepdims = 1>(a, last)  c = Add(b, eps)  d = Sqrt(c)
            e = Div(one, d)  y = Mul(x, e) }""",
        x,
    )
    yield composed(
        "RMSNormalization",
        "RMSNorm by Reciprocal",
        """(float[2,8] x) => (float[2,8] y) <float eps = {0.00001}, int64[1] last = {-1}> {
            a = Mul(x, x)  b = ReduceMean<keepdims = 1>(a, last)  c = Add(b, eps)  d = Sqrt(c)
            e = Reciprocal(d)  y = Mul(x, e) }""",
        x,
    )
    yield composed(
        "LayerNormalization",
        "LayerNorm as torch's older exporter writes it",
        """(float[2,8] x) => (float[2,8] y) <float two = {2.0}, float eps = {0.00001}> {
            m = ReduceMean<axes = [-1]>(x)  d = Sub(x, m)  s = Pow(d, two)  v = ReduceMean<axes = [-1]>(s)
            e = Add(v, eps)  r = Sqrt(e)  y = Div(d, r) }""",
        x,
        opset=14,
    )
    yield composed(
        "HardSwish",
        "HardSwish by HardSigmoid",
        "(float[2,8] x) => (float[2,8] y) { h = HardSigmoid<alpha = 0.16666667>(x)  y = Mul(x, h) }",
        {"x": secret(2, 8, low=-5.0, high=5.0)},
    )
    yield composed(
        "Sigmoid",
        "SiLU as torch exports it",
        "(float[n,8] x) => (float[n,8] y) { s = Sigmoid(x)  y = Mul(x, s) }",
        {"x": secret(2, 8, low=-9.0, high=9.0)},
    )
    yield composed(
        "Mish",
        "Mish as torch exports it",
        "(float[n,8] x) => (float[n,8] y) { s = Softplus(x)  t = Tanh(s)  y = Mul(x, t) }",
        {"x": secret(2, 8, low=-9.0, high=9.0)},
    )
    yield composed(
        "Reshape",
        "Reshape by the input's own shape",
        """(float[n,3,4] x) => (float[n,12] y) <int64 zero = {0}, int64[1] front = {0}, int64[1] rest = {-1}> {
            s = Shape(x)  b = Gather<axis = 0>(s, zero)  u = Unsqueeze(b, front)  t = Concat<axis = 0>(u, rest)
            y = Reshape(x, t) }""",
        {"x": secret(2, 3, 4)},
    )
    yield composed(
        "Expand",
        "Expand of a constant by the input's shape",
        """(float[n,4] x) => (float[n,4] y) {
            s = Shape(x)  o = ConstantOfShape<value = float[1] {2.5}>(s)  y = Add(x, o) }""",
        {"x": secret(2, 4)},
    )
    yield composed(
        "Slice",
        "Slice to the size that Shape and Range tell",
        """(float[2,3,4] x) => (float[2,3,4] y) <int64 zero = {0}, int64 one = {1}, int64 two = {2}> {
            s = Shape(x)  n = Gather(s, two)  r = Range(zero, n, one)  f = Cast<to = 1>(r)  y = Add(x, f) }""",
        {"x": secret(2, 3, 4)},
    )
    yield composed(
        "Where",
        "Mask of attention",
        """(float[2,4,4] x, bool[4,4] m) => (float[2,4,4] y) <float low = {-100.0}> {
            w = Where(m, x, low)  y = Softmax(w) }""",
        {"x": secret(2, 4, 4), "m": secret(4, 4, dtype="bool")},
    )
    yield composed(
        "Where",
        "Where of a comparison",
        """(float[2,8] x) => (float[2,8] y) <float zero = {0.0}, float slope = {0.1}> {
            p = Greater(x, zero)  s = Mul(x, slope)  y = Where(p, x, s) }""",
        x,
    )
    yield composed(
        "And",
        "Comparisons joined",
        """(float[2,8] x) => (float[2,8] y) <float low = {-1.0}, float high = {1.0}> {
            a = Greater(x, low)  b = Less(x, high)  c = And(a, b)  d = Not(c)  y = Cast<to = 1>(d) }""",
        x,
    )
    yield composed(
        "ArgMax",
        "ArgMax of a softmax",
        "(float[2,8] x) => (int64[2] y) { p = Softmax(x)  y = ArgMax<axis = 1, keepdims = 0>(p) }",
        x,
    )


Source = Callable[[], Iterator[Case]]
SOURCES: Mapping[str, Source] = {
    "node": lambda: node_cases(expanded=False),
    "expanded": lambda: (case for case in node_cases() if case.source == "expanded"),
    "torch": torch_cases,
    "generated": generated_cases,
    "weights": weight_cases,
}
