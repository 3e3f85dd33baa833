"""Export and bundles: what is written says what the module says, is whole, and is found out when it is not."""

import contextlib
import hashlib
import inspect
import json
import os
import resource
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import small_models
import torch
from helpers import ROOT
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import helper
from onnx_models import agrees, build, floats
from torch import nn

from protocols.errors import BundleError, RangeError, RangeWarning, ShapeError, UnsupportedError
from protocols.running.ranges import measure
from securemtk.onnx import bundle
from securemtk.onnx.bundle import read_bundle, read_model, write_bundle
from securemtk.onnx.export import OPSET, export_onnx, write_file
from securemtk.onnx.importer import load_onnx
from securemtk.onnx.manifest import MANIFEST, MODEL, Manifest
from securemtk.onnx.model.runtime import start
from securemtk.tasks import Task

TASKS = (Task("digit", 3, secured=True), Task("parity", 2))


class Heads(nn.Module):
    """Two tasks as a dict, in another order than that of the file."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5), nn.Flatten())
        self.digit, self.parity = nn.Linear(16, 3), nn.Linear(16, 2)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        z = self.trunk(x)
        return {"parity": self.parity(z), "digit": self.digit(z)}


@pytest.fixture(scope="module")
def module() -> Heads:
    torch.manual_seed(5)
    heads = Heads()
    heads.trunk[1].running_mean += 0.3
    return heads


@pytest.fixture(scope="module")
def data(module: Heads) -> bytes:
    return export_onnx(module, torch.rand(1, 1, 4, 4), ["digit", "parity"])


def arguments(**changes: object) -> dict:
    """Return what write_bundle needs beside folder and model."""
    covariance = np.diag([1.0, 2.0, 3.0]) + 0.5
    return {
        "model_id": "0123456789abcdef" * 2,
        "tasks": TASKS,
        "input_name": "input",
        "input_shape": (1, 4, 4),
        "low": 0.0,
        "high": 1.0,
        "answers": {"digit": {"mean": np.eye(3), "covariance": covariance}},
    } | changes


@pytest.fixture
def folder(tmp_path: Path, data: bytes) -> Path:
    write_bundle(tmp_path / "bundle", data, **arguments())
    return tmp_path / "bundle"


# --- export


def test_onnxruntime_reproduces_torch_on_any_batch(module, data):
    session = start(data)
    assert [x.name for x in session.get_outputs()] == ["digit", "parity"]
    module.eval()
    for batch in (1, 3, 17):
        x = torch.rand(batch, 1, 4, 4)
        with torch.no_grad():
            want = module(x)
        for name, got in zip(("digit", "parity"), session.run(None, {"input": x.numpy()}), strict=True):
            np.testing.assert_allclose(got, want[name].numpy(), atol=1e-5)


def test_an_export_imports_again(data):
    imported = agrees(data)
    assert [layer.op for layer in imported.program.layers] == ["conv2d", "relu", "reshape", "matmul", "matmul"]
    assert onnx.load_from_string(data).opset_import[0].version == OPSET


def test_an_export_tells_nothing_of_this_machine(data):
    model = onnx.load_from_string(data)
    text = str(model)
    assert "metadata_props" not in text
    assert "doc_string" not in text
    for word in (str(ROOT), os.path.expanduser("~"), ".py", "site-packages"):
        assert word.encode() not in data


def test_an_export_leaves_the_module_as_it_was(module):
    module.train()
    module.trunk[1].eval()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    export_onnx(module, torch.rand(2, 1, 4, 4), ["parity", "digit"])
    assert module.training
    assert module.trunk[3].training
    assert not module.trunk[1].training
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_an_export_writes_the_file_and_nothing_else(tmp_path, capfd):
    data = export_onnx(nn.Linear(3, 2), torch.rand(1, 3), ["y"], tmp_path / "m.onnx")
    assert capfd.readouterr() == ("", "")
    assert [x.name for x in tmp_path.iterdir()] == ["m.onnx"]
    assert (tmp_path / "m.onnx").read_bytes() == data


class Sorting(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[:1] if float(x.sum()) > 0 else x


class Unsteady(nn.Module):
    """Says something else each time."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return x * self.calls


