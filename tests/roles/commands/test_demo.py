"""The demo, run once as a user would, against the figures that the project promises."""

import contextlib
import json
import subprocess
import sys

import numpy as np
import pytest
from rich.console import Console

from securemtk import data
from securemtk.cli import tables
from securemtk.cli.commands import demo as demo_command
from securemtk.demo import Figures, TaskFigures, attack_closed
from securemtk.mtk.keys.key import load as load_key
from securemtk.onnx.bundle import read_bundle
from securemtk.report import pictures
from securemtk.runs.run_folder import open_run
from securemtk.serving.session import Session
from securemtk.support import files

pytestmark = pytest.mark.timeout(600)

SECURED = ("digit", "parity")
TASK_FIELDS = {"secured", "chance", "baseline", "no_key", "right_key", "wrong_key", "encrypted"}
FIELDS = {"tasks", "agreement", "max_difference", "samples", "rounds"}
FIELDS |= {"online_s", "offline_s", "online_bytes", "offline_bytes"}


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The folder that one run of `securemtk demo --json` leaves, and what it printed."""
    folder = tmp_path_factory.mktemp("demo") / "runs" / "demo"
    done = subprocess.run(
        [sys.executable, "-m", "securemtk.cli.app", "demo", "--out", str(folder), "--json"],
        capture_output=True,
        text=True,
        timeout=560,
    )
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


@pytest.fixture(scope="module")
def figures(demo):
    return json.loads((demo[0] / "demo.json").read_text())


@pytest.fixture(scope="module")
def details(demo):
    return json.loads((demo[0] / "details.json").read_text())


def test_demo_json_has_exactly_its_fields_and_is_what_is_printed(demo, figures):
    assert set(figures) == FIELDS
    assert all(set(task) == TASK_FIELDS for task in figures["tasks"].values())
    assert {name: task["secured"] for name, task in figures["tasks"].items()} == {
        "digit": True,
        "parity": True,
        "large": False,
    }
    assert figures["samples"] == 360
    assert json.loads(demo[1]) == figures


@pytest.mark.parametrize("name", SECURED)
def test_the_right_key_costs_at_most_2_points(name, figures):
    task = figures["tasks"][name]
    assert task["right_key"] >= task["baseline"] - 0.02
    assert task["encrypted"] >= task["baseline"] - 0.02


@pytest.mark.parametrize("name", SECURED)
def test_no_key_and_a_wrong_key_give_at_most_5_points_more_than_the_open_tasks_tell(name, figures):
    task = figures["tasks"][name]
    assert task["no_key"] <= task["chance"] + 0.05
    assert task["wrong_key"] <= task["chance"] + 0.05


def test_the_unprotected_task_loses_at_most_1_point_in_any_state(figures):
    task = figures["tasks"]["large"]
    assert min(task[state] for state in ("no_key", "right_key", "wrong_key", "encrypted")) >= task["baseline"] - 0.01


@pytest.mark.parametrize("name", SECURED)
def test_fewer_than_1_in_100_random_patterns_open_a_task(name, details):
    rate = details["random_patterns"][name]
    assert rate["tries"] == 1000
    assert rate["share"] < 0.01


def test_attackers_gain_at_most_3_points_from_encrypted_closed_scores(demo, details):
    # All samples and both closed states: luck alone has a spread of 0.8 points on two classes. In the demo, 1.3.
    folder, _ = demo
    dataset = data.load("digits")
    x = np.concatenate([dataset.x_train, dataset.x_test])
    with Session(key_files=folder / "keys") as session:
        model = session.load(folder / "bundle")
        asked = {keys: model.predict(x, open_tasks=keys) for keys in ((), ("digit",), ("parity",))}
    for name in SECURED:
        y = np.concatenate([dataset.y_train[name], dataset.y_test[name]])
        closed = [scores[name] for keys, scores in asked.items() if name not in keys]
        attack = attack_closed(np.concatenate(closed), np.tile(y, len(closed)))
        assert attack["answers"] == 2 * 1797
        assert attack["gain"] <= 0.03
        # The same attackers read an open task at once: they are no straw men.
        (opened,) = [scores[name] for keys, scores in asked.items() if name in keys]
        assert attack_closed(opened, y)["gain"] > 0.4
        seen = details["attack_on_encrypted_closed_scores"][name]
        assert seen["answers"] == 2 * 360 + 720
        assert seen["gain"] <= max(0.03, 4 * seen["standard_error"])


def test_encrypted_answers_are_those_of_onnxruntime(figures):
    assert figures["agreement"] >= 0.995
    assert 0 < figures["max_difference"] <= 0.01


def test_every_state_of_the_keys_costs_the_same_messages(details, figures):
    asked = details["predictions"]
    assert [one["keys"] for one in asked] == [[], ["digit"], ["parity"]]
    assert len({(one["online_bytes"], one["rounds"]) for one in asked}) == 1
    assert figures["online_bytes"] == asked[0]["online_bytes"]
    assert sorted(one["online_s"] for one in asked)[1] == figures["online_s"]


def test_the_folder_is_a_run_with_a_bundle_that_holds_no_key(demo):
    folder, _ = demo
    keys = {name: load_key(folder / "keys" / f"{name}.key") for name in SECURED}
    manifest, model = read_bundle(folder / "bundle")
    assert all(key.model_id == manifest.model_id for key in keys.values())
    for key in keys.values():
        values = key.pattern[key.mask]
        assert values.tobytes() not in model
        assert values.astype(np.float64).tobytes() not in model
        # Short decimals such as 0.2 stand in any manifest.
        assert not [text for text in map(str, values) if len(text) > 8 and text in manifest.to_json()]
    assert set(open_run(folder).metrics) == {"digit", "parity", "large"}
    assert np.load(folder / "x.npy").shape == (4, 1, 16, 16)
    assert (folder / "demo.png").read_bytes().startswith(b"\x89PNG")
    # Nothing of the folder in the making is left beside it.
    assert [path.name for path in folder.parent.iterdir()] == ["demo"]


def test_the_table_shows_every_figure_the_demo_promises(tmp_path, capsys, monkeypatch):
    task = TaskFigures(True, 0.201, 0.991, 0.112, 0.983, 0.123, 0.974)
    shown = Figures(
        tasks={"digit": task},
        agreement=0.9972,
        max_difference=0.00054,
        samples=360,
        online_s=1.5,
        offline_s=0.4,
        online_bytes=313_200_000,
        offline_bytes=88_000_000,
        rounds=60,
    )
    monkeypatch.setattr(tables, "Console", lambda: Console(width=200))
    demo_command._demo_table(shown, tmp_path)
    out = capsys.readouterr().out
    for text in ("20.1", "99.1", "11.2", "98.3", "12.3", "97.4", "99.7 %", "0.00054", "360"):
        assert text in out
    for text in ("1.50 s, 313.2 MB, 60 rounds", "0.40 s, 88.0 MB"):
        assert text in out


def test_a_picture_never_shows_what_lies_in_a_keys_place(monkeypatch):
    drawn = []
    monkeypatch.setattr(pictures.Axes, "imshow", lambda self, image, **_: drawn.append(image))
    mask = np.zeros((8, 8), dtype=bool)
    mask[5:, 5:] = True
    image = np.zeros((8, 8), dtype=np.float32)
    sample = pictures.Sample(image, ("digit",), {"digit": 3}, {"digit": 3}, {"digit": True})
    task = {"secured": True, "chance": 0.1} | dict.fromkeys(pictures.STATES, 0.5)
    picture = pictures.draw_demo({"digit": task}, [sample], {"digit": mask}, [])
    assert picture.startswith(b"\x89PNG")
    assert [shown is image for shown in drawn] == [True]


def test_a_new_folder_replaces_an_old_result_only_when_all_went_well(tmp_path):
    target = tmp_path / "result"
    with files.new_folder(target) as work:
        files.write_whole(work / "a", b"old")
    with contextlib.suppress(RuntimeError), files.new_folder(target, replaceable=["a"]) as work:
        files.write_whole(work / "a", b"half")
        raise RuntimeError
    assert (target / "a").read_bytes() == b"old"
    with files.new_folder(target, replaceable=["a"]) as work:
        files.write_whole(work / "a", b"new")
    assert (target / "a").read_bytes() == b"new"
    assert [path.name for path in tmp_path.iterdir()] == ["result"]


def test_a_file_is_written_whole_or_stays_as_it_was(tmp_path, monkeypatch):
    files.write_whole(tmp_path / "a", b"old")

    def fails(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", fails)
    with pytest.raises(OSError, match="No space"):
        files.write_whole(tmp_path / "a", b"new")
    assert (tmp_path / "a").read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
