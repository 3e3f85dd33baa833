"""All attacks on one model, and their report."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from protocols.errors import InputError
from securemtk.mtk.attacks import finetune, guess, infer, invert, membership
from securemtk.mtk.attacks.base import Finding, Victim, one_thread
from securemtk.support.documents import read
from securemtk.support.progress import Progress, silent

FORMAT = 1


@dataclass(frozen=True)
class Effort:
    """How hard each attack tries.

    Args:
        tries: random patterns for each key.
        queries: of each key inversion from the query interface.
        steps: of each key inversion by gradient.
        restarts: random starts of each key inversion by gradient.
        labelled: numbers of labelled samples for fine-tuning; those beyond the training part are left out.
    """

    tries: int = 100_000
    queries: int = 200_000
    steps: int = 300
    restarts: int = 48
    labelled: tuple[int, ...] = (50, 200, 1000)

    def __post_init__(self) -> None:
        if min(self.tries, self.queries, self.steps, self.restarts, *self.labelled) < 1 or not self.labelled:
            raise InputError(f"each effort must be at least 1; got {asdict(self)}")


# Name -> the attack, as hard as an effort says; in the order in which they are run.
_RUNS: Mapping[str, Callable[[Effort], Callable[..., list[Finding]]]] = {
    guess.NAME: lambda effort: partial(guess.guess, tries=effort.tries),
    invert.NAME: lambda effort: partial(
        invert.invert, queries=effort.queries, steps=effort.steps, restarts=effort.restarts
    ),
    infer.NAME: lambda effort: infer.infer,
    finetune.NAME: lambda effort: partial(finetune.finetune, counts=effort.labelled),
    membership.NAME: lambda effort: membership.membership,
}
ATTACKS = tuple(_RUNS)


@dataclass(frozen=True)
class AttackReport:
    """What all attacks found.

    Args:
        seed: of the attacks.
        effort: how hard they tried.
        findings: in the order of the attacks.
        seconds: attack -> time that it took.
    """

    seed: int
    effort: Effort
    findings: tuple[Finding, ...]
    seconds: Mapping[str, float]

    def to_dict(self) -> dict[str, Any]:
        """Return all of it as JSON values."""
        return {"format": FORMAT} | asdict(self)

    @classmethod
    def from_dict(cls, raw: Any, what: str) -> "AttackReport":
        """Read what `to_dict` returned.

        Args:
            raw: JSON values.
            what: names them in a message.

        Raises:
            InputError: they are something else, or without findings.
        """
        if not isinstance(raw, dict) or raw.get("format") != FORMAT:
            raise InputError(f"{what} must be a table of format {FORMAT}, as written by securemtk attack; got another")
        found = read(cls, {name: value for name, value in raw.items() if name != "format"}, what)
        if not found.findings:
            raise InputError(f"{what} must have findings of securemtk attack; got none")
        return found


def check_attacks(names: Sequence[str]) -> None:
    """Raise InputError where a name is not among `ATTACKS`."""
    if unknown := sorted(set(names) - set(ATTACKS)):
        raise InputError(f"attacks must be among {', '.join(ATTACKS)}; got {', '.join(unknown)}")


def run_attacks(
    victim: Victim,
    only: Sequence[str] = (),
    *,
    effort: Effort | None = None,
    seed: int = 0,
    progress: Progress = silent,
) -> AttackReport:
    """Run attacks, on one thread; what they find depends on the seed and the victim alone.

    Args:
        victim: model, data and keys.
        only: names among `ATTACKS`; all of them when empty.
        effort: `Effort()` when absent.
        seed: of guesses, starts and samples, none of which is a secret.
        progress: told what goes on; see `securemtk.support.progress.progress_bar`.

    Raises:
        InputError: an unknown attack, or a number that is not positive.
    """
    effort = Effort() if effort is None else effort
    check_attacks(only)
    findings: list[Finding] = []
    seconds = {}
    with one_thread():
        for name in (name for name in ATTACKS if not only or name in only):
            start = time.perf_counter()
            findings += _RUNS[name](effort)(victim, seed=seed, progress=progress)
            seconds[name] = time.perf_counter() - start
    return AttackReport(seed, effort, tuple(findings), seconds)
