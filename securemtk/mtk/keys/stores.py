"""Where an authority's keys and grants come from, as interfaces: files today, a data base or a service tomorrow."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from securemtk.mtk.keys.grants import Grant, KeyRequest
from securemtk.mtk.keys.key import TriggerKey


@dataclass(frozen=True)
class KeyName:
    """What a key is for: the model's id, 32 hexadecimal digits, and the task's name."""

    model_id: str
    task: str


class KeyStore(Protocol):
    """Trigger-keys, by model and task."""

    def names(self) -> Sequence[KeyName]:
        """Return what there are keys for, and no key."""

    def get(self, name: KeyName) -> TriggerKey:
        """Return a key; raise KeyRefused where there is none, or none that opens."""


class GrantStore(Protocol):
    """Who may use which key, and the log of each use: what returns without an error has been logged."""

    def grants(self) -> Sequence[Grant]:
        """Return all grants, revoked and expired ones too."""

    def permit(self, asked: KeyRequest) -> None:
        """Decide whether a prediction may be dealt ahead of need; raise KeyRefused where it may not."""

    def use(self, asked: KeyRequest) -> None:
        """Decide whether keys may be used now, and count the samples; raise KeyRefused where they may not."""

    def refuse(self, asked: KeyRequest, task: str, reason: str) -> None:
        """Log that a key was refused for a reason outside this store; raise KeyRefused where that fails."""
