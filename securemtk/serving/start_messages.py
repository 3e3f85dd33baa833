"""What a role and its starter say to each other, by lines on a pipe.

Apart from the other messages, for this is said before anything large is loaded.
"""

from typing import Annotated, ClassVar

import msgspec

from protocols.net.frames import Count, Message
from protocols.running.names import PROTOCOLS

Port = Annotated[int, msgspec.Meta(ge=0, le=65535)]
Seconds = Annotated[float, msgspec.Meta(gt=0)]


def check_protocol(name: str) -> None:
    """Raise ValueError unless there is a protocol of this name."""
    if name not in PROTOCOLS:
        raise ValueError(f"protocol must be one of {', '.join(PROTOCOLS)}")


class RoleSettings(Message, frozen=True):
    """How a role process runs.

    Args:
        credentials: as `Credentials.to_json` writes them.
        host, port: where it listens; port 0 lets the system choose.
        timeout_s, start_timeout_s, threads: as in `Config`.
    """

    hidden: ClassVar[frozenset[str]] = frozenset({"credentials", "passphrase"})

    credentials: dict[str, str]
    host: str
    timeout_s: Seconds
    start_timeout_s: Seconds
    threads: Count
    port: Port = 0


class KeeperSettings(RoleSettings, frozen=True, kw_only=True):
    """The same of a keeper.

    Args:
        protocol: by name: what is loaded before anybody waits for it.
        needs_grant: whether the authority has grants.
        store: folder for correlations that wait.
        slots: predictions whose shares wait in memory where there is a store.
    """

    kind: ClassVar[str] = "keeper"

    protocol: str
    needs_grant: bool = False
    store: str | None = None
    slots: Count = 1

    def __post_init__(self) -> None:
        check_protocol(self.protocol)


class AuthoritySettings(RoleSettings, frozen=True, kw_only=True):
    """The same of an authority.

    Args:
        protocol: by name: what is loaded before anybody waits for it.
        key_files: files and folders of keys.
        passphrase: of the keys.
        grants: file of grants.
    """

    kind: ClassVar[str] = "authority"

    protocol: str
    key_files: tuple[str, ...] = ()
    passphrase: str | None = None
    grants: str | None = None

    def __post_init__(self) -> None:
        check_protocol(self.protocol)


class Listening(Message, frozen=True):
    """A role to its starter: where it listens."""

    kind: ClassVar[str] = "listening"

    address: tuple[str, Port]


class KeeperAt(Message, frozen=True):
    """The starter to the authority: where the keeper listens."""

    kind: ClassVar[str] = "keeper at"

    address: tuple[str, Port]
