"""Keeper and authority as processes. Run as `python -m securemtk.serving.role`.

A role process reads its settings and credentials as one line of JSON from its standard input,
announces its address as one line on its standard output, connects, and serves requests until the
user leaves. It exits by itself when a peer is gone: no process outlives its session.
"""

import os
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from protocols.errors import InputError, KeyRefused
from protocols.net.listener import Listener, connect
from protocols.net.tls import Credentials
from protocols.running import backend
from securemtk.mtk.keys.distributor import KeyDistributor
from securemtk.mtk.keys.grants import Ledger
from securemtk.mtk.keys.key import TriggerKey
from securemtk.mtk.keys.key import load as load_key
from securemtk.serving.authority import Authority
from securemtk.serving.config import AUTHORITY_ROLE, KEEPER_ROLE, PURPOSES, USER_ROLE
from securemtk.serving.keeper import Keeper
from securemtk.serving.peers import Links
from securemtk.serving.process import Hear, Life, Say, live, run


def read_keys(paths: Sequence[str], passphrase: str | None) -> list[TriggerKey]:
    """Return the keys of files, and of all `*.key` files of folders."""
    files: list[Path] = []
    for path in map(Path, paths):
        if not path.exists():
            raise KeyRefused(f"a key file or folder must exist; {path.name!r} does not")
        files += sorted(path.glob("*.key")) if path.is_dir() else [path]
    return [load_key(file, passphrase) for file in files]


def _distributor(settings: Mapping[str, Any]) -> KeyDistributor:
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


def _connect(role: str, settings: Mapping[str, Any], say: Say, hear: Hear) -> Links:
    """Open this role's connections: (peer, purpose) -> link."""
    credentials = Credentials.from_json(settings["credentials"])
    timeout_s, start_s = float(settings["timeout_s"]), float(settings["start_timeout_s"])
    listener = Listener(credentials, settings["host"], int(settings["port"]), timeout_s)
    say({"address": listener.address})
    links: Links = {}
    try:
        expected = [(USER_ROLE, purpose) for purpose in PURPOSES[role, USER_ROLE]]
        if role == AUTHORITY_ROLE:
            keeper = (settings["host"], int(hear()["keeper_port"]))
            for purpose in PURPOSES[KEEPER_ROLE, AUTHORITY_ROLE]:
                links[KEEPER_ROLE, purpose] = connect(
                    credentials, keeper, KEEPER_ROLE, purpose, timeout_s, opening_s=start_s
                )
        else:
            expected += [(AUTHORITY_ROLE, purpose) for purpose in PURPOSES[role, AUTHORITY_ROLE]]
        return links | listener.accept(expected, start_s)
    finally:
        listener.close()


def _keep(settings: Mapping[str, Any], links: Links, life: Life) -> None:
    store = settings["store"]
    user, authority, supply = links[USER_ROLE, "data"], links[AUTHORITY_ROLE, "data"], links[AUTHORITY_ROLE, "supply"]
    keeper = Keeper(user, authority, supply, life.watch, store, settings["slots"], bool(settings["needs_grant"]))
    life.closing.callback(keeper.close)
    try:
        keeper.serve()
    finally:
        if store is not None:
            life.end.cancel()  # what is stored shall go, however long that, and to part from the others, takes


def _decide(keys: KeyDistributor, links: Links, life: Life) -> None:
    supply = (links[KEEPER_ROLE, "supply"], links[USER_ROLE, "supply"])
    Authority(links[USER_ROLE, "data"], links[KEEPER_ROLE, "data"], supply, life.watch, keys).serve()


def serve(settings: Mapping[str, Any], say: Say, hear: Hear) -> int:
    """Be a role until the user leaves.

    Args:
        settings: role, addresses, credentials and limits, as `LocalStart` writes them.
        say: tells the starter where this role listens.
        hear: returns what the starter says later.

    Returns:
        The process's exit status.
    """
    role = str(settings["role"])
    torch.set_num_threads(int(settings["threads"]))
    backend.find(str(settings["protocol"])).warm()
    # Before it listens: what is wrong with keys or grants is told before anything runs.
    work = partial(_keep, settings) if role == KEEPER_ROLE else partial(_decide, _distributor(settings))
    links = _connect(role, settings, say, hear)
    return live(role, links, float(settings["timeout_s"]), partial(work, links))


if __name__ == "__main__":
    # Nothing is left to save: do not wait for the interpreter to take torch apart.
    os._exit(run(serve, sys.stdin, sys.stdout))
