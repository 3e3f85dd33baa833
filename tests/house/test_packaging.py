"""How the files hang together: what may import what, one door for each foreign thing, what is installed."""

import ast
import configparser
import graphlib
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import lock
import pytest
import readme
from helpers import ROOT
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from setuptools import find_packages

import securemtk
from protocols.running import backend
from securemtk.serving import launch

TOP_LEVEL = {
    "securemtk",
    "protocols",
    "benchmarks",
    "examples",
    "tests",
    "docs",
    "findings",
    "setup.cfg",
    "pyproject.toml",
    "Makefile",
}
TOP_LEVEL |= {"README.md", "CHANGELOG.md", "CONTRIBUTING.md", ".ci", ".gitignore"}


def modules() -> dict[str, Path]:
    """Return every module of both packages; packages with nothing in them but a docstring are left out."""
    found = {}
    for package in ("protocols", "securemtk"):
        for path in sorted((ROOT / package).rglob("*.py")):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
            if path.name != "__init__.py" or len(ast.parse(path.read_text()).body) > 1:
                found[name] = path
    return found


MODULES = modules()
NAMES = sorted(MODULES)


def imports(path: Path) -> Iterator[tuple[str, str | None]]:
    """Give each import of a file as (module, name), the name None for `import module`."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.module or "", alias.name) for alias in node.names)


def ours(path: Path) -> set[str]:
    """Return the modules of ours that a file imports."""
    found = set()
    for module, name in imports(path):
        if module.split(".")[0] in ("protocols", "securemtk"):
            whole = f"{module}.{name}"
            found.add(whole if whole in MODULES else module)
    return found | late(path)


def late(path: Path) -> set[str]:
    """Return the modules that a file imports on demand, by `Late("module")`."""
    calls = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call)]
    return {ast.literal_eval(n.args[0]) for n in calls if isinstance(n.func, ast.Name) and n.func.id == "Late"}


def test_layers_hold():
    # Which folder may import which stands in setup.cfg.
    program = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run([program, "--no-cache"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert done.stdout.count("KEPT") == len([name for name in settings() if name.startswith("importlinter:contract")])


def test_no_file_imports_itself_by_way_of_others():
    graph = {name: ours(path) & set(MODULES) for name, path in MODULES.items()}
    list(graphlib.TopologicalSorter(graph).static_order())


# What is long because its subject is: kernels.
LONG = {"protocols.primitives.kernels_numba"}


def test_no_file_is_longer_than_500_lines():
    long = {name for name, path in MODULES.items() if len(path.read_text().splitlines()) > 500}
    assert long <= LONG


@pytest.mark.parametrize("top", ["protocols", "securemtk", "benchmarks", "tests", "examples", "findings"])
def test_no_folder_has_more_than_15_files(top):
    # Results are data, with a name for each.
    files = [name for name in tracked() if name.startswith(f"{top}/") and not name.startswith("benchmarks/results/")]
    count = Counter(str(Path(name).parent) for name in files)
    assert {folder: n for folder, n in count.items() if n > 15} == {}


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_imported_relatively_or_inside_a_function(name):
    tree = ast.parse(MODULES[name].read_text())
    inner = [
        n for f in ast.walk(tree) if isinstance(f, ast.FunctionDef | ast.ClassDef | ast.Lambda) for n in ast.walk(f)
    ]
    assert not [n for n in inner if isinstance(n, ast.Import | ast.ImportFrom)]
    assert not [n for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.level]
    assert "TYPE_CHECKING" not in MODULES[name].read_text()


@pytest.mark.parametrize("name", NAMES)
def test_what_is_imported_on_demand_is_there_and_imported_by_one_door(name):
    assert late(MODULES[name]) <= set(MODULES)
    # The last one loads the programs of users.
    doors = {"protocols.on_demand", "securemtk.crypten_backend.roles"}
    assert name in doors or not re.search(r"import_module|__import__|find_spec", MODULES[name].read_text())


def test_public_names_and_protocols_lie_where_the_tables_say():
    places = {*securemtk._PLACES, *backend.PROTOCOLS.values()}
    assert places <= set(MODULES)
    for name, place in securemtk._PLACE_OF.items():
        assert getattr(securemtk, name) is getattr(sys.modules[place], name)
    assert set(securemtk.__all__) <= set(dir(securemtk))


DOORS = {
    "crypten": {"protocols.crypten.door"},
    "onnx": {name for name in NAMES if name.startswith("securemtk.onnx.")},
    "onnxruntime": {"securemtk.onnx.model.runtime", "securemtk.serving.onnxruntime_options"},
    "socket": {
        "protocols.net.link",
        "protocols.net.listener",
        "protocols.net.watch",
        "protocols.net.pulse",
        "protocols.net.pulse_native",
        "protocols.net.tls",
    },
    "ssl": {"protocols.net.tls"},
    "secrets": set(),
    "random": set(),
    "pickle": set(),
    "typer": {name for name in NAMES if name.startswith("securemtk.cli.")},
    "matplotlib": {"securemtk.report.pictures"},
    "jinja2": {"securemtk.report.page"},
    "PIL": {"securemtk.data.images"},
}


@pytest.mark.parametrize("foreign", DOORS)
def test_each_foreign_thing_has_one_door(foreign):
    users = {name for name in MODULES if foreign in {module.split(".")[0] for module, _ in imports(MODULES[name])}}
    assert users <= DOORS[foreign]


@pytest.mark.parametrize(
    "name", ["securemtk.onnx.model.graph", "securemtk.onnx.model.inputs", "securemtk.mtk.keys.distributor"]
)
def test_what_roles_need_loads_no_large_library(name):
    # Of a package that has an __init__ with imports only the module counts.
    needed, new = set(), {name}
    while new:
        needed |= new
        new = set().union(*(ours(MODULES[each]) & set(MODULES) for each in new)) - needed
    foreign = {module.split(".")[0] for each in needed for module, _ in imports(MODULES[each])}
    assert foreign.isdisjoint({"onnx", "onnxruntime", "scipy", "sklearn", "accelerate", "crypten", "numba", "rich"})


@pytest.mark.parametrize("name", NAMES)
def test_only_the_command_line_prints_and_exits(name):
    calls = [n.func for n in ast.walk(ast.parse(MODULES[name].read_text())) if isinstance(n, ast.Call)]
    printing = [f for f in calls if isinstance(f, ast.Name) and f.id in ("print", "exit", "quit")]
    leaving = [f for f in calls if isinstance(f, ast.Attribute) and ast.unparse(f) in ("sys.exit", "os.urandom")]
    allowed = {
        "securemtk.cli.app": {"print", "sys.exit"},
        "securemtk.cli.tables": {"print"},
        "protocols.primitives.prg": {"os.urandom"},
    }.get(name, set())
    assert {ast.unparse(f) for f in printing + leaving} <= allowed


def tracked() -> list[str]:
    """Return the files that git knows or would add."""
    git = shutil.which("git")
    if git is None or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listed = subprocess.run(
        [git, "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    return [name for name in listed.stdout.splitlines() if (ROOT / name).exists()]


def test_the_top_level_holds_what_the_owner_asked_for_and_nothing_else():
    found = {name.split("/")[0] for name in tracked()}
    assert found <= TOP_LEVEL
    assert {"securemtk", "protocols", "tests", "setup.cfg", "README.md"} <= found


def test_no_file_names_this_machine():
    here = {str(ROOT), str(Path.home()), os.uname().nodename}
    for name in tracked():
        if not name.endswith((".png", ".npy")):
            text = (ROOT / name).read_text()
            assert not [word for word in here if len(word) > 5 and word in text], name


@pytest.mark.parametrize("name", [path.name for path in sorted((ROOT / "findings").iterdir())])
def test_a_finding_has_its_form(name):
    # They are not run here: each installs packages.
    text = (ROOT / "findings" / name).read_text()
    head, _, body = text.partition("set -eu\n")
    for part in ("One would expect:", "What happens:", "Output seen:", "Runs no code of ours.", "sh findings/NAME.sh"):
        assert part in head
    assert 'work="$(mktemp -d)"\ntrap \'rm -rf "$work"\' EXIT INT TERM' in body
    assert "--only-binary :all:" in body
    assert "==" in body
    assert not {"securemtk", "protocols", "benchmarks"} & set(re.findall(r"\w+", text))


def settings() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    return parser


def requirements() -> list[Requirement]:
    """Return what setup.cfg asks for, with all extras."""
    options = settings()
    extras = options["options.extras_require"]
    lines = options["options"]["install_requires"] + extras["test"] + extras["sklearn"]
    found = [Requirement(line) for line in lines.splitlines() if line.strip() and not line.strip().startswith("#")]
    assert len(found) > 15
    return found


def test_only_our_two_packages_are_installed():
    include = settings()["options.packages.find"]["include"].split()
    assert {name.split(".")[0] for name in find_packages(str(ROOT), include=include)} == {"securemtk", "protocols"}
    for package in ("securemtk", "protocols"):
        assert (ROOT / package / "py.typed").exists()


def test_every_file_that_is_no_code_is_installed_too():
    declared = settings()["options.package_data"]
    others = [Path(name) for name in tracked() if name.startswith(("securemtk/", "protocols/")) and name[-3:] != ".py"]
    assert len(others) > 2
    for path in others:
        assert path.name in declared[".".join(path.parent.parts)].split(), path


def test_installed_versions_lie_in_the_ranges_that_setup_cfg_names():
    for requirement in requirements():
        assert requirement.specifier.contains(importlib.metadata.version(requirement.name), prereleases=True)


def test_the_lock_has_one_version_in_its_range_for_everything_that_setup_cfg_names():
    locked = lock.pins((ROOT / ".ci" / "constraints.txt").read_text())
    for requirement in requirements():
        assert requirement.specifier.contains(locked[canonicalize_name(requirement.name)]), requirement


@pytest.mark.parametrize(
    "line", ["a>=1", "a==1+cpu", "a==1,<2", "a", "a @ file:///a.whl", "--find-links x", "a==1\na==2", "a==1\nA==1"]
)
def test_a_lock_with_anything_but_exact_versions_is_refused(line):
    with pytest.raises(ValueError, match=r"."):
        lock.pins(line)


def test_what_is_installed_unlike_the_lock_is_named():
    locked = lock.pins("# tried\nfree_threads==1.0\ntorch==2.13.0\n")
    here = [("Free-Threads", "1.0"), ("torch", "2.13.0+cpu"), ("pip", "1"), ("securemtk", "0.1.0")]
    assert lock.unlike(locked, here) == []
    found = lock.unlike(locked, [*here, ("numpy", "2.0"), ("torch", "2.14.0")])
    assert found == ["numpy 2.0 is installed, nothing is locked", "torch 2.14.0 is installed, 2.13.0 is locked"]


def test_every_foreign_import_is_a_declared_dependency():
    distributions = importlib.metadata.packages_distributions()
    declared = {
        Requirement(line).name
        for line in settings()["options"]["install_requires"].splitlines()
        if "#" not in line and line
    }
    for name, path in MODULES.items():
        for top in {module.split(".")[0] for module, _ in imports(path)} - {"protocols", "securemtk"}:
            if top not in sys.stdlib_module_names:
                assert declared & set(distributions[top]), f"{name} imports {top}"


def test_a_wheel_with_a_foreign_package_is_noticed(tmp_path):
    for name in ("securemtk", "protocols", "securemtk-1.dist-info", "benchmarks"):
        (tmp_path / "tree" / name).mkdir(parents=True)
        (tmp_path / "tree" / name / "x").touch()
    wheel = shutil.make_archive(str(tmp_path / "wheel"), "zip", tmp_path / "tree")
    assert readme.foreign_packages(wheel) == {"benchmarks"}


def test_the_program_is_declared_and_starts():
    (script,) = importlib.metadata.entry_points(group="console_scripts", name="securemtk")
    assert script.value == "securemtk.cli.app:main"
    assert callable(script.load())


@pytest.fixture
def make(tmp_path):
    """A function that runs make in a folder with nothing in it but what the Makefile reads."""
    program = shutil.which("make")
    if program is None:
        pytest.skip("no make here")
    (tmp_path / ".ci").mkdir()
    for name in ("Makefile", "setup.cfg", ".ci/constraints.txt"):
        shutil.copy(ROOT / name, tmp_path / name)

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([program, *arguments], cwd=tmp_path, capture_output=True, text=True, check=False)

    return run


def builds(done: subprocess.CompletedProcess[str]) -> str:
    """Return the stamp that a dry run would leave behind a new environment, "" when it builds none."""
    assert done.returncode == 0, done.stderr
    stamps = [line.split()[-1] for line in done.stdout.splitlines() if "touch" in line]
    assert len(stamps) == done.stdout.count("-m venv --clear")
    return stamps[0] if stamps else ""


@pytest.mark.parametrize("target", ["test", "demo", "lint", "wheel-check"])
def test_make_installs_the_versions_that_were_tried(make, target):
    steps = make("--dry-run", target, f"PYTHON={sys.executable}").stdout
    (install,) = [line for line in steps.splitlines() if "pip" in line and "install" in line]
    assert "PIP_CONSTRAINT=.ci/constraints.txt PIP_BUILD_CONSTRAINT=.ci/constraints.txt" in install


def test_make_tries_the_newest_versions_in_an_environment_of_their_own(make):
    steps = make("--dry-run", "test-newest", f"PYTHON={sys.executable}").stdout
    assert "CONSTRAINT" not in steps
    assert "--upgrade-strategy eager" in steps
    assert " .venv/" not in steps


@pytest.mark.parametrize("changed", ["setup.cfg", ".ci/constraints.txt", "Makefile", "python"])
def test_make_builds_the_environment_anew_when_what_it_was_made_of_changes(make, tmp_path, changed):
    ours = tmp_path / "python"
    ours.write_text(f"#!/bin/sh\nexec '{sys.executable}' \"$@\"\n")
    ours.chmod(0o755)
    steps = ("--dry-run", "test", f"PYTHON={ours}")
    stamp = builds(make(*steps))
    assert stamp.startswith(".venv/")
    (tmp_path / ".venv").mkdir()
    (tmp_path / stamp).touch()
    assert builds(make(*steps)) == ""
    if changed == "python":  # as a Python of another version would say
        ours.write_text("#!/bin/sh\ncase $2 in *sys.version\\)) echo 3.13.9;; esac\n")
    else:
        with (tmp_path / changed).open("a") as file:
            file.write("\n# changed\n")
    assert builds(make(*steps)) not in ("", stamp)


@pytest.mark.parametrize("target", ["test", "test-newest"])
def test_make_says_so_when_there_is_no_fitting_python(make, tmp_path, target):
    done = make(target, "PYTHON=/bin/false")
    assert done.returncode != 0
    assert "Python 3.11, 3.12 or 3.13" in done.stderr
    assert not list(tmp_path.glob(".venv*"))


# What takes long to load, and is loaded by whoever needs it: what a start may hold of it.
HEAVY = {"torch", "numba", "scipy", "crypten", "onnx", "onnxruntime", "sklearn", "accelerate", "matplotlib", "PIL"}
HEAVY |= {"typer", "pandas", "sympy"}
STARTS = {
    "import securemtk": set(),
    "import securemtk.cli.app; securemtk.cli.app.run(['--help'])": {"typer"},
    # A role connects before it loads what it computes with, and reads models with when there is one.
    "import securemtk.serving.role": set(),
    "import securemtk.serving.duties": {"torch"},
    "from securemtk import Session": {"torch"},
}


@pytest.mark.parametrize("code", STARTS)
def test_a_start_loads_no_more_than_it_needs(code):
    code += "; import sys; print('loaded', *{name.split('.')[0] for name in sys.modules})"
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = set(ran.stdout.splitlines()[-1].split()[1:])
    assert loaded & HEAVY == STARTS[code.split("; import sys")[0]]


def test_a_role_collects_garbage_once_it_has_started_and_is_run_as_a_program(tmp_path):
    lines = ["import gc, sys", "from securemtk.serving.process import settle", "before = gc.isenabled()", "settle()"]
    lines += ["print(__name__, before, gc.isenabled(), gc.get_freeze_count() > 10_000, sys.argv[1:])"]
    (tmp_path / "role.py").write_text("\n".join(lines))
    command = [sys.executable, "-P", "-c", launch._START, "role"]
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(tmp_path)])}
    ran = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    assert ran.stdout == "__main__ False True True ['role']\n"
