"""Operators of ai.onnx.ml against onnxruntime, and models of scikit-learn, through skl2onnx, against scikit-learn."""

from collections.abc import Sequence

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx_models import IR_VERSION, floats, ops
from program_oracle import run
from skl2onnx import to_onnx
from sklearn.base import BaseEstimator
from sklearn.linear_model import LinearRegression, LogisticRegression, Ridge
from sklearn.neural_network import MLPClassifier, MLPRegressor
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import MinMaxScaler, Normalizer, StandardScaler
from sklearn.svm import LinearSVC, LinearSVR

from examples import sklearn_user
from protocols.errors import UnsupportedError
from securemtk.onnx.check import check
from securemtk.onnx.fix import fix
from securemtk.onnx.importer import load_onnx
from securemtk.onnx.runtime import start

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
        ("LinearRegressor", {"coefficients": WEIGHTS[:4]}),
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


def test_a_normalizer_by_the_maximum_divides_by_the_largest_magnitude():
    imported = load_onnx(classical("Normalizer", ["y"], norm="MAX"))
    x = np.array([[1.0, 2.0, 4.0, 0.5], [3.0, 1.0, 1.5, 0.0]], dtype=np.float32)
    want = x / np.abs(x).max(1, keepdims=True)
    np.testing.assert_allclose(run(imported.program, imported.params, {"x": x})["y"], want, atol=1e-3)


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


def test_the_rewritten_file_of_a_classifier_needs_no_operator_but_those_of_the_standard():
    x, y = data_of(3)
    fixed = fix(to_onnx(LogisticRegression(max_iter=1000).fit(x, y), x[:1]).SerializeToString())
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
