"""Trigger-keys: drawn, stamped, and kept in files."""

import copy
import json
import os
import pickle
import stat

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from protocols.errors import InputError, KeyRefused, ShapeError
from protocols.primitives.prg import Stream
from securemtk.mtk.keys import key_file
from securemtk.mtk.keys.key import PLACES, TriggerKey, draw_keys, load, stamp

MODEL = "00112233445566778899aabbccddeeff"
SHAPE = (1, 16, 16)


@pytest.fixture(autouse=True)
def cheap_passphrases(monkeypatch):
    # A second for each passphrase would make the tests slow and show nothing more.
    monkeypatch.setattr(key_file, "_SCRYPT_N", 1 << 4)


@pytest.fixture
def key() -> TriggerKey:
    return draw_keys(["digit"], SHAPE, MODEL)["digit"]


@st.composite
def some_key(draw, shape=None):
    """A key with any mask, connected or not."""
    channels, height, width = shape or draw(st.tuples(st.integers(1, 3), st.integers(1, 6), st.integers(1, 6)))
    places = draw(st.sets(st.integers(0, height * width - 1), min_size=1))
    plane = np.zeros(height * width, dtype=bool)
    plane[list(places)] = True
    mask = np.repeat(plane.reshape(1, height, width), channels, axis=0)
    values = draw(st.lists(st.floats(-4, 4, width=32), min_size=int(mask.sum()), max_size=int(mask.sum())))
    pattern = np.zeros(mask.shape, dtype=np.float32)
    pattern[mask] = values
    return TriggerKey("task", MODEL, mask, pattern)


def same(a: TriggerKey, b: TriggerKey) -> bool:
    return (
        (a.task, a.model_id) == (b.task, b.model_id)
        and np.array_equal(a.mask, b.mask)
        and np.array_equal(a.pattern, b.pattern)
    )


def test_keys_are_drawn_side_by_side_from_the_corner():
    first, second = draw_keys(["digit", "parity"], SHAPE).values()
    assert first.mask[0, 11:, 11:].all()
    assert second.mask[0, 11:, 6:11].all()
    assert first.mask.sum() == second.mask.sum() == 25
    assert first.model_id == second.model_id


