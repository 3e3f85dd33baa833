"""Data sets: what they hold, what they refuse, and the law behind the drawn ones."""

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes

from protocols.errors import InputError, RangeError, ShapeError
from securemtk.data import Columns, DataSet, Law, correlated_law, load
from securemtk.data.shapes import COLOURS, SIDE, draw
from securemtk.mtk.evaluation.evaluate import chance
from securemtk.tasks import Task

TASKS = (Task("a", 3), Task("b", 2))


def small(**changes) -> DataSet:
    rng = np.random.default_rng(0)
    fields = {
        "name": "small",
        "tasks": TASKS,
        "x_train": rng.random((6, 1, 4, 4), dtype=np.float32),
        "y_train": {"a": np.array([0, 1, 2] * 2), "b": np.array([0, 1] * 3)},
        "x_test": rng.random((3, 1, 4, 4), dtype=np.float32),
        "y_test": {"a": np.array([0, 1, 2]), "b": np.array([0, 1, 1])},
    }
    return DataSet(**fields | changes)


@pytest.fixture(scope="module")
def digits() -> DataSet:
    return load("digits")


@pytest.fixture(scope="module")
def shapes() -> DataSet:
    return load("shapes", n_train=600, n_test=100)


def test_an_unknown_data_set_is_refused_with_those_known():
    with pytest.raises(InputError, match=r"digits, shapes, .*; got 'faces'"):
        load("faces")


def test_digits_are_split_into_1437_and_360_and_scaled(digits):
    assert digits.x_train.shape == (1437, 1, 16, 16)
    assert digits.x_test.shape == (360, 1, 16, 16)
    assert (digits.x_train.min(), digits.x_train.max()) == (0.0, 1.0)


def test_the_split_of_digits_is_stratified_and_always_the_same(digits):
    shares = [np.bincount(y["digit"]) / len(y["digit"]) for y in (digits.y_train, digits.y_test)]
    assert np.abs(shares[0] - shares[1]).max() < 0.004
    assert np.array_equal(load("digits").x_test, digits.x_test)


def test_parity_and_large_follow_from_the_digit(digits):
    for labels in (digits.y_train, digits.y_test):
        assert np.array_equal(labels["parity"], labels["digit"] % 2)
        assert np.array_equal(labels["large"], labels["digit"] >= 5)


def test_the_five_lowest_rows_of_digits_are_free_for_keys(digits):
    assert not digits.x_train[:, :, 11:].any()
    assert digits.x_train[:, :, 10].any()


def test_digits_can_fill_the_whole_canvas():
    assert load("digits", side=16).x_train[:, :, 15].any()


@pytest.mark.parametrize("side", [7, 17])
def test_a_side_that_does_not_fit_is_refused(side):
    with pytest.raises(InputError, match=f"8..16; got {side}"):
        load("digits", side=side)


def test_a_task_is_found_by_name_or_those_known_are_listed():
    assert small().task("b") == Task("b", 2)
    with pytest.raises(InputError, match=r"\['a', 'b'\]; got 'c'"):
        small().task("c")


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"x_train": np.zeros((6, 1, 4, 4))}, ShapeError, "float32"),
        ({"x_train": np.zeros((6, 4, 4), np.float32)}, ShapeError, "n, C, H, W"),
        ({"x_train": np.zeros((0, 1, 4, 4), np.float32)}, ShapeError, "none of them 0"),
        ({"x_test": np.zeros((3, 1, 5, 4), np.float32)}, ShapeError, "x_test"),
        ({"x_test": np.full((3, 1, 4, 4), 1.5, np.float32)}, RangeError, "x_test"),
        ({"x_test": np.full((3, 1, 4, 4), np.nan, np.float32)}, RangeError, "not finite"),
        ({"y_test": {"a": np.array([0, 1, 2])}}, InputError, "y_test"),
        (
            {"y_test": {"a": np.array([0, 1, 3]), "b": np.array([0, 1, 1])}},
            RangeError,
            r"0..2, or be -1 where missing; got 0..3",
        ),
        ({"y_test": {"a": np.array([0, -2, 2]), "b": np.array([0, 1, 1])}}, RangeError, r"got -2..2"),
        ({"y_test": {"a": np.array([0, 1, 2]), "b": np.full(3, -1)}}, InputError, "one sample at least; got none"),
        ({"x_train": np.zeros((6, 4), np.float32)}, ShapeError, r"x_test must have samples of shape \(4,\)"),
        ({"columns": Columns.fit(["f"], np.zeros((2, 1)))}, InputError, "columns must be those of samples"),
        ({"y_test": {"a": np.array([0, 1]), "b": np.array([0, 1, 1])}}, ShapeError, r"\(3,\)"),
        ({"y_test": {"a": np.array([0.0, 1, 2]), "b": np.array([0, 1, 1])}}, ShapeError, "int64"),
        ({"tasks": ()}, InputError, "unique names"),
        ({"tasks": (*TASKS, Task("a", 3))}, InputError, "unique names"),
        ({"tasks": (replace(TASKS[0], secured=True), TASKS[1])}, InputError, "not be secured"),
        ({"low": 1.0}, RangeError, "low"),
    ],
)
def test_a_data_set_with_a_fault_is_refused(changes, error, says):
    with pytest.raises(error, match=says):
        small(**changes)