def test_a_module_that_torch_cannot_export_is_refused_in_one_line(capfd):
    with pytest.raises(UnsupportedError, match=r"torch\.onnx\.export accepts; .*data-dependent") as caught:
        export_onnx(Sorting(), torch.rand(2, 3), ["y"])
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


def test_an_export_that_says_something_else_than_the_module_is_refused():
    with pytest.raises(BundleError, match="differ by"):
        export_onnx(Unsteady(), torch.rand(2, 3), ["y"])


@pytest.mark.parametrize(
    ("example", "names"),
    [
        (torch.rand(1, 1, 4, 4), ["digit", "colour"]),
        (torch.rand(1, 1, 4, 4), ["digit", "digit"]),
        (torch.rand(0, 1, 4, 4), ["digit", "parity"]),
        (torch.rand(1, 1, 4, 4).double(), ["digit", "parity"]),
        ((torch.rand(1, 1, 4, 4),) * 2, ["digit", "parity"]),
    ],
)
def test_an_example_or_names_that_do_not_fit_are_refused(module, example, names):
    with pytest.raises(ShapeError):
        export_onnx(module, example, names)


def test_an_export_into_a_folder_that_is_absent_is_refused(tmp_path):
    with pytest.raises(BundleError, match="must lie in a folder that is there"):
        write_file(tmp_path / "absent" / "m.onnx", b"")


# --- writing and reading


def test_a_bundle_is_read_as_it_was_written(tmp_path, data):
    written = write_bundle(tmp_path / "b", data, **arguments())
    manifest, model = read_bundle(tmp_path / "b")
    assert manifest == written
    assert model == data
    assert manifest.tasks == TASKS
    assert manifest.answers["digit"]["covariance"][0] == [1.5, 0.5, 0.5]
    assert manifest.files == {MODEL: {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}}
    assert set(manifest.versions) >= {"securemtk", "torch", "onnx", "onnxruntime"}
    assert {x.name for x in (tmp_path / "b").iterdir()} == {MANIFEST, MODEL}
    assert [x.name for x in tmp_path.iterdir()] == ["b"]


def test_a_bundle_is_for_its_owner_alone(folder):
    assert folder.stat().st_mode & 0o077 == 0


def test_a_manifest_goes_through_json_unchanged(folder):
    manifest = read_bundle(folder)[0]
    assert Manifest.from_json(manifest.to_json()) == manifest
    assert json.loads(manifest.to_json())["format"] == 1


def test_a_model_without_secured_tasks_has_no_answers(tmp_path, data):
    write_bundle(tmp_path / "b", data, **arguments(tasks=(Task("digit", 3), TASKS[1]), answers=None))
    assert read_bundle(tmp_path / "b")[0].answers == {}


def test_a_model_is_read_from_a_bundle_or_a_plain_file(folder, data, tmp_path):
    (tmp_path / "plain.onnx").write_bytes(data)
    assert read_model(folder) == read_bundle(folder)
    assert read_model(tmp_path / "plain.onnx") == (None, data)
    with pytest.raises(BundleError, match=r"absent\.onnx"):
        read_model(tmp_path / "absent.onnx")


def test_a_plain_model_is_read_with_its_external_data(tmp_path, data):
    onnx.save(
        onnx.load_from_string(data), tmp_path / "m.onnx", save_as_external_data=True, location="w", size_threshold=0
    )
    _, alone = read_model(str(tmp_path / "m.onnx"))
    x = floats(2, 1, 4, 4)
    for want, got in zip(start(data).run(None, {"input": x}), start(alone).run(None, {"input": x}), strict=True):
        np.testing.assert_array_equal(want, got)


def test_keys_are_never_in_a_bundle(folder):
    """No field or argument takes one, and nothing of the module knows what one is."""
    names = {*inspect.signature(write_bundle).parameters, *(f.name for f in fields(Manifest))}
    assert not [n for n in names if any(word in n for word in ("key", "mask", "pattern", "seed", "secret"))]
    text = (folder / MANIFEST).read_text()
    assert not any(f'"{word}' in text for word in ("key", "mask", "pattern", "seed"))
    assert "securemtk.mtk" not in inspect.getsource(bundle)


