"""Elementwise and logical operators against onnxruntime: by samples, as a whole, in every form of broadcasting."""

import numpy as np
import onnx
import pytest
from both_parties import PROTOCOLS, secure
from onnx import TensorProto, helper, numpy_helper
from onnx_models import IR_VERSION, ops
from program_oracle import run

from protocols.errors import UnsupportedError
from securemtk.onnx.building.registry import RULES
from securemtk.onnx.importer import Imported, assemble, load_onnx
from securemtk.onnx.model.analyse import analyse
from securemtk.onnx.model.declared import fixed_shapes
from securemtk.onnx.model.runtime import start
from securemtk.onnx.rules.all_rules import translate

OPSET = 20
NODE = helper.make_node
RNG = np.random.default_rng(5)


def case(op: str, *inputs: object, opset: int = OPSET, **attrs: object) -> onnx.ModelProto:
    """A model of one node; an input is an array (a constant), a list (an activation's example) or None (absent)."""
    names, infos, weights, examples = [], [], [], {}
    for i, value in enumerate(inputs):
        names.append("" if value is None else f"v{i}")
        if isinstance(value, list):
            example = np.asarray(value[0])
            kind = helper.np_dtype_to_tensor_dtype(example.dtype)
            infos.append(helper.make_tensor_value_info(f"v{i}", kind, example.shape))
            examples[f"v{i}"] = example
        elif value is not None:
            weights.append(numpy_helper.from_array(np.asarray(value), f"v{i}"))
    node = helper.make_node(op, names, ["y"], name=f"the {op}", **attrs)
    graph = helper.make_graph([node], "test", infos, [onnx.ValueInfoProto(name="y")], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=IR_VERSION)
    return model, examples


def expected(model: onnx.ModelProto, examples: dict) -> np.ndarray:
    copy = onnx.shape_inference.infer_shapes(model)
    return start(copy.SerializeToString()).run(None, examples)[0]


def as_a_whole(model: onnx.ModelProto) -> Imported:
    graph = analyse(model, RULES, fixed_shapes(model, {}))
    steps, problems = translate(graph)
    assert not problems, problems
    return assemble(graph, steps)


def close(got: np.ndarray, want: np.ndarray, atol: float, rtol: float) -> None:
    assert got.shape == want.shape
    np.testing.assert_allclose(got, want.astype(np.float64), atol=atol, rtol=rtol)


def by_samples(model, examples, want, atol, rtol) -> Imported:
    imported = load_onnx(model.SerializeToString())
    assert not imported.program.whole
    close(run(imported.program, imported.params, examples)["y"], want, atol, rtol)
    return imported


def whole(model, examples, want, atol, rtol) -> Imported:
    imported = as_a_whole(model)
    assert imported.program.whole
    got = run(imported.program, imported.params, {k: v[None] for k, v in examples.items()})["y"]
    close(got[0], want, atol, rtol)
    return imported


def both_ways(op, *inputs, atol=5e-4, rtol=0.0, **attrs) -> Imported:
    model, examples = case(op, *inputs, **attrs)
    want = expected(model, examples)
    whole(model, examples, want, atol, rtol)
    return by_samples(model, examples, want, atol, rtol)


def line(low: float, high: float, *, n: int = 240) -> list:
    """An activation (2, ., 4, 5) with numbers of an interval, on the units of fixed point."""
    x = np.linspace(low, high, n).astype(np.float32)
    return [(np.round(x * 2**16) / 2**16).astype(np.float32).reshape(2, -1, 4, 5)]


def f(*shape: int, scale: float = 2.0) -> np.ndarray:
    return (np.round(RNG.normal(0, scale, shape) * 2**10) / 2**10).astype(np.float32)


def b(*shape: int) -> np.ndarray:
    return RNG.integers(0, 2, shape).astype(bool)


WIDE = line(-20, 20, n=4000)
ALL_OPSETS = {
    "Relu": 9, "Abs": 9, "Neg": 9, "Sign": 9, "Sigmoid": 9, "Tanh": 9, "Erf": 9, "Softplus": 9, "Softsign": 9,
    "HardSigmoid": 9, "HardSwish": 14, "Elu": 9, "Selu": 9, "Celu": 12, "ThresholdedRelu": 10, "Shrink": 9,
    "LeakyRelu": 9, "Gelu": 20, "Mish": 18, "Identity": 9, "Dropout": 9,
}  # fmt: skip


