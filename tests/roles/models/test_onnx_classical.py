"""Operators of ai.onnx.ml against onnxruntime, and models of scikit-learn, through skl2onnx, against scikit-learn."""

from collections.abc import Sequence

import numpy as np
import onnx
import onnx.defs
import pytest
from both_parties import secure
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from onnx_models import IR_VERSION, floats, ops
from program_oracle import run
from skl2onnx import to_onnx
from sklearn.base import BaseEstimator
from sklearn.linear_model import LinearRegression, LogisticRegression, Ridge
from sklearn.multiclass import OneVsRestClassifier
from sklearn.naive_bayes import BernoulliNB, CategoricalNB, ComplementNB, GaussianNB, MultinomialNB
from sklearn.neighbors import KNeighborsClassifier, KNeighborsRegressor
from sklearn.neural_network import MLPClassifier, MLPRegressor
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import MinMaxScaler, Normalizer, StandardScaler
from sklearn.svm import LinearSVC, LinearSVR

from examples import sklearn_user
from protocols.errors import NeedsInputs, SecureError, UnsupportedError
from securemtk.onnx.fix import fix
from securemtk.onnx.importer import Imported, load_onnx
from securemtk.onnx.model.classical import REWRITES
from securemtk.onnx.model.runtime import ERRORS, start
from securemtk.planning.check import check

WEIGHTS = floats(3, 4).ravel().tolist()
BIAS = [0.5, -0.25, 0.125]


def classical(op: str, outputs: Sequence[str], *, inputs: Sequence[str] = ("x",), opset: int = 18, **attrs: object):
    """A model of one node of ai.onnx.ml with a free batch of 4 numbers."""
    node = helper.make_node(op, list(inputs), list(outputs), name=f"the {op}", domain="ai.onnx.ml", **attrs)
    graph = helper.make_graph(
        [node],
        "test",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 4])],
        [onnx.ValueInfoProto(name=name) for name in outputs],
        [numpy_helper.from_array(np.array([2, 0]), "places")],
    )
    imports = [helper.make_opsetid("", opset), helper.make_opsetid("ai.onnx.ml", 1)]
    return helper.make_model(graph, opset_imports=imports, ir_version=IR_VERSION).SerializeToString()


def agrees(data: bytes, x: np.ndarray, atol: float = 5e-4) -> None:
    imported = load_onnx(data)
    got = run(imported.program, imported.params, {imported.inputs[0].name: x})
    for info, value in zip(imported.outputs, start(data).run(None, {imported.inputs[0].name: x}), strict=True):
        want = np.array([list(row.values()) for row in value]) if isinstance(value, list) else value
        assert got[info.name].shape == want.shape
        assert info.dtype == ("float32" if isinstance(value, list) else want.dtype.name)
        np.testing.assert_allclose(got[info.name], want, atol=atol)


@pytest.mark.parametrize("opset", [9, 13, 18, 22])
@pytest.mark.parametrize("transform", ["NONE", "SOFTMAX", "LOGISTIC"])
@pytest.mark.parametrize("classes", [[0, 1, 2], [7, -3, 20]])
def test_a_linear_classifier_gives_labels_and_scores(opset, transform, classes):
    attrs = {"coefficients": WEIGHTS, "intercepts": BIAS, "classlabels_ints": classes, "multi_class": 1}
    data = classical("LinearClassifier", ["label", "scores"], opset=opset, post_transform=transform, **attrs)
    agrees(data, floats(6, 4, seed=1))


@pytest.mark.parametrize(
    ("op", "attrs"),
    [
        ("LinearRegressor", {"coefficients": WEIGHTS, "intercepts": BIAS, "targets": 3}),
        ("LinearRegressor", {"coefficients": WEIGHTS, "targets": 3, "post_transform": "SOFTMAX"}),
        ("LinearRegressor", {"coefficients": WEIGHTS, "targets": 3, "post_transform": "LOGISTIC"}),
        ("LinearRegressor", {"coefficients": WEIGHTS[:4]}),
        ("LinearRegressor", {"coefficients": WEIGHTS[:4], "post_transform": "SOFTMAX"}),
        ("LinearRegressor", {"coefficients": WEIGHTS[:4], "post_transform": "LOGISTIC"}),
        ("Scaler", {"offset": [*BIAS, 1.0], "scale": WEIGHTS[:4]}),
        ("Scaler", {"offset": [0.5], "scale": [2.0]}),
        ("Normalizer", {"norm": "L1"}),
        ("Normalizer", {"norm": "L2"}),
        ("Binarizer", {"threshold": 0.25}),
    ],
)
@pytest.mark.parametrize("opset", [9, 18])
def test_operators_of_one_output_agree(op, attrs, opset):
    agrees(classical(op, ["y"], opset=opset, **attrs), floats(6, 4, seed=1), atol=1e-3)


