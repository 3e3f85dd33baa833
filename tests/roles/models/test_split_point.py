"""Keys at a split point: maps of a local part as a data set, keyed, trained, exported and asked under encryption."""

from contextlib import closing
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from examples import split_user
from protocols.errors import InputError, RangeError, ShapeError
from protocols.limits import input_limit
from securemtk.data import load
from securemtk.mtk.training.train import TrainConfig
from securemtk.privynet.split_point import SplitPoint
from securemtk.serving.session import Session


@pytest.fixture(scope="module")
def digits():
    """A few digits; the last test sample is ten times brighter than any of training."""
    whole = load("digits")
    x_test = whole.x_test[:40].copy()
    x_test[-1] *= 10
    return replace(
        whole,
        x_train=whole.x_train[:300],
        y_train={name: y[:300] for name, y in whole.y_train.items()},
        x_test=x_test,
        y_test={name: y[:40] for name, y in whole.y_test.items()},
        high=10.0,
        left_out=("one.png",),
    )


def convolution(channels=6):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, channels, 3, stride=2, padding=1), nn.BatchNorm2d(channels), nn.ReLU())


def test_maps_are_those_of_the_local_part_in_evaluation_mode_with_room_below(digits):
    local = convolution()
    split = SplitPoint.fit(local, digits, room=5)
    maps = split.dataset(digits)
    with torch.no_grad():
        expected = local.eval()(torch.from_numpy(digits.x_train)).numpy()
    assert maps.shape == (6, 13, 8)
    assert maps.x_train.dtype == np.float32
    np.testing.assert_allclose(maps.x_train[:, :, :8], expected, atol=1e-6)
    assert not maps.x_train[:, :, 8:].any()
    assert (maps.low, maps.high) == (split.low, split.high) == (maps.x_train.min(), maps.x_train.max())


def test_samples_beyond_the_range_of_training_are_clipped_to_it(digits):
    local = convolution()
    split = SplitPoint.fit(local, digits, room=0)
    maps = split.dataset(digits)
    with torch.no_grad():
        raw = local.eval()(torch.from_numpy(digits.x_test)).numpy()
    assert raw[-1].max() > split.high
    np.testing.assert_array_equal(maps.x_test, raw.clip(None, np.float32(split.high)))
    np.testing.assert_allclose(split.maps(digits.x_test[-1:]), maps.x_test[-1:], atol=1e-6)


def test_names_labels_and_tasks_are_those_of_the_original(digits):
    maps = SplitPoint.fit(convolution(), digits, room=0).dataset(digits)
    assert maps.name == "digits at a split"
    assert (maps.tasks, maps.class_names, maps.left_out) == (digits.tasks, digits.class_names, digits.left_out)
    for part in ("y_train", "y_test"):
        assert all(np.array_equal(y, getattr(digits, part)[name]) for name, y in getattr(maps, part).items())
    assert maps.columns is None


def test_the_local_part_stays_as_it_was_whatever_happens(digits):
    local = convolution().train()
    local[1].eval()
    before = {name: value.clone() for name, value in local.state_dict().items()}
    SplitPoint.fit(local, digits, room=0).maps(digits.x_test)
    with pytest.raises(ShapeError):
        SplitPoint.fit(local, load("wine"), room=0)
    assert [part.training for part in local.modules()] == [True, True, False, True]
    assert all(torch.equal(value, before[name]) for name, value in local.state_dict().items())
    assert all(parameter.grad is None for parameter in local.parameters())


def test_samples_stay_as_they_were_where_a_layer_writes_over_its_input():
    x = np.full((3, 2, 8, 8), -1, dtype=np.float32)
    x.setflags(write=False)
    assert not SplitPoint(nn.ReLU(inplace=True), 0.0, 1.0).maps(x).any()
    assert (x == -1).all()


def test_maps_are_computed_batch_by_batch():
    sizes = []
    local = nn.Identity()
    local.register_forward_hook(lambda _module, inputs, _output: sizes.append(len(inputs[0])))
    x = np.random.default_rng(0).random((600, 3), dtype=np.float32)
    assert np.array_equal(SplitPoint(local, 0.0, 1.0).maps(x), x)
    assert sizes == [256, 256, 88]


def test_rows_of_features_cross_too_with_columns_for_keys():
    torch.manual_seed(0)
    wine = load("wine")
    split = SplitPoint.fit(nn.Sequential(nn.Linear(11, 6), nn.Tanh()).double().float(), wine, room=8)
    maps = split.dataset(wine)
    assert maps.shape == (14,)
    assert maps.columns is None
    assert not maps.x_train[:, 6:].any()


@pytest.mark.parametrize(
    ("local", "error", "message"),
    [
        (nn.Conv2d(3, 4, 3), ShapeError, r"take samples of shape \(1, 16, 16\)"),
        (nn.BatchNorm1d(4), ShapeError, r"take samples of shape \(1, 16, 16\)"),
        (nn.Flatten(2), ShapeError, r"give floats \(n, C, H, W\) or \(n, F\).*\(256, 1, 256\)"),
        (nn.Flatten(0), ShapeError, "give floats"),
        (nn.LSTM(16, 2), ShapeError, "take samples|give floats"),
        (nn.Threshold(2.0, float("nan")), RangeError, "finite values of float32; got NaN"),
        (nn.Threshold(2.0, 1.0), RangeError, r"must lie in \[-.*and differ; got 1\.0 and 1\.0"),
        (nn.Threshold(0.5, 2 * input_limit()), RangeError, r"must lie in"),
    ],
)
def test_what_cannot_cross_is_refused(local, error, message, digits):
    with pytest.raises(error, match=message):
        SplitPoint.fit(local, digits, room=0)


def test_a_split_point_without_range_or_with_negative_room_is_refused():
    for low, high in ((0.0, 0.0), (1.0, 0.0), (float("nan"), 1.0), (0.0, float("inf"))):
        with pytest.raises(RangeError, match="least and greatest"):
            SplitPoint(nn.Identity(), low, high)
    with pytest.raises(ShapeError, match="one or more"):
        SplitPoint(nn.Identity(), 0.0, 1.0).maps(np.zeros((0, 1, 8, 8), dtype=np.float32))
    with pytest.raises(InputError, match="room"):
        SplitPoint(nn.Identity(), 0.0, 1.0, room=-1)


def test_a_keyed_model_of_maps_is_asked_under_encryption_with_the_authoritys_keys(tmp_path, digits):
    config = TrainConfig(epochs=3, batch=60)
    split = SplitPoint.fit(convolution(), digits, room=split_user.ROOM)
    trained = split_user.keyed_on_maps(digits, split, config)
    bundle, keys = split_user.handed_out(trained, tmp_path)
    x = digits.x_test[:8]
    with closing(Session(key_files=keys)) as session:
        loaded = session.load(bundle)
        for granted in ((), ("digit",), ("digit", "parity")):
            scores, again = (split_user.ask(loaded, split, x, granted) for _ in range(2))
            plain = split_user.expected(trained, split, x, granted)
            assert set(plain) == {"large", *granted}
            for name in scores:
                if name in plain:
                    np.testing.assert_allclose(scores[name], plain[name], atol=0.02)
                else:
                    # Noise, drawn anew each time: more than the units in the last place in which one answer differs.
                    # How much more hangs on the scores that it is drawn like, of a network of three epochs.
                    assert np.abs(scores[name] - again[name]).max() > 10 * 2.0**-16
