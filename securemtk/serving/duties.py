"""What a role process does once it has its links: its part of the protocols, with all that this needs loaded.

Apart from `role`, which connects: that takes a tenth of the time that torch takes to load.
"""

import torch

from protocols.net import pulse
from protocols.running import backend
from securemtk.mtk.keys.distributor import KeyDistributor
from securemtk.mtk.keys.file_stores import FileGrants, FileKeyStore
from securemtk.mtk.keys.grants import Ledger
from securemtk.serving.config import AUTHORITY_ROLE, KEEPER_ROLE, USER_ROLE
from securemtk.serving.parties.authority import Authority
from securemtk.serving.parties.keeper import Keeper
from securemtk.serving.peers import Links
from securemtk.serving.process import Life, settle
from securemtk.serving.start_messages import AuthoritySettings, KeeperSettings


def distributor(settings: AuthoritySettings) -> KeyDistributor:
    """Return the keys that the settings name, and who may use them.

    Raises:
        InputError: keys or grants cannot be used.
    """
    grants = None if settings.grants is None else FileGrants(Ledger(settings.grants))
    return KeyDistributor(FileKeyStore(settings.key_files, settings.passphrase), grants)


def _warm(protocol: str) -> None:
    """Load what a prediction needs: after the peers have what they wait for, before anybody asks for one."""
    backend.find(protocol).warm()
    pulse.warm()
    settle()


def keep(settings: KeeperSettings, links: Links, life: Life) -> None:
    """Be the keeper until the user leaves."""
    torch.set_num_threads(settings.threads)
    user, authority, supply = links[USER_ROLE, "data"], links[AUTHORITY_ROLE, "data"], links[AUTHORITY_ROLE, "supply"]
    keeper = Keeper(
        user,
        authority,
        supply,
        life.watch,
        store=settings.store,
        slots=settings.slots,
        needs_grant=settings.needs_grant,
    )
    life.closing.callback(keeper.close)
    try:
        _warm(settings.protocol)
        keeper.serve()
    finally:
        if settings.store is not None:
            life.end.cancel()  # what is stored shall go, however long that, and to part from the others, takes


def decide(settings: AuthoritySettings, keys: KeyDistributor, links: Links, life: Life) -> None:
    """Be the authority until the user leaves."""
    torch.set_num_threads(settings.threads)
    supply = (links[KEEPER_ROLE, "supply"], links[USER_ROLE, "supply"])
    authority = Authority(links[USER_ROLE, "data"], links[KEEPER_ROLE, "data"], supply, life.watch, keys)
    _warm(settings.protocol)
    authority.serve()
