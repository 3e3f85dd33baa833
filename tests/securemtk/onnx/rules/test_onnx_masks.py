"""Masks as exporters write them, and questions for NaN: right for all rows, within comparisons' range, or refused."""

import functools
from collections.abc import Callable

import numpy as np
import onnx
import pytest
import torch
from both_parties import PROTOCOLS, secure
from exporters import EXPORTERS, fed, legacy
from onnx import TensorProto, helper, numpy_helper
from onnx_models import build, ops
from program_oracle import run
from torch import Tensor, nn

from protocols.errors import RangeError, UnsupportedError
from protocols.running.ranges import measure
from securemtk.onnx.importer import Imported, load_onnx
from securemtk.onnx.model.runtime import start

OP = helper.make_node
HEADS, LONG = 2, 6
FP16, FP32 = torch.finfo(torch.float16).min, torch.finfo(torch.float32).min


def right(data: bytes, feeds: dict, atol: float = 4e-4) -> Imported:
    """Import a file and assert that the program is in range and says what onnxruntime says."""
    imported = load_onnx(data)
    numbers = fed(imported, feeds)
    ranges = measure(imported.program, imported.params, [numbers])
    assert all(row.share < 1 for row in ranges), ranges
    got = run(imported.program, imported.params, numbers)
    for info, want in zip(imported.outputs, start(data).run(None, feeds), strict=True):
        np.testing.assert_allclose(got[info.name].reshape(want.shape), want, atol=atol)
    return imported


def mask(dtype: type = np.float32) -> np.ndarray:
    """Rows of truth values: some out, the second row out as a whole."""
    return np.array([[1, 1, 0, 1, 0, 0], [0, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1]]).astype(dtype)


def scores(scale: float = 3.0) -> np.ndarray:
    return (scale * np.random.default_rng(1).standard_normal((3, HEADS, LONG, LONG))).astype(np.float32)


def wide(m: Tensor) -> Tensor:
    return m[:, None, None, :]


FORMS: dict[str, Callable[..., Tensor]] = {
    "(1 - m) C": lambda s, m, c: s + (1.0 - wide(m)) * c,
    "C (1 - m) before scores": lambda s, m, c: (1.0 - wide(m)) * c + s,
    "(m - 1) * -C": lambda s, m, c: s + (wide(m) - 1.0) * -c,
    "less (1 - m) * -C": lambda s, m, c: s - (1.0 - wide(m)) * -c,
    "m * -C + C": lambda s, m, c: s + (wide(m) * -c + c),
    "scaled afterwards": lambda s, m, c: (s + (1.0 - wide(m)) * c) / 8.0,
    "expanded": lambda s, m, c: s + ((1.0 - wide(m)) * c).expand(-1, HEADS, LONG, LONG),
    "a product of two": lambda s, m, c: s + (1.0 - m[:, None, :, None] * wide(m)) * c,
    "of a comparison": lambda s, m, c: s + (wide(m) < 0.5).float() * c,
    "masked_fill": lambda s, m, c: s.masked_fill(wide(m) == 0, c),
    "where": lambda s, m, c: torch.where(wide(m) > 0.5, s, torch.tensor(c)),
    "where, then added": lambda s, m, c: s + torch.where(wide(m) > 0.5, 0.0, c),
    "masked_fill of 1 - m": lambda s, m, c: s + (1.0 - wide(m)).masked_fill((1.0 - wide(m)).bool(), c),
}


@functools.cache
def exported(exporter: str, form: str) -> bytes:
    """A softmax behind a mask of -65504."""
    example = (torch.from_numpy(scores()), torch.from_numpy(mask()))
    return EXPORTERS[exporter](lambda s, m: torch.softmax(FORMS[form](s, m, FP16), -1), example)


def with_number(data: bytes, number: float) -> bytes:
    """Put another number in the place of -65504: exporting takes seconds."""
    model = onnx.load_from_string(data)
    values = [*model.graph.initializer, *(a.t for n in model.graph.node for a in n.attribute if a.name == "value")]
    changed = 0
    for tensor in values:
        value = numpy_helper.to_array(tensor)
        if value.dtype.kind == "f" and (large := np.abs(value) == -FP16).any():
            with np.errstate(invalid="ignore"):
                new = np.where(large, np.sign(value) * -np.float32(number), value)
            tensor.CopyFrom(numpy_helper.from_array(new.astype(np.float32), tensor.name))
            changed += 1
    assert changed
    return model.SerializeToString()


