"""Data sets from files: CelebA, UTKFace, folders of images and tables, in small copies that the tests make."""

import io
import json
import logging
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from protocols.errors import InputError, RangeError
from securemtk.data import MISSING, load
from securemtk.data import images as images_module
from securemtk.data.images import CACHE, ImageOptions, read_images
from securemtk.data.splits import Split, named_split, random_split
from securemtk.mtk.training.assembler import AssemblerConfig
from securemtk.mtk.training.train import TrainConfig
from securemtk.runs import run_folder
from securemtk.support import progress

ATTRIBUTES = ("Bald", "Male", "Smiling")


def picture(path: Path, colour: tuple[int, int, int], size: tuple[int, int] = (12, 16), **options) -> None:
    Image.new("RGB", size, colour).save(path, **options)


@pytest.fixture
def celeba(tmp_path: Path) -> Path:
    """Twelve images as CelebA has them: eight for training, two for validation, two for tests."""
    folder = tmp_path / "celeba"
    (folder / "img_align_celeba").mkdir(parents=True)
    lines, parts = [], []
    for i in range(12):
        name = f"{i + 1:06d}.jpg"
        picture(folder / "img_align_celeba" / name, (20 * i, 0, 255 - 20 * i))
        lines.append(f"{name} {-1 if i % 3 else ' 1'} {1 if i % 2 else -1}  {1 if i < 6 else -1}\n")
        parts.append(f"{name} {0 if i < 8 else 1 if i < 10 else 2}\n")
    (folder / "list_attr_celeba.txt").write_text("12\n" + " ".join(ATTRIBUTES) + " \n" + "".join(lines))
    (folder / "list_eval_partition.txt").write_text("".join(parts))
    return folder