def test_a_normalizer_by_the_maximum_divides_by_the_largest_value_as_onnxruntime_does():
    x = np.array([[1.0, 2.0, 4.0, 0.5], [-3.0, -1.0, -5.0, -2.0], [-2.0, -1.0, 0.0, -3.0]], dtype=np.float32)
    agrees(classical("Normalizer", ["y"], norm="MAX"), x, atol=2e-3)


def test_features_are_extracted_at_constant_places():
    agrees(classical("ArrayFeatureExtractor", ["y"], inputs=["x", "places"]), floats(6, 4))


def test_what_is_not_understood_is_refused_with_what_to_do():
    report = check(classical("TreeEnsembleRegressor", ["y"], n_targets=1))
    (problem,) = report.unsupported
    assert (problem.name, problem.op_type) == ("the TreeEnsembleRegressor", "TreeEnsembleRegressor")
    assert "linear models, MLPs" in problem.remedy
    attrs = {"coefficients": WEIGHTS, "intercepts": BIAS, "classlabels_ints": [0, 1, 2], "post_transform": "PROBIT"}
    with pytest.raises(UnsupportedError, match="post_transform must be one of NONE, SOFTMAX, LOGISTIC; got PROBIT"):
        load_onnx(classical("LinearClassifier", ["label", "scores"], **attrs))


# --- any attributes and types ---------------------------------------------------------------------------------------

TYPES = {
    "float32": TensorProto.FLOAT,
    "float64": TensorProto.DOUBLE,
    "int64": TensorProto.INT64,
    "int32": TensorProto.INT32,
    "bool": TensorProto.BOOL,
    "object": TensorProto.STRING,
}
NAMES = ["no", "yes", "zero", "one"]


@st.composite
def attributes(draw: st.DrawFn, op: str) -> dict[str, object]:
    """Attributes of an operator, each absent or of its type, and mostly of sizes that fit one another."""
    size = st.sampled_from([draw(st.integers(1, 4))] * 3 + [1, 3])
    of_kind = {
        "FLOAT": st.sampled_from([-1.5, 0.0, 0.25]),
        "FLOATS": size.map(lambda n: (np.arange(n) % 5 / 2 - 0.75).tolist()),
        "INT": st.integers(0, 4),
        "INTS": size.map(lambda n: [[0, 7, -3, 20, 5][i % 5] for i in range(n)]),
        "STRING": st.sampled_from(["NONE", "SOFTMAX", "LOGISTIC", "PROBIT", "L1", "L2", "MAX", "other"]),
        "STRINGS": size.map(lambda n: NAMES[:n]),
    }
    special = {
        "coefficients": size.map(lambda n: floats(n, 4, seed=n).ravel().tolist()),
        "offset": st.sampled_from([[0.5], [0.5, 0.25, -1.0, 2.0], [0.5, 0.25]]),
        "scale": st.sampled_from([[2.0], [2.0, 0.5, -1.0, 1.5], [2.0, 0.5]]),
        "norm": st.sampled_from(["L1", "L2", "MAX", "other"]),
        "post_transform": st.sampled_from(["NONE", "SOFTMAX", "LOGISTIC", "SOFTMAX_ZERO", "PROBIT"]),
    }
    made: dict[str, object] = {}
    for name, attribute in onnx.defs.get_schema(op, "ai.onnx.ml").attributes.items():
        kind = of_kind.get(attribute.type.name)
        if kind is not None and draw(st.integers(0, 3)):
            made[name] = draw(special.get(name, kind))
    return made