# A file of the newer exporter takes its time.
NUMBERS = [("legacy", x) for x in (-10000.0, FP16, -1e6, -1e9, FP32)] + [("dynamo", x) for x in (FP16, FP32)]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("exporter", "number"), NUMBERS)
def test_a_mask_is_right_in_every_form_and_row(exporter, form, number):
    data, given = with_number(exported(exporter, form), number), mask()
    if number == -1e6:
        # Where all of a row is out float32 has 1/16 left of a score: no right value for fixed point.
        given = mask()[[0, 2, 0]] if form != "a product of two" else np.ones_like(mask())
    names = [x.name for x in load_onnx(data).inputs]
    # -65504 and -10000 leave float32 itself with 1/256 and 1/1024 of a score.
    right(data, dict(zip(names, [scores(), given], strict=True)), atol=4e-3 if number == FP16 else 7e-4)


TYPED = {
    "int64": (np.int64, lambda s, m: s + (1.0 - wide(m).float()) * FP16),
    "int64, transformers": (
        np.int64,
        lambda s, m: s + (1.0 - wide(m).float()).masked_fill((1.0 - wide(m).float()).bool(), FP32),
    ),
    "bool": (np.bool_, lambda s, m: s + (~wide(m)).float() * FP16),
    "bool, where": (np.bool_, lambda s, m: torch.where(wide(m), s, torch.tensor(FP32))),
}


@pytest.mark.parametrize("form", TYPED)
def test_a_mask_may_be_of_any_type(form):
    dtype, function = TYPED[form]
    example = (torch.from_numpy(scores()), torch.from_numpy(mask(dtype)))
    data = legacy(lambda s, m: torch.softmax(function(s, m), -1), example)
    right(data, {"x0": scores(), "x1": mask(dtype)}, atol=4e-3)


def attention(q: Tensor, m: Tensor) -> Tensor:
    return nn.functional.scaled_dot_product_attention(q, q, q, attn_mask=m)


@pytest.mark.parametrize("exporter", EXPORTERS)
@pytest.mark.parametrize("protocol", ["program", *PROTOCOLS])
def test_attention_of_torch_is_right_where_a_row_is_masked_as_a_whole(exporter, protocol):
    # The older exporter writes -inf and asks for NaN, and the row is 0; the newer the least float32: it is even.
    q = torch.from_numpy(scores(0.5)[:, :, :, :4])
    data = EXPORTERS[exporter](attention, (q, wide(torch.from_numpy(mask(np.bool_)))))
    imported = load_onnx(data)
    feeds = dict(zip([x.name for x in imported.inputs], [q.numpy(), mask(np.bool_)[:, None, None, :]], strict=True))
    if protocol == "program":
        right(data, feeds)
        return
    want = start(data).run(None, feeds)[0]
    got, *_ = secure(protocol, imported.program, imported.params, fed(imported, feeds))
    assert np.abs(want[1]).max() == 0 or exporter == "dynamo"
    np.testing.assert_allclose(got[imported.outputs[0].name].reshape(want.shape), want, atol=2e-3)


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("number", [FP16, FP32])
def test_a_secret_mask_leaves_nothing_of_what_is_masked_under_encryption(number, protocol):
    data = with_number(exported("legacy", "(1 - m) C"), number)
    feeds = {"x0": scores(), "x1": mask()}
    imported = load_onnx(data)
    got, *_ = secure(protocol, imported.program, imported.params, feeds)
    np.testing.assert_allclose(got["y"], start(data).run(None, feeds)[0], atol=5e-3)
    assert np.abs(got["y"][0][..., mask()[0] == 0]).max() < 1e-4


def test_nan_to_num_behind_a_softmax_is_right_from_both_exporters():
    def function(s: Tensor, m: Tensor) -> Tensor:
        return torch.softmax(s.masked_fill(wide(m) == 0, -torch.inf), -1).nan_to_num(0.0)

    for export in EXPORTERS.values():
        data = export(function, (torch.from_numpy(scores()), torch.from_numpy(mask())))
        names = [x.name for x in load_onnx(data).inputs]
        right(data, dict(zip(names, [scores(), mask()], strict=True)))


def test_another_number_than_0_may_take_the_place_of_nan():
    function = lambda s, m: torch.softmax(s.masked_fill(wide(m) == 0, -torch.inf), -1).nan_to_num(0.25)  # noqa: E731
    data = legacy(function, (torch.from_numpy(scores()), torch.from_numpy(mask())))
    right(data, {"x0": scores(), "x1": mask()})


