"""Keeper and authority as processes. Run as `python -m securemtk.serving.role`.

A role process reads its settings and credentials as one line of JSON from its standard input,
announces its address as one line on its standard output, connects, and serves requests until the
user leaves. It exits by itself when a peer is gone: no process outlives its session.
"""

import os
import sys
from collections.abc import Mapping
from functools import partial
from typing import Any

from protocols.net.listener import Listener, connect
from protocols.net.tls import Credentials
from protocols.on_demand import Late
from securemtk.serving.config import AUTHORITY_ROLE, KEEPER_ROLE, PURPOSES, USER_ROLE
from securemtk.serving.peers import Links
from securemtk.serving.process import Hear, Life, Say, live, run

# With torch, which takes longer to load than all else: the peers need not wait for it.
duties = Late("securemtk.serving.duties")


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


def _has_keys(settings: Mapping[str, Any]) -> bool:
    return bool(settings["keys"]) or settings["grants"] is not None


def _work(role: str, settings: Mapping[str, Any], keys: Any, links: Links, life: Life) -> None:
    if role == KEEPER_ROLE:
        duties.keep(settings, links, life)
    else:
        duties.decide(settings, duties.distributor(settings) if keys is None else keys, links, life)


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
    # Before it listens: what is wrong with keys or grants is told before anything runs.
    keys = duties.distributor(settings) if role == AUTHORITY_ROLE and _has_keys(settings) else None
    links = _connect(role, settings, say, hear)
    return live(role, links, float(settings["timeout_s"]), partial(_work, role, settings, keys, links))


if __name__ == "__main__":
    # Nothing is left to save: do not wait for the interpreter to take torch apart.
    os._exit(run(serve, sys.stdin, sys.stdout))
