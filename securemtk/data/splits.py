"""What loaders share: the split into training and test, options, and names."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from protocols.errors import InputError
from securemtk.data.base import Labels


@dataclass(frozen=True)
class Split:
    """Which samples of a source are for training and which for testing.

    Args:
        train: int64, places of the training samples, ascending.
        test: int64, places of the test samples, ascending.
    """

    train: Labels
    test: Labels

    def limited(self, n_train: int | None, n_test: int | None, seed: int) -> "Split":
        """Keep at most so many samples of each part, drawn at random: sources are often sorted by class.

        Raises:
            InputError: a number is less than 1.
        """
        rng = np.random.default_rng(check_whole("seed", seed, 0))
        parts = []
        for name, part, most in (("n_train", self.train, n_train), ("n_test", self.test, n_test)):
            if most is not None:
                check_whole(name, most, 1)
            kept = part if most is None or most >= len(part) else rng.choice(part, most, replace=False)
            parts.append(np.sort(kept))
        return Split(*parts)


def random_split(n: int, test_share: float, seed: int) -> Split:
    """Split n samples at random; the same seed gives the same split.

    Raises:
        InputError: test_share is not in (0, 1), or a part would be empty.
    """
    if not (isinstance(test_share, float) and 0 < test_share < 1):
        raise InputError(f"test_share must be a number between 0 and 1; got {test_share!r}")
    n_test = round(n * test_share)
    if not 0 < n_test < n:
        raise InputError(f"both parts must have a sample at least; got {n} samples of which {test_share} are for tests")
    order = np.random.default_rng(check_whole("seed", seed, 0)).permutation(n)
    return Split(np.sort(order[n_test:]), np.sort(order[:n_test]))


def named_split(parts: Sequence[str], source: str) -> Split:
    """Split by a column of the words train and test.

    Raises:
        InputError: another word stands there, or one of them is missing.
    """
    if (found := set(parts)) != {"train", "test"}:
        raise InputError(f"{source} must hold the words train and test and no others; got {few(sorted(found))}")
    words: NDArray[np.str_] = np.array(parts)
    return Split(np.flatnonzero(words == "train"), np.flatnonzero(words == "test"))


def check_whole(name: str, value: object, least: int) -> int:
    """Return an option that is a whole number of at least `least`; raise InputError for anything else."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise InputError(f"{name} must be a whole number of at least {least}; got {value!r}")
    return value


def as_path(name: str, value: object) -> Path:
    """Return an option that is a path; raise InputError for anything else."""
    if not isinstance(value, str | os.PathLike):
        raise InputError(f"{name} must be a path; got {value!r}")
    return Path(value)


def check_flag(name: str, value: object) -> bool:
    """Return an option that is true or false; raise InputError for anything else."""
    if not isinstance(value, bool):
        raise InputError(f"{name} must be true or false; got {value!r}")
    return value


def names_of(value: str | Sequence[str], what: str) -> tuple[str, ...]:
    """Return an option that is one name or several; raise InputError where there is none, or one stands twice."""
    names = (value,) if isinstance(value, str) else tuple(value) if isinstance(value, Sequence) else ()
    if not names or not all(isinstance(name, str) for name in names) or len(set(names)) != len(names):
        raise InputError(f"{what} must be one or more unique names; got {value!r}")
    return names


def few(names: Sequence[object], most: int = 5) -> str:
    """Return the first few names, and how many more there are."""
    shown = ", ".join(repr(name) for name in names[:most])
    return shown + (f" and {len(names) - most} more" if len(names) > most else "")
