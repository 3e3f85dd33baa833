"""What the caller of a CrypTen program, its two parties and their dealer say to each other, beside tensors."""

from typing import Any, ClassVar

from protocols.crypten.eager import TYPES
from protocols.net.frames import Message
from securemtk.serving.start_messages import Port, RoleSettings


class PartySettings(RoleSettings, frozen=True, kw_only=True):
    """How the process of a party or of the dealer runs; `role` says which."""

    kind: ClassVar[str] = "role"

    role: str


class Addresses(Message, frozen=True):
    """The starter to each role: role -> where it listens."""

    kind: ClassVar[str] = "addresses"

    addresses: dict[str, tuple[str, Port]]


class Call(Message, frozen=True):
    """The caller to both parties: run this function. Its arguments' arrays come with it.

    Args:
        module, path, name: where the function is; path None for a module that can be imported.
        sys_path: where Python looks for modules.
        protocol: a name of `TYPES`.
        arguments: as `values.pack` returns them.
    """

    kind: ClassVar[str] = "program"
    holds_arrays: ClassVar[bool] = True
    hidden: ClassVar[frozenset[str]] = frozenset({"arguments"})

    module: str
    path: str | None
    name: str
    sys_path: tuple[str, ...]
    protocol: str
    arguments: Any

    def __post_init__(self) -> None:
        if self.protocol not in TYPES:
            raise ValueError(f"protocol must be one of {', '.join(TYPES)}")


class Result(Message, frozen=True):
    """A party to the caller: what the function returned, as `values.pack` returns it; its arrays come with it."""

    kind: ClassVar[str] = "result"
    holds_arrays: ClassVar[bool] = True
    hidden: ClassVar[frozenset[str]] = frozenset({"result"})

    result: Any