# --- damage


@pytest.mark.parametrize("name", [MANIFEST, MODEL])
def test_a_bundle_with_a_changed_byte_anywhere_is_refused(folder, name):
    whole = (folder / name).read_bytes()
    step = 7 if name == MANIFEST else 97
    for i in [*range(0, len(whole), step), len(whole) - 1]:
        (folder / name).write_bytes(whole[:i] + bytes([whole[i] ^ 1]) + whole[i + 1 :])
        with pytest.raises(BundleError, match=name.split(".")[0]):
            read_bundle(folder)
    (folder / name).write_bytes(whole)
    read_bundle(folder)


@pytest.mark.parametrize("name", [MANIFEST, MODEL])
def test_a_bundle_with_a_file_cut_off_lengthened_or_gone_is_refused(folder, name):
    whole = (folder / name).read_bytes()
    for changed in (whole[:-1], whole[: len(whole) // 2], b"", whole + b"\n"):
        (folder / name).write_bytes(changed)
        with pytest.raises(BundleError, match=name.split(".")[0]):
            read_bundle(folder)
    (folder / name).unlink()
    with pytest.raises(BundleError, match=f"'{name}' is missing"):
        read_bundle(folder)


def test_a_bundle_with_one_file_more_is_refused(folder):
    (folder / "digit.key").write_text("")
    with pytest.raises(BundleError, match=r"digit\.key"):
        read_bundle(folder)


@pytest.mark.parametrize("name", [MANIFEST, MODEL])
def test_a_bundle_with_a_link_a_folder_or_a_pipe_in_a_files_place_is_refused(folder, tmp_path, name):
    member, copy = folder / name, tmp_path / "copy"
    copy.write_bytes(member.read_bytes())
    for make in (lambda: member.symlink_to(copy), member.mkdir, lambda: os.mkfifo(member)):
        if member.is_symlink() or not member.is_dir():
            member.unlink()
        else:
            member.rmdir()
        make()
        with pytest.raises(BundleError, match=name):
            read_bundle(folder)


def test_what_is_no_folder_is_no_bundle(tmp_path):
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "file", tmp_path / "absent"):
        with pytest.raises(BundleError, match="cannot be opened"):
            read_bundle(path)


def forged(folder: Path, **changes: object) -> None:
    """Write a manifest with other fields and the right sums, as only a forger would."""
    manifest = read_bundle(folder)[0]
    (folder / MANIFEST).write_text(replace(manifest, **changes).to_json())


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"tasks": (TASKS[1], TASKS[0])}, "output"),
        ({"tasks": (TASKS[0], Task("parity", 3))}, "output"),
        ({"tasks": (TASKS[0], Task("colour", 2))}, "output"),
        ({"tasks": TASKS[:1]}, "output"),
        ({"input_name": "other"}, "input"),
        ({"input_shape": (1, 4, 5)}, "input"),
    ],
)
def test_a_manifest_that_does_not_fit_its_model_is_refused(folder, data, tmp_path, changes, word):
    with pytest.raises(BundleError, match=word):
        write_bundle(tmp_path / "new", data, **arguments(**changes))
    assert not (tmp_path / "new").exists()
    forged(folder, **changes)
    with pytest.raises(BundleError, match=word):
        read_bundle(folder)


def test_a_forged_model_must_still_be_a_model_that_runs(folder):
    nodes = [helper.make_node("Sin", ["input"], ["digit"]), helper.make_node("Sin", ["input"], ["parity"])]
    other = build(nodes, {"input": ["n", 1, 4, 4]}, ["digit", "parity"]).SerializeToString()
    (folder / MODEL).write_bytes(other)
    facts = {MODEL: {"sha256": hashlib.sha256(other).hexdigest(), "bytes": len(other)}}
    (folder / MANIFEST).write_text(edited((folder / MANIFEST).read_text(), {"files": facts}))
    with pytest.raises(UnsupportedError, match="Sin"):
        read_bundle(folder)


