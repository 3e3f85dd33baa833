"""The distributor of keys: what an authority's process needs of the agents, without the libraries of training."""

from collections.abc import Sequence

from protocols.errors import KeyRefused
from securemtk.mtk.keys.file_stores import HeldKeys
from securemtk.mtk.keys.grants import KeyRequest
from securemtk.mtk.keys.key import TriggerKey, draw_keys
from securemtk.mtk.keys.stores import GrantStore, KeyName, KeyStore


class KeyDistributor:
    """Holds keys, decides who may use them, and gives them out: in training to the assembler, later to the dealer.

    Args:
        keys: all keys that it may give out, of any number of models.
        grants: who may use them, and the log of uses; without them everybody who can ask may use every key, and nothing
            is logged.
    """

    def __init__(self, keys: KeyStore, grants: GrantStore | None = None) -> None:
        self._keys = keys
        self._grants = grants

    @classmethod
    def draw(cls, tasks: Sequence[str], shape: Sequence[int], *, low: float, high: float) -> "KeyDistributor":
        """Make new keys for tasks, as `draw_keys`: it learns of the samples their shape and range alone.

        Args:
            tasks: names of the tasks; none gives a distributor without keys.
            shape: (C, H, W) or (F,) of a sample.
            low, high: range of the keys' values.
        """
        return cls(HeldKeys(draw_keys(tasks, shape, low=low, high=high).values() if tasks else ()))

    @property
    def needs_grant(self) -> bool:
        """Whether keys are given out only under grants."""
        return self._grants is not None

    def for_training(self) -> dict[str, TriggerKey]:
        """Return the keys by task, for the assembler of a model of one's own: before there is anybody to grant to."""
        return {name.task: self._keys.get(name) for name in self._keys.names()}

    def find(self, asked: KeyRequest) -> list[TriggerKey]:
        """Return the keys of the tasks asked for; whoever uses them calls `permit` first.

        Raises:
            KeyRefused: there is none for a task, or one of another model; this is logged as well.
        """
        return [self._find(asked, task) for task in asked.tasks]

    def permit(self, asked: KeyRequest, *, use: bool) -> None:
        """Decide whether keys may be used: when this returns it is logged, and they may.

        Args:
            asked: what for; without tasks nothing is decided nor logged.
            use: whether they are used now, and the samples counted; False where correlations are dealt ahead.

        Raises:
            KeyRefused: they may not.
        """
        if self._grants is None:
            return
        if use:
            self._grants.use(asked)
        else:
            self._grants.permit(asked)

    def _find(self, asked: KeyRequest, task: str) -> TriggerKey:
        name, names = KeyName(asked.model_id, task), self._keys.names()
        if name in names:
            return self._keys.get(name)
        if self._grants is not None:
            self._grants.refuse(asked, task, "no key")
        if any(other.task == task for other in names):
            raise KeyRefused(f"the key of task {task!r} must be of this model; the authority's is of another one")
        raise KeyRefused(f"the authority must hold a key of task {task!r}; it holds none")