def test_samples_may_be_rows_of_a_table():
    rows = small(x_train=np.zeros((6, 5), np.float32), x_test=np.ones((3, 5), np.float32))
    assert rows.shape == (5,)


def test_missing_labels_are_known_as_such_and_have_no_share():
    labels = {"a": np.array([0, -1, 2, 2, -1, 2]), "b": np.array([0, 1] * 3)}
    some = small(y_train=labels, tasks=(replace(TASKS[0], labels=("x", "y", "z")), TASKS[1]))
    assert some.class_names == {"a": ("x", "y", "z")}
    assert some.known("a").tolist() == [True, False, True, True, False, True]
    assert some.known("a", "test").all()
    assert some.shares("a").tolist() == [0.25, 0.0, 0.75]
    assert some.shares("b").tolist() == [0.5, 0.5]
    with pytest.raises(InputError, match="train or test; got 'valid'"):
        some.known("a", "valid")


def test_columns_put_three_deviations_at_the_ends_and_cut_what_lies_beyond():
    rows = np.array([[1.0, 7.0], [3.0, 7.0]])
    columns = Columns.fit(["f", "constant"], rows, low=0.0, high=1.0)
    found = columns.scaled(np.array([[2.0, 7.0], [5.0, 7.0], [-1.0, 7.0], [100.0, 10.0]]))
    assert found.dtype == np.float32
    assert np.allclose(found, [[0.5, 0.5], [1, 0.5], [0, 0.5], [1, 1]])
    with pytest.raises(ShapeError, match=r"\(n, 2\); got \(1, 3\)"):
        columns.scaled(np.zeros((1, 3)))


@pytest.mark.parametrize(
    ("mean", "std", "error"),
    [((1,), (2,), ShapeError), ((2,), (1,), ShapeError)],
)
def test_columns_need_a_mean_and_a_deviation_each(mean, std, error):
    with pytest.raises(error, match=r"\(2,\)"):
        Columns(("f", "g"), np.zeros(mean), np.ones(std))


@pytest.mark.parametrize("std", [0.0, -1.0, np.nan])
def test_columns_need_positive_deviations(std):
    with pytest.raises(RangeError, match="std positive"):
        Columns(("f",), np.zeros(1), np.array([std]))


@st.composite
def tables(draw):
    shape = draw(array_shapes(min_dims=1, max_dims=3, min_side=2, max_side=4))
    size = int(np.prod(shape))
    weights = draw(st.lists(st.integers(0, 20), min_size=size, max_size=size).filter(any))
    return np.array(weights, dtype=float).reshape(shape) / sum(weights)


laws = tables()


@given(table=laws, seed=st.integers(0, 1000))
@settings(max_examples=50, deadline=None)
def test_labels_follow_their_law_and_impossible_ones_never_occur(table, seed):
    law = Law(tuple("abc"[: table.ndim]), table)
    n = 20_000
    found = np.zeros_like(table)
    np.add.at(found, tuple(law.sample(n, seed).values()), 1 / n)
    # Six standard deviations of the most uncertain cell.
    assert np.abs(found - table).max() < 6 * 0.5 / np.sqrt(n)
    assert not found[table == 0].any()


