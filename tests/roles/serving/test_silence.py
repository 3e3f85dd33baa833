"""Nothing tells of our users: what appears below an empty home, and what the environment is left as."""

import ast
import os
import subprocess
import sys

import numpy as np
import pytest
import small_models
import write_guard
from helpers import ROOT, SUPPORT
from onnx_models import floats

from securemtk.support.silence import SILENT, silently

NAME = "ORT_DISABLE_TELEMETRY"


@pytest.fixture
def at_home(tmp_path):
    """Run Python with an empty home; return what it has printed, and which files are below the home then."""
    home = tmp_path / "home"
    home.mkdir()

    def call(*arguments: object, xdg: bool = False, **more: str) -> tuple[str, set[str]]:
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("XDG_", "MPL", NAME))}
        folders = ("XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME", "XDG_STATE_HOME") if xdg else ()
        env = kept | {"HOME": str(home)} | {name: str(home / name) for name in folders}
        path = os.pathsep.join([str(ROOT), str(SUPPORT), env.get("PYTHONPATH", "")])
        for name in folders:
            (home / name).mkdir(exist_ok=True)
        done = subprocess.run(
            [sys.executable, *map(str, arguments)],
            cwd=tmp_path,
            env=env | {"PYTHONPATH": path} | more,
            capture_output=True,
            text=True,
            timeout=280,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout, {str(x.relative_to(home)) for x in home.rglob("*") if not x.is_dir()}

    return call


def without_fonts(found: set[str]) -> set[str]:
    return {name for name in found if "matplotlib/fontlist" not in name}


SESSIONS = """
import os
import numpy as np, small_models, securemtk
x = np.ones((2, 8), dtype=np.float32)
with securemtk.Session() as session:
    session.load(small_models.mlp()).predict(x)
with securemtk.InferenceSession(small_models.mlp()) as session:
    session.run(None, {"x": x})
print(os.environ.get("ORT_DISABLE_TELEMETRY"))
"""


def test_sessions_leave_no_file_in_an_empty_home_and_the_environment_as_it_was(at_home):
    out, found = at_home("-c", SESSIONS)
    assert found == set()
    assert out == "None\n"


def test_the_command_line_leaves_fonts_alone(at_home, tmp_path):
    (tmp_path / "m.onnx").write_bytes(small_models.mlp())
    np.save(tmp_path / "x.npy", floats(2, 8))
    cli = ("-m", "securemtk.cli.app")
    for arguments in (
        ("train", "digits", "--secure", "digit", "--epochs", "1", "--out", "run"),
        ("export", "run", "bundle"),
        ("predict", "m.onnx", "x.npy"),
    ):
        _, found = at_home(*cli, *arguments)
        assert without_fonts(found) == set(), arguments


def test_whatever_of_ours_is_imported_leaves_no_file(at_home):
    _, found = at_home("-c", "import securemtk.crypten_backend, securemtk.serving.role, securemtk.cli.app", xdg=True)
    assert without_fonts(found) == set()
    assert at_home("-c", "import benchmarks.networks.onnx_models")[1] == found


def test_roles_are_silent_whatever_the_users_environment_says(at_home):
    code = "import os, small_models, securemtk, pathlib\n" + (
        "with securemtk.Session() as session:\n"
        "    session.start()\n"
        "    for pid in session.pids.values():\n"
        "        said = pathlib.Path(f'/proc/{pid}/environ').read_bytes().split(bytes(1))\n"
        f"        print(*[x.decode() for x in said if x.startswith(b'{NAME}')])\n"
        f"print(os.environ['{NAME}'])\n"
    )
    out, _ = at_home("-c", code, **{NAME: "0"})
    assert out.split() == [f"{NAME}=1", f"{NAME}=1", "0"]


def test_onnxruntime_that_the_user_has_imported_before_is_left_alone(at_home):
    code = f"import os, onnxruntime; os.environ['{NAME}'] = 'mine'; import securemtk; print(os.environ['{NAME}'])"
    out, _ = at_home("-c", code)
    assert out == "mine\n"


def silent_while(library: str) -> str | None:
    with silently(library):
        return os.environ.get(NAME)


def test_the_environment_changes_for_the_import_alone(monkeypatch):
    monkeypatch.delenv(NAME)
    assert silent_while("a_library_that_nobody_has") == SILENT[NAME] == "1"
    assert NAME not in os.environ
    assert silent_while("os") is None  # imported already: nothing is changed
    monkeypatch.setenv(NAME, "0")
    assert silent_while("a_library_that_nobody_has") == "0"  # the user has said so
    assert os.environ[NAME] == "0"


def test_the_environment_comes_back_after_an_import_that_fails(monkeypatch):
    monkeypatch.delenv(NAME)
    with pytest.raises(ImportError), silently("a_library_that_nobody_has"):
        import a_library_that_nobody_has  # noqa: F401
    assert NAME not in os.environ


def test_every_import_of_onnxruntime_is_a_silent_one():
    found = 0
    for path in [*(ROOT / "securemtk").rglob("*.py"), *(ROOT / "protocols").rglob("*.py")]:
        tree = ast.parse(path.read_text())
        inside = {
            id(child)
            for block in ast.walk(tree)
            if isinstance(block, ast.With) and "silently('onnxruntime')" in ast.unparse(block.items[0])
            for child in ast.walk(block)
        }
        for each in ast.walk(tree):
            names = [a.name for a in each.names] if isinstance(each, ast.Import) else []
            names += [each.module or ""] if isinstance(each, ast.ImportFrom) else []
            if any(name.split(".")[0] == "onnxruntime" for name in names):
                found += 1
                assert id(each) in inside, path
    assert found >= 2


def test_tests_and_benchmarks_are_silent_too():
    assert os.environ[NAME] == "1"
    assert NAME in (ROOT / "benchmarks" / "__init__.py").read_text()
    assert write_guard.ALLOWED in os.environ
