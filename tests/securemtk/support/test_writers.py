"""Every door that writes: what it replaces, what it refuses and when; and that tests write in their folders only."""

import io
import os
import socket
import stat
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
import write_guard
from helpers import ROOT
from onnx import helper
from onnx_models import build, floats
from torch import nn

from benchmarks import report
from protocols.errors import BundleError, InputError, KeyRefused
from securemtk import data, demo
from securemtk.cli import app
from securemtk.cli.commands import attack, check, predict
from securemtk.cli.commands import report as report_command
from securemtk.mtk.keys.audit import AuditLog
from securemtk.mtk.keys.grants import Ledger
from securemtk.mtk.keys.key import draw_keys, load
from securemtk.mtk.training import train
from securemtk.onnx import export
from securemtk.onnx.bundle import check_bundle_target
from securemtk.report.page import check_target
from securemtk.runs import run_folder
from securemtk.support import files

# --- what may have the name of a file to write ----------------------------------------------------------------------


def folder(path: Path) -> None:
    path.mkdir()


def link(path: Path) -> None:
    (path.parent / "led-to").write_bytes(b"precious")
    path.symlink_to("led-to")


def dangling(path: Path) -> None:
    path.symlink_to("nowhere")


def local_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made, _inside(path.parent):
        made.bind(path.name)  # a socket's address has no room for a whole path


@contextmanager
def _inside(where: Path):
    here = Path.cwd()
    os.chdir(where)
    try:
        yield
    finally:
        os.chdir(here)


def device(path: Path) -> None:
    """Make a null device of our own; a named pipe stands for it where that takes rights that we lack."""
    try:
        os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(1, 3))
    except PermissionError:
        os.mkfifo(path, 0o600)


def pipe(path: Path) -> None:
    os.mkfifo(path, 0o600)


THINGS = [folder, link, dangling, local_socket, device, pipe]


def present(where: Path) -> dict[str, tuple[int, int]]:
    """Return what is in a folder: name -> (mode, inode), links not followed."""
    return {x.name: (x.lstat().st_mode, x.lstat().st_ino) for x in where.iterdir()}


# --- the doors ------------------------------------------------------------------------------------------------------


def model(path: Path, op: str = "Relu") -> Path:
    nodes = [helper.make_node("Identity", ["x"], ["h"]), helper.make_node(op, ["h"], ["y"])]
    path.write_bytes(build(nodes, {"x": ["n", 4]}, ["y"], {"unused": floats(3)}).SerializeToString())
    return path


def command(*arguments: object) -> None:
    if status := app.run([str(x) for x in arguments]):
        raise InputError(f"exit status {status}")


def check_fix(target: Path) -> None:
    command("check", model(target.parent.parent / "m.onnx"), "--fix", target)


def predict_out(target: Path) -> None:
    x = target.parent.parent / "x.npy"
    np.save(x, floats(2, 4))
    command("predict", model(x.with_name("m.onnx")), x, "--out", target)


def some_run(where: Path) -> Path:
    """Make the folder of a run that has not been trained."""
    where.mkdir()
    (where / run_folder.RUN).write_text(run_folder.Run("digits", (), train.TrainConfig()).to_json())
    return where


def attack_out(target: Path) -> None:
    command("attack", some_run(target.parent.parent / "run"), "--out", target)


def report_output(target: Path) -> None:
    command("report", some_run(target.parent.parent / "run"), "--output", target)


def checkpoint(target: Path) -> None:
    train.train(data.load("digits"), config=train.TrainConfig(epochs=1), checkpoint=target)


def log(target: Path) -> None:
    with AuditLog(target).locked():
        pass