@pytest.mark.parametrize("op", ALL_OPSETS)
def test_a_function_of_any_number_agrees_in_its_oldest_and_a_new_opset(op):
    for opset in {ALL_OPSETS[op], OPSET}:
        both_ways(op, WIDE, opset=opset, atol=1.5e-4 if op != "Softsign" else 3e-4)


@pytest.mark.parametrize(
    ("op", "attrs"),
    [
        ("LeakyRelu", {"alpha": 0.3}),
        ("LeakyRelu", {"alpha": 2.0}),
        ("HardSigmoid", {"alpha": 1 / 6}),
        ("HardSigmoid", {"alpha": -0.3, "beta": 0.2}),
        ("HardSigmoid", {"alpha": 0.0, "beta": 0.3}),
        ("Elu", {"alpha": 0.3}),
        ("Selu", {"alpha": 1.2, "gamma": 0.7}),
        ("Celu", {"alpha": 3.0}),
        ("Celu", {"alpha": 0.05}),
        ("ThresholdedRelu", {"alpha": 0.3}),
        ("ThresholdedRelu", {"alpha": -2.0}),
        ("Shrink", {"lambd": 0.5}),
        ("Shrink", {"lambd": 1.0, "bias": 0.7}),
        ("Gelu", {"approximate": "tanh"}),
        ("Swish", {"alpha": 1.0, "opset": 24}),
        ("Swish", {"alpha": 1.702, "opset": 24}),
        ("Swish", {"alpha": -0.5, "opset": 24}),
        ("Swish", {"alpha": 0.0, "opset": 24}),
        ("Clip", {"min": -0.5, "max": 1.25, "opset": 9}),
    ],
)
def test_attributes_of_functions(op, attrs):
    both_ways(op, WIDE, atol=1.5e-4, **attrs)


def test_a_public_slope_holds_for_large_numbers():
    model, examples = case("LeakyRelu", line(-16000, 16000), alpha=0.0123)
    want = expected(model, examples)
    imported = by_samples(model, examples, want, 1e-4, 0)
    np.testing.assert_allclose(encrypted("fss", imported, examples), want, atol=1e-4)


@pytest.mark.parametrize(
    ("op", "x", "atol", "rtol"),
    [
        ("Exp", line(-12, 10, n=4000), 1e-4, 2e-4),
        ("Exp", line(-30, -12), 1e-4, 0),
        ("Log", line(2**-8, 8, n=4000), 6e-4, 0),
        ("Log", line(8, 4000, n=4000), 6e-4, 0),
        ("Sqrt", line(2**-10, 8, n=4000), 2e-4, 4e-4),
        ("Sqrt", line(8, 16000, n=4000), 2e-4, 4e-4),
        ("Reciprocal", line(1 / 16, 8, n=4000), 2e-6, 6e-4),
        ("Reciprocal", line(-8, -1 / 16, n=4000), 2e-6, 6e-4),
        ("Reciprocal", line(-16000, -8, n=4000), 2e-6, 6e-4),
        ("Reciprocal", line(8, 16000, n=4000), 2e-6, 6e-4),
    ],
)
def test_a_function_with_a_domain_agrees_there(op, x, atol, rtol):
    for opset in (9, OPSET):
        both_ways(op, x, atol=atol, rtol=rtol, opset=opset)


@pytest.mark.parametrize(
    ("low", "high"),
    [(-1.5, 2.0), (None, 2.0), (-1.5, None), (None, None), (0.0, None), (0.0, 6.0), (-65504.0, 65504.0)],
)
def test_clip_has_constant_bounds_or_none(low, high):
    low, high = (None if x is None else np.float32(x) for x in (low, high))
    both_ways("Clip", WIDE, low, high)


def test_clip_has_bounds_that_are_computed():
    model, examples = case("Clip", WIDE, [np.float32(-0.5)], np.float32(0.75))
    imported = whole(model, examples, expected(model, examples), 1e-5, 0)
    assert ops(imported).count("relu") == 2