def edited(text: str, edit: dict, *, forge: bool = True) -> str:
    """Return a manifest with other entries (None: without them), with right sums if forged."""
    raw = json.loads(text)
    for name, value in edit.items():
        raw.pop(name) if value is None else raw.__setitem__(name, value)
    if not forge:
        return json.dumps(raw, sort_keys=True, indent=1)
    raw.pop("sha256", None)
    head = json.dumps(raw, sort_keys=True, indent=1)
    return head[:-2] + f',\n "sha256": "{hashlib.sha256(head.encode()).hexdigest()}"\n}}\n'


BAD_MANIFESTS = [
    {"low": 2.0},
    {"low": "0"},
    {"low": True},
    {"format": 2},
    {"format": True},
    {"model_id": "0" * 31},
    {"model_id": "X" * 32},
    {"tasks": []},
    {"tasks": {}},
    {"tasks": [{"name": "a", "classes": 2}]},
    {"tasks": [{"name": "a", "classes": "2", "secured": False}]},
    {"tasks": [{"name": "../a", "classes": 2, "secured": False}]},
    {"tasks": [{"name": "a", "classes": 2, "secured": 1}]},
    {"tasks": [{"name": "a", "classes": 2, "secured": False, "surprise": 1}]},
    {"tasks": [{"name": "a", "classes": 2, "secured": False, "labels": None}]},
    {"tasks": [{"name": "a", "classes": 2, "secured": False, "labels": ["x"]}]},
    {"tasks": [{"name": "a", "classes": 2, "secured": False, "labels": ["x", "x"]}]},
    {"tasks": [{"name": "a", "classes": 2, "secured": False, "labels": ["x", 1]}]},
    {"input_shape": [0]},
    {"input_shape": [1.5]},
    {"input_shape": "1"},
    {"input_name": ""},
    {"frac_bits": 60},
    {"frac_bits": 16.0},
    {"files": {}},
    {"files": {"../cloud.onnx": {"sha256": "0" * 64, "bytes": 1}}},
    {"files": {"cloud.onnx": {"sha256": "0" * 64}}},
    {"files": {"cloud.onnx": {"sha256": "0" * 64, "bytes": -1}}},
    {"files": [1]},
    {"answers": {}},
    {"answers": {"digit": {"mean": [[1.0]], "covariance": [[1.0]]}}},
    {"answers": {"digit": {"mean": "x", "covariance": 1}}},
    {"answers": {"digit": 1}},
    {"versions": {"torch": 2}},
    {"versions": None},
    {"headroom": 1},
    {"headroom": {"guess": {}}},
    {"headroom": {"comparison": 3}},
    {"headroom": {"comparison": {"relu": 2.5}}},
    {"headroom": {"comparison": {"relu": True}}},
    {"headroom": {"comparison": {"relu": 9}}},
    {"surprise": 1},
]


@pytest.mark.parametrize("edit", BAD_MANIFESTS, ids=str)
def test_a_manifest_that_breaks_a_rule_is_refused_even_with_right_sums(folder, edit):
    (folder / MANIFEST).write_text(edited((folder / MANIFEST).read_text(), edit))
    with pytest.raises(BundleError, match=r"manifest\.json"):
        read_bundle(folder)


def test_a_manifest_has_names_of_classes_where_there_are_some_and_is_unchanged_where_there_are_none(data, tmp_path):
    plain = write_bundle(tmp_path / "plain", data, **arguments())
    assert all(set(task) == {"name", "classes", "secured"} for task in json.loads(plain.to_json())["tasks"])
    labels = ("none", "one", "more")
    tasks = tuple(replace(task, labels=labels if task.classes == len(labels) else None) for task in TASKS)
    named = write_bundle(tmp_path / "named", data, **arguments(tasks=tasks))
    assert labels in [task.labels for task in named.tasks]
    assert read_bundle(tmp_path / "named")[0] == named
    assert json.loads(named.to_json())["tasks"][0].get("labels", list(labels)) == list(labels)