@given(table=laws)
@settings(max_examples=50, deadline=None)
def test_the_best_guess_is_that_of_counting_all_cases(table):
    names = tuple("abc"[: table.ndim])
    law = Law(names, table)
    known = names[1:]
    expected = sum(table[(slice(None), *cell)].max() for cell in product(*map(range, table.shape[1:])))
    assert law.best_guess("a", known) == pytest.approx(expected)
    assert law.best_guess("a") == pytest.approx(table.reshape(len(table), -1).sum(axis=1).max())
    assert law.best_guess("a", known) >= law.best_guess("a") - 1e-12


def test_an_independent_law_tells_nothing():
    law = Law.independent()
    assert law.best_guess("shape", ["colour", "size", "texture"]) == pytest.approx(0.25)


@pytest.mark.parametrize(
    ("names", "table", "error"),
    [
        (("a",), np.array([0.5, 0.6]), RangeError),
        (("a",), np.array([1.5, -0.5]), RangeError),
        (("a",), np.array([np.nan, 1]), RangeError),
        (("a", "b"), np.array([0.5, 0.5]), ShapeError),
        (("a", "a"), np.full((2, 2), 0.25), InputError),
    ],
)
def test_a_table_that_is_no_law_is_refused(names, table, error):
    with pytest.raises(error):
        Law(names, table)


def test_a_law_refuses_unknown_attributes_and_the_target_as_given():
    law = Law.independent()
    with pytest.raises(InputError, match="weight"):
        law.best_guess("weight")
    with pytest.raises(InputError, match="not be given"):
        law.best_guess("shape", ["shape"])


def test_shapes_follow_a_law_that_the_caller_sets():
    table = np.zeros((4, 4, 2, 2))
    for i in range(4):
        table[i, i] = 1 / 16
    found = load("shapes", law=table, n_train=50, n_test=5)
    assert np.array_equal(found.y_train["shape"], found.y_train["colour"])
    assert len(np.unique(found.y_train["texture"])) == 2


@pytest.mark.parametrize("q", [0.5, 0.7, 0.85, 1.0])
def test_under_the_correlated_law_each_attribute_is_uniform_and_the_shape_tells_the_others_to_the_strength(q):
    law = correlated_law(q)
    for i, n_classes in enumerate(law.table.shape):
        assert np.allclose(law.table.sum(axis=tuple({0, 1, 2, 3} - {i})), 1 / n_classes)
    assert all(law.best_guess(name, ["shape"]) == pytest.approx(q) for name in ("colour", "size", "texture"))
    # Both agree with the half of the shape, or neither does.
    assert law.best_guess("size", ["texture"]) == pytest.approx(q**2 + (1 - q) ** 2)
    # The colour's own half is right with it, or with one of three others.
    assert law.best_guess("size", ["colour"]) == pytest.approx(q * (q + (1 - q) / 3) + (1 - q) * (1 - q) * 2 / 3)


def test_optima_hold_every_set_of_other_attributes_and_never_fall_with_more_of_them():
    optima = correlated_law().optima("size")
    assert len(optima) == 8
    assert optima[()] == 0.5
    assert all(optima[a] <= optima[b] + 1e-12 for a in optima for b in optima if set(a) <= set(b))
    assert max(optima.values()) == pytest.approx(0.85)


@pytest.mark.parametrize("strength", [0.4, 1.1, float("nan")])
def test_a_strength_that_cannot_be_is_refused(strength):
    with pytest.raises(RangeError, match="strength"):
        load("shapes-correlated", strength=strength)