E_ = np.array([[0.5, -1.5, 2.0, 0.25, -3.0]], np.float32)
FORMS = {
    "two activations": lambda: ([f(2, 3, 4)], [f(2, 3, 4)]),
    "two that broadcast": lambda: ([f(2, 1, 4)], [f(2, 3, 1)]),
    "a scalar": lambda: ([f(2, 3, 4)], np.float32(1.5)),
    "a scalar first": lambda: (np.float32(1.5), [f(2, 3, 4)]),
    "one number": lambda: ([f(2, 3, 4)], np.float32([1.5])),
    "a row": lambda: ([f(2, 3, 4)], f(4) + 9),
    "a column": lambda: ([f(2, 3, 4)], f(3, 1) + 9),
    "a whole sample": lambda: ([f(2, 3, 4)], f(1, 3, 4) + 9),
    "one that widens": lambda: ([f(2, 1, 4)], f(3, 1) + 9),
    "one that widens first": lambda: (f(3, 4) + 9, [f(2, 1, 1)]),
}
PAIRS = ["Add", "Sub", "Mul", "Max", "Min", "Sum", "Mean", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Equal"]


# The standard lets slopes broadcast to the activation only.
SLOPES = [x for x in FORMS if "first" not in x and "broadcast" not in x and "widens" not in x]


@pytest.mark.parametrize(
    ("op", "form"),
    [(op, form) for op in [*PAIRS, "Div"] for form in FORMS] + [("PRelu", form) for form in SLOPES],
)
def test_operators_of_two_values_broadcast(op, form):
    x, y = FORMS[form]()
    if op == "Div":
        y = [np.abs(y[0]) + 1] if isinstance(y, list) else y
    both_ways(op, x, y, atol=1e-5 if op != "Div" else 5e-4, rtol=1e-4)


WHOLE_FORMS = {
    "lower rank": lambda: ([f(4, 3)], [f(3)]),
    "lower rank first": lambda: ([f(3)], [f(2, 4, 3)]),
    "nothing but a number": lambda: ([f(3)], [f()]),
    "a constant of higher rank": lambda: ([f(3)], f(2, 4, 1)),
    "a number and a constant": lambda: ([f()], f(3)),
    "two numbers": lambda: ([f()], np.float32(2)),
    "the first axis": lambda: ([f(3, 2)], f(3, 1)),
}


@pytest.mark.parametrize("op", PAIRS)
@pytest.mark.parametrize("form", WHOLE_FORMS)
def test_as_a_whole_ranks_may_differ(op, form):
    model, examples = case(op, *WHOLE_FORMS[form]())
    whole(model, examples, expected(model, examples), 1e-5, 1e-4)


def test_operands_of_another_rank_that_would_mix_the_batch_are_refused():
    model, _ = case("Add", [f(2, 1, 3)], [f(2, 3)])
    for x in model.graph.input:
        x.type.tensor_type.shape.dim[0].dim_param = "n"
    with pytest.raises(UnsupportedError, match="batch must stay the first axis"):
        load_onnx(model.SerializeToString())


@pytest.mark.parametrize("op", ["Max", "Min", "Sum", "Mean"])
def test_any_number_of_operands(op):
    both_ways(op, [f(2, 3)], atol=1e-5)
    both_ways(op, [f(2, 3)], [f(2, 1)], [f(2, 3)], atol=2e-4)
    both_ways(op, [f(2, 3)], f(3), [f(2, 3)], np.float32(0.5), [f(2, 1)], atol=1e-5 if op != "Mean" else 2e-4)


@pytest.mark.parametrize("limit", [np.inf, np.finfo(np.float32).max, 65504, 40000])
def test_a_constant_operand_of_a_comparison_may_be_infinite_or_too_large_to_compare(limit):
    for op, bound in (("Max", -limit), ("Min", limit), ("Less", limit), ("Greater", -limit)):
        model, examples = case(op, line(-9000, 9000), np.float32([bound] * 5))
        imported = by_samples(model, examples, expected(model, examples), 0, 0)
        np.testing.assert_array_equal(encrypted("fss", imported, examples), expected(model, examples))


@pytest.mark.parametrize("op", [*PAIRS, "Div", "PRelu", "And", "Or", "Xor"])
def test_a_program_says_nothing_about_constants(op):
    logical = op in ("And", "Or", "Xor")
    first, second = (b(3), ~b(3)) if logical else (f(3) + 9, np.zeros(3, np.float32) + 2)
    x = [b(2, 3)] if logical else [f(2, 3)]
    programs = [load_onnx(case(op, x, c)[0].SerializeToString()).program.to_json() for c in (first, second)]
    assert programs[0] == programs[1]


CONDITIONS = {
    "all computed": lambda: ([b(2, 3)], [f(2, 3)], [f(2, 3)]),
    "all broadcast": lambda: ([b(2, 3, 1)], [f(2, 1, 4)], [f(2, 3, 4)]),
    "constant condition": lambda: (b(3), [f(2, 3)], [f(2, 3)]),
    "constant condition and first": lambda: (b(3), f(3), [f(2, 3)]),
    "constant condition and second": lambda: (b(3), [f(2, 3)], np.float32(0.5)),
    "constant branches": lambda: ([b(2, 3)], np.float32(2), np.float32(-1)),
    "constant branches that widen": lambda: ([b(2, 1, 3)], f(4, 1), np.float32(-1)),
    "constant first": lambda: ([b(2, 3)], f(3), [f(2, 3)]),
    "constant second": lambda: ([b(2, 3)], [f(2, 1)], f(3)),
    "condition that widens": lambda: (b(4, 3), [f(2, 1, 3)], f(4, 1)),
}


@pytest.mark.parametrize("form", CONDITIONS)
def test_where(form):
    both_ways("Where", *CONDITIONS[form](), atol=1e-5)


def test_a_masked_value_is_so_low_that_softmax_forgets_it():
    mask = np.array([True, False, True, False])
    nodes = [
        helper.make_node("Where", ["m", "x", "low"], ["a"]),
        helper.make_node("Add", ["a", "more"], ["b"]),
        helper.make_node("Softmax", ["b"], ["y"]),
    ]
    for least in (-np.inf, np.finfo(np.float32).min, -1e9):
        weights = {"m": mask, "low": np.float32(least), "more": np.float32([0, 0, 0, least])}
        graph = helper.make_graph(
            nodes,
            "test",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 4])],
            [onnx.ValueInfoProto(name="y")],
            [numpy_helper.from_array(np.asarray(v), k) for k, v in weights.items()],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
        examples = {"x": f(2, 4)}
        want = expected(model, examples)
        by_samples(model, examples, want, 2e-4, 0)
        whole(model, examples, want, 2e-4, 0)


