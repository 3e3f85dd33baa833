"""The lock, .ci/constraints.txt: compare it with what is installed beside us.

As a program, for make lint:  lock.py CONSTRAINTS
"""

import importlib.metadata
import sys
from collections.abc import Iterable
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

# Ourselves, and what an environment has before anything is installed.
NOT_LOCKED = {"securemtk", "pip"}


def pins(text: str) -> dict[str, str]:
    """Return {canonical name: version}; every line must be a comment or NAME==VERSION, each name once.

    Raises:
        ValueError: a line is anything else: a range, an address, a local version, a second line for a name.
    """
    found: dict[str, str] = {}
    for line in text.splitlines():
        if not line or line.startswith("#"):
            continue
        name, _, version = line.partition("==")
        if str(Requirement(line)) != line or Version(version).local or canonicalize_name(name) in found:
            raise ValueError(f"a line of the lock must be NAME==VERSION, each name once; got {line!r}")
        found[canonicalize_name(name)] = version
    return found


def unlike(locked: dict[str, str], installed: Iterable[tuple[str, str]]) -> list[str]:
    """Name each installed package whose version is not that of the lock; a local part ("+cpu") may be any."""
    return [
        f"{name} {version} is installed, {locked.get(canonicalize_name(name), 'nothing')} is locked"
        for name, version in sorted(installed)
        if canonicalize_name(name) not in NOT_LOCKED
        and Version(version).public != str(Version(locked.get(canonicalize_name(name), "0+none")))
    ]


def main(path: str) -> str:
    """Compare the lock with this interpreter's packages; return an error, or nothing."""
    installed = ((found.metadata["Name"], found.version) for found in importlib.metadata.distributions())
    return "\n".join(unlike(pins(Path(path).read_text()), installed))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]) or None)
