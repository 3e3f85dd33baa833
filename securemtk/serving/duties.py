"""What a role process does once it has its links: its part of the protocols, with all that this needs loaded.

Apart from `role`, which connects: that takes a tenth of the time that torch takes to load.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from protocols.errors import InputError, KeyRefused
from protocols.net import pulse
from protocols.running import backend
from securemtk.mtk.keys.distributor import KeyDistributor
from securemtk.mtk.keys.grants import Ledger
from securemtk.mtk.keys.key import TriggerKey
from securemtk.mtk.keys.key import load as load_key
from securemtk.serving.authority import Authority
from securemtk.serving.config import AUTHORITY_ROLE, KEEPER_ROLE, USER_ROLE
from securemtk.serving.keeper import Keeper
from securemtk.serving.peers import Links
from securemtk.serving.process import Life, settle


def read_keys(paths: Sequence[str], passphrase: str | None) -> list[TriggerKey]:
    """Return the keys of files, and of all `*.key` files of folders."""
    files: list[Path] = []
    for path in map(Path, paths):
        if not path.exists():
            raise KeyRefused(f"a key file or folder must exist; {path.name!r} does not")
        files += sorted(path.glob("*.key")) if path.is_dir() else [path]
    return [load_key(file, passphrase) for file in files]


def distributor(settings: Mapping[str, Any]) -> KeyDistributor:
    """Return the keys that the settings name, and who may use them.

    Raises:
        InputError: keys or grants cannot be used.
    """
    keys = read_keys(settings["keys"], settings["passphrase"])
    if settings["grants"] is None:
        return KeyDistributor(keys)
    ledger = Ledger(settings["grants"])
    if not ledger.path.exists():
        raise InputError(f"a grants file must exist; {ledger.path.name!r} does not: see securemtk keys grant")
    # Both are read here, so that what is wrong with them is told before anything runs.
    ledger.grants()
    ledger.used()
    return KeyDistributor(keys, ledger)


def _warm(settings: Mapping[str, Any]) -> None:
    """Load what a prediction needs: after the peers have what they wait for, before anybody asks for one."""
    backend.find(str(settings["protocol"])).warm()
    pulse.warm()
    settle()


def keep(settings: Mapping[str, Any], links: Links, life: Life) -> None:
    """Be the keeper until the user leaves."""
    torch.set_num_threads(int(settings["threads"]))
    store = settings["store"]
    user, authority, supply = links[USER_ROLE, "data"], links[AUTHORITY_ROLE, "data"], links[AUTHORITY_ROLE, "supply"]
    keeper = Keeper(user, authority, supply, life.watch, store, settings["slots"], bool(settings["needs_grant"]))
    life.closing.callback(keeper.close)
    try:
        _warm(settings)
        keeper.serve()
    finally:
        if store is not None:
            life.end.cancel()  # what is stored shall go, however long that, and to part from the others, takes


def decide(settings: Mapping[str, Any], keys: KeyDistributor, links: Links, life: Life) -> None:
    """Be the authority until the user leaves."""
    torch.set_num_threads(int(settings["threads"]))
    supply = (links[KEEPER_ROLE, "supply"], links[USER_ROLE, "supply"])
    authority = Authority(links[USER_ROLE, "data"], links[KEEPER_ROLE, "data"], supply, life.watch, keys)
    _warm(settings)
    authority.serve()