def test_a_manifest_tells_headroom_in_whole_doublings_and_nothing_without_samples(folder, data, tmp_path):
    assert "headroom" not in json.loads((folder / MANIFEST).read_text())
    assert read_bundle(folder)[0].headroom is None
    told = set()
    # Within a factor of 2 of each other the samples give the same manifest, and no digit of them stands in it.
    for i, x in enumerate([np.full((2, 1, 4, 4), 0.9, np.float32), np.full((3, 1, 4, 4), 0.91, np.float32)]):
        written = write_bundle(tmp_path / f"b{i}", data, **arguments(high=3e4), samples=[x * 2**10, x])
        assert read_bundle(tmp_path / f"b{i}")[0] == written
        told.add((tmp_path / f"b{i}" / MANIFEST).read_text())
    (text,) = told
    room = json.loads(text)["headroom"]
    assert set(room) == {"comparison", "truncation"}
    assert all(type(bits) is int for layers in room.values() for bits in layers.values())
    (bits,) = room["comparison"].values()
    imported = load_onnx(data)
    rows = measure(imported.program, imported.params, [{"input": np.full((1, 1, 4, 4), 0.9 * 2**10, np.float32)}])
    largest = next(row.largest for row in rows if row.step == "comparison")
    assert 2.0**14 <= largest * 2.0**bits < 2.0**15 or bits == 8


def test_samples_beyond_or_near_the_range_stop_an_export_or_are_warned_of(data, tmp_path):
    imported = load_onnx(small_models.mlp())
    unit = np.ones((1, 8), np.float32)
    rows = measure(imported.program, imported.params, [{"x": unit * 2**12}])
    scale = 2**12 / next(row.share for row in rows if row.step == "comparison")
    assert scale * 1.2 < 2**14
    about = arguments(tasks=(Task("y", 3),), input_name="x", input_shape=(8,), answers={}, low=-1e6, high=1e6)
    with pytest.warns(RangeWarning, match="comparison") as caught:
        write_bundle(tmp_path / "near", small_models.mlp(), **about, samples=[unit * scale * 0.8])
    assert caught[0].filename == __file__
    with pytest.raises(RangeError, match="comparison"):
        write_bundle(tmp_path / "beyond", small_models.mlp(), **about, samples=[unit, unit * scale * 1.2])
    assert not (tmp_path / "beyond").exists()
    with pytest.raises(RangeError, match="must lie in"):
        write_bundle(tmp_path / "outside", data, **arguments(), samples=[np.full((1, 1, 4, 4), 2, np.float32)])


@pytest.mark.parametrize("edit", [{"low": 0.5}, {"sha256": "0" * 64}, {"sha256": None}, {}])
def test_an_edited_manifest_is_refused(folder, edit):
    text = (folder / MANIFEST).read_text()
    assert edited(text, {}) == text
    (folder / MANIFEST).write_text(edited(text, edit, forge=False))
    with pytest.raises(BundleError, match=r"manifest\.json"):
        read_bundle(folder)


@pytest.mark.parametrize(
    "text", ["", "[]", "1", "null", "{", '{"low": NaN}', "[" * 100_000, '{"a": 1, "a": 2}', "\u00e4", '{"low": 1e999}']
)
def test_what_is_no_manifest_is_refused(folder, text):
    (folder / MANIFEST).write_text(text)
    with pytest.raises(BundleError, match=r"manifest\.json"):
        read_bundle(folder)


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    json_value=st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
        max_leaves=5,
    ),
    name=st.sampled_from([f.name for f in fields(Manifest)]),
)
def test_any_value_in_any_place_gives_an_error_of_ours(json_value, name):
    good = Manifest(
        **arguments(answers={}, tasks=TASKS[1:]), files={MODEL: {"sha256": "0" * 64, "bytes": 1}}, versions={}
    )
    try:
        manifest = Manifest.from_json(edited(good.to_json(), {name: json_value}))
    except BundleError:
        return
    assert manifest.to_json() == edited(good.to_json(), {name: json_value})


