"""Who is told what a role does: a role's watch, or a test's stand-in."""

from typing import Protocol

from protocols.errors import SecureError


class Steps(Protocol):
    """What keeper, authority and user need of their watch."""

    step: str

    def fail(self, error: SecureError) -> None:
        """End the session because something in the background of this role failed."""