@pytest.mark.parametrize("place", PLACES)
def test_the_place_is_an_option(place):
    mask = draw_keys(["digit"], (3, 10, 12), side=4, place=place)["digit"].mask
    rows, columns = np.nonzero(mask[0])
    assert {r // 4 for r in rows} <= ({0} if "top" in place else {1, 2})
    assert rows.max() == (3 if "top" in place else 9)
    assert columns.max() == (3 if "left" in place else 11)
    assert mask.sum() == 3 * 16


@given(n=st.integers(1, 4), sides=st.tuples(st.integers(12, 20), st.integers(12, 20)), place=st.sampled_from(PLACES))
@settings(max_examples=30, deadline=None)
def test_masks_of_one_draw_are_disjoint_and_patterns_are_256_levels_in_range(n, sides, place):
    drawn = draw_keys([f"t{i}" for i in range(n)], (2, *sides), place=place, low=-1.0, high=3.0)
    assert np.sum([key.mask for key in drawn.values()], axis=0).max() == 1
    for key in drawn.values():
        levels = (key.pattern[key.mask].astype(np.float64) + 1) / 4 * 255
        assert np.abs(levels - np.round(levels)).max() < 1e-3
        assert levels.min() > -1e-3
        assert levels.max() < 255.001


def test_patterns_use_their_whole_range():
    values = draw_keys(["a"], (3, 64, 64), side=64)["a"].pattern
    assert np.abs(np.histogram(values, bins=16)[0] / values.size - 1 / 16).max() < 0.01
    assert (values.min(), values.max()) == (0.0, 1.0)


def test_each_draw_gives_another_key_but_one_stream_the_same():
    assert not np.array_equal(*(draw_keys(["a"], SHAPE)["a"].pattern for _ in range(2)))
    a, b = (draw_keys(["a"], SHAPE, stream=Stream(bytes(16)))["a"] for _ in range(2))
    assert same(a, b)


def test_small_images_get_smaller_patches():
    assert draw_keys(["a", "b"], (1, 8, 8))["a"].mask.sum() == 16


@pytest.mark.parametrize(
    ("tasks", "shape", "options", "error"),
    [
        ([], SHAPE, {}, InputError),
        (["a", "a"], SHAPE, {}, InputError),
        (["a"], SHAPE, {"place": "middle"}, InputError),
        (["a"], SHAPE, {"side": 2}, InputError),
        (["a"], SHAPE, {"side": 17}, InputError),
        (["a", "b", "c", "d"], SHAPE, {"side": 5}, InputError),
        (["a"], (16, 16), {}, ShapeError),
        (["a"], SHAPE, {"model_id": "12"}, KeyRefused),
        (["a b"], SHAPE, {}, KeyRefused),
    ],
)
def test_keys_that_cannot_be_drawn_are_refused(tasks, shape, options, error):
    with pytest.raises(error):
        draw_keys(tasks, shape, **options)


def test_repr_shows_no_value(key):
    assert repr(key) == f"TriggerKey(task='digit', model_id='{MODEL}', <hidden>)"
    assert repr(key) == str([key])[1:-1]


@pytest.mark.parametrize("attempt", [pickle.dumps, copy.copy, copy.deepcopy])
def test_a_key_does_not_pickle(key, attempt):
    with pytest.raises(TypeError, match="must not be pickled"):
        attempt(key)


def test_a_key_cannot_be_changed_through_its_arrays(key):
    with pytest.raises(ValueError, match="read-only"):
        key.pattern[0] = 0


def test_masks_and_patterns_that_do_not_fit_are_refused(key):
    mask, pattern = key.mask, key.pattern
    uneven = np.concatenate([mask, ~mask])
    for wrong_mask, wrong_pattern in [
        (mask.astype(np.uint8), pattern),
        (mask[0], pattern[0]),
        (np.zeros_like(mask), np.zeros_like(pattern)),
        (uneven, np.zeros(uneven.shape, np.float32)),
        (mask, pattern.astype(np.float64)),
        (mask, pattern[:, :-1]),
        (mask, pattern + np.float32(1)),
        (mask, np.where(mask, np.float32(np.nan), pattern)),
    ]:
        with pytest.raises(KeyRefused):
            TriggerKey("digit", MODEL, wrong_mask, wrong_pattern)


@given(data=st.data(), n=st.integers(0, 3))
@settings(max_examples=60, deadline=None)
def test_stamping_is_the_masked_overwrite_of_the_paper(data, n):
    shape = data.draw(st.tuples(st.integers(1, 3), st.integers(2, 5), st.integers(2, 5)))
    keys = [data.draw(some_key(shape)) for _ in range(n)]
    free = np.ones(shape, dtype=bool)
    disjoint = []
    for key in keys:
        if (key.mask & free).sum() == key.mask.sum():
            disjoint.append(key)
            free &= ~key.mask
    x = np.random.default_rng(n).random((4, *shape), dtype=np.float32)
    before = x.copy()
    covered = sum((key.mask for key in disjoint), np.zeros(shape, dtype=int))
    expected = (1 - covered) * x + sum((key.mask * key.pattern for key in disjoint), np.zeros(shape))
    stamped = stamp(x, disjoint)
    assert np.array_equal(stamped, expected.astype(np.float32))
    assert stamped.dtype == np.float32
    assert np.array_equal(x, before)
    assert torch.equal(stamp(torch.from_numpy(x), disjoint), torch.from_numpy(stamped))


def test_stamping_refuses_masks_that_overlap(key):
    with pytest.raises(KeyRefused, match="disjoint"):
        stamp(np.zeros((1, *SHAPE), np.float32), [key, draw_keys(["parity"], SHAPE)["parity"]])


def test_stamping_refuses_samples_of_another_shape(key):
    with pytest.raises(ShapeError, match=r"\(1, 16, 15\)"):
        stamp(np.zeros((1, 1, 16, 15), np.float32), [key])


@given(key=some_key(), passphrase=st.none() | st.text(st.characters(codec="utf-8"), min_size=1, max_size=20))
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_saved_key_comes_back(tmp_path, key, passphrase):
    key.save(tmp_path / "a.key", passphrase)
    assert same(load(tmp_path / "a.key", passphrase), key)


@pytest.mark.parametrize("passphrase", [None, "correct horse"])
def test_a_key_file_is_private_from_its_first_byte(tmp_path, key, passphrase, monkeypatch):
    modes = []
    replace = os.replace

    def spy(source, target):
        modes.append(stat.S_IMODE(os.stat(source).st_mode))
        replace(source, target)

    monkeypatch.setattr(os, "replace", spy)
    before = os.umask(0)
    try:
        key.save(tmp_path / "a.key", passphrase)
    finally:
        os.umask(before)
    assert modes == [0o600]
    assert stat.S_IMODE((tmp_path / "a.key").stat().st_mode) == 0o600


def test_a_save_that_fails_leaves_the_old_key_and_nothing_else(tmp_path, key, monkeypatch):
    key.save(tmp_path / "a.key")
    before = (tmp_path / "a.key").read_bytes()

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        draw_keys(["digit"], SHAPE)["digit"].save(tmp_path / "a.key")
    assert (tmp_path / "a.key").read_bytes() == before
    assert os.listdir(tmp_path) == ["a.key"]


def test_a_locked_file_shows_neither_mask_nor_pattern_and_never_looks_the_same(tmp_path, key):
    key.save(tmp_path / "plain.key")
    plain = json.loads((tmp_path / "plain.key").read_text())
    texts = []
    for _ in range(2):
        key.save(tmp_path / "locked.key", "correct horse")
        texts.append((tmp_path / "locked.key").read_text())
    assert texts[0] != texts[1]
    for secret in ("mask", "pattern"):
        assert plain[secret] not in texts[0]
        assert secret not in json.loads(texts[0])


def test_a_wrong_passphrase_is_refused(tmp_path, key):
    key.save(tmp_path / "a.key", "correct horse")
    with pytest.raises(KeyRefused, match="passphrase is wrong"):
        load(tmp_path / "a.key", "battery staple")


def test_a_missing_passphrase_is_refused(tmp_path, key):
    key.save(tmp_path / "a.key", "correct horse")
    with pytest.raises(KeyRefused, match="must be opened with its passphrase; got none"):
        load(tmp_path / "a.key")


def test_an_empty_passphrase_locks_nothing(tmp_path, key):
    with pytest.raises(InputError, match="not be empty"):
        key.save(tmp_path / "a.key", "")
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o601])
def test_a_key_that_others_may_touch_is_refused_and_the_remedy_named(tmp_path, key, mode):
    key.save(tmp_path / "a.key")
    (tmp_path / "a.key").chmod(mode)
    with pytest.raises(KeyRefused, match=rf"mode {mode:04o}: run chmod 600 .*a\.key"):
        load(tmp_path / "a.key")


