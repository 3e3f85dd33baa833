"""The benchmarks run, say what they must, refuse what they must and leave nothing behind; no times are judged."""

import ast
import contextlib
import json
import os
import signal
import subprocess
import sys
import uuid
from pathlib import Path

import numpy as np
import pytest
from helpers import PATIENCE_S, ROOT, alive, wait_until

from benchmarks import costs, primitives, report
from benchmarks.latency import run
from benchmarks.latency.processes import RunnerError, run_json
from benchmarks.networks.models import NETWORKS, float_scores
from benchmarks.networks.onnx_models import run_float, to_onnx
from benchmarks.peers import setup_spu

PNG = b"\x89PNG"
TINY = ("--models", "tiny", "--batch", "2", "--repeats", "1", "--ours", "2")


# --- networks -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tiny", "mlp", "cnn"])
def test_onnxruntime_and_the_reference_of_the_peers_agree(name):
    network = NETWORKS[name]
    x = network.inputs(3)
    scores = run_float(to_onnx(network, name), x)
    assert scores.shape == (3, 10)
    np.testing.assert_allclose(float_scores(network, x), scores, atol=1e-4)


def test_weights_and_inputs_are_those_on_which_earlier_figures_were_measured():
    weights = NETWORKS["mlp"].weights()
    np.testing.assert_allclose(weights[0][0][0, :3], np.float32([0.006350335, -0.0066723023, 0.03234623]), rtol=1e-5)
    np.testing.assert_allclose(weights[2][1][:2], np.float32([-0.2497098, 0.038097996]), rtol=1e-5)
    np.testing.assert_allclose(NETWORKS["cnn"].inputs(1).ravel()[:2], np.float32([0.34558418, 0.82161814]), rtol=1e-5)
    assert sum(w.size + b.size for w, b in NETWORKS["vgg16"].weights()) == 14_982_474


def imports(path: Path) -> set[str]:
    """Return the modules that a file imports."""
    tree = ast.parse(path.read_text())
    found = {alias.name for n in ast.walk(tree) if isinstance(n, ast.Import) for alias in n.names}
    return found | {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}


@pytest.mark.parametrize("name", ["__init__", "crypten_functions", "crypten_peer", "spu_peer", "setup_spu"])
def test_a_peer_imports_nothing_of_ours_but_the_networks(name):
    found = imports(ROOT / "benchmarks" / "peers" / f"{name}.py")
    ours = {module for module in found if module.split(".")[0] in ("protocols", "securemtk", "benchmarks")}
    assert ours <= {"benchmarks.networks.models"}
    networks = imports(ROOT / "benchmarks" / "networks" / "models.py")
    foreign = {module.split(".")[0] for module in networks} - sys.stdlib_module_names
    assert foreign == {"numpy"}


# --- costs ----------------------------------------------------------------------------------------------------------


def test_the_cost_table_in_docs_is_what_the_command_prints():
    assert (ROOT / "docs" / "costs.md").read_text() == costs.document() + "\n"


def test_the_cost_table_has_every_declared_cost_and_its_words():
    found = {name: costs.words(function) for name, function, _ in costs.declared()}
    assert {"compare.relu", "linear.apply", "party.truncate", "gate.close_outputs"} <= set(found)
    assert all("round" in words for words in found.values())


def test_key_material_of_a_comparison_is_at_most_460_bytes_to_each_party():
    for received in costs.key_bytes().values():
        assert 404 <= received["user"] <= received["keeper"] <= 460


