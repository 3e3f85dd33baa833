"""The README's Python example: extract it, and compare what it prints with what the README says it prints.

As a program, for .ci/wheel-check:  readme.py example | compare OUTPUT | packages WHEEL
To let the README say what the example prints now:  readme.py update OUTPUT
"""

import re
import sys
import zipfile
from pathlib import Path

README = Path(__file__).resolve().parents[2] / "README.md"
SECONDS = re.compile(r"\d+\.\d+ s\b")
DECIMAL = re.compile(r"\d+\.\d+")
# Keys are drawn anew, and closed answers are noise: five standard deviations of an accuracy on 360 samples.
TOLERANCE = 0.08


def blocks(text: str) -> list[tuple[str, str]]:
    """Return each fenced block as (language, content)."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


def example_and_output() -> tuple[str, str]:
    """Return the first Python block, and the block after it."""
    found = blocks(README.read_text())
    at = next(i for i, (language, _) in enumerate(found) if language == "python")
    return found[at][1], found[at + 1][1]


def difference(expected: str, output: str) -> str:
    """Return how an output differs from the README's, "" when it does not.

    Seconds may be any; other decimals agree within `TOLERANCE`; all else is equal.
    """
    one, other = (SECONDS.sub("# s", text.strip()) for text in (expected, output))
    if DECIMAL.sub("#", one) != DECIMAL.sub("#", other):
        return f"expected\n{expected}\ngot\n{output}"
    for a, b in zip(DECIMAL.findall(one), DECIMAL.findall(other), strict=True):
        if abs(float(a) - float(b)) > TOLERANCE:
            return f"expected {a}, got {b} in\n{output}"
    return ""


def foreign_packages(wheel: str) -> set[str]:
    """Return what a wheel would install at top level beside our packages."""
    with zipfile.ZipFile(wheel) as archive:
        top = {name.split("/")[0] for name in archive.namelist()}
    return {name for name in top if name not in ("securemtk", "protocols") and not name.endswith(".dist-info")}


def main(command: str, *arguments: str) -> str:
    """Run one of the commands; return an error, or nothing."""
    if command == "example":
        sys.stdout.write(example_and_output()[0])
        return ""
    if command == "compare":
        return difference(example_and_output()[1], Path(arguments[0]).read_text())
    if command == "packages":
        return ", ".join(foreign_packages(arguments[0]))
    text = README.read_text()
    README.write_text(text.replace(example_and_output()[1], Path(arguments[0]).read_text()))
    return ""


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]) or None)