# Each door, and the work before its writing: that must not have begun.
FILES = {
    "whole_file": ("a", lambda target: files.write_whole(target, b"new"), None),
    "private": ("a", lambda target: files.write_whole(target, b"new", private=True), None),
    "write_file": ("a", lambda target: export.write_file(target, b"new"), None),
    "export_onnx": (
        "a",
        lambda target: export.export_onnx(nn.Linear(3, 2), torch.zeros(2, 3), ["y"], target),
        (export, "_export"),
    ),
    "key": ("a.key", lambda target: draw_keys(["digit"], (1, 8, 8))["digit"].save(target), None),
    "grants": ("a", lambda target: Ledger(target).grant("ann", "12" * 16, "digit"), None),
    "log": ("a.log", log, None),
    "checkpoint": ("a", checkpoint, (train._Training, "_epoch")),
    "report": ("a.html", check_target, None),
    "report's JSON": ("a.json", lambda target: check_target(target.with_suffix(".html")), None),
    "report --output": ("a.html", report_output, (report_command, "measure_report")),
    "check --fix": ("a.onnx", check_fix, (check, "fix_model")),
    "predict --out": ("a.npz", predict_out, (predict, "Session")),
    "attack --out": ("a.json", attack_out, (attack, "run_attacks")),
    "attack's picture": ("a.png", lambda target: attack_out(target.with_suffix(".json")), (attack, "run_attacks")),
    "benchmarks": ("a.json", lambda target: report.check_outputs(target), None),
    "benchmarks write": ("a.json", lambda target: report.write_json(target, {}), None),
}
# These take a folder that is empty.
FOLDERS = {
    "demo": ("a", demo.run_demo, (demo, "train_run")),
    "train": ("a", lambda target: run_folder.train_run(target, "digits"), (run_folder, "train")),
    "new_folder": ("a", lambda target: files.new_folder(target).__enter__(), None),
    "bundle": ("a", check_bundle_target, None),
    "bundle, overwrite": ("a", lambda target: check_bundle_target(target, overwrite=True), None),
    "export": (
        "a",
        lambda target: command("export", some_run(target.parent.parent / "run"), target),
        (run_folder, "export"),
    ),
}
CASES = [(name, thing) for name in FILES for thing in THINGS]
CASES += [(name, thing) for name in FOLDERS for thing in THINGS if thing is not folder]


@pytest.mark.parametrize(("door", "thing"), CASES, ids=lambda x: x if isinstance(x, str) else x.__name__)
def test_a_door_leaves_what_is_no_regular_file_and_says_so_before_the_work(door, thing, tmp_path, monkeypatch):
    name, write, work = (FILES | FOLDERS)[door]
    where = tmp_path / "there"
    where.mkdir()
    thing(where / name)
    before, began = present(where), []
    if work is not None:
        monkeypatch.setattr(*work, lambda *_, **__: began.append(work))
    with pytest.raises((InputError, KeyRefused, OSError)):
        write(where / name)
    assert (present(where), began) == (before, [])
    if thing is link:
        assert (where / "led-to").read_bytes() == b"precious"


@pytest.mark.parametrize("door", [name for name in FILES if not name.startswith("benchmarks")])
def test_a_folder_that_is_not_there_is_said_before_the_work(door, tmp_path, monkeypatch):
    name, write, work = FILES[door]
    began = []
    if work is not None:
        monkeypatch.setattr(*work, lambda *_, **__: began.append(work))
    with pytest.raises((InputError, OSError)):
        write(tmp_path / "absent" / name)
    assert not began
    assert not (tmp_path / "absent").exists()


@pytest.mark.parametrize(
    "door", ["export_onnx", "checkpoint", "check --fix", "predict --out", "attack --out", "report"]
)
def test_a_folder_that_takes_no_file_is_said_before_the_work(door, tmp_path, monkeypatch, capsys):
    name, write, work = FILES[door]
    began = []
    if work is not None:
        monkeypatch.setattr(*work, lambda *_, **__: began.append(work))

    def refuses(*_, **__):
        raise PermissionError(13, "Permission denied")

    (tmp_path / "there").mkdir()
    monkeypatch.setattr(files.tempfile, "TemporaryFile", refuses)
    with pytest.raises((InputError, OSError)) as caught:
        write(tmp_path / "there" / name)
    assert "Permission denied" in str(caught.value) + capsys.readouterr().err
    assert not began


def test_the_message_names_the_thing(tmp_path):
    for thing, word in zip(
        THINGS, ["folder", "symbolic link", "symbolic link", "socket", "device|pipe", "pipe"], strict=True
    ):
        thing(tmp_path / thing.__name__)
        with pytest.raises(InputError, match=f"must be a new name or a regular file; .* is a (named )?({word})"):
            files.check_file(tmp_path / thing.__name__)


def test_what_comes_while_the_content_is_made_is_not_replaced(tmp_path):
    def write() -> None:
        with files.whole_file(tmp_path / "a") as file:
            file.write(b"new")
            os.mkfifo(tmp_path / "a")

    with pytest.raises(InputError, match="named pipe"):
        write()
    assert stat.S_ISFIFO((tmp_path / "a").stat().st_mode)
    assert os.listdir(tmp_path) == ["a"]