def test_a_mask_may_be_an_input_as_transformers_have_it():
    model = chain(
        NODE("Sub", ["one", "x"], ["a"]),
        NODE("Mul", ["a", "least"], ["b"]),
        NODE("Add", ["b", "scores"], ["c"]),
        NODE("Softmax", ["c"], ["y"]),
        one=np.float32(1),
        least=np.finfo(np.float32).min,
        scores=f(12),
    )
    examples = {"x": np.arange(24).reshape(2, 12).astype(np.float32) % 3 % 2}
    want = expected(model, examples)
    imported = by_samples(model, examples, want, 2e-4, 0)
    np.testing.assert_allclose(encrypted("fss", imported, examples), want, atol=1e-3)


@pytest.mark.parametrize("exponent", [0, 1, 2, 3, 5, 8])
def test_powers_with_a_whole_exponent(exponent):
    both_ways("Pow", [f(2, 30, scale=1.0)], np.float32(exponent), atol=1e-4, rtol=1e-4)
    both_ways("Pow", [f(2, 30, scale=1.0)], np.int64([exponent]), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("exponent", "atol"), [(0.5, 1.5e-3), (-0.5, 2e-3), (-1, 1e-3), (-2, 3e-3)])
def test_powers_with_other_exponents(exponent, atol):
    both_ways("Pow", [np.abs(f(2, 30)) + np.float32(0.5)], np.float32(exponent), atol=atol)


def test_powers_of_a_constant():
    both_ways("Pow", np.float32(2), [f(2, 30)], rtol=5e-4)


LOGIC = {
    "two": lambda: ([b(2, 3)], [b(2, 3)]),
    "two that broadcast": lambda: ([b(2, 3, 1)], [b(2, 1, 4)]),
    "constant": lambda: ([b(2, 8)], b(8)),
    "constant first": lambda: (b(8), [b(2, 8)]),
    "constant that widens": lambda: ([b(2, 1, 8)], b(4, 1)),
}


@pytest.mark.parametrize("op", ["And", "Or", "Xor", "Equal"])
@pytest.mark.parametrize("form", LOGIC)
def test_connectives(op, form):
    both_ways(op, *LOGIC[form](), atol=0)