# --- arguments ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--models", "resnet"], "got resnet"),
        (["--models", "mlp,cnn", "--batch", "1,2,3"], "got 3"),
        (["--batch", "0"], "1 or more"),
        (["--repeats", "some"], "1 or more"),
        (["--peers", "mpyc"], "got mpyc"),
        (["--throughput", "--models", "mlp,cnn"], "one model"),
        (["--throughput", "--peers", "crypten"], "no peers"),
        (["--peers"], "benchmarks.peers.setup_spu"),
    ],
)
def test_a_wrong_argument_ends_with_status_2_and_says_what_is_wrong(arguments, message, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(setup_spu, "PYTHON", tmp_path / "absent")
    with pytest.raises(SystemExit) as ended:
        run.parse(arguments)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_the_command_of_the_goals_means_what_it_says(monkeypatch):
    monkeypatch.setattr(setup_spu, "PYTHON", Path(sys.executable))
    settings = run.parse(["--models", "mlp,cnn,vgg16", "--batch", "4,4,1", "--peers", "--repeats", "7"]).settings
    assert settings.jobs == (run.Job("mlp", 4), run.Job("cnn", 4), run.Job("vgg16", 1))
    assert settings.peers == ("crypten", "spu")
    assert settings.repeats == 7
    turns = [run.share(settings.repeats, settings.turns, turn) for turn in range(settings.turns)]
    assert sum(turns) == 7
    assert min(turns) >= 1


# --- results --------------------------------------------------------------------------------------------------------


def test_a_summary_has_quantiles_and_all_samples():
    found = report.summary([float(v) for v in range(101)])
    assert (found["n"], found["p50"], found["p90"], found["p99"]) == (101, 50, 90, 99)
    assert (found["min"], found["max"], len(found["samples"])) == (0, 100, 101)


def turn_of_ours(online: list[float], peak: int) -> dict:
    layer = {"name": "fc0", "op": "matmul", "seconds": online[0], "bytes": 8, "rounds": 1}
    return {
        "online_s": online,
        "demand_s": [2 * s for s in online],
        "offline_s": [0.1] * len(online),
        "wall_s": online,
        "online_bytes": 8,
        "offline_bytes": 80,
        "rounds": 2,
        "chunks": 1,
        "error": peak / 1e5,
        "peak_bytes": {"keeper": peak, "user": 1, "authority": 1},
        "layers": [layer],
    }


def test_ratios_are_those_of_medians_over_all_turns():
    answers = {
        "ours": [turn_of_ours([0.1, 0.2], 100), turn_of_ours([0.3], 300)],
        "crypten": [
            {"version": "1", "seconds": [3.0, 4.0], "error": 0.1},
            {"version": "1", "seconds": [5.0], "error": 0.2},
        ],
        "spu": [{"version": "1", "seconds": [2.0], "error": 0.1}],
    }
    found = run._result(run.Job("cnn", 4), answers)
    assert found["ratios"]["online"] == pytest.approx({"crypten": 20, "spu": 10})
    assert found["ratios"]["total_against_better"] == pytest.approx(2 / 0.5)
    assert found["peers"]["crypten"]["error"] == 0.2
    assert found["ours"]["peak_bytes"]["keeper"] == 300
    assert found["ours"]["error"] == 300 / 1e5
    assert found["ours"]["online_s"]["n"] == 3
    assert "20.0x (30x)" in run.times_table([found])


# --- processes ------------------------------------------------------------------------------------------------------


def marked(mark: str) -> list[int]:
    """Return the living processes that have `mark` in their environment."""
    found = []
    for folder in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if (
                folder.name.isdecimal()
                and mark.encode() in (folder / "environ").read_bytes()
                and alive(int(folder.name))
            ):
                found.append(int(folder.name))
    return found


def wait_until_gone(mark: str) -> None:
    """Wait until no process has the mark: roles end by themselves."""
    wait_until(lambda: not marked(mark), "all processes have ended")


@pytest.fixture
def mark():
    """A word for the environment of a command, by which its descendants are found."""
    return uuid.uuid4().hex


def test_a_runner_that_fails_is_reported_with_what_it_said():
    with pytest.raises(RunnerError, match=r"(?s)exit status 3.*what went wrong"):
        run_json([sys.executable, "-c", "import sys; print('what went wrong', file=sys.stderr); sys.exit(3)"], 30)


def test_a_runner_that_says_no_json_is_reported():
    with pytest.raises(RunnerError, match="JSON"):
        run_json([sys.executable, "-c", "print('hello')"], 30)


def test_a_runner_that_takes_too_long_is_ended_with_its_children(mark, monkeypatch):
    monkeypatch.setenv("SECUREMTK_TEST", mark)
    child = "import time; time.sleep(600)"
    code = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {child!r}]); time.sleep(600)"
    with pytest.raises(RunnerError, match="must end within 1 s"):
        run_json([sys.executable, "-c", code], 1)
    monkeypatch.delenv("SECUREMTK_TEST")
    wait_until_gone(mark)


def start(arguments: tuple[str, ...], folder: Path, mark: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "benchmarks.latency", *arguments, "--output", str(folder)]
    environment = os.environ | {"SECUREMTK_TEST": mark}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def test_a_run_writes_json_and_a_picture_prints_tables_and_leaves_no_process(tmp_path, mark):
    process = start(TINY, tmp_path, mark)
    out, err = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0, err
    wait_until_gone(mark)
    assert "| tiny, 2 |" in out
    assert (tmp_path / "latency.png").read_bytes().startswith(PNG)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latency.json", "latency.png"]
    content = json.loads((tmp_path / "latency.json").read_text())
    assert set(content) == {"command", "date", "commit", "machine", "settings", "key_bytes", "runs"}
    assert {"cpu", "cores", "python", "torch"} <= set(content["machine"])
    assert content["command"] == "python -m benchmarks.latency " + " ".join(TINY)
    (found,) = content["runs"]
    assert (found["model"], found["batch"], found["peers"]) == ("tiny", 2, {})
    mine = found["ours"]
    for name in ("online_s", "demand_s", "offline_s", "total_s", "wall_s"):
        assert mine[name]["n"] == 2
        assert (
            0 <= mine[name]["min"] <= mine[name]["p50"] <= mine[name]["p90"] <= mine[name]["p99"] <= mine[name]["max"]
        )
    assert mine["error"] < 0.005
    assert mine["rounds"] >= 2
    assert 0 < mine["online_bytes"] < mine["offline_bytes"]
    assert set(mine["peak_bytes"]) == {"keeper", "user", "authority"}
    assert min(mine["peak_bytes"].values()) > 1 << 20
    assert sum(layer["bytes"] for layer in mine["layers"]) == mine["online_bytes"]
    assert {"conv2d", "relu", "max_pool2d", "matmul"} <= {layer["op"] for layer in mine["layers"]}
    assert run.tables(content) + "\n" == out


def test_an_interrupted_run_leaves_no_process(tmp_path, mark):
    process = start(("--models", "tiny", "--repeats", "1", "--ours", "1000000"), tmp_path, mark)
    # The benchmark, the user's process, keeper and authority.
    wait_until(lambda: len(marked(mark)) == 4, "the roles have started", running=process)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 130
    wait_until_gone(mark)
    assert not list(tmp_path.iterdir())


def test_primitives_are_measured_in_a_session(tmp_path):
    content = primitives.run(["base", "relu"], 1024, 1, tmp_path)
    assert content == json.loads((tmp_path / "primitives.json").read_text())
    assert (tmp_path / "primitives.png").read_bytes().startswith(PNG)
    for name in ("base", "relu"):
        (found,) = content["primitives"][name]
        assert found["count"] == 1024
        assert found["error"] < 1e-3
    relu, base = (content["primitives"][name][0]["online_bytes"] for name in ("relu", "base"))
    assert relu - base >= 16 * 1024
    assert "| ReLU | 1,024 values |" in primitives.table(content)