@st.composite
def any_node(draw: st.DrawFn) -> tuple[bytes, str]:
    """A model of one node of ai.onnx.ml, mostly of one that is understood, and the type of its input."""
    every = {s.name for s in onnx.defs.get_all_schemas() if s.domain == "ai.onnx.ml"}
    op = draw(st.sampled_from([*sorted(REWRITES)] * 3 + [*sorted(every)]))
    dtype = draw(st.sampled_from([*TYPES]))
    inputs = ["x", "places"] if op == "ArrayFeatureExtractor" else ["x"]
    if inputs[1:] and draw(st.booleans()):
        inputs = ["classes", "x"]
    n_outputs = 1 + (op in ("LinearClassifier", "TreeEnsembleClassifier", "SVMClassifier") and draw(st.booleans()))
    opset = draw(st.sampled_from([9, 13, 18, 21]))
    attrs = draw(attributes(op))
    node = helper.make_node(op, inputs, [f"y{i}" for i in range(n_outputs)], domain="ai.onnx.ml", **attrs)
    classes = draw(
        st.sampled_from([np.arange(4), np.arange(4.0), np.arange(4, dtype=np.int32), np.array(NAMES, object)])
    )
    form = draw(st.sampled_from([(4,), (1, 4), (2, 2)]))
    graph = helper.make_graph(
        [node],
        "test",
        [helper.make_tensor_value_info("x", TYPES[dtype], [] if inputs[0] == "classes" else ["n", 4])],
        [onnx.ValueInfoProto(name=name) for name in node.output],
        [
            numpy_helper.from_array(np.array(draw(st.sampled_from([[2, 0], [3], [9]]))), "places"),
            numpy_helper.from_array(classes.reshape(form), "classes"),
        ],
    )
    if inputs[0] == "classes":
        graph.input[0].CopyFrom(helper.make_tensor_value_info("x", TYPES[dtype], ["n"]))
    imports = [helper.make_opsetid("", opset), helper.make_opsetid("ai.onnx.ml", draw(st.sampled_from([1, 3])))]
    model = helper.make_model(graph, opset_imports=imports, ir_version=IR_VERSION)
    return model.SerializeToString(), dtype


def numbers(value: object) -> np.ndarray:
    """Return an output of onnxruntime as we give it: maps as columns, texts as places."""
    array = np.array([[*row.values()] for row in value]) if isinstance(value, list) else np.asarray(value)
    return np.vectorize(NAMES.index, otypes=[float])(array) if array.dtype.kind in "OU" else array


@given(case=any_node())
@settings(max_examples=150, deadline=None, derandomize=True)
def test_a_node_of_any_attributes_and_type_is_refused_or_says_what_onnxruntime_says(case):
    data, dtype = case
    imported, refusal = loaded(data)
    assert "cannot be understood" not in str(refusal)
    # With a batch given it may run.
    assert isinstance(refusal, NeedsInputs) or runs(data) == (refusal is None)
    if imported is None:
        return
    ranks = len(imported.inputs[0].shape)
    x = (np.arange(12).reshape(3, 4) % 7 - 3.25) if ranks else np.array([2, 0, 3])
    x = x.astype(dtype)
    try:
        expected = start(data).run(None, {"x": x})
    except ERRORS:
        return  # it has fewer types than the standard
    got = run(imported.program, imported.params, {"x": x.astype(np.float64)})
    for info, value in zip(imported.outputs, map(numbers, expected), strict=True):
        assert got[info.name].shape == value.shape
        np.testing.assert_allclose(got[info.name], value, atol=2e-3)


def loaded(data: bytes) -> tuple[Imported | None, SecureError | None]:
    try:
        return load_onnx(data), None
    except SecureError as error:
        return None, error


def runs(data: bytes) -> bool:
    try:
        return check(data).ok
    except SecureError:
        return False


# --- scikit-learn ---------------------------------------------------------------------------------------------------


