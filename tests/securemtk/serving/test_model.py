"""What a loaded model returns of the scores that its session brings: scores, labels with their names, probabilities."""

from types import SimpleNamespace

import numpy as np
import pytest
import small_models
from scipy.special import softmax

from protocols.errors import InputError
from securemtk.onnx.bundle import read_bundle
from securemtk.onnx.importer import load_onnx
from securemtk.serving.model import LoadedModel, Model, ModelSource
from securemtk.tasks import Task

SCORES = np.array([[0.5, -1.0, 3.0], [2.0, 2.0, -70.0]], dtype=np.float32)


class Bringer:
    """A session that has these scores for every task, and notes what it was asked for."""

    protocol, comparison_bits = "fss", 32

    def __init__(self, names):
        self.names, self.asked = names, []

    def require_here(self):
        pass

    def predict(self, model, inputs, open_tasks):
        self.asked.append(open_tasks)
        return dict.fromkeys(self.names, SCORES)


@pytest.fixture
def made(tmp_path):
    """A function that makes a model of three classes a task, some of them with names."""
    small_models.make_bundle(tmp_path)
    manifest, data = read_bundle(tmp_path / "bundle")
    imported = load_onnx(data)

    def make(*tasks: Task) -> tuple[Model, Bringer]:
        said = SimpleNamespace(tasks=tasks, low=manifest.low, high=manifest.high, headroom={}) if tasks else None
        bringer = Bringer([task.name for task in tasks])
        loaded = LoadedModel(0, imported.program, said, imported.inputs, imported.outputs)
        return Model(bringer, loaded, ModelSource(b"")), bringer

    return make


X = np.zeros((2, *small_models.SHAPE), dtype=np.float32)


def test_labels_are_names_where_classes_have_some_and_numbers_else(made):
    model, bringer = made(Task("kind", 3, secured=True, labels=("cat", "dog", "fox")), Task("size", 3))
    labels = model.labels(X, open_tasks=["kind"])
    assert labels["kind"].tolist() == ["fox", "cat"]
    assert (labels["size"].tolist(), labels["size"].dtype) == ([2, 0], np.int64)
    numbers = model.labels(X, numbers=True)
    assert (numbers["kind"].tolist(), numbers["kind"].dtype) == ([2, 0], np.int64)
    assert bringer.asked == [("kind",), ()]


def test_probabilities_are_the_softmax_of_scores_also_where_they_are_far_apart(made):
    model, _ = made(Task("kind", 3))
    got = model.probabilities(X)["kind"]
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, softmax(SCORES.astype(np.float64), axis=1), rtol=1e-6)


@pytest.mark.parametrize("method", ["labels", "probabilities"])
def test_a_file_without_tasks_says_of_no_output_that_it_is_scores_of_classes(made, method):
    model, bringer = made()
    with pytest.raises(InputError, match="must have tasks"):
        getattr(model, method)(X)
    assert bringer.asked == []


@pytest.mark.parametrize("wrong", ["kind", ["colour"], ["size"]])
def test_only_secured_tasks_of_the_model_are_opened(made, wrong):
    model, bringer = made(Task("kind", 3, secured=True), Task("size", 3))
    for ask in (model.predict, model.labels, model.probabilities):
        with pytest.raises(InputError, match=r"open_tasks must be|takes no key"):
            ask(X, open_tasks=wrong)
    assert bringer.asked == []
