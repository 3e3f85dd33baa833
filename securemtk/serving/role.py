"""Keeper and authority as processes. Run as `python -m securemtk.serving.role`.

A role process reads its settings and credentials as one line of JSON from its standard input,
announces its address as one line on its standard output, connects, and serves requests until the
user leaves. It exits by itself when a peer is gone: no process outlives its session.
"""

import os
import sys
from collections.abc import Callable
from functools import partial

import torch

from protocols.net.listener import Listener, connect
from protocols.net.tls import Credentials
from securemtk.mtk.keys.distributor import KeyDistributor
from securemtk.mtk.keys.file_stores import FileGrants, FileKeyStore
from securemtk.mtk.keys.grants import Ledger
from securemtk.serving.backends import backend
from securemtk.serving.config import AUTHORITY_ROLE, KEEPER_ROLE, PURPOSES, USER_ROLE
from securemtk.serving.messages import AuthoritySettings, KeeperAt, KeeperSettings, Listening
from securemtk.serving.parties.authority import Authority
from securemtk.serving.parties.keeper import Keeper
from securemtk.serving.peers import Links
from securemtk.serving.process import Life, PipeStarter, Starter, live, run


def _distributor(settings: AuthoritySettings) -> KeyDistributor:
    grants = None if settings.grants is None else FileGrants(Ledger(settings.grants))
    return KeyDistributor(FileKeyStore(settings.keys, settings.passphrase), grants)


def _connect(settings: KeeperSettings | AuthoritySettings, starter: Starter) -> Links:
    """Open this role's connections: (peer, purpose) -> link."""
    role, timeout_s, start_s = settings.kind, settings.timeout_s, settings.start_timeout_s
    credentials = Credentials.from_json(settings.credentials)
    listener = Listener(credentials, settings.host, settings.port, timeout_s)
    starter.say(Listening(listener.address))
    links: Links = {}
    try:
        expected = [(USER_ROLE, purpose) for purpose in PURPOSES[role, USER_ROLE]]
        if role == AUTHORITY_ROLE:
            keeper = starter.hear(KeeperAt).address
            for purpose in PURPOSES[KEEPER_ROLE, AUTHORITY_ROLE]:
                links[KEEPER_ROLE, purpose] = connect(
                    credentials, keeper, KEEPER_ROLE, purpose, timeout_s, opening_s=start_s
                )
        else:
            expected += [(AUTHORITY_ROLE, purpose) for purpose in PURPOSES[role, AUTHORITY_ROLE]]
        return links | listener.accept(expected, start_s)
    finally:
        listener.close()


def _keep(settings: KeeperSettings, links: Links, life: Life) -> None:
    user, authority, supply = links[USER_ROLE, "data"], links[AUTHORITY_ROLE, "data"], links[AUTHORITY_ROLE, "supply"]
    keeper = Keeper(
        user,
        authority,
        supply,
        life.watch,
        store=settings.store,
        slots=settings.slots,
        needs_grant=settings.needs_grant,
    )
    life.closing.callback(keeper.close)
    try:
        keeper.serve()
    finally:
        if settings.store is not None:
            life.end.cancel()  # what is stored shall go, however long that, and to part from the others, takes


def _decide(keys: KeyDistributor, links: Links, life: Life) -> None:
    supply = (links[KEEPER_ROLE, "supply"], links[USER_ROLE, "supply"])
    Authority(links[USER_ROLE, "data"], links[KEEPER_ROLE, "data"], supply, life.watch, keys).serve()


def serve(starter: Starter) -> int:
    """Be the role that the starter says until the user leaves.

    Returns:
        The process's exit status.
    """
    settings = starter.hear(KeeperSettings, AuthoritySettings)
    torch.set_num_threads(settings.threads)
    backend(settings.protocol).warm()
    # Before it listens: what is wrong with keys or grants is told before anything runs.
    if isinstance(settings, KeeperSettings):
        work: Callable[[Links, Life], None] = partial(_keep, settings)
    else:
        work = partial(_decide, _distributor(settings))
    links = _connect(settings, starter)
    return live(settings.kind, links, settings.timeout_s, partial(work, links))


if __name__ == "__main__":
    # Nothing is left to save: do not wait for the interpreter to take torch apart.
    os._exit(run(serve, PipeStarter(sys.stdin.buffer, sys.stdout.buffer)))