def test_a_file_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(KeyRefused, match="No such file"):
        load(tmp_path / "a.key")


@pytest.mark.parametrize("passphrase", [None, "correct horse"])
@pytest.mark.parametrize(
    ("field", "value"), [("task", "parity"), ("model_id", "ff" * 16), ("shape", [1, 8, 32]), ("version", 2)]
)
def test_an_edited_header_is_refused(tmp_path, key, passphrase, field, value):
    key.save(tmp_path / "a.key", passphrase)
    body = json.loads((tmp_path / "a.key").read_text())
    (tmp_path / "a.key").write_text(json.dumps(body | {field: value}))
    with pytest.raises(KeyRefused):
        load(tmp_path / "a.key", passphrase)


@given(data=st.data(), passphrase=st.sampled_from([None, "correct horse"]))
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_damaged_file_is_refused_or_is_the_same_key(tmp_path, key, data, passphrase):
    path = tmp_path / "a.key"
    key.save(path, passphrase)
    content = bytearray(path.read_bytes())
    if data.draw(st.booleans(), label="cut"):
        del content[data.draw(st.integers(0, len(content) - 1)) :]
    else:
        content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content)
    try:
        found = load(path, passphrase)
    except KeyRefused:
        return
    assert same(found, key)


@pytest.mark.parametrize("content", ["", "[]", "null", "{}", '{"format": "other"}', "[" * 100_000, "\xff"])
def test_a_file_that_is_no_key_is_refused(tmp_path, content):
    (tmp_path / "a.key").write_bytes(content.encode("latin-1"))
    (tmp_path / "a.key").chmod(0o600)
    with pytest.raises(KeyRefused):
        load(tmp_path / "a.key")


@pytest.mark.parametrize(
    "changes", [{"n": 1 << 40}, {"n": 3}, {"n": 0}, {"r": 1 << 20}, {"p": 1 << 20}, {"name": "md5"}]
)
def test_a_file_cannot_make_its_reader_work_or_allocate_without_bound(tmp_path, key, changes):
    key.save(tmp_path / "a.key", "correct horse")
    body = json.loads((tmp_path / "a.key").read_text())
    body["kdf"] |= changes
    (tmp_path / "a.key").write_text(json.dumps(body))
    with pytest.raises(KeyRefused, match="other parameters"):
        load(tmp_path / "a.key", "correct horse")


def test_the_default_cost_of_a_passphrase_is_128_mib(monkeypatch, tmp_path, key):
    monkeypatch.undo()
    key.save(tmp_path / "a.key", "correct horse")
    kdf = json.loads((tmp_path / "a.key").read_text())["kdf"]
    assert 128 * kdf["n"] * kdf["r"] == 128 << 20
    assert same(load(tmp_path / "a.key", "correct horse"), key)
