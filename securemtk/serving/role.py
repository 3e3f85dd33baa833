"""Keeper and authority as processes. Run as `python -m securemtk.serving.role`.

A role process reads its settings and credentials as one line of JSON from its standard input,
announces its address as one line on its standard output, connects, and serves requests until the
user leaves. It exits by itself when a peer is gone: no process outlives its session.
"""

import os
import sys
from functools import partial
from typing import Any

from protocols.net.listener import Listener, connect
from protocols.net.tls import Credentials
from protocols.on_demand import Late
from securemtk.serving.config import AUTHORITY_ROLE, KEEPER_ROLE, PURPOSES, USER_ROLE
from securemtk.serving.peers import Links
from securemtk.serving.process import Life, PipeStarter, Starter, live, run
from securemtk.serving.start_messages import AuthoritySettings, KeeperAt, KeeperSettings, Listening

# With torch, which takes longer to load than all else: the peers need not wait for it.
duties = Late("securemtk.serving.duties")


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


def _work(settings: KeeperSettings | AuthoritySettings, keys: Any, links: Links, life: Life) -> None:
    if isinstance(settings, KeeperSettings):
        duties.keep(settings, links, life)
    else:
        duties.decide(settings, duties.distributor(settings) if keys is None else keys, links, life)


def serve(starter: Starter) -> int:
    """Be the role that the starter says until the user leaves.

    Returns:
        The process's exit status.
    """
    settings = starter.hear(KeeperSettings, AuthoritySettings)
    # Before it listens: what is wrong with keys or grants is told before anything runs.
    has_keys = isinstance(settings, AuthoritySettings) and (settings.key_files or settings.grants is not None)
    keys = duties.distributor(settings) if has_keys else None
    links = _connect(settings, starter)
    return live(settings.kind, links, settings.timeout_s, partial(_work, settings, keys, links))


if __name__ == "__main__":
    # Nothing is left to save: do not wait for the interpreter to take torch apart.
    os._exit(run(serve, PipeStarter(sys.stdin.buffer, sys.stdout.buffer)))
