"""The local start: keeper and authority as processes on this machine, under certificates of this run alone."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from protocols.errors import InputError
from protocols.net.listener import connect
from protocols.net.tls import Credentials, check_user, issue
from securemtk.serving.config import AUTHORITY_ROLE, KEEPER_ROLE, PURPOSES, USER_ROLE, Config
from securemtk.serving.launch import RoleProcess, stop_all
from securemtk.serving.peers import Links
from securemtk.serving.start_messages import AuthoritySettings, KeeperAt, KeeperSettings

Paths = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]


class LocalPeers:
    """Keeper and authority as child processes.

    Args:
        processes: of the keeper and the authority.
        links: to them.
    """

    def __init__(self, processes: list[RoleProcess], links: Links) -> None:
        self.processes, self.links = processes, links

    @property
    def pids(self) -> Mapping[str, int]:
        """Role -> process id."""
        return {process.role: process.pid for process in self.processes}

    def model_name(self, source: str | os.PathLike[str]) -> str:
        """Return the absolute path of a bundle or file, which the keeper opens; raise InputError where it is none."""
        try:
            return str(Path(source).resolve())
        except (TypeError, ValueError, OSError, RuntimeError):
            raise InputError(
                f"a model must be a path that there can be, or the bytes of an ONNX file; got a {type(source).__name__}"
            ) from None

    def stop(self, grace_s: float) -> None:
        """Wait for the processes to end by themselves, then end them."""
        stop_all(self.processes, grace_s)


class LocalStart:
    """Starts keeper and authority as children of this process, which becomes the user.

    Args:
        key_files: folder of `*.key` files, or a list of files and folders; only their paths pass through this process.
        passphrase: of the keys, where they have one.
        grants: file that says who may use which key; None for everybody.
        user: name of whoever asks, bound into this process's certificate.

    Raises:
        InputError: a name that no certificate can carry, or a passphrase that is no text.
    """

    def __init__(
        self,
        key_files: Paths | None = None,
        passphrase: str | None = None,
        grants: str | os.PathLike[str] | None = None,
        user: str | None = None,
    ) -> None:
        if user is not None:
            check_user(user)
        if passphrase is not None and not isinstance(passphrase, str):
            raise InputError(f"a passphrase must be a text; got a {type(passphrase).__name__}")
        paths = (
            [] if key_files is None else [key_files] if isinstance(key_files, str | os.PathLike) else list(key_files)
        )
        self._key_files = tuple(str(Path(path).resolve()) for path in paths)
        self._passphrase = passphrase
        self._grants = None if grants is None else os.path.abspath(grants)
        self._user = user

    def __repr__(self) -> str:
        return f"LocalStart({len(self._key_files)} paths of keys, user={self._user!r})"

    def start(self, config: Config, protocol: str) -> LocalPeers:
        """Return keeper and authority, started and connected; see `Start`."""
        processes: list[RoleProcess] = []
        try:
            return LocalPeers(processes, self._start(config, protocol, processes))
        except BaseException:
            stop_all(processes)
            raise

    def _start(self, config: Config, protocol: str, processes: list[RoleProcess]) -> Links:
        names = {} if self._user is None else {USER_ROLE: self._user}
        credentials = issue([KEEPER_ROLE, USER_ROLE, AUTHORITY_ROLE], users=names)
        for settings in self._settings(config, protocol, credentials):
            processes.append(RoleProcess(settings.kind, settings))
        addresses = {process.role: process.address(config.start_timeout_s) for process in processes}
        processes[1].tell(KeeperAt(addresses[KEEPER_ROLE]))
        limits = {"timeout_s": config.timeout_s, "opening_s": config.start_timeout_s}
        return {
            (role, purpose): connect(credentials[USER_ROLE], addresses[role], role, purpose, **limits)
            for role in addresses
            for purpose in PURPOSES[role, USER_ROLE]
        }

    def _settings(
        self, config: Config, protocol: str, credentials: Mapping[str, Credentials]
    ) -> tuple[KeeperSettings, AuthoritySettings]:
        common: dict[str, Any] = {
            "host": config.host,
            "timeout_s": float(config.timeout_s),
            "start_timeout_s": float(config.start_timeout_s),
            "threads": config.threads,
            "protocol": protocol,
        }
        keeper = KeeperSettings(
            credentials=credentials[KEEPER_ROLE].to_json(),
            port=config.keeper_port,
            needs_grant=self._grants is not None,
            store=None if config.store is None else os.path.abspath(config.store),
            slots=max(config.ahead, 1),
            **common,
        )
        authority = AuthoritySettings(
            credentials=credentials[AUTHORITY_ROLE].to_json(),
            port=config.authority_port,
            key_files=self._key_files,
            passphrase=self._passphrase,
            grants=self._grants,
            **common,
        )
        return keeper, authority
