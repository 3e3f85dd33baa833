"""Which of several workers (pytest-xdist) runs which tests.

A file's tests stay together, for the sake of what they share. Files whose tests start roles (tests/roles) go to the
first worker, and the others to the rest, as long as there are any; then whoever is idle takes what is left. Longest
files come first, so that the workers end at about the same time.

xdist's own grouping by a mark writes the group into a test's name, which pytest 9.2 no longer lets it do: every test
then goes to any worker, each worker makes what a file shares, and nothing says so.
"""

from collections.abc import Iterable

from xdist.scheduler import LoadFileScheduling
from xdist.workermanage import WorkerController


class Files(LoadFileScheduling):
    """Hand out files, to the first worker and to the others by kind.

    Args:
        config, log: what pytest-xdist gives.
        first: folder whose files the first worker takes first.
        long: names of files (without .py) that take long, longest first.
    """

    def __init__(self, config: object, log: object, *, first: str, long: Iterable[str]) -> None:
        super().__init__(config, log)
        self._first, self._long = first, list(long)

    def _assign_work_unit(self, node: WorkerController) -> None:
        waiting = sorted(self.workqueue, key=self._rank)
        is_first = node is next(iter(self.assigned_work))
        own = [path for path in waiting if self._first in path.split("/")]
        others = [path for path in waiting if path not in own]
        path = next(iter(own + others if is_first else others + own))
        self.workqueue.move_to_end(path, last=False)
        super()._assign_work_unit(node)

    def _rank(self, path: str) -> int:
        name = path.rsplit("/", 1)[-1].removesuffix(".py")
        return self._long.index(name) if name in self._long else len(self._long)
