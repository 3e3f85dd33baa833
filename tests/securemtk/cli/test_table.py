"""The table of commands says of each what its own help says, so that `--help` need import none."""

import inspect
from pathlib import Path

import pytest

from protocols.on_demand import load
from securemtk.cli.app import program
from securemtk.cli.table import COMMANDS, KEYS_COMMANDS

PLACES = {"securemtk.cli.commands": COMMANDS, "securemtk.cli.commands.keys": KEYS_COMMANDS}
CASES = [(place, name) for place, commands in PLACES.items() for name in commands]


@pytest.mark.parametrize(("place", "name"), CASES)
def test_a_command_says_in_the_table_what_its_own_help_begins_with(place, name):
    (command,) = load(f"{place}.{name}").app.registered_commands
    first, _, _ = inspect.cleandoc(command.callback.__doc__).partition("\n\n")
    assert PLACES[place][name] == " ".join(first.split())
    assert "Example:" in command.epilog


@pytest.mark.parametrize("place", PLACES)
def test_every_file_of_a_command_is_in_the_table(place):
    (folder,) = load(place).__path__
    assert {path.stem for path in sorted(Path(folder).glob("[a-z]*.py"))} == set(PLACES[place])


def test_help_lists_every_command_in_order(capsys):
    with pytest.raises(SystemExit):
        program()(["--help"], prog_name="securemtk")
    shown = [line.split()[1] for line in capsys.readouterr().out.splitlines() if line.startswith("│ ")]
    assert [word for word in shown if word in (*COMMANDS, "keys")] == [*COMMANDS, "keys"]