@pytest.fixture
def utkface(tmp_path: Path) -> Path:
    folder = tmp_path / "UTKFace"
    folder.mkdir()
    for i in range(10):
        picture(folder / f"{10 * i}_{i % 2}_{i % 5}_2017010917{i:07d}.jpg.chip.jpg", (25 * i, 9, 9))
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Ten images, their labels in labels.csv: one column of numbers, one of text with two labels missing."""
    where = tmp_path / "pictures"
    where.mkdir()
    lines = ["file,count,kind,part\n"]
    for i in range(10):
        picture(where / f"{i}.png", (25 * i, 100, 0))
        kind = "" if i in (2, 9) else ("cat", "dog")[i % 2]
        lines.append(f"{i}.png,{(1, 5, 10)[i % 3]},{kind},{'train' if i < 6 else 'test'}\n")
    (where / "labels.csv").write_text("".join(lines))
    return where


@pytest.fixture
def table(tmp_path: Path) -> Path:
    path = tmp_path / "rows.csv"
    rows = [f"{i},{10 - i},{'yes' if i % 2 else 'no'},{'' if i == 3 else float(i % 3)}\n" for i in range(20)]
    path.write_text("age, income,bought,level\n" + "".join(rows))
    return path


# --- CelebA ---------------------------------------------------------------------------------------------------------


def test_celeba_is_split_as_its_owners_do_with_a_task_for_each_attribute(celeba):
    found = load("celeba", path=str(celeba), attributes=["Smiling", "Male"], side=8)
    assert [(task.name, task.classes) for task in found.tasks] == [("Smiling", 2), ("Male", 2)]
    assert found.class_names["Male"] == ("no", "yes")
    assert found.x_train.shape == (8, 3, 8, 8)
    assert found.y_train["Smiling"].tolist() == [1, 1, 1, 1, 1, 1, 0, 0]
    assert found.y_train["Male"].tolist() == [0, 1] * 4
    assert found.y_test["Male"].tolist() == [0, 1]
    # The colours tell which image is where; JPEG may err by a few levels.
    assert np.abs(found.x_train[:, 0, 4, 4] * 255 - 20 * np.arange(8)).max() < 6
    assert np.abs(found.x_test[:, 0, 4, 4] * 255 - [200, 220]).max() < 6


def test_one_attribute_may_be_named_alone_and_validation_may_be_the_test_part(celeba):
    found = load("celeba", path=celeba, attributes="Bald", test_part="validation", side=8, grey=True)
    assert found.shape == (1, 8, 8)
    assert found.y_test["Bald"].tolist() == [0, 1]


def test_fewer_samples_are_drawn_at_random_and_only_they_are_read(celeba):
    for name in ("000011.jpg", "000012.jpg"):
        (celeba / "img_align_celeba" / name).unlink()
    with pytest.raises(InputError, match=r"2 of 10 missing: '000011\.jpg', '000012\.jpg'"):
        load("celeba", path=celeba, attributes="Male", side=8)
    few, again, other = (
        load("celeba", path=celeba, attributes="Male", test_part="validation", side=8, n_train=3, seed=seed)
        for seed in (0, 0, 1)
    )
    assert (len(few.x_train), len(few.x_test)) == (3, 2)
    assert np.array_equal(few.x_train, again.x_train)
    assert not np.array_equal(few.x_train, other.x_train)


@pytest.mark.parametrize(
    ("file", "change", "says"),
    [
        ("list_attr_celeba.txt", None, "list_attr_celeba.txt must be a readable text file"),
        ("list_attr_celeba.txt", lambda text: text.replace("12\n", "13\n", 1), "must name 13 images.*got 12 lines"),
        ("list_attr_celeba.txt", lambda text: text.replace("12\n", "many\n", 1), "must begin with the number"),
        ("list_attr_celeba.txt", lambda text: text[:-8] + "\n", "line 14, must be a file name and 3 values"),
        ("list_attr_celeba.txt", lambda text: text.replace(" -1  ", " 0 "), "line 3, must be"),
        ("list_eval_partition.txt", None, "list_eval_partition.txt must be a readable text file"),
        (
            "list_eval_partition.txt",
            lambda text: text.replace(" 2", " 3"),
            "line 11, must be a file name and 0, 1 or 2",
        ),
        ("list_eval_partition.txt", lambda text: text.replace(" 2", " 1"), "train .0. and test"),
        ("list_eval_partition.txt", lambda text: text[14:], "must name every image; got none of '000001.jpg'"),
    ],
)
def test_a_broken_file_of_celeba_is_named(celeba, file, change, says):
    path = celeba / file
    text = path.read_text()
    path.unlink() if change is None else path.write_text(change(text))
    with pytest.raises(InputError, match=says):
        load("celeba", path=celeba, attributes="Male", side=8)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"attributes": ["Male", "Old"]}, "among Bald, Male, Smiling; got 'Old'"),
        ({"attributes": ["Male", "Male"]}, "unique"),
        ({"attributes": []}, "attributes must be one or more"),
        ({"attributes": 3}, "attributes must be one or more"),
        ({"test_part": "all"}, "test or validation"),
        ({"side": 4}, "side must be a whole number of at least 8; got 4"),
        ({"side": 4096}, "at most 1024"),
        ({"side": "64"}, "side must be a whole number"),
        ({"crop": "no"}, "crop must be true or false"),
        ({"n_train": 0}, "n_train must be a whole number of at least 1"),
        ({"seed": "a"}, "seed must be"),
        ({"path": "nowhere"}, "must be a folder that holds img_align_celeba/, list_attr_celeba.txt and"),
        ({"path": 3}, "path must be a path"),
        ({"cache": 3}, "cache must be a path"),
        ({"colour": True}, "options of celeba must be among path, attributes"),
    ],
)
def test_an_option_that_cannot_be_is_refused(celeba, options, says):
    with pytest.raises(InputError, match=says):
        load("celeba", **{"path": celeba, "attributes": "Male"} | options)


def test_a_data_set_from_files_wants_its_path():
    with pytest.raises(InputError, match=r"options of celeba must be among .*, path given; got \[\]"):
        load("celeba")


# --- UTKFace --------------------------------------------------------------------------------------------------------


def test_utkface_takes_its_labels_from_file_names(utkface):
    found = load("utkface", path=utkface, side=8, age_edges=[20, 50])
    assert [(task.name, task.classes) for task in found.tasks] == [("age", 3), ("gender", 2), ("race", 5)]
    assert found.class_names["age"] == ("0-19", "20-49", "50+")
    assert (len(found.x_train), len(found.x_test)) == (8, 2)
    # The red of an image is its age times 2.5.
    for x, y in ((found.x_train, found.y_train), (found.x_test, found.y_test)):
        i = np.round(x[:, 0, 4, 4] * 255 / 25).astype(int)
        assert np.array_equal(y["age"], np.digitize(10 * i, [20, 50]))
        assert np.array_equal(y["gender"], i % 2)
        assert np.array_equal(y["race"], i % 5)


def test_files_with_broken_names_are_counted_named_and_left_out(utkface, caplog):
    odd = ["61_1_20170109142408075.jpg.chip.jpg", "61_3_20170109150557335.jpg", "20_0_7_20170101.jpg", "notes.txt"]
    for name in odd:
        picture(utkface / name, (0, 0, 0), format="JPEG")
    # Odd behind the date, but all labels are there.
    picture(utkface / "24_0_1_20170116220224657 .jpg.chip.jpg", (60, 9, 9))
    picture(utkface / "55_0_0_20170116232725357jpg.chip.jpg", (137, 9, 9))
    with caplog.at_level(logging.WARNING):
        found = load("utkface", path=utkface, side=8)
    assert found.left_out == tuple(sorted(odd))
    assert "4 of 16 files left out" in caplog.text
    assert "'20_0_7_20170101.jpg'" in caplog.text
    assert len(found.x_train) + len(found.x_test) == 12


def test_no_file_is_left_out_silently_or_reported_without_need(utkface, caplog):
    assert load("utkface", path=utkface, side=8).left_out == ()
    assert not caplog.records


@pytest.mark.parametrize("edges", [(), (0, 5), (5, 5), (9, 5), ("a",), 7])
def test_edges_of_ages_that_cannot_be_are_refused(utkface, edges):
    with pytest.raises(InputError, match="age_edges"):
        load("utkface", path=utkface, age_edges=edges)


def test_a_folder_without_faces_is_refused(tmp_path):
    (tmp_path / "a.jpg").touch()
    with pytest.raises(InputError, match=r"must hold images named .*; got 'a.jpg'"):
        load("utkface", path=tmp_path)


# --- images with a table of labels ----------------------------------------------------------------------------------


def test_labels_of_images_may_be_numbers_text_or_missing(folder):
    found = load("images", path=folder, tasks=["count", "kind"], split_column="part", side=8)
    assert found.class_names == {"count": ("1", "5", "10"), "kind": ("cat", "dog")}
    assert found.y_train["count"].tolist() == [0, 1, 2, 0, 1, 2]
    assert found.y_train["kind"].tolist() == [0, 1, MISSING, 1, 0, 1]
    assert found.y_test["kind"].tolist() == [0, 1, 0, MISSING]
    assert np.allclose(found.x_test[:, 0, 0, 0] * 255, [150, 175, 200, 225])
    assert found.x_test.max() <= 1


def test_without_names_of_tasks_every_other_column_is_one(folder):
    found = load("images", path=folder, split_column="part", side=8)
    assert [task.name for task in found.tasks] == ["count", "kind"]


def test_images_are_split_at_random_where_no_column_says_how(folder):
    found, again, other = (
        load("images", path=folder, tasks="count", test_share=0.3, side=8, seed=seed) for seed in (0, 0, 1)
    )
    assert (len(found.x_train), len(found.x_test)) == (7, 3)
    assert np.array_equal(found.x_test, again.x_test)
    assert not np.array_equal(found.x_test, other.x_test)
    reds = np.concatenate([found.x_train, found.x_test])[:, 0, 0, 0] * 255
    assert np.allclose(np.sort(reds), 25 * np.arange(10))


@pytest.mark.parametrize(
    ("change", "options", "says"),
    [
        (lambda text: text.replace("3.png", "33.png"), {}, "1 of 10 missing: '33.png'"),
        (lambda text: text.replace("3.png", "4.png"), {}, "column 'file', must name each file once"),
        (lambda text: text.replace(",cat,", ",dog,"), {}, "column 'kind', must hold 2 to 1000 distinct labels; got 1"),
        (lambda text: text.replace("4.png,5,", "4.png,"), {}, "row 6, must have 4 values as the first line; got 3"),
        (lambda text: text.replace("test", "valid"), {}, "words train and test and no others; got 'train', 'valid'"),
        (lambda text: text.replace("count", "kind"), {}, "unique column names"),
        (lambda text: text.splitlines()[0], {}, "must have a row below"),
        (lambda text: "", {}, "unique column names; got nothing"),
        (lambda text: text.replace("dog", '"dog'), {}, "readable CSV file"),
        (lambda text: text.replace("kind", "the kind"), {"tasks": ["the kind"]}, "task's name"),
        (lambda text: text, {"tasks": ["size"]}, "got no 'size' among 'file', 'count', 'kind', 'part'"),
        (lambda text: text, {"labels": "other.csv"}, "other.csv must be a readable CSV file.*No such file"),
        (lambda text: text, {"split_column": None, "tasks": "count", "test_share": 2.0}, "between 0 and 1"),
        (lambda text: text, {"split_column": None, "tasks": "count", "test_share": 0.01}, "a sample at least"),
    ],
)
def test_a_fault_in_the_table_of_labels_is_named(folder, change, options, says):
    path = folder / "labels.csv"
    path.write_text(change(path.read_text()))
    with pytest.raises(InputError, match=says):
        load("images", **{"path": folder, "split_column": "part", "side": 8} | options)


def test_a_table_that_is_not_utf8_is_refused(folder):
    (folder / "labels.csv").write_bytes(b"file,kind\n1.png,\xff\n")
    with pytest.raises(InputError, match="in UTF-8; got"):
        load("images", path=folder)


# --- reading images -------------------------------------------------------------------------------------------------


def test_the_middle_is_cut_out_or_the_whole_is_squeezed(tmp_path):
    image = np.zeros((10, 30, 3), np.uint8)
    image[:, 10:20] = 255
    Image.fromarray(image).save(tmp_path / "a.png")
    cut = read_images(tmp_path, ["a.png"], ImageOptions(8, crop=True))
    whole = read_images(tmp_path, ["a.png"], ImageOptions(8))
    assert cut.shape == whole.shape == (1, 3, 8, 8)
    # Resampling looks a pixel beyond the edges.
    assert cut[..., 1:-1].min() == 255
    assert cut.min() > 200
    assert whole[:, :, :, 0].max() == 0
    assert whole[:, :, :, 4].min() > 200


def test_images_of_many_kinds_become_one_shape(tmp_path):
    kinds = {"L": "png", "RGBA": "png", "P": "gif", "1": "png", "CMYK": "jpg"}
    for mode, suffix in kinds.items():
        Image.new("RGB", (9, 9), (255, 255, 255)).convert(mode).save(tmp_path / f"{mode}.{suffix}")
    names = [f"{mode}.{suffix}" for mode, suffix in kinds.items()]
    assert read_images(tmp_path, names, ImageOptions(8)).min() >= 254
    assert read_images(tmp_path, names, ImageOptions(8, grey=True)).shape == (5, 1, 8, 8)


def test_a_photograph_is_turned_upright(tmp_path):
    image = np.zeros((8, 8, 3), np.uint8)
    image[0] = 255
    exif = Image.Exif()
    exif[0x0112] = 3
    Image.fromarray(image).save(tmp_path / "a.png", exif=exif)
    found = read_images(tmp_path, ["a.png"], ImageOptions(8))
    assert found[0, :, 7].min() == 255
    assert found[0, :, 0].max() == 0


def test_all_broken_images_are_counted_and_nothing_is_kept(folder, monkeypatch):
    (folder / "3.png").write_bytes((folder / "3.png").read_bytes()[:40])
    (folder / "5.png").write_text("no image")
    (folder / "6.png").unlink()
    (folder / "6.png").mkdir()
    Image.fromarray(np.zeros((9, 9), np.uint16)).save(folder / "7.png")
    monkeypatch.setattr(images_module, "MOST_PIXELS", 200)
    picture(folder / "8.png", (0, 0, 0), (20, 20))
    names = [f"{i}.png" for i in range(10)]
    with pytest.raises(InputError, match="images of 8 bits a channel; 5 of 10 are not") as refused:
        read_images(folder, names, ImageOptions(8))
    for word in ("3.png", "5.png: UnidentifiedImageError", "6.png: IsADirectory", "7.png: mode I;16", "8.png: more"):
        assert word in str(refused.value)
    assert list((folder / CACHE).iterdir()) == []


def test_images_are_decoded_once_and_then_read_from_the_cache(folder, monkeypatch):
    names = [f"{i}.png" for i in range(10)]
    first = read_images(folder, names, ImageOptions(8))
    (file,) = (folder / CACHE).iterdir()
    assert file.stat().st_mode & 0o777 == 0o600

    def decoded_again(*_: object) -> None:
        raise AssertionError

    with monkeypatch.context() as patched:
        patched.setattr(images_module, "_read", decoded_again)
        assert np.array_equal(read_images(folder, names, ImageOptions(8)), first)


def test_a_changed_file_another_option_or_a_damaged_cache_is_decoded_anew(folder, tmp_path):
    names, options, cache = ["1.png", "2.png"], ImageOptions(8), tmp_path / "cache"

    def read(names: list[str] = names, options: ImageOptions = options) -> tuple[np.ndarray, int]:
        return np.array(read_images(folder, names, options, cache)), len(list(cache.iterdir()))

    first, n = read()
    assert n == 1
    assert read(names[::-1])[1] == 2
    assert read(options=ImageOptions(8, crop=True))[1] == 3
    # The same size and another time: as when a file is replaced by one of equal length.
    os.utime(folder / "1.png", ns=(1, 1))
    assert read()[1] == 4
    picture(folder / "1.png", (7, 7, 7))
    changed, n = read()
    assert n == 5
    assert changed[0].max() == 7
    assert np.array_equal(changed[1], first[1])
    for file in cache.iterdir():
        file.write_bytes(file.read_bytes()[:100])
    assert np.array_equal(read()[0], changed)


def test_a_cache_that_cannot_be_written_leaves_nothing(folder, tmp_path, monkeypatch):
    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("securemtk.support.files.os.fsync", refuse)
    with pytest.raises(OSError, match="No space"):
        read_images(folder, ["1.png"], ImageOptions(8), tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_images_read_in_parts_are_those_read_at_once(folder, tmp_path, monkeypatch):
    whole = load("images", path=folder, split_column="part", side=8)
    monkeypatch.setattr(images_module, "_CHUNK", 3)
    parts = load("images", path=folder, split_column="part", side=8, cache=str(tmp_path / "cache"))
    assert np.array_equal(whole.x_train, parts.x_train)
    assert np.array_equal(whole.x_test, parts.x_test)


def test_a_bar_is_drawn_on_a_terminal_alone(folder, capsys, monkeypatch):
    read_images(folder, ["1.png"], ImageOptions(8))
    captured = capsys.readouterr()
    assert captured.out + captured.err == ""
    screen = io.StringIO()
    console = progress.Console
    monkeypatch.setattr(
        progress, "Console", lambda **_: console(file=screen, force_terminal=True, force_interactive=True)
    )
    read_images(folder, ["2.png"], ImageOptions(8))
    assert "read images" in screen.getvalue()


# --- tables ---------------------------------------------------------------------------------------------------------


def test_a_table_gives_scaled_features_and_encoded_labels(table):
    found = load("table", path=table, tasks=["bought", "level"], test_share=0.25)
    assert found.columns.names == ("age", "income")
    assert (found.x_train.shape, found.x_test.shape) == ((15, 2), (5, 2))
    assert found.class_names == {"bought": ("no", "yes"), "level": ("0", "1", "2")}
    x = np.concatenate([found.x_train, found.x_test])
    order = x[:, 0].argsort()
    y = {name: np.concatenate([found.y_train[name], found.y_test[name]])[order] for name in ("bought", "level")}
    assert y["bought"].tolist() == [0, 1] * 10
    assert y["level"].tolist() == [MISSING if i == 3 else i % 3 for i in range(20)]
    assert np.allclose(x[order][:, 0], -x[order][::-1][:, 1][::-1], atol=1e-6)
    rows = np.column_stack([np.arange(20), 10 - np.arange(20)])
    assert np.allclose(found.columns.scaled(rows), x[order])
    # Its statistics are those of the training part alone.
    assert abs(found.x_train.mean()) < 1e-6


def test_a_table_may_say_itself_which_rows_are_for_training_and_which_features_count(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("\ufeffx,y,part,a\n1,5,train,0\n\n3,6,train,1\n9,7,test,1\n5,8,test,0\n")
    found = load("table", path=str(path), tasks="a", split_column="part", features="x", low=0.0, high=1.0)
    # Mean 2, deviation 1: three deviations above it is the end.
    assert np.allclose(found.x_train[:, 0], [1 / 3, 2 / 3])
    assert np.allclose(found.x_test[:, 0], [1, 1])
    assert load("table", path=path, tasks="a", split_column="part", n_test=1).x_test.shape == (1, 2)


@pytest.mark.parametrize(
    ("change", "options", "says"),
    [
        (lambda text: text.replace("7,3,", "7,,"), {}, "row 9, column 'income', must hold a finite number; got ''"),
        (lambda text: text.replace("7,3,", "x,3,"), {}, "row 9, column 'age', .*; got 'x'"),
        (lambda text: text.replace("7,3,", "inf,3,"), {}, "row 9, column 'age', .*; got 'inf'"),
        (lambda text: text, {"tasks": ["colour"]}, "got no 'colour' among 'age', 'income', 'bought', 'level'"),
        (lambda text: text, {"tasks": ["level", "level"]}, "unique"),
        (lambda text: text, {"features": ["age", "level"]}, "a feature or a label, not both; got 'level'"),
        (lambda text: text, {"features": []}, "features must be one or more"),
        (lambda text: text, {"tasks": ["age", "income", "bought", "level"]}, "features must be one or more"),
        (lambda text: text, {"split_column": "part"}, "got no 'part'"),
        (lambda text: text, {"path": "nowhere.csv"}, "nowhere.csv must be a readable CSV file"),
    ],
)
def test_a_fault_in_a_table_is_named(table, change, options, says):
    table.write_text(change(table.read_text()))
    with pytest.raises(InputError, match=says):
        load("table", **{"path": table, "tasks": ["bought", "level"]} | options)


@pytest.mark.parametrize(("low", "high"), [(1.0, 1.0), ("a", 1.0), (0.0, float("nan"))])
def test_ends_of_a_scale_that_cannot_be_are_refused(table, low, high):
    with pytest.raises(RangeError, match="low < high"):
        load("table", path=table, tasks="bought", features="age", low=low, high=high)


def test_a_column_with_a_label_for_each_row_is_no_task(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("x,who\n" + "".join(f"{i},name{i}\n" for i in range(1001)))
    with pytest.raises(InputError, match="distinct labels; got 1001 in 1001 rows"):
        load("table", path=path, tasks="who")


def test_splits_are_whole_and_disjoint():
    split = random_split(101, 0.2, 3)
    assert np.array_equal(np.sort(np.concatenate([split.train, split.test])), np.arange(101))
    assert (len(split.test), len(split.limited(7, 2, 0).train)) == (20, 7)
    assert set(split.limited(7, 2, 0).train) < set(split.train)
    assert isinstance(named_split(["train", "test"], "here"), Split)


# --- from data set to run -------------------------------------------------------------------------------------------


def test_a_run_remembers_the_options_of_its_data_set(folder, tmp_path):
    options = {"path": str(folder), "split_column": "part", "side": 16}
    config = TrainConfig(epochs=6, batch=3, assembler=AssemblerConfig(decoys=1))
    trained = run_folder.train_run(tmp_path / "run", "images", ["kind"], config, options=options)
    assert json.loads((tmp_path / "run" / "run.json").read_text())["options"] == options
    again = run_folder.open_run(tmp_path / "run")
    assert np.array_equal(again.dataset.x_train, trained.dataset.x_train)
    # Wrong keys are drawn anew each time; what the network answers without any is the same.
    assert again.metrics["count"].no_key == trained.metrics["count"].no_key
    with pytest.raises(InputError, match="same data set"):
        run_folder.train_run(
            tmp_path / "run", "images", ["kind"], config, options=options | {"crop": True}, resume=True
        )
    with pytest.raises(InputError, match="values that JSON has"):
        run_folder.train_run(tmp_path / "other", "images", options=options | {"path": folder})
