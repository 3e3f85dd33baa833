"""Keys and grants in files: the stores of a session on one machine."""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from protocols.errors import KeyRefused
from securemtk.mtk.keys.grants import Grant, KeyRequest, Ledger
from securemtk.mtk.keys.key import TriggerKey, load
from securemtk.mtk.keys.stores import KeyName


class HeldKeys:
    """Keys in memory.

    Args:
        keys: of any number of models; of several for one model and task the first counts.
    """

    def __init__(self, keys: Iterable[TriggerKey]) -> None:
        self._keys: dict[KeyName, TriggerKey] = {}
        for key in keys:
            self._keys.setdefault(KeyName(key.model_id, key.task), key)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self._keys)} keys)"

    def names(self) -> Sequence[KeyName]:
        """Return what there are keys for."""
        return tuple(self._keys)

    def get(self, name: KeyName) -> TriggerKey:
        """Return a key; raise KeyRefused where there is none."""
        if name not in self._keys:
            raise KeyRefused(f"the authority must hold a key of task {name.task!r} of this model; it holds none")
        return self._keys[name]


class FileKeyStore(HeldKeys):
    """Keys of files, read once.

    Args:
        paths: key files, and folders of which all `*.key` files are read.
        passphrase: of the keys, where they have one.

    Raises:
        KeyRefused: a path does not exist, or a file is no key, or does not open.
    """

    def __init__(self, paths: Iterable[str | os.PathLike[str]], passphrase: str | None = None) -> None:
        files: list[Path] = []
        for path in map(Path, paths):
            if not path.exists():
                raise KeyRefused(f"a key file or folder must exist; {path.name!r} does not")
            files += sorted(path.glob("*.key")) if path.is_dir() else [path]
        super().__init__(load(file, passphrase) for file in files)


class FileGrants:
    """A file of grants and its log, as `Ledger` keeps them.

    Args:
        ledger: of the file, which must exist.

    Raises:
        InputError: the file does not exist, or it or its log is not as it was written.
    """

    def __init__(self, ledger: Ledger) -> None:
        ledger.require()
        self._ledger = ledger
        # Both are read here, so that what is wrong with them is told before anything runs.
        ledger.grants()
        ledger.used()

    def grants(self) -> Sequence[Grant]:
        """Return all grants, revoked and expired ones too."""
        return self._ledger.grants()

    def permit(self, asked: KeyRequest) -> None:
        """Decide whether a prediction may be dealt ahead of need."""
        self._decide(asked, use=False)

    def use(self, asked: KeyRequest) -> None:
        """Decide whether keys may be used now, and count the samples."""
        self._decide(asked, use=True)

    def refuse(self, asked: KeyRequest, task: str, reason: str) -> None:
        """Log that a key was refused for another reason."""
        self._ledger.refuse(asked, task, reason)

    def _decide(self, asked: KeyRequest, *, use: bool) -> None:
        # A batch below 1 would give uses back.
        if type(asked.batch) is not int or asked.batch < 1:
            raise KeyRefused(f"a batch must be a whole number of samples, 1 or more; got {asked.batch!r}")
        self._ledger.permit(asked, use=use)