def test_a_file_that_is_replaced_keeps_its_mode_unless_it_must_be_private(tmp_path):
    (tmp_path / "a").write_bytes(b"old")
    for mode in (0o600, 0o640, 0o755):
        (tmp_path / "a").chmod(mode)
        files.write_whole(tmp_path / "a", b"new")
        assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == mode
    files.write_whole(tmp_path / "a", b"secret", private=True)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o600


def test_a_name_of_the_greatest_length_is_written(tmp_path):
    for name in ("a" * 255, "é" * 127):
        files.write_whole(tmp_path / name, b"new")
        assert (tmp_path / name).read_bytes() == b"new"


@pytest.mark.parametrize("read", [load, lambda path: Ledger(path).grants()], ids=["key", "grants"])
@pytest.mark.parametrize("thing", [device, pipe])
def test_a_private_file_that_is_none_is_refused_and_not_waited_for(read, thing, tmp_path):
    thing(tmp_path / "a")
    with pytest.raises(InputError, match="must be a regular file"):
        read(tmp_path / "a")


def test_check_writes_no_model_that_does_not_run(tmp_path, capsys):
    target = tmp_path / "fixed.onnx"
    source = model(tmp_path / "m.onnx", op="Det" if onnx.defs.has("Det") else "Erf")
    for more in ([], ["--json"]):
        status = app.run(["check", str(source), "--fix", str(target), *more])
        assert status == app.UNSUPPORTED
        assert "written to" not in capsys.readouterr().out.replace("not written", "")
    assert sorted(os.listdir(tmp_path)) == ["m.onnx"]


def test_check_writes_no_model_whose_values_leave_the_range(tmp_path):
    nodes = [helper.make_node("MatMul", ["x", "w"], ["h"]), helper.make_node("Relu", ["h"], ["y"])]
    source, weights = tmp_path / "m.onnx", {"w": np.full((4, 3), 10, dtype=np.float32)}
    source.write_bytes(build(nodes, {"x": ["n", 4]}, ["y"], weights).SerializeToString())
    np.save(tmp_path / "x.npy", np.full((2, 4), 1600, dtype=np.float32))
    call = ["check", str(source), "--sample", str(tmp_path / "x.npy"), "--fix", str(tmp_path / "fixed.onnx")]
    assert app.run(call) == app.UNSUPPORTED
    assert not (tmp_path / "fixed.onnx").exists()


def test_a_bundle_error_is_a_bundle_error_whatever_is_in_the_way(tmp_path):
    pipe(tmp_path / "a")
    with pytest.raises(BundleError, match="named pipe"):
        export.write_file(tmp_path / "a", b"new")


# --- tests themselves -----------------------------------------------------------------------------------------------


TRIES = {
    "open": "open(path, 'w')",
    "append": "open(path, 'ab')",
    "make": "import os; os.mkdir(path)",
    "rename": "import os; open(own, 'w').close(); os.replace(own, path)",
    "link": "import os; os.symlink(own, path)",
}


@pytest.mark.parametrize("code", TRIES.values(), ids=TRIES.keys())
@pytest.mark.parametrize("child", [False, True], ids=["here", "in a child"])
def test_a_test_that_writes_elsewhere_is_refused_and_found(code, child, tmp_path, monkeypatch):
    outside = ROOT / "written-by-a-test"
    monkeypatch.setenv(write_guard.NOTES, str(tmp_path / "notes"))
    variables = {"path": str(outside), "own": str(tmp_path / "own")}
    try:
        if child:
            program = f"path, own = {variables['path']!r}, {variables['own']!r}; {code}"
            done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
            assert "WritesOutside" in done.stderr
        else:
            with pytest.raises(write_guard.WritesOutside):
                exec(code, variables)  # noqa: S102
        assert not outside.exists()
    finally:
        if outside.is_file():
            outside.unlink()
    assert [str(outside) in line for line in write_guard.notes()] == [True]


def test_the_null_device_may_be_written_to_but_not_replaced():
    assert write_guard.is_allowed("/dev/null", opened=True)
    assert not write_guard.is_allowed("/dev/null", opened=False)


def test_reading_and_caches_are_left_alone(tmp_path):
    (ROOT / "setup.cfg").read_text()
    assert write_guard.is_allowed(str(ROOT / "tests" / "__pycache__" / "x.pyc"), opened=False)
    assert write_guard.is_allowed(str(tmp_path / "x"), opened=False)
    assert not write_guard.is_allowed(f"{tmp_path.parent.parent}x", opened=False)
    assert io.BytesIO(b"x").read() == b"x"