def data_of(classes: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    y = np.arange(120) % classes
    return (rng.standard_normal((classes, 4))[y] * 2 + rng.standard_normal((120, 4))).astype(np.float32), y


def small_mlp(kind: type = MLPClassifier, **options: object) -> BaseEstimator:
    # By this solver it converges in little time, and says nothing of it.
    # The loss is computed in float32, in which a smaller gradient than `tol` is noise: scipy 1.18 says so by an error.
    return kind(hidden_layer_sizes=(8,), solver="lbfgs", max_iter=2000, alpha=1.0, tol=0.01, random_state=0, **options)


CLASSIFIERS = {
    "logistic": lambda: LogisticRegression(max_iter=1000),
    "svc": lambda: LinearSVC(random_state=0),
    "mlp": small_mlp,
    "mlp-tanh": lambda: small_mlp(activation="tanh"),
    "mlp-logistic": lambda: small_mlp(activation="logistic"),
    "standard-logistic": lambda: make_pipeline(StandardScaler(), LogisticRegression()),
    "minmax-mlp": lambda: make_pipeline(MinMaxScaler(), small_mlp()),
    "normal-logistic": lambda: make_pipeline(Normalizer(), LogisticRegression()),
}


@pytest.mark.parametrize("zipmap", [True, False])
@pytest.mark.parametrize("names", ["places", "numbers", "texts"])
@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("kind", CLASSIFIERS)
def test_a_classifier_of_scikit_learn_says_what_scikit_learn_says(kind, classes, names, zipmap):
    x, y = data_of(classes)
    known = {"places": np.arange(3), "numbers": np.array([4, 11, 12]), "texts": np.array(["no", "yes", "zero"])}[names]
    model = CLASSIFIERS[kind]().fit(x, known[y])
    has_probabilities = hasattr(model, "predict_proba")
    options = {id(model): {"zipmap": False}} if has_probabilities and not zipmap else None
    data = to_onnx(model, x[:1], options=options)
    imported = load_onnx(data.SerializeToString())
    got = run(imported.program, imported.params, {"X": x})
    label, scores = (got[info.name] for info in imported.outputs)
    assert [info.dtype for info in imported.outputs] == ["int64", "float32"]
    want = model.predict_proba(x) if has_probabilities else model.decision_function(x).reshape(len(x), -1)
    np.testing.assert_allclose(scores, want, atol=2e-3)
    places = np.rint(label).astype(int)
    labels = model.classes_[places] if names == "texts" else places
    sure = np.sort(want, 1)[:, -1] - np.sort(want, 1)[:, -2] > 0.01 if want.shape[1] > 1 else np.abs(want[:, 0]) > 0.01
    assert sure.mean() > 0.8
    np.testing.assert_array_equal(labels[sure], model.predict(x)[sure])


@pytest.mark.parametrize(
    "model",
    [LinearRegression(), Ridge(), LinearSVR(random_state=0, max_iter=20_000), small_mlp(MLPRegressor)],
    ids=lambda m: type(m).__name__,
)
def test_a_regressor_of_scikit_learn_says_what_scikit_learn_says(model):
    x, y = data_of(3)
    model.fit(x, y + 0.5)
    imported = load_onnx(to_onnx(model, x[:1]).SerializeToString())
    got = run(imported.program, imported.params, {"X": x})["variable"]
    np.testing.assert_allclose(got[:, 0], model.predict(x), atol=1e-4)
    assert set(ops(imported)) <= {"matmul", "relu"}


@pytest.mark.parametrize(
    "model",
    [LogisticRegression(max_iter=1000), make_pipeline(Normalizer("max"), LogisticRegression()), GaussianNB()],
    ids=lambda model: type(model).__name__,
)
def test_the_rewritten_file_of_a_classifier_needs_no_operator_but_those_of_the_standard(model):
    x, y = data_of(3)
    fixed = fix(to_onnx(model.fit(np.abs(x), y), x[:1]).SerializeToString())
    assert "wrote operators of ai.onnx.ml as operators of the standard" in fixed.rewrites
    assert {node.domain for node in onnx.load_model_from_string(fixed.data).graph.node} == {""}


@pytest.mark.usefixtures("in_open_session")
@pytest.mark.parametrize("name", sklearn_user.models())
def test_the_example_asks_models_of_scikit_learn_under_encryption(name):
    x, y = sklearn_user.digits()
    model = sklearn_user.models()[name].fit(x[:400], y[:400])
    labels, scores = sklearn_user.asked(sklearn_user.exported(model, x), x[-5:])
    want = model.predict_proba(x[-5:]) if hasattr(model, "predict_proba") else model.decision_function(x[-5:])
    np.testing.assert_allclose(scores, want, atol=2e-3)
    np.testing.assert_array_equal(labels, model.predict(x[-5:]))


BAYES = {
    "gaussian": (GaussianNB, lambda x: x),
    "bernoulli": (BernoulliNB, lambda x: x),
    "multinomial": (MultinomialNB, np.abs),
    "complement": (ComplementNB, np.abs),
    "gaussian of integers": (GaussianNB, lambda x: np.rint(x).astype(np.int64)),
    "bernoulli of truth values": (BernoulliNB, lambda x: x > 0),
    "one against the rest": (lambda: OneVsRestClassifier(LogisticRegression()), lambda x: x),
}


@pytest.mark.parametrize("names", ["places", "numbers", "texts"])
@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("kind", BAYES)
def test_probabilistic_and_combined_classifiers_say_what_scikit_learn_says(kind, classes, names):
    x, y = data_of(classes)
    known = {"places": np.arange(3), "numbers": np.array([4, 11, 12]), "texts": np.array(["no", "yes", "zero"])}[names]
    made, change = BAYES[kind]
    x = change(x)
    model = made().fit(x, known[y])
    imported = load_onnx(to_onnx(model, x[:1]).SerializeToString())
    assert not imported.program.whole
    got = run(imported.program, imported.params, {"X": x.astype(np.float64)})
    label, scores = (got[info.name] for info in imported.outputs)
    assert label.shape == (len(x),)
    np.testing.assert_allclose(scores, model.predict_proba(x), atol=2e-3)
    places = np.rint(label).astype(int)
    labels = model.classes_[places] if names == "texts" else places
    ordered = np.sort(scores, 1)
    sure = ordered[:, -1] - ordered[:, -2] > 0.01
    assert sure.mean() > 0.8
    np.testing.assert_array_equal(labels[sure], model.predict(x)[sure])


def test_a_categorical_classifier_is_understood_as_a_whole():
    x, y = data_of(3)
    places = np.clip(np.rint(np.abs(x)), 0, 2).astype(np.int64)
    model = CategoricalNB(min_categories=3).fit(places, y)
    data = to_onnx(model, places[:1], options={id(model): {"zipmap": False}}).SerializeToString()
    with pytest.raises(NeedsInputs, match="--shape X=N,4"):
        load_onnx(data)
    imported = load_onnx(data, shapes={"X": (5, 4)})
    got = run(imported.program, imported.params, {"X": places[None, :5].astype(np.float64)})
    np.testing.assert_allclose(got["probabilities"][0], model.predict_proba(places[:5]), atol=2e-3)
    np.testing.assert_array_equal(np.rint(got["label"][0]), model.predict(places[:5]))


@pytest.mark.parametrize("options", [{}, {"optim": "cdist"}])
@pytest.mark.parametrize("kind", [KNeighborsClassifier, KNeighborsRegressor])
def test_nearest_neighbours_are_refused_by_name_with_what_to_use(kind, options):
    x, y = data_of(3)
    model = kind(3).fit(x, y)
    data = to_onnx(model, x[:1], options={id(model): options}).SerializeToString()
    report = check(data)
    assert report.unsupported[0].op_type == ("CDist" if options else "Scan")
    assert "in the place of nearest neighbours" in report.unsupported[0].remedy
    with pytest.raises(UnsupportedError, match="nearest neighbours"):
        load_onnx(data)


@pytest.mark.parametrize("kind", ["gaussian", "one against the rest"])
def test_they_agree_under_encryption(kind):
    x, y = data_of(3)
    model = BAYES[kind][0]().fit(x, y)
    imported = load_onnx(to_onnx(model, x[:1]).SerializeToString())
    got, *_ = secure("fss", imported.program, imported.params, {"X": x[:8]})
    label, scores = (got[info.name] for info in imported.outputs)
    np.testing.assert_allclose(scores, model.predict_proba(x[:8]), atol=5e-3)
    np.testing.assert_array_equal(np.rint(label), model.predict(x[:8]))


@pytest.mark.parametrize("form", [(3,), (1, 3), (1, 1, 3), (2, 3)])
@pytest.mark.parametrize("kind", ["int64", "int32", "float32"])
def test_a_row_of_classes_of_any_form_and_type_is_looked_up(form, kind):
    classes = np.resize(np.array([0, 1, 2] if form == (3,) else [5, 9, 2, 4, 7, 1], kind), form)
    extract = helper.make_node("ArrayFeatureExtractor", ["classes", "x"], ["y"], domain="ai.onnx.ml")
    graph = helper.make_graph(
        [extract],
        "test",
        [helper.make_tensor_value_info("x", TensorProto.INT64, [4])],
        [onnx.ValueInfoProto(name="y")],
        [numpy_helper.from_array(classes, "classes")],
    )
    imports = [helper.make_opsetid("", 18), helper.make_opsetid("ai.onnx.ml", 1)]
    data = helper.make_model(graph, opset_imports=imports, ir_version=IR_VERSION).SerializeToString()
    x = np.array([2, 0, 1, 2])
    want = start(data).run(None, {"x": x})[0]
    imported = load_onnx(data, shapes={"x": (4,)})
    got = run(imported.program, imported.params, {"x": x[None].astype(float) if imported.program.whole else x})["y"]
    assert imported.outputs[0].dtype == kind
    np.testing.assert_allclose(got[0] if imported.program.whole else got, want, atol=1e-3)


def test_a_converted_pipeline_with_two_versions_of_the_standard_is_read_as_onnxruntime_reads_it():
    x, y = data_of(3)
    data = to_onnx(GaussianNB().fit(x, y), x[:1], target_opset=13, options={"zipmap": False})
    for first in (9, 18):
        twice = onnx.ModelProto.FromString(data.SerializeToString())
        standard = [v for v in twice.opset_import if v.domain == ""]
        twice.opset_import.insert(0, helper.make_opsetid("", first))
        assert standard
        agrees(twice.SerializeToString(), x, atol=2e-3)