@pytest.mark.parametrize(
    ("soft", "hard"), [(-1e4, -np.inf), (-1e4, FP32), (FP16, -1e9), (FP16, -np.inf), (-1e9, -np.inf)]
)
def test_of_two_masks_the_weaker_one_counts_where_both_leave_nothing(soft, hard):
    # Padding on the left and a causal mask: the first token sees itself alone, and is padding.
    causal = np.triu(np.full((LONG, LONG), hard, np.float32), 1)
    nodes = [
        OP("Sub", ["one", "m"], ["d"]),
        OP("Mul", ["d", "soft"], ["padding"]),
        OP("Add", ["x", "causal"], ["a"]),
        OP("Add", ["a", "padding"], ["b"]),
        OP("Softmax", ["b"], ["y"], axis=-1),
    ]
    weights = {"one": np.float32(1), "soft": np.float32(soft), "causal": causal}
    model = build(nodes, {"x": ["n", LONG, LONG], "m": ["n", 1, LONG]}, ["y"], weights)
    m = np.array([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]], np.float32)[:, None]
    right(model.SerializeToString(), {"x": scores()[:2, 0], "m": m}, atol=4e-3)


def test_a_mask_of_fractions_is_right_to_where_it_leaves_nothing():
    m = np.array([[1, 1 - 2**-14, 1 - 2**-12, 0.99, 0.5, 0]], np.float32)
    m = np.concatenate([m, m[:, ::-1], np.ones_like(m)])
    right(exported("legacy", "(1 - m) C"), {"x0": scores(), "x1": m}, atol=4e-3)


def of_one(*nodes: onnx.NodeProto, **weights: object) -> bytes:
    arrays = {k: np.asarray(v) for k, v in weights.items()}
    return build(nodes, {"x": ["n", 6]}, ["y"], arrays).SerializeToString()


def numbers(scale: float = 2.0) -> np.ndarray:
    return (scale * np.random.default_rng(2).standard_normal((4, 6))).astype(np.float32)


FLAGS = np.array([True, False, True, True, False, True])
ENDS = {
    "sigmoid": OP("Sigmoid", ["z"], ["y"]),
    "relu": OP("Relu", ["z"], ["y"]),
    "exp": OP("Exp", ["z"], ["y"]),
    "place": OP("Hardmax", ["z"], ["y"], axis=1),
}


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("least", [-np.inf, FP32, -1e9, FP16])
def test_other_functions_that_a_mask_takes_to_their_end_are_right(end, least):
    right(of_one(OP("Where", ["m", "x", "c"], ["z"]), ENDS[end], m=FLAGS, c=np.float32(least)), {"x": numbers()})
    # The truth is the input's own.
    nodes = [OP("Greater", ["x", "c"], ["t"]), OP("Cast", ["t"], ["f"], to=TensorProto.FLOAT)]
    if np.isfinite(least):
        nodes += [OP("Mul", ["f", "least"], ["p"]), OP("Add", ["p", "x"], ["z"]), ENDS[end]]
        right(of_one(*nodes, c=np.float32(0.5), least=np.float32(least)), {"x": numbers()})


def test_a_softmax_written_by_hand_takes_a_mask():
    nodes = [
        OP("Where", ["m", "x", "c"], ["z"]),
        OP("ReduceMax", ["z"], ["most"], axes=[1], keepdims=1),
        OP("Sub", ["z", "most"], ["d"]),
        OP("Exp", ["d"], ["e"]),
        OP("ReduceSum", ["e", "axis"], ["s"], keepdims=1),
        OP("Div", ["e", "s"], ["y"]),
    ]
    weights = {"m": FLAGS, "c": np.float32(-np.inf), "axis": np.array([1])}
    model = build(nodes, {"x": ["n", 6]}, ["y"], weights, opset=17)
    right(model.SerializeToString(), {"x": numbers()})


CHAINS = {
    "1e9 x / 1e6": ([OP("Mul", ["x", "a"], ["b"]), OP("Div", ["b", "c"], ["y"])], 1e9, 1e6),
    "1e12 x / 1e12": ([OP("Mul", ["x", "a"], ["b"]), OP("Div", ["b", "c"], ["y"])], 1e12, 1e12),
    "(x + 1e8) - 1e8": ([OP("Add", ["x", "a"], ["b"]), OP("Sub", ["b", "c"], ["y"])], 1e8, 1e8),
    "(x - 1e6) + 1e6": ([OP("Sub", ["x", "a"], ["b"]), OP("Add", ["b", "c"], ["y"])], 1e6, 1e6),
}


@pytest.mark.parametrize("name", CHAINS)
def test_constants_that_meet_are_one_and_no_mask(name):
    nodes, a, c = CHAINS[name]
    imported = load_onnx(of_one(*nodes, a=np.float32(a), c=np.float32(c)))
    x = np.float32([[100.5, -3.25, 0.5, 0, 7, -100.5]])
    factor = a / c if "x /" in name or "1e9" in name else 1.0
    np.testing.assert_allclose(run(imported.program, imported.params, {"x": x})["y"], x * factor, rtol=1e-6, atol=1e-6)


