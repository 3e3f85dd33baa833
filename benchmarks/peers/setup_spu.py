"""Make the environment in which SPU runs, apart from securemtk's: `.spu` in the repository's root (about 1 GB).

    python -m benchmarks.peers.setup_spu

Does nothing where it is complete already. Git does not see the folder.
"""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / ".spu"
PYTHON = FOLDER / "bin" / "python"
REQUIREMENT = "spu==0.9.5"


def complete() -> bool:
    """Return whether the environment has the right SPU."""
    if not PYTHON.exists():
        return False
    code = f"from importlib.metadata import version; assert 'spu==' + version('spu') == {REQUIREMENT!r}"
    return subprocess.run([PYTHON, "-c", code], stderr=subprocess.DEVNULL, check=False).returncode == 0


def main() -> None:
    """Run from the command line."""
    if complete():
        print(f"{FOLDER.name} is complete: {REQUIREMENT}")
        return
    subprocess.run([sys.executable, "-m", "venv", "--clear", FOLDER], check=True)
    (FOLDER / ".gitignore").write_text("*\n")
    subprocess.run([PYTHON, "-m", "pip", "install", "--disable-pip-version-check", REQUIREMENT], check=True)


if __name__ == "__main__":
    main()
