"""What every two roles say to each other: who calls and what for, that they live, and why they part."""

from typing import ClassVar

from protocols.net.frames import Message, Refused


class Hello(Message, frozen=True):
    """The first word of who calls: what the connection is for."""

    kind: ClassVar[str] = "hello"

    purpose: str


class Welcome(Message, frozen=True):
    """The answer to `Hello`: the connection was expected."""

    kind: ClassVar[str] = "welcome"


class Beat(Message, frozen=True):
    """A role lives, and what it is doing."""

    kind: ClassVar[str] = "beat"

    step: str


class Bye(Message, frozen=True):
    """A role leaves in good order."""

    kind: ClassVar[str] = "bye"


class Abort(Message, frozen=True):
    """A role has failed: at which step, and why."""

    kind: ClassVar[str] = "abort"

    step: str
    error: Refused
