"""How the user comes to a keeper and an authority: a `Start` gives links to them, whatever and wherever they are."""

import os
from collections.abc import Mapping
from typing import Protocol

from protocols.net.link import Link
from securemtk.serving.config import WATCH_PURPOSES, Config

# (peer, purpose) -> link.
Links = dict[tuple[str, str], Link]


def sort_links(links: Links) -> tuple[list[Link], dict[str, Link], dict[str, Link]]:
    """Return the links for data, and the watch's own by role: to be watched, and for beats."""
    data_links = [link for (_, purpose), link in links.items() if purpose not in WATCH_PURPOSES]
    watched, pulses = (
        {other: link for (other, own), link in links.items() if own == purpose} for purpose in WATCH_PURPOSES
    )
    return data_links, watched, pulses


class Peers(Protocol):
    """The keeper and the authority of one session, as the user reaches them."""

    @property
    def links(self) -> Links:
        """(role, purpose) -> link, for every purpose that `config.PURPOSES` names for the user."""

    @property
    def pids(self) -> Mapping[str, int]:
        """Role -> process id, of the roles that run on this machine for this session alone."""

    def model_name(self, source: str | os.PathLike[str]) -> str:
        """Return the name by which the keeper knows what the user calls `source`."""

    def stop(self, grace_s: float) -> None:
        """End what was started, after `grace_s` seconds at the latest; may be called any number of times."""


class Start(Protocol):
    """One way to come to peers."""

    def start(self, config: Config, protocol: str) -> Peers:
        """Return connected peers; where that fails, leave nothing behind.

        Args:
            config: of the session.
            protocol: by name, as in `Session`.

        Raises:
            InputError: a setting that a role cannot work with.
            TransportError: a role did not start or proved to be another one.
        """
