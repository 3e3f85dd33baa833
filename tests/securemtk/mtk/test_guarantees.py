"""T1 to T3: what holds of closed answers whatever the experiment."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocols.errors import KeyRefused
from protocols.primitives.prg import Stream
from securemtk.data.base import DataSet
from securemtk.mtk.evaluation.evaluate import release
from securemtk.mtk.evaluation.guarantees import drawn_advantage, guarantees, mean_kl
from securemtk.mtk.keys.key import draw_keys
from securemtk.mtk.training.model import MultiTaskModel
from securemtk.tasks import Task


def test_a_constant_uniform_answer_has_no_distance_and_tells_nothing():
    p = np.full((60, 3), 1 / 3)
    y = np.arange(60) % 3
    assert mean_kl(p) == pytest.approx(0, abs=1e-12)
    assert drawn_advantage(p, y) == pytest.approx(0, abs=1e-12)


def test_an_answer_that_is_the_label_tells_all_of_it():
    y = np.arange(60) % 3
    assert drawn_advantage(np.eye(3)[y], y) == pytest.approx(2 / 3)


def test_the_distance_is_that_of_kullback_and_leibler():
    p = np.array([[0.5, 0.25, 0.25]])
    assert mean_kl(p) == pytest.approx(-(math.log(1.5) + 2 * math.log(0.75)) / 3)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**32 - 1),
    classes=st.integers(2, 6),
    spread=st.floats(0.0, 3.0),
    told=st.floats(0.0, 1.0),
)
def test_a_drawn_label_never_tells_more_than_pinsker_allows_to_who_knows_no_more(seed, classes, spread, told):
    rng = np.random.default_rng(seed)
    y = rng.integers(0, classes, 400)
    scores = spread * (told * np.eye(classes)[y] + (1 - told) * rng.standard_normal((400, classes)))
    p = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
    assert drawn_advantage(p, y) <= math.sqrt(mean_kl(p) / 2) + 1e-9


def test_what_is_released_by_sampling_follows_the_law_that_the_bound_is_about():
    p = np.array([[0.7, 0.2, 0.1]])
    drawn = release(np.repeat(np.log(p), 20000, axis=0).astype(np.float32), "sampled", Stream()).mean(0)
    np.testing.assert_allclose(drawn, p[0], atol=0.02)


def test_a_model_is_measured_task_by_task_and_keys_must_be_there():
    tasks = (Task("a", 3, secured=True), Task("b", 2))
    model = MultiTaskModel(tasks, (24,)).eval()
    x = np.random.default_rng(0).uniform(-1, 1, (40, 24)).astype(np.float32)
    y = {"a": np.arange(40) % 3, "b": np.arange(40) % 2}
    y["a"][0] = -1
    data = DataSet("rows", (Task("a", 3), Task("b", 2)), x, y, x, y, low=-1.0)
    keys = draw_keys(["a"], (24,), low=-1.0)
    (found,) = guarantees(model, data, keys).values()
    assert found.key_bits == 8 * 12
    assert 0 <= found.advantage <= found.bound + 1e-9
    assert found.bound == pytest.approx(math.sqrt(found.kl / 2))
    with pytest.raises(KeyRefused, match="secured tasks"):
        guarantees(model, data, {})