def test_correlated_shapes_are_drawn_by_that_law():
    found = load("shapes-correlated", n_train=2000, n_test=5, strength=0.9)
    shape, y = found.y_train["shape"], found.y_train
    for agree in (y["colour"] == shape, y["size"] == shape // 2, y["texture"] == shape // 2):
        assert agree.mean() == pytest.approx(0.9, abs=0.035)
    assert found.class_names["size"] == ("small", "large")


@pytest.mark.parametrize(
    ("name", "parts", "features", "tasks"),
    [
        ("wine", (133, 45), 11, {"cultivar": 3, "proline": 2, "colour": 2}),
        ("breast_cancer", (426, 143), 21, {"benign": 2, "size": 2, "concave": 2}),
    ],
)
def test_an_embedded_table_is_split_by_seed_and_scaled_by_its_training_part(name, parts, features, tasks):
    found, again, other = (load(name, seed=seed) for seed in (0, 0, 1))
    assert (len(found.x_train), len(found.x_test)) == parts
    assert found.shape == (features,)
    assert {task.name: task.classes for task in found.tasks} == tasks
    assert np.array_equal(found.x_test, again.x_test)
    assert not np.array_equal(found.x_test, other.x_test)
    # Three deviations are 1, and few values lie beyond.
    assert np.abs(found.x_train.mean(axis=0)).max() < 0.04
    assert np.abs(found.x_train.std(axis=0) - 1 / 3).max() < 0.1
    assert found.class_names[found.tasks[1].name] == ("low", "high")


@pytest.mark.parametrize(("name", "held_out"), [("wine", "proline"), ("breast_cancer", "radius")])
def test_the_features_that_tasks_are_made_of_are_no_inputs(name, held_out):
    found = load(name)
    assert not [feature for feature in found.columns.names if held_out in feature and "error" not in feature]
    for task in found.tasks[1:]:
        single = [
            max(
                np.mean((x > np.median(x)) == found.y_train[task.name]),
                np.mean((x <= np.median(x)) == found.y_train[task.name]),
            )
            for x in found.x_train.T
        ]
        assert max(single) < 0.9
        assert chance(found, task.name, [found.tasks[0].name]) > chance(found, task.name, []) + 0.2


def test_options_that_a_data_set_does_not_have_are_refused_with_those_it_has():
    with pytest.raises(InputError, match=r"options of digits must be among side; got \['edge'\]"):
        load("digits", edge=3)
    with pytest.raises(InputError, match="seed must be a whole number of at least 0; got 'x'"):
        load("wine", seed="x")


def test_shapes_refuse_a_law_of_other_attributes():
    with pytest.raises(InputError, match="the law must be one of"):
        load("shapes", law=np.full((2, 2, 2, 2), 1 / 16))
    with pytest.raises(InputError, match="n_train"):
        load("shapes", n_train=0)


def test_shapes_are_the_same_for_the_same_seed_alone(shapes):
    again, other = (load("shapes", n_train=600, n_test=100, seed=seed) for seed in (0, 1))
    assert np.array_equal(again.x_train, shapes.x_train)
    assert not np.array_equal(other.x_train, shapes.x_train)


def test_shapes_are_colour_images_in_range_and_free_of_figures_in_the_five_lowest_rows(shapes):
    assert shapes.x_train.shape == (600, 3, SIDE, SIDE)
    # The ground is grey: its channels differ by noise alone, those of a figure by much more.
    spread = shapes.x_train.max(axis=1) - shapes.x_train.min(axis=1)
    assert spread[:, -5:].max() < 0.11
    assert (spread[:, :-5].reshape(600, -1).max(axis=1) > 0.3).all()


def test_each_attribute_can_be_seen_in_the_image(shapes):
    x, y = shapes.x_train, shapes.y_train
    figure = (x.max(axis=1) - x.min(axis=1)) > 0.25
    area = figure.sum(axis=(1, 2))
    mean = (x * figure[:, None]).sum(axis=(2, 3)) / area[:, None]
    strongest = {name: mean[y["colour"] == i].mean(axis=0).argmax() for i, name in enumerate(COLOURS)}
    assert (strongest["red"], strongest["green"], strongest["blue"]) == (0, 1, 2)
    assert area[y["size"] == 1].mean() > 2 * area[y["size"] == 0].mean()
    bright = np.array([np.std(image.max(axis=0)[where]) for image, where in zip(x, figure, strict=True)])
    assert bright[y["texture"] == 1].mean() > 1.4 * bright[y["texture"] == 0].mean()
    areas = [area[(y["shape"] == i) & (y["texture"] == 0) & (y["size"] == 1)].mean() for i in range(4)]
    assert areas[0] > areas[1] > areas[3] > areas[2]


def test_drawing_many_images_in_parts_gives_as_many(monkeypatch):
    monkeypatch.setattr("securemtk.data.shapes._CHUNK", 7)
    labels = Law.independent().sample(20, 0)
    assert draw(labels, 0).min(axis=(1, 2, 3)).shape == (20,)


def test_every_data_set_is_listed_under_its_own_name():
    for name in ("digits", "wine", "breast_cancer"):
        assert load(name).name == name
    for name in ("shapes", "shapes-correlated"):
        assert load(name, n_train=1, n_test=1).name == name
