"""The distributor of keys: what an authority's process needs of the agents, without the libraries of training."""

from collections.abc import Iterable, Sequence

from protocols.errors import KeyRefused
from securemtk.mtk.keys.grants import KeyRequest, Ledger
from securemtk.mtk.keys.key import TriggerKey, draw_keys


class KeyDistributor:
    """Holds keys, decides who may use them, and gives them out: in training to the assembler, later to the dealer.

    Args:
        keys: all keys that it may give out, of any number of models.
        ledger: grants and the log of uses; without one everybody who can ask may use every key, and nothing is logged.
    """

    def __init__(self, keys: Iterable[TriggerKey], ledger: Ledger | None = None) -> None:
        self._keys = tuple(keys)
        self._ledger = ledger

    @classmethod
    def draw(cls, tasks: Sequence[str], shape: Sequence[int], *, low: float, high: float) -> "KeyDistributor":
        """Make new keys for tasks, as `draw_keys`: it learns of the samples their shape and range alone.

        Args:
            tasks: names of the tasks; none gives a distributor without keys.
            shape: (C, H, W) or (F,) of a sample.
            low, high: range of the keys' values.
        """
        return cls(draw_keys(tasks, shape, low=low, high=high).values() if tasks else ())

    @property
    def needs_grants(self) -> bool:
        """Whether keys are given out only under grants."""
        return self._ledger is not None

    def for_training(self) -> dict[str, TriggerKey]:
        """Return the keys by task, for the assembler of a model of one's own: before there is anybody to grant to."""
        return {key.task: key for key in self._keys}

    def find(self, asked: KeyRequest) -> list[TriggerKey]:
        """Return the keys of the tasks asked for; whoever uses them calls `permit` first.

        Raises:
            KeyRefused: there is none for a task, or one of another model; this is logged as well.
        """
        return [self._find(asked, task) for task in asked.tasks]

    def permit(self, asked: KeyRequest, *, use: bool) -> None:
        """Decide whether keys may be used, as `Ledger.permit`: when this returns it is logged, and they may.

        Args:
            asked: what for.
            use: whether the keys are used now; False where correlations are dealt ahead.

        Raises:
            KeyRefused: they may not.
        """
        if self._ledger is not None:
            self._ledger.permit(asked, use=use)

    def _find(self, asked: KeyRequest, task: str) -> TriggerKey:
        of_task = [key for key in self._keys if key.task == task]
        for key in of_task:
            if key.model_id == asked.model_id:
                return key
        if self._ledger is not None:
            self._ledger.refuse(asked, task, "no key")
        if of_task:
            raise KeyRefused(f"the key of task {task!r} must be of this model; the authority's is of another one")
        raise KeyRefused(f"the authority must hold a key of task {task!r}; it holds none")