def test_not_and_what_is_never_true():
    both_ways("Not", [b(2, 8)], atol=0)
    both_ways("IsNaN", [f(2, 8)], atol=0)
    both_ways("IsInf", [f(2, 8)], atol=0)


@pytest.mark.parametrize("op", ["Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Equal"])
def test_comparisons_of_equals_and_neighbours(op):
    unit = 2.0**-16
    x, y = np.float32([[1, 1, 1, -2, 0]]), np.float32([[1, 1 + unit, 1 - unit, -2, unit]])
    both_ways(op, [x], [y], atol=0)
    both_ways(op, [x], y, atol=0)
    both_ways(op, y, [x], atol=0, opset=12 if op.endswith("OrEqual") else 11)
    both_ways(op, [RNG.integers(-3, 4, (2, 30))], [RNG.integers(-3, 4, (2, 30))], atol=0)


@pytest.mark.parametrize("op", ["Add", "Sub", "Mul", "Max", "Min", "Where", "Abs", "Neg", "Sign"])
def test_whole_numbers(op):
    x, y = RNG.integers(-9, 10, (2, 2, 8))
    inputs = ([b(2, 8)],) if op == "Where" else ()
    both_ways(op, *inputs, [x], *(() if op in ("Abs", "Neg", "Sign") else ([y],)), atol=0)


@pytest.mark.parametrize(
    ("given", "to"),
    [
        (b(2, 8), TensorProto.FLOAT),
        (b(2, 8), TensorProto.INT64),
        (np.arange(16).reshape(2, 8), TensorProto.FLOAT),
        (np.arange(16).reshape(2, 8) - 3, TensorProto.BOOL),
        (np.arange(16).reshape(2, 8).astype(np.int32), TensorProto.INT64),
        (np.float32([[0, 1, -1, 2**-16], [0, 0, 5, -(2**-16)]]), TensorProto.BOOL),
        (f(2, 8), TensorProto.DOUBLE),
    ],
)
def test_casts(given, to):
    both_ways("Cast", [given], to=to, atol=1e-6)
    both_ways("CastLike", [given], np.zeros(1, helper.tensor_dtype_to_np_dtype(to)), atol=1e-6)


def chain(*nodes: onnx.NodeProto, opset: int = OPSET, **weights: object) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "test",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 12])],
        [onnx.ValueInfoProto(name="y")],
        [numpy_helper.from_array(np.asarray(v), k) for k, v in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=IR_VERSION)


def agrees_both_ways(model: onnx.ModelProto, atol: float = 3e-4, scale: float = 2.0) -> Imported:
    examples = {"x": f(2, 12, scale=scale)}
    want = expected(model, examples)
    whole(model, examples, want, atol, 0)
    return by_samples(model, examples, want, atol, 0)


def test_what_is_whole_by_construction_may_be_cast_and_rounded():
    agrees_both_ways(
        chain(
            NODE("Greater", ["x", "zero"], ["a"]),
            NODE("Cast", ["a"], ["b"], to=TensorProto.FLOAT),
            NODE("Floor", ["b"], ["f"]),
            NODE("Ceil", ["f"], ["c"]),
            NODE("Cast", ["c"], ["d"], to=TensorProto.INT64),
            NODE("Cast", ["d"], ["y"], to=TensorProto.FLOAT),
            zero=np.float32(0),
        ),
        atol=0,
    )


REFUSED = [
    ("Cast", ([f(2, 3)],), {"to": TensorProto.INT64}, "a cast to int64 rounds"),
    ("CastLike", ([f(2, 3)], np.int32([1])), {}, "a cast to int32 rounds"),
    ("Floor", ([f(2, 3)],), {}, "rounding is not supported"),
    ("Round", ([f(2, 3)],), {}, "rounding is not supported"),
    ("Div", ([np.int64([[4, 5]])], np.int64(2)), {}, "a division of integers rounds"),
    ("Div", ([f(2, 3)], np.float32([1, 0, 2])), {}, "must not hold a zero"),
    ("Pow", ([f(2, 3)], np.float32(99)), {}, "exponent must lie in -64..64"),
    ("Pow", ([f(2, 3)], [f(2, 3)]), {}, "the exponent must be constant"),
    ("Pow", (np.float32(-2), [f(2, 3)]), {}, "one positive number"),
    ("Mod", ([f(2, 3)], np.float32(2)), {"fmod": 1}, "operator 'Mod' is not supported"),
    ("Celu", ([f(2, 3)],), {"alpha": 1e4}, "alpha must lie in"),
    ("Swish", ([f(2, 3)],), {"alpha": 1e4, "opset": 24}, "alpha must lie in"),
    ("Shrink", ([f(2, 3)],), {"lambd": -1.0}, "lambd must not be negative"),
    ("Clip", ([f(2, 3)], np.float32(2), np.float32(1)), {}, "lower bound must not exceed"),
    ("Dropout", ([f(2, 3)], np.float32(0.5), np.bool_(True)), {}, "draws random numbers"),
]


