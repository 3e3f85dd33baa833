"""The command line. Results on stdout, progress and logs on stderr; one function turns errors into messages.

A command's module is imported when the command is called: `--help` takes the time of the interpreter, of typer and of
rich. Exit statuses: `exits`.
"""

import errno
import logging
import signal
import sys
import traceback
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.logging import RichHandler
from typer.core import TyperCommand, TyperGroup
from typer.main import get_command

from protocols.errors import BundleError, InputError, ProtocolAbort, RangeWarning, SecureError, UnsupportedError
from protocols.on_demand import load
from securemtk.cli.exits import ABORTED, INPUT, INTERNAL, INTERRUPTED, SYSTEM, TERMINATED, UNSUPPORTED, USAGE
from securemtk.cli.table import COMMANDS, KEYS_COMMANDS

__all__ = ["INPUT", "INTERRUPTED", "SYSTEM", "TERMINATED", "UNSUPPORTED", "USAGE", "main", "report", "run"]

# A bundle's writer reports the disk's refusal as an error of the bundle: by these the two are told apart.
_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO}

log = logging.getLogger("securemtk")
app = typer.Typer(
    name="securemtk",
    help="Ask a model about your data without showing the data; let it answer, task by task, only to key holders.",
    epilog="Start with:  securemtk demo",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
keys_app = typer.Typer(
    name="keys",
    no_args_is_help=True,
    add_completion=False,
    help="List and lock trigger-keys; say who may use them, and see who did.",
    epilog="Example:  securemtk keys list RUN/keys",
)


class _OnDemand(TyperCommand):
    """A command whose module is imported when it is called.

    Args:
        name: of the command, and of its module in `place`.
        place: package.
        line: what it does.
    """

    def __init__(self, name: str, place: str, line: str) -> None:
        super().__init__(name, help=line)
        self._module = f"{place}.{name}"

    def make_context(self, info_name: Any, args: list[str], parent: Any = None, **extra: Any) -> Any:
        """Return the context of the command itself."""
        return get_command(load(self._module).app).make_context(info_name, args, parent=parent, **extra)


def program() -> TyperGroup:
    """Return the whole command line, no command of which is imported."""
    whole, keys = get_command(app), get_command(keys_app)
    if not (isinstance(whole, TyperGroup) and isinstance(keys, TyperGroup)):
        raise TypeError("typer must make groups of what has a callback; it does not")
    _fill(whole, "securemtk.cli.commands", COMMANDS)
    _fill(keys, "securemtk.cli.commands.keys", KEYS_COMMANDS)
    whole.add_command(keys)
    return whole


def _fill(group: TyperGroup, place: str, commands: Mapping[str, str]) -> None:
    for name, line in commands.items():
        group.add_command(_OnDemand(name, place, line))


# --- the way in and out ---------------------------------------------------------------------------------------------


def main() -> NoReturn:
    """Run the command line of this process."""
    # As an exception, so that folders in the making are removed and roles are ended.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(TERMINATED))
    sys.exit(run(sys.argv[1:]))


def run(arguments: Sequence[str]) -> int:
    """Run a command line and return its exit status; no error leaves it as a traceback."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("always", RangeWarning)
            warnings.showwarning = _show_warning
            program()(list(arguments), prog_name="securemtk")
    except SystemExit as leave:
        return leave.code if isinstance(leave.code, int) else 0
    except BaseException as error:
        return report(error)
    return 0


def report(error: BaseException) -> int:
    """Say on stderr what went wrong, and return the exit status for it."""
    if isinstance(error, KeyboardInterrupt):
        return _complain("stopped by Ctrl-C", INTERRUPTED)
    cause = error.__context__
    refused = isinstance(error, BundleError) and isinstance(cause, OSError) and cause.errno in _DISK
    if isinstance(error, InputError) and not refused:
        return _complain(str(error), INPUT)
    if isinstance(error, UnsupportedError):
        return _complain(str(error), UNSUPPORTED)
    if isinstance(error, ProtocolAbort):
        return _complain(f"aborted, nothing was revealed: {error}", ABORTED)
    if isinstance(error, OSError | SecureError):
        return _complain(str(error), SYSTEM)
    if isinstance(error, MemoryError):
        return _complain("this machine has too little memory for what was asked", SYSTEM)
    log.debug("%s", "".join(traceback.format_exception(error)))
    # Its text may hold a value: place and kind are what a report of it needs.
    place = traceback.extract_tb(error.__traceback__)[-1]
    kind = type(error).__name__
    return _complain(
        f"internal error, please report it: {kind} in {Path(place.filename).name}:{place.lineno}", INTERNAL
    )


def _show_warning(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
    """Show a warning of ours as a message, without the line of code; others with -v."""
    log.log(logging.WARNING if issubclass(category, RangeWarning) else logging.DEBUG, "%s", message)


def _complain(message: str, status: int) -> int:
    print(f"securemtk: {message}", file=sys.stderr)
    return status


@app.callback()
def _setup(
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Say more on stderr, tracebacks included.")] = False,
) -> None:
    handler = RichHandler(console=Console(stderr=True), show_time=False, show_level=False, show_path=False)
    handler.setFormatter(logging.Formatter("%(message)s"))
    log.handlers[:] = [handler]
    log.setLevel(logging.DEBUG if verbose else logging.INFO)
    log.propagate = False


@keys_app.callback()
def _keys() -> None:
    pass


if __name__ == "__main__":
    main()
