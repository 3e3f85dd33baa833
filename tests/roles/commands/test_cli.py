"""The command line: results on stdout, one clear message for each kind of bad input, nothing half-written."""

import contextlib
import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from helpers import PATIENCE_S, alive, wait_until
from onnx import helper
from onnx_models import build, floats, one
from small_models import mlp
from torch import nn

from protocols.errors import (
    BundleError,
    DealerError,
    InputError,
    IntegrityError,
    KeyRefused,
    PeerLost,
    PeerTimeout,
    RangeError,
    SecureError,
    ShapeError,
    UnsupportedError,
)
from securemtk.cli import app
from securemtk.cli.commands import check, predict, train
from securemtk.cli.table import COMMANDS, KEYS_COMMANDS
from securemtk.mtk.attacks.suite import ATTACKS
from securemtk.mtk.keys.key import draw_keys
from securemtk.mtk.keys.key import load as load_key
from securemtk.mtk.training.assembler import AssemblerConfig
from securemtk.mtk.training.train import TrainConfig
from securemtk.onnx.bundle import read_bundle
from securemtk.onnx.export import export_onnx
from securemtk.onnx.manifest import MANIFEST
from securemtk.runs import run_folder
from securemtk.serving.session import Session


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run of one epoch, its bundle, a small input, and keys of another model."""
    folder = tmp_path_factory.mktemp("cli")
    config = TrainConfig(epochs=1, assembler=AssemblerConfig(decoys=1))
    trained = run_folder.train_run(folder / "run", "digits", ["digit", "parity"], config)
    run_folder.export(trained, folder / "bundle")
    np.save(folder / "x.npy", trained.dataset.x_test[:3])
    for name, key in draw_keys(["digit"], trained.dataset.shape).items():
        key.save(folder / f"foreign-{name}.key")
    return folder


@pytest.fixture(scope="module")
def open_session(made):
    """One real session for the cases in which it is opened as always and refuses later."""
    with Session(key_files=made / "run" / "keys") as session:
        yield session


@pytest.fixture
def in_open_session(open_session, monkeypatch):
    """Let commands take the open session where they would start one of their own."""
    monkeypatch.setattr(predict, "Session", lambda *_, **__: contextlib.nullcontext(open_session))


@pytest.fixture
def command(capfd):
    """Run a command line; return exit status, stdout and stderr, and insist on what holds for all of them."""

    def call(*arguments: object) -> tuple[int, str, str]:
        status = app.run([str(a) for a in arguments])
        out, err = capfd.readouterr()
        assert "Traceback" not in out + err
        if status not in (0, app.UNSUPPORTED):
            assert out == ""
            assert err.strip()
        return status, out, err

    return call


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


# --- what works -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*COMMANDS, *(f"keys {name}" for name in KEYS_COMMANDS)])
def test_help_of_each_command_has_an_example(name, command):
    status, out, _ = command(*name.split(), "--help")
    assert status == 0
    assert f"securemtk {name}" in " ".join(out.split())
    assert "Example:" in out
    assert "--install-completion" not in out


def test_predict_in_a_process_of_its_own_prints_one_json_document_with_right_scores(made):
    key = load_key(made / "run" / "keys" / "digit.key")
    call = ["predict", made / "bundle", made / "x.npy", "--key-files", made / "run", "--open-task", "digit", "--json"]
    done = subprocess.run(
        [sys.executable, "-m", "securemtk.cli.app", *map(str, call)], capture_output=True, text=True, timeout=PATIENCE_S
    )
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert set(answer) == {"outputs", "cost"}
    assert {name: o["open"] for name, o in answer["outputs"].items()} == {"digit": True, "parity": False, "large": True}
    keyed = np.where(key.mask, key.pattern, np.load(made / "x.npy"))
    with torch.no_grad():
        digit, _, large = run_folder.open_run(made / "run").result.model(torch.from_numpy(keyed))
    assert np.abs(np.array(answer["outputs"]["digit"]["scores"]) - digit.numpy()).max() < 0.01
    assert np.abs(np.array(answer["outputs"]["large"]["scores"]) - large.numpy()).max() < 0.01
    assert answer["outputs"]["digit"]["labels"] == digit.argmax(1).tolist()
    assert {"online_s", "offline_s", "online_bytes", "offline_bytes", "rounds", "layers"} <= set(answer["cost"])


def test_predict_on_a_plain_onnx_file_shows_a_table_and_writes_the_scores(tmp_path, command):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))
    export_onnx(module, torch.randn(2, 4), ["y"], tmp_path / "model.onnx")
    x = floats(12, 4)
    np.save(tmp_path / "x.npy", x)
    status, out, _ = command("predict", tmp_path / "model.onnx", tmp_path / "x.npy", "--out", tmp_path / "y.npz")
    assert status == 0
    assert "labels" in out
    assert "2 more" in out
    assert "rounds" in out
    scores = np.load(tmp_path / "y.npz", allow_pickle=False)
    with torch.no_grad():
        assert np.abs(scores["y"] - module(torch.from_numpy(x)).numpy()).max() < 0.001
    assert files(tmp_path) == {"model.onnx", "x.npy", "y.npz"}


def test_train_evaluate_and_export_a_run_whose_keys_are_locked(tmp_path, command):
    secret = tmp_path / "passphrase"
    secret.write_text("correct horse\n")
    options = ["--secure", "digit", "--epochs", 1, "--passphrase-file", secret]
    status, out, _ = command("train", "digits", "--out", tmp_path / "run", *options, "--json")
    assert status == 0
    assert set(json.loads(out)["tasks"]) == {"digit", "parity", "large"}
    assert files(tmp_path / "run") == {"run.json", "checkpoint.pt", "keys", "keys/digit.key"}
    assert os.stat(tmp_path / "run" / "keys" / "digit.key").st_mode & 0o777 == 0o600

    status, out, _ = command("keys", "list", tmp_path / "run", "--json")
    (key,) = json.loads(out)["keys"]
    assert (status, key["task"], key["locked"]) == (0, "digit", True)

    status, out, _ = command("evaluate", tmp_path / "run", "--passphrase-file", secret, "--tries", 5, "--json")
    assert status == 0
    evaluated = json.loads(out)
    assert evaluated["random_patterns"]["digit"]["tries"] == 5
    assert evaluated["tasks"]["digit"]["secured"]

    status, out, _ = command("export", tmp_path / "run", tmp_path / "bundle", "--passphrase-file", secret, "--json")
    assert status == 0
    assert json.loads(out)["model_id"] == key["model_id"]
    assert files(tmp_path / "bundle") == {"manifest.json", "cloud.onnx"}


def test_attack_writes_its_findings_into_the_run_and_again_the_same_ones(tmp_path, command, made):
    shutil.copytree(made / "run", tmp_path / "run")
    call = ["attack", tmp_path / "run", "--only", "guess, membership", "--tries", 64, "--seed", 7]
    status, out, _ = command(*call, "--json")
    assert status == 0
    found = json.loads(out)
    assert {f["attack"] for f in found["findings"]} == {"guess", "membership"}
    assert {f["task"] for f in found["findings"]} == {"digit", "parity", "large"}
    assert (found["seed"], found["effort"]["tries"]) == (7, 64)
    assert json.loads((tmp_path / "run" / "attack.json").read_text()) == found
    assert (tmp_path / "run" / "attack.png").read_bytes().startswith(b"\x89PNG")
    assert files(tmp_path / "run") - files(made / "run") == {"attack.json", "attack.png"}

    status, out, err = command(*call, "--out", tmp_path / "again.json")
    assert status == 0
    assert "64 random patterns" in " ".join(out.split())
    assert "again.json" in err.replace("\n", "")
    assert json.loads((tmp_path / "again.json").read_text())["findings"] == found["findings"]


def test_a_run_on_a_table_is_attacked_by_all_attacks(tmp_path, command):
    run_folder.train_run(tmp_path / "run", "wine", ["cultivar"], TrainConfig(epochs=2, batch=32))
    small = ["--tries", 20, "--queries", 800, "--steps", 2, "--restarts", 2]
    status, out, _ = command("attack", tmp_path / "run", *small, "--json")
    assert status == 0
    assert {f["attack"] for f in json.loads(out)["findings"]} == set(ATTACKS)
    assert (tmp_path / "run" / "attack.png").read_bytes().startswith(b"\x89PNG")


def test_an_interrupted_run_is_resumed_to_the_same_weights(tmp_path, command, made):
    whole = run_folder.open_run(made / "run").result.model.state_dict()
    shutil.copytree(made / "run", tmp_path / "run")
    text = (tmp_path / "run" / "run.json").read_text()
    unfinished = json.dumps(json.loads(text) | {"metrics": None})
    (tmp_path / "run" / "run.json").write_text(unfinished)
    (tmp_path / "run" / "checkpoint.pt").unlink()
    call = ["train", "digits", "--secure", "digit", "--secure", "parity", "--out", tmp_path / "run", "--decoys", 1]

    status, _, err = command("evaluate", tmp_path / "run")
    assert (status, "ended" in err) == (app.INPUT, True)
    status, _, err = command(*call, "--epochs", 1)
    assert (status, "new or empty" in err) == (app.INPUT, True)
    status, _, err = command(*call, "--epochs", 2, "--resume")
    assert (status, "same data set" in err) == (app.INPUT, True)
    assert command(*call, "--epochs", 1, "--resume")[0] == 0
    resumed = run_folder.open_run(tmp_path / "run").result.model.state_dict()
    assert all(torch.equal(resumed[name], value) for name, value in whole.items())


def test_options_of_a_data_set_are_given_by_name_and_kept_in_the_run(tmp_path, command):
    call = ["train", "shapes-correlated", "--secure", "size", "--out", tmp_path / "run", "--epochs", 1, "--decoys", 1]
    options = ["--data", "n_train=96", "--data", "n_test=20", "--data", "strength=0.9"]
    status, out, _ = command(*call, *options, "--json")
    assert status == 0
    assert json.loads(out)["tasks"]["size"]["secured"]
    kept = json.loads((tmp_path / "run" / "run.json").read_text())["options"]
    assert kept == {"n_train": 96, "n_test": 20, "strength": 0.9}
    assert len(run_folder.open_run(tmp_path / "run").dataset.x_train) == 96
    assert train._data_options(["a=x,y", "b=[1,2]", "c=true", "d=./e=f"]) == {
        "a": ["x", "y"],
        "b": [1, 2],
        "c": True,
        "d": "./e=f",
    }


def test_keys_are_locked_all_or_none_and_never_shown(tmp_path, command, made):
    shutil.copytree(made / "run" / "keys", tmp_path / "keys")
    one_secret, other_secret = tmp_path / "one", tmp_path / "other"
    one_secret.write_text("one\n")
    other_secret.write_text("other\n")
    before = load_key(tmp_path / "keys" / "digit.key")
    status, out, _ = command("keys", "lock", tmp_path / "keys", "--new-passphrase-file", one_secret)
    assert status == 0
    assert "True" in out
    stored = json.loads((made / "run" / "keys" / "digit.key").read_text())
    assert stored["pattern"][:8] not in out
    assert np.array_equal(load_key(tmp_path / "keys" / "digit.key", "one").pattern, before.pattern)

    untouched = {path.name: path.read_bytes() for path in (tmp_path / "keys").iterdir()}
    call = ["keys", "lock", tmp_path / "keys", "--new-passphrase-file", other_secret]
    status, _, err = command(*call, "--passphrase-file", other_secret)
    assert (status, "passphrase" in err) == (app.INPUT, True)
    assert {path.name: path.read_bytes() for path in (tmp_path / "keys").iterdir()} == untouched
    assert command(*call, "--passphrase-file", one_secret)[0] == 0
    assert np.array_equal(load_key(tmp_path / "keys" / "digit.key", "other").pattern, before.pattern)


def test_keys_are_granted_and_revoked_and_the_log_is_verified(tmp_path, command, made):
    grants, keys = tmp_path / "grants.json", made / "run" / "keys"
    limits = ["--until", "2999-12-31T18:00", "--uses", "9"]
    status, out, _ = command("keys", "grant", grants, keys, "--user", "ann", *limits, "--json")
    given = json.loads(out)["grants"]
    assert (status, [grant["task"] for grant in given]) == (0, ["digit", "parity"])
    assert {(grant["until"], grant["uses"], grant["used"]) for grant in given} == {("2999-12-31T18:00:00+00:00", 9, 0)}
    assert command("keys", "revoke", grants, "--user", "ann", "--task", "digit")[0] == 0
    status, out, _ = command("keys", "grants", grants, "--json")
    assert [grant["revoked"] is None for grant in json.loads(out)["grants"]] == [False, True]
    status, out, _ = command("keys", "log", grants, "--json")
    log = json.loads(out)
    assert (status, [entry["event"] for entry in log["entries"]]) == (0, ["grant", "grant", "revoke"])
    assert "revoke" in command("keys", "log", grants)[1]
    status, out, _ = command("keys", "log", grants, "--verify", "--head", log["head"], "--json")
    assert (status, json.loads(out)["lines"]) == (0, 3)

    path = tmp_path / "grants.json.log"
    whole = path.read_bytes()
    path.write_bytes(whole[:-9])
    status, out, err = command("keys", "log", grants, "--verify", "--json")
    assert (status, json.loads(out)["torn"], "as by a crash" in err) == (0, True, True)
    status, _, err = command("keys", "log", grants, "--verify", "--head", log["head"])
    assert (status, "lines are gone" in err) == (app.INPUT, True)
    path.write_bytes(whole.replace(b'"uses":9', b'"uses":8', 1))
    status, _, err = command("keys", "log", grants, "--verify")
    assert (status, "line 1 is not" in err) == (app.INPUT, True)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (["grant", "KEYS", "--user", "ann smith"], "user's name"),
        (["grant", "KEYS", "--user", "ann", "--until", "soon"], "ISO 8601"),
        (["grant", "KEYS", "--user", "ann", "--uses", "0"], "1 or more"),
        (["grant", "nowhere", "--user", "ann"], "readable"),
        (["revoke", "--user", "ann"], "none does"),
        (["revoke"], "none does"),
        (["log"], "there is none"),
    ],
)
def test_what_cannot_be_granted_revoked_or_shown_changes_nothing(tmp_path, command, made, call, said):
    name, *rest = [str(made / "run" / "keys") if part == "KEYS" else part for part in call]
    status, _, err = command("keys", name, tmp_path / "grants.json", *rest)
    assert (status, said in " ".join(err.split())) == (app.INPUT, True)
    assert list(tmp_path.iterdir()) == []


def test_grants_that_are_not_there_are_no_empty_list_and_leave_no_log(tmp_path, command):
    status, out, err = command("keys", "grants", tmp_path / "grants.json")
    assert (status, out, "must exist" in err) == (app.INPUT, "", True)
    assert list(tmp_path.iterdir()) == []


def test_predict_asks_under_a_name_and_is_refused_when_too_few_uses_are_left(tmp_path, command, made):
    grants, key = tmp_path / "grants.json", made / "run" / "keys" / "digit.key"
    assert command("keys", "grant", grants, key, "--user", "ann", "--uses", "2")[0] == 0
    asked = ["--key-files", key, "--open-task", "digit", "--grants", grants, "--user", "ann", "--json"]
    call = ["predict", made / "bundle", made / "x.npy", *asked]
    status, _, err = command(*call)
    assert (status, "granted to user 'ann'" in err, "used up" in err) == (app.INPUT, True, True)


def test_check_names_every_unsupported_node_at_once(tmp_path, command, made):
    bad = tmp_path / "bad.onnx"
    bad.write_bytes(one("Sin", ["n", 4]).SerializeToString())
    status, out, _ = command("check", bad, "--json")
    report = json.loads(out)
    assert (status, report["ok"], [p["op_type"] for p in report["unsupported"]]) == (app.UNSUPPORTED, False, ["Sin"])
    status, out, _ = command("check", bad)
    assert status == app.UNSUPPORTED
    assert "the Sin" in out
    status, out, _ = command("check", made / "bundle", "--json")
    assert (status, json.loads(out)["ok"]) == (0, True)


def test_check_takes_the_shapes_that_a_file_leaves_free(tmp_path, command):
    (tmp_path / "m.onnx").write_bytes(one("Transpose", [4, "n"], perm=[1, 0]).SerializeToString())
    np.save(tmp_path / "x.npy", floats(4, 5))
    status, out, _ = command("check", tmp_path / "m.onnx")
    assert status == app.UNSUPPORTED
    status, out, _ = command("check", tmp_path / "m.onnx", "--shape", "x=4,5", "--sample", tmp_path / "x.npy", "--json")
    report = json.loads(out)
    assert (status, report["ok"], report["outputs"][0]["shape"]) == (0, True, [5, 4])
    for wrong in ("x", "x=4,n", "x=4,0", "=4,5", "z=4,5", "x=3,5"):
        status, _, err = command("check", tmp_path / "m.onnx", "--shape", wrong)
        assert (status, "shape" in err) == (app.INPUT, True)


def test_check_estimates_what_a_prediction_costs(tmp_path, command):
    (tmp_path / "m.onnx").write_bytes(mlp())
    call = ["check", tmp_path / "m.onnx", "--batch", "3"]
    status, out, _ = command(*call, "--json")
    found = json.loads(out)["estimate"]
    assert (status, found["batch"], found["protocol"], found["online_s"]) == (0, 3, "fss", None)
    assert [row["name"] for row in found["layers"]] == ["input", "fc1", "relu1", "fc2", "output"]
    assert sum(row["online_bytes"] for row in found["layers"]) == found["online_bytes"]
    status, out, _ = command(*call)
    assert f"{found['online_bytes']:,}" in out
    assert "there and back" not in out
    status, out, _ = command(*call, "--rtt", "40ms", "--bandwidth", "100mbit")
    assert status == 0
    assert "over 40 ms there and back, 100 Mbit/s" in out
    status, out, _ = command(*call, "--network", "lan", "--protocol", "crypten", "--json")
    found = json.loads(out)["estimate"]
    assert (found["protocol"], found["network"]["rtt_s"]) == ("crypten", 0.0005)
    assert found["online_s"] > found["rounds"] * 0.00025
    assert command(*call, "--network", "moon")[0] == app.INPUT
    assert command(*call, "--protocol", "none")[0] == app.UNSUPPORTED


def test_check_writes_the_rewritten_model_and_reports_it(tmp_path, command):
    nodes = [helper.make_node("Identity", ["x"], ["h"]), helper.make_node("Relu", ["h"], ["y"], name="top")]
    model, target = tmp_path / "m.onnx", tmp_path / "fixed.onnx"
    model.write_bytes(build(nodes, {"x": ["n", 4]}, ["y"], {"unused": floats(3)}).SerializeToString())
    status, out, _ = command("check", model, "--fix", target, "--json")
    assert status == 0
    assert "removed 1 Identity nodes" in json.loads(out)["rewrites"]
    assert [n.op_type for n in onnx.load(target).graph.node] == ["Relu"]
    assert "nothing to do" in command("check", target, "--fix", target)[1]
    assert command("check", model, "--fix", tmp_path / "no" / "where.onnx")[0] == app.INPUT
    model.write_bytes(b"damaged")
    assert command("check", model, "--fix", tmp_path / "other.onnx")[0] == app.INPUT
    assert not (tmp_path / "other.onnx").exists()


@pytest.mark.parametrize(
    ("scale", "status", "said", "warned"),
    [(1.0, 0, "runs under encryption", ""), (20.0, 0, "close", "'the Relu'"), (40.0, app.UNSUPPORTED, "too large", "")],
)
def test_check_with_a_sample_shows_the_largest_values_and_fails_beyond_the_bounds(
    tmp_path, command, scale, status, said, warned
):
    model, x = tmp_path / "m.onnx", tmp_path / "x.npy"
    nodes = [
        helper.make_node("Mul", ["x", "c"], ["h"], name="scale"),
        helper.make_node("Relu", ["h"], ["y"], name="the Relu"),
    ]
    model.write_bytes(build(nodes, {"x": ["n", 4]}, ["y"], {"c": np.float32(scale)}).SerializeToString())
    np.save(x, np.full((2, 4), 1000, np.float32))
    code, out, err = command("check", model, "--sample", x)
    assert code == status
    assert said in out
    assert "32768" in out
    assert ("reach half" in err and warned in err) if warned else "reach half" not in err
    code, out, err = command("check", model, "--sample", x, "--json")
    report = json.loads(out)
    assert (code, report["ok"], report["in_range"]) == (status, True, status == 0)
    assert {row["name"]: row["largest"] for row in report["ranges"]}["the Relu"] == 1000 * scale


def test_check_takes_a_sample_of_several_inputs(tmp_path, command):
    nodes = [helper.make_node("Add", ["a", "b"], ["h"]), helper.make_node("Relu", ["h"], ["y"], name="top")]
    (tmp_path / "m.onnx").write_bytes(build(nodes, {"a": ["n", 2], "b": ["n", 2]}, ["y"]).SerializeToString())
    np.savez(tmp_path / "x.npz", a=np.ones((3, 2), np.float32), b=2 * np.ones((3, 2), np.float32))
    status, out, _ = command("check", tmp_path / "m.onnx", "--sample", tmp_path / "x.npz", "--json")
    assert (status, [row["largest"] for row in json.loads(out)["ranges"]]) == (0, [3.0])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (np.zeros((2, 5), np.float32), "got shape (2, 5)"),
        (np.zeros((2, 4), np.int64), "int64"),
        (np.full((2, 4), np.nan, np.float32), "finite"),
        (np.full((2, 4), 1e6, np.float32), "must lie in"),
        (np.array([None, {}]), "must be a .npy file of numbers"),
        (b"no array", "must be a .npy file of numbers"),
        (None, "must be a readable .npy file"),
    ],
    ids=["shape", "dtype", "nan", "range", "pickle", "text", "absent"],
)
def test_a_bad_sample_is_refused_with_a_message(tmp_path, command, content, message):
    (tmp_path / "m.onnx").write_bytes(one("Relu", ["n", 4]).SerializeToString())
    if isinstance(content, bytes):
        (tmp_path / "x.npy").write_bytes(content)
    elif content is not None:
        np.save(tmp_path / "x.npy", content)
    status, _, err = command("check", tmp_path / "m.onnx", "--sample", tmp_path / "x.npy")
    assert (status, message in " ".join(err.split())) == (app.INPUT, True)


@pytest.mark.usefixtures("in_open_session")
def test_an_export_records_headroom_and_predict_says_before_it_works_that_it_is_small(made, tmp_path, command):
    manifest = read_bundle(made / "bundle")[0]
    assert min(bits for layers in manifest.headroom.values() for bits in layers.values()) > 0
    shutil.copytree(made / "bundle", tmp_path / "bundle")
    near = replace(manifest, headroom={"comparison": {"some layer": 0}})
    (tmp_path / "bundle" / MANIFEST).write_text(near.to_json())
    status, out, err = command("predict", tmp_path / "bundle", made / "x.npy", "--json")
    assert status == 0
    assert set(json.loads(out)) == {"outputs", "cost"}
    assert "'some layer' (comparison) reach half" in " ".join(err.split())
    assert ".py" not in err


# --- bad input ------------------------------------------------------------------------------------------------------


def bad_input(name: str, made: Path, tmp_path: Path) -> tuple[list[object], str]:
    """Return the arguments of `predict` and a part of the message."""
    key = made / "run" / "keys" / "digit.key"
    x = np.load(made / "x.npy")
    call: list[object] = ["predict", made / "bundle", tmp_path / "x.npy"]
    if name == "wrong shape":
        x = x[:, :, :8]
        message = "shape"
    elif name == "wrong dtype":
        x = (255 * x).astype(np.uint8)
        message = "uint8"
    elif name == "nan":
        x[0, 0, 0, 0] = np.nan
        message = "finite"
    elif name == "infinity":
        x[0, 0, 0, 0] = np.inf
        message = "finite"
    elif name == "out of range":
        x[0, 0, 0, 0] = 1e12
        message = "must lie in"
    elif name == "no samples":
        x = x[:0]
        message = "n >= 1"
    elif name == "task that the model lacks":
        (unknown,) = draw_keys(["colour"], x.shape[1:]).values()
        unknown.save(tmp_path / "colour.key")
        call += ["--open-task", "colour", "--key-files", tmp_path / "colour.key"]
        message = "'colour'"
    elif name == "key of another model":
        call += ["--open-task", "digit", "--key-files", made / "foreign-digit.key"]
        message = "another one"
    elif name == "wrong passphrase":
        load_key(key).save(tmp_path / "locked.key", "right")
        (tmp_path / "secret").write_text("wrong\n")
        call += [
            "--open-task",
            "digit",
            "--key-files",
            tmp_path / "locked.key",
            "--passphrase-file",
            tmp_path / "secret",
        ]
        message = "passphrase is wrong"
    elif name == "passphrase nowhere":
        load_key(key).save(tmp_path / "locked.key", "right")
        call += ["--open-task", "digit", "--key-files", tmp_path / "locked.key"]
        message = "typed at a terminal"
    elif name == "damaged key":
        (tmp_path / "bad.key").write_bytes(key.read_bytes()[:100])
        call += ["--open-task", "digit", "--key-files", tmp_path / "bad.key"]
        message = "must be a key file"
    elif name == "key that others may read":
        shutil.copy(key, tmp_path / "open.key")
        (tmp_path / "open.key").chmod(0o644)
        call += ["--open-task", "digit", "--key-files", tmp_path / "open.key"]
        message = "chmod 600"
    elif name == "keys for nothing":
        call += ["--key-files", made / "run"]
        message = "digit, parity by --open-task"
    elif name == "no key for a task":
        call += ["--open-task", "parity", "--key-files", key]
        message = "none for parity"
    elif name == "edited bundle":
        shutil.copytree(made / "bundle", tmp_path / "bundle")
        data = bytearray((tmp_path / "bundle" / "cloud.onnx").read_bytes())
        data[len(data) // 2] ^= 1
        (tmp_path / "bundle" / "cloud.onnx").write_bytes(data)
        call[1] = tmp_path / "bundle"
        message = "SHA-256"
    elif name == "missing model":
        call[1] = tmp_path / "nothing"
        message = "nothing"
    elif name == "missing input":
        call[2] = tmp_path / "nothing.npy"
        message = "No such file"
    elif name == "pickled input":
        np.save(tmp_path / "x.npy", np.array([{}], dtype=object), allow_pickle=True)
        return call, "numbers"
    elif name == "input that is no array":
        (tmp_path / "x.npy").write_text("hello")
        return call, "numbers"
    elif name == "port out of range":
        call += ["--keeper-port", 70000]
        message = "0..65535"
    elif name == "folder of --out missing":
        call += ["--out", tmp_path / "nowhere" / "y.npz"]
        message = "folder"
    else:
        raise AssertionError(name)
    np.save(tmp_path / "x.npy", x)
    return call, message


STOPS_EARLY = ["wrong dtype", "nan", "infinity", "passphrase nowhere", "damaged key", "missing model", "missing input"]
STOPS_EARLY += ["keys for nothing", "no key for a task"]
STOPS_EARLY += ["pickled input", "input that is no array", "port out of range", "folder of --out missing"]
IN_SESSION = ["wrong shape", "out of range", "no samples", "task that the model lacks", "edited bundle"]
AT_ITS_START = ["key of another model", "wrong passphrase", "key that others may read"]


@pytest.mark.parametrize("name", AT_ITS_START)
def test_a_bad_key_is_refused_with_its_own_message(name, made, tmp_path, command):
    check_refusal(name, made, tmp_path, command)


@pytest.mark.parametrize("name", STOPS_EARLY)
def test_bad_input_is_refused_before_a_session_starts(name, made, tmp_path, command, monkeypatch):
    monkeypatch.setattr(Session, "start", lambda self: pytest.fail("a session was started"))
    check_refusal(name, made, tmp_path, command)


@pytest.mark.parametrize("name", IN_SESSION)
@pytest.mark.usefixtures("in_open_session")
def test_bad_input_is_refused_by_the_session(name, made, tmp_path, command, open_session):
    check_refusal(name, made, tmp_path, command)
    assert open_session.load(made / "bundle").predict(np.load(made / "x.npy"))["large"].shape == (3, 2)


def check_refusal(name, made, tmp_path, command):
    call, message = bad_input(name, made, tmp_path)
    before = files(tmp_path)
    status, _, err = command(*call, *([] if "--out" in call else ["--out", tmp_path / "y.npz"]))
    assert status == app.INPUT
    assert message in err
    assert files(tmp_path) - {"x.npy"} == before - {"x.npy"}


def test_a_port_in_use_is_refused(made, command):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        status, _, err = command("predict", made / "bundle", made / "x.npy", "--keeper-port", port)
    assert status == app.INPUT
    assert str(port) in err


@pytest.mark.usefixtures("in_open_session")
def test_an_unsupported_model_is_refused_by_node(tmp_path, command):
    (tmp_path / "bad.onnx").write_bytes(one("Sin", ["n", 4]).SerializeToString())
    np.save(tmp_path / "x.npy", floats(2, 4))
    status, out, err = command("predict", tmp_path / "bad.onnx", tmp_path / "x.npy")
    assert (status, out) == (app.UNSUPPORTED, "")
    assert "'the Sin'" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "letters"], "digits, shapes"),
        (["train", "shapes", "--data", "n_train"], "NAME=VALUE"),
        (["train", "shapes", "--data", "seed=1", "--data", "seed=2"], "each name once"),
        (["train", "shapes", "--data", "n_train=many"], "n_train must be a whole number"),
        (["train", "shapes", "--data", "law=none"], "table of probabilities"),
        (["train", "shapes", "--data", "colour=red"], "options of shapes must be among law, n_train"),
        (["train", "images", "--data", "path=nowhere"], "must be a folder that holds images"),
        (["train", "utkface"], "path given"),
        (["train", "digits", "--secure", "colour"], "colour"),
        (["train", "digits", "--secure", "digit", "--secure", "digit"], "unique"),
        (["train", "digits", "--epochs", "0"], "epochs"),
        (["train", "digits", "--decoys", "-1"], "decoys"),
        (["train", "digits", "--secure", "digit", "--lock"], "--passphrase-file"),
    ],
)
def test_bad_input_of_train_leaves_no_folder(arguments, message, tmp_path, command):
    status, _, err = command(*arguments, "--out", tmp_path / "run")
    assert status == app.INPUT
    assert message in err
    assert files(tmp_path) == set()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "guess,steal"], "got steal"),
        (["--out", "absent/attack.json"], "folder that is there"),
        (["--out", "attack.txt"], ".json file"),
    ],
)
def test_bad_input_of_attack_is_refused_before_anything_runs(arguments, message, tmp_path, command, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, _, err = command("attack", tmp_path / "run", *arguments)
    assert (status, message in err) == (app.INPUT, True)
    assert files(tmp_path) == set()


def test_attack_needs_a_run_with_secured_tasks(tmp_path, command):
    status, _, err = command("attack", tmp_path)
    assert (status, "folder of a run" in err) == (app.INPUT, True)
    run_folder.train_run(tmp_path / "open", "digits", [], TrainConfig(epochs=1))
    status, _, err = command("attack", tmp_path / "open", "--only", "membership")
    assert (status, "secured task" in err) == (app.INPUT, True)
    assert not (tmp_path / "open" / "attack.json").exists()


def test_a_folder_with_other_files_is_never_replaced(tmp_path, command, made):
    (tmp_path / "precious.txt").write_text("mine")
    for call in (
        ["demo", "--out", tmp_path],
        ["train", "digits", "--out", tmp_path],
        ["export", made / "run", tmp_path, "--overwrite"],
    ):
        status, _, err = command(*call)
        assert status == app.INPUT
        assert "hold" in err
    assert files(tmp_path) == {"precious.txt"}


def test_a_damaged_run_is_refused(tmp_path, command, made):
    assert command("evaluate", tmp_path)[0] == app.INPUT
    for name, content in {"run.json": b"{}", "checkpoint.pt": b"not torch's"}.items():
        folder = tmp_path / name
        shutil.copytree(made / "run", folder)
        (folder / name).write_bytes(content)
        status, _, err = command("export", folder, tmp_path / "bundle")
        assert (status, name in err) == (app.INPUT, True)
    assert not (tmp_path / "bundle").exists()


def test_wrong_usage_ends_with_2(command):
    assert command("predict", "only-one-argument")[0] == app.USAGE
    assert command("conquer")[0] == app.USAGE
    assert command("check", "x", "--no-such-option")[0] == app.USAGE


# --- errors and signals ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (InputError("x"), 3),
        (ShapeError("x"), 3),
        (RangeError("x"), 3),
        (BundleError("x"), 3),
        (KeyRefused("x"), 3),
        (UnsupportedError("x"), 4),
        (PeerLost("x"), 5),
        (PeerTimeout("x"), 5),
        (DealerError("x"), 5),
        (IntegrityError("x"), 5),
        (OSError(28, "No space left on device"), 6),
        (KeyboardInterrupt(), 130),
        (ZeroDivisionError("secret 42"), 1),
    ],
)
def test_each_kind_of_error_has_its_exit_status(error, status, capfd, monkeypatch):
    def fails(*arguments: object, **options: object) -> None:
        raise error

    monkeypatch.setattr(check, "check_model", fails)
    assert app.run(["check", "model.onnx"]) == status
    out, err = capfd.readouterr()
    assert out == ""
    assert "Traceback" not in err
    assert "42" not in err
    if isinstance(error, SecureError):
        assert err == f"securemtk: {'aborted, nothing was revealed: ' if status == 5 else ''}x\n"


def limited(*arguments: object, file_bytes: int) -> subprocess.CompletedProcess:
    """Run the program where the system refuses to make a file larger than `file_bytes`, as a full disk would."""
    return subprocess.run(
        [sys.executable, "-m", "securemtk.cli.app", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, file_bytes)),
    )


@pytest.mark.parametrize("what", ["predict", "export", "train", "keys"])
def test_a_full_disk_ends_with_6_and_leaves_nothing_behind(what, made, tmp_path):
    np.save(tmp_path / "x.npy", np.repeat(np.load(made / "x.npy"), 50, axis=0))
    shutil.copytree(made / "run" / "keys", tmp_path / "keys")
    (tmp_path / "secret").write_text("secret\n")
    keys = {path.name: path.read_bytes() for path in (tmp_path / "keys").iterdir()}
    call, limit = {
        "predict": (["predict", made / "bundle", tmp_path / "x.npy", "--out", tmp_path / "y.npz"], 2000),
        "export": (["export", made / "run", tmp_path / "bundle"], 20_000),
        "train": (["train", "digits", "--secure", "digit", "--out", tmp_path / "run"], 100),
        "keys": (["keys", "lock", tmp_path / "keys", "--new-passphrase-file", tmp_path / "secret"], 100),
    }[what]
    before = files(tmp_path)
    done = limited(*call, file_bytes=limit)
    assert done.returncode == app.SYSTEM, done.stderr
    assert "File too large" in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    assert files(tmp_path) == before
    assert {path.name: path.read_bytes() for path in (tmp_path / "keys").iterdir()} == keys


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, app.INTERRUPTED), (signal.SIGTERM, app.TERMINATED)])
def test_a_stopped_demo_leaves_no_file_and_no_process(number, status, tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-m", "securemtk.cli.app", "demo", "--out", str(tmp_path / "demo")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_until(lambda: list(tmp_path.glob(".demo.*/new/checkpoint.pt")), "training is over", running=process)
    process.send_signal(number)
    out, err = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == status
    assert out == ""
    assert "Traceback" not in err
    assert files(tmp_path) == set()
    assert not alive(process.pid)