@pytest.mark.parametrize(("op", "inputs", "attrs", "reason"), REFUSED)
def test_what_is_refused_says_why(op, inputs, attrs, reason):
    model, _ = case(op, *inputs, **attrs)
    _, problems = translate(analyse(model, RULES))
    assert [p.op_type for p in problems] == [op]
    assert reason in problems[0].reason
    assert problems[0].remedy


def encrypted(protocol: str, imported: Imported, examples: dict) -> np.ndarray:
    return secure(protocol, imported.program, imported.params, examples)[0]["y"]


CHAINS = {
    "comparisons and choices": chain(
        NODE("Greater", ["x", "half"], ["big"]),
        NODE("Less", ["x", "low"], ["small"]),
        NODE("Or", ["big", "small"], ["either"]),
        NODE("Not", ["either"], ["neither"]),
        NODE("Xor", ["neither", "flags"], ["odd"]),
        NODE("Where", ["odd", "x", "half"], ["chosen"]),
        NODE("Max", ["chosen", "low", "x"], ["most"]),
        NODE("Cast", ["odd"], ["number"], to=TensorProto.FLOAT),
        NODE("Add", ["most", "number"], ["y"]),
        half=np.float32(0.5),
        low=np.float32(-1),
        flags=np.arange(12) % 2 == 0,
    ),
    "functions": chain(
        NODE("Gelu", ["x"], ["a"]),
        NODE("Shrink", ["a"], ["b"], lambd=0.25, bias=0.1),
        NODE("PRelu", ["b", "slope"], ["c"]),
        NODE("Softsign", ["c"], ["d"]),
        NODE("HardSwish", ["d"], ["e"]),
        NODE("Abs", ["e"], ["y"]),
        slope=np.linspace(-1, 1, 12).astype(np.float32),
    ),
    "quotients and powers": chain(
        NODE("Pow", ["x", "two"], ["a"]),
        NODE("Add", ["a", "one"], ["b"]),
        NODE("Div", ["x", "b"], ["c"]),
        NODE("Mean", ["c", "x"], ["d"]),
        NODE("Reciprocal", ["b"], ["e"]),
        NODE("Mul", ["d", "e"], ["y"]),
        two=np.float32(2),
        one=np.float32(1),
    ),
}


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("name", CHAINS)
def test_encrypted_chains_agree(name, protocol):
    model, examples = CHAINS[name], {"x": f(2, 12)}
    got = encrypted(protocol, agrees_both_ways(model, atol=5e-4), examples)
    np.testing.assert_allclose(got, expected(model, examples), atol=2e-3)


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("op", ["Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Equal"])
def test_encrypted_comparisons_are_exact(op, protocol):
    unit = 2.0**-16
    x = [np.float32([[1, 1, 1, -2, 0, 5, -5]])]
    y = np.float32([[1, 1 + unit, 1 - unit, -2, unit, -5, 5]])
    for second in ([y], y):
        model, examples = case(op, x, second)
        got = encrypted(protocol, load_onnx(model.SerializeToString()), examples)
        np.testing.assert_array_equal(got, expected(model, examples))


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("op", ["And", "Or", "Xor"])
def test_encrypted_truth_values_are_exact(op, protocol):
    x = np.array([[False, False, True, True]])
    y = np.array([[False, True, False, True]])
    for second in ([y], y):
        model, examples = case(op, [x], second)
        numbers = {k: v.astype(np.float32) for k, v in examples.items()}
        got = encrypted(protocol, load_onnx(model.SerializeToString()), numbers)
        np.testing.assert_array_equal(got, expected(model, examples))