@pytest.mark.parametrize(
    ("mean", "covariance", "word"),
    [
        (np.eye(2), np.eye(3), "3 x 3"),
        (np.eye(3), np.ones((3, 2)), "3 x 3"),
        (np.eye(3), np.diag([1, 1, -1]), "eigenvalue"),
        (np.eye(3), np.triu(np.ones((3, 3))), "symmetric"),
        (np.full((3, 3), np.nan), np.eye(3), "3 x 3"),
    ],
)
def test_statistics_that_nobody_can_draw_from_are_refused(tmp_path, data, mean, covariance, word):
    answers = {"digit": {"mean": mean, "covariance": covariance}}
    with pytest.raises(BundleError, match=word):
        write_bundle(tmp_path / "b", data, **arguments(answers=answers))


# --- whole or not at all


def test_an_existing_folder_is_replaced_only_on_demand_and_only_a_bundle(folder, data, tmp_path):
    with pytest.raises(BundleError, match="overwrite"):
        write_bundle(folder, data, **arguments(high=2.0))
    assert read_bundle(folder)[0].high == 1.0
    write_bundle(folder, data, **arguments(high=2.0), overwrite=True)
    assert read_bundle(folder)[0].high == 2.0
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("work of years")
    for target in (precious, precious / "thesis.txt"):
        with pytest.raises(BundleError, match="something else"):
            write_bundle(target, data, **arguments(), overwrite=True)
    assert (precious / "thesis.txt").read_text() == "work of years"
    assert {x.name for x in tmp_path.iterdir()} == {"bundle", "precious"}


@contextlib.contextmanager
def small_disk():
    """Let this process write files of at most 100 bytes: the kernel refuses more, as on a full disk.

    Only around the call under test: pytest's own output may go to a file.
    """
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_leaves_nothing(tmp_path, data):
    write_bundle(tmp_path / "old", data, **arguments())
    for name, overwrite in (("new", False), ("old", True)):
        with small_disk(), pytest.raises(BundleError, match="cannot be written"):
            write_bundle(tmp_path / name, data, **arguments(high=3.0), overwrite=overwrite)
    assert [x.name for x in tmp_path.iterdir()] == ["old"]
    assert read_bundle(tmp_path / "old")[0].high == 1.0


def test_a_full_disk_leaves_no_exported_file(tmp_path):
    (tmp_path / "m.onnx").write_bytes(b"old")
    with small_disk(), pytest.raises(BundleError, match="cannot be written"):
        write_file(tmp_path / "m.onnx", bytes(1000))
    assert [x.name for x in tmp_path.iterdir()] == ["m.onnx"]
    assert (tmp_path / "m.onnx").read_bytes() == b"old"


def test_an_interrupted_replacement_puts_the_old_bundle_back(folder, data, monkeypatch):
    real = os.rename

    def rename(source: os.PathLike, target: os.PathLike) -> None:
        if Path(source).name == "new":
            raise OSError(5, "Input/output error")
        real(source, target)

    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(BundleError, match="Input/output error"):
        write_bundle(folder, data, **arguments(high=2.0), overwrite=True)
    monkeypatch.undo()
    assert read_bundle(folder)[0].high == 1.0
    assert [x.name for x in folder.parent.iterdir()] == [folder.name]


def test_a_folder_that_cannot_be_made_is_an_error_of_ours(tmp_path, data):
    with pytest.raises(BundleError, match="cannot be written"):
        write_bundle(tmp_path / "absent" / "b", data, **arguments())


def test_a_model_with_a_fixed_batch_is_no_bundle(tmp_path):
    nodes = [helper.make_node("Flatten", ["input"], ["f"]), helper.make_node("MatMul", ["f", "w"], ["digit"])]
    model = build(nodes, {"input": [1, 1, 4, 4]}, ["digit"], {"w": floats(16, 3)}).SerializeToString()
    with pytest.raises(BundleError, match="batch free"):
        write_bundle(tmp_path / "b", model, **arguments(tasks=TASKS[:1]))