def test_a_large_number_that_is_no_mask_stays():
    # A batch of numbers around 1e5 and their distance from it.
    nodes = [OP("Add", ["x", "a"], ["b"]), OP("Where", ["m", "b", "c"], ["y"])]
    right(of_one(*nodes, a=np.float32(1e5), c=np.float32(-2e5), m=FLAGS), {"x": numbers()}, atol=1e-2)


REFUSED = {
    "an output": ([OP("Where", ["m", "x", "inf"], ["y"])], "it holds -inf"),
    "an output, added": ([OP("Add", ["x", "inf"], ["y"])], "it holds -inf"),
    "a matrix product": ([OP("Where", ["m", "x", "inf"], ["z"]), OP("MatMul", ["z", "w"], ["y"])], "it holds -inf"),
    "1e10": ([OP("Where", ["m", "x", "huge"], ["y"])], "must stay below"),
    "a maximum": (
        [OP("Where", ["m", "x", "much"], ["z"]), OP("ReduceMax", ["z"], ["y"], axes=[1])],
        "size 1e\\+09 goes to ReduceMax, where comparisons cannot decide it",
    ),
    "a log-softmax": (
        [OP("Where", ["m", "x", "inf"], ["z"]), OP("LogSoftmax", ["z"], ["y"])],
        "size inf goes to LogSoftmax",
    ),
    "a softmax and an output": (
        [OP("Where", ["m", "x", "much"], ["z"]), OP("Softmax", ["z"], ["p"]), OP("Add", ["p", "z"], ["y"])],
        "goes to output",
    ),
    "NaN of a logarithm": (
        [OP("Log", ["x"], ["z"]), OP("IsNaN", ["z"], ["n"]), OP("Where", ["n", "one", "z"], ["y"])],
        "whether a number is no number cannot be told in fixed point, and 'Log_0' may make it so",
    ),
    "infinity of a quotient": (
        [OP("Reciprocal", ["x"], ["z"]), OP("IsInf", ["z"], ["n"]), OP("Where", ["n", "one", "z"], ["y"])],
        "whether a number is infinite cannot be told",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_proven_is_refused_by_name(name):
    nodes, reason = REFUSED[name]
    weights = {"m": FLAGS, "inf": np.float32(-np.inf), "much": np.float32(-1e9), "huge": np.float32(1e10)}
    weights |= {"w": np.ones((6, 2), np.float32), "one": np.float32(1)}
    model = build(nodes, {"x": ["n", 6]}, ["y"], {k: np.asarray(v) for k, v in weights.items()}, opset=17)
    with pytest.raises((UnsupportedError, RangeError), match=reason):
        load_onnx(model.SerializeToString())


NEVER = {
    "an input": [OP("IsNaN", ["x"], ["n"])],
    "a mean": [OP("ReduceMean", ["x"], ["z"], axes=[1], keepdims=1), OP("IsInf", ["z"], ["n"])],
    "a normalisation": [
        OP("Mul", ["x", "x"], ["a"]),
        OP("ReduceMean", ["a"], ["b"], axes=[1], keepdims=1),
        OP("Add", ["b", "eps"], ["c"]),
        OP("Sqrt", ["c"], ["d"]),
        OP("Div", ["x", "d"], ["z"]),
        OP("IsNaN", ["z"], ["n"]),
    ],
    "a softmax by hand": [
        OP("ReduceMax", ["x"], ["a"], axes=[1], keepdims=1),
        OP("Sub", ["x", "a"], ["b"]),
        OP("Exp", ["b"], ["z"]),
        OP("IsInf", ["z"], ["n"]),
    ],
    "and anything": [OP("IsNaN", ["x"], ["a"]), OP("Greater", ["x", "eps"], ["b"]), OP("And", ["a", "b"], ["n"])],
}


@pytest.mark.parametrize("name", NEVER)
def test_what_is_provably_a_number_is_known_to_be(name):
    # 3.4e38 would take its place: where it never does it need not fit.
    nodes = [*NEVER[name], OP("Where", ["n", "most", "x"], ["y"])]
    model = build(nodes, {"x": ["n", 6]}, ["y"], {"eps": np.float32(1e-5), "most": np.float32(3.4e38)}, opset=17)
    imported = right(model.SerializeToString(), {"x": numbers()})
    assert not {"spline", "mul"} & set(ops(imported))
