"""Images drawn by us, whose attributes follow a joint law that the caller sets and that is known exactly.

With a known law the leak of one attribute through another has an exact optimum to compare an attack with.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from protocols.errors import InputError, RangeError, ShapeError
from securemtk.data.base import DataSet, Images, Labels
from securemtk.data.splits import check_whole
from securemtk.tasks import Task

SIDE = 32
SHAPES = ("circle", "square", "triangle", "cross")
COLOURS = ("red", "green", "blue", "yellow")
SIZES = ("small", "large")
TEXTURES = ("solid", "striped")
TASKS = (
    Task.named("shape", SHAPES),
    Task.named("colour", COLOURS),
    Task.named("size", SIZES),
    Task.named("texture", TEXTURES),
)

_RGB = np.array([[0.9, 0.15, 0.15], [0.15, 0.75, 0.2], [0.2, 0.3, 0.95], [0.95, 0.85, 0.15]], dtype=np.float32)
_RADIUS = np.array([5.0, 8.5], dtype=np.float32)
_STRIPE_PERIOD = 4.0
_CHUNK = 4096

Floats = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Law:
    """A joint law of attributes.

    Args:
        names: one name for each axis of the table.
        table: float64 probabilities, one axis for each attribute and one entry for each combination; sums to 1.

    Raises:
        ShapeError: names and axes differ in number.
        RangeError: an entry is negative or not finite, or the sum is not 1 (within 1e-9).
        InputError: a name stands twice.

    Example:
        >>> law = Law(("a", "b"), np.array([[0.4, 0.1], [0.1, 0.4]]))
        >>> round(law.best_guess("a"), 3), round(law.best_guess("a", given=["b"]), 3)
        (0.5, 0.8)
    """

    names: tuple[str, ...]
    table: NDArray[np.float64]

    def __post_init__(self) -> None:
        if self.table.ndim != len(self.names) or self.table.size == 0:
            raise ShapeError(f"a law's table must have an axis for each of {self.names}; got shape {self.table.shape}")
        if len(set(self.names)) != len(self.names):
            raise InputError(f"a law's names must be unique; got {self.names}")
        if not (np.isfinite(self.table).all() and (self.table >= 0).all() and abs(self.table.sum() - 1) < 1e-9):
            raise RangeError("a law's table must hold probabilities that sum to 1; got others")

    @classmethod
    def independent(cls, tasks: Sequence[Task] = TASKS) -> "Law":
        """Return the law under which all attributes are uniform and independent."""
        shape = tuple(task.classes for task in tasks)
        return cls(tuple(task.name for task in tasks), np.full(shape, 1 / np.prod(shape)))

    def best_guess(self, target: str, given: Sequence[str] = ()) -> float:
        """Return how often the best possible guess of `target` is right for one who knows the attributes `given`.

        It is the sum over the values g of `given` of max_t P(target = t, given = g), exact.

        Args:
            target: the attribute guessed.
            given: attributes that are known.

        Raises:
            InputError: a name is unknown, or target is given.
        """
        if unknown := sorted({target, *given} - set(self.names)):
            raise InputError(f"attributes must be among {self.names}; got {unknown}")
        if target in given:
            raise InputError(f"target must not be given; got {target!r} in both")
        others = tuple(i for i, name in enumerate(self.names) if name != target and name not in given)
        joint = self.table.sum(axis=others, keepdims=True)
        return float(joint.max(axis=self.names.index(target)).sum())

    def optima(self, target: str) -> dict[tuple[str, ...], float]:
        """Return the `best_guess` of target for every set of other attributes, the empty one first.

        Raises:
            InputError: target is unknown.
        """
        others = [name for name in self.names if name != target]
        sets = (given for size in range(len(others) + 1) for given in combinations(others, size))
        return {given: self.best_guess(target, given) for given in sets}

    def sample(self, n: int, seed: int) -> dict[str, Labels]:
        """Return n draws, attribute name -> int64 (n,); the same seed gives the same draws.

        Args:
            n: number of draws.
            seed: of the draws.
        """
        edges = np.cumsum(self.table.ravel())
        cells = np.searchsorted(edges, np.random.default_rng(seed).random(n) * edges[-1], side="right")
        columns = np.unravel_index(cells, self.table.shape)
        return {name: column.astype(np.int64) for name, column in zip(self.names, columns, strict=True)}


def load(
    *, law: Law | NDArray[np.float64] | None = None, n_train: int = 4000, n_test: int = 1000, seed: int = 0
) -> DataSet:
    """Draw 32x32 colour images with tasks shape (4), colour (4), size (2) and texture (2).

    Each image holds one figure of random place, turn and shade on a grey, noisy ground. The five lowest rows never
    hold a part of it, so that keys there do not cover it.

    Args:
        law: joint law of the attributes, or its table of shape (4, 4, 2, 2); uniform and independent when absent.
        n_train: number of training samples.
        n_test: number of test samples.
        seed: of labels and drawing; the same seed gives the same data set.

    Returns:
        Images float32 (n, 3, 32, 32) in [0, 1].

    Raises:
        InputError: the law does not fit these attributes, or a number of samples is not positive.
    """
    law = Law.independent() if law is None else law
    if not isinstance(law, Law):
        law = Law(tuple(task.name for task in TASKS), _table(law))
    wanted = {task.name: task.classes for task in TASKS}
    if dict(zip(law.names, law.table.shape, strict=True)) != wanted:
        raise InputError(f"the law must be one of {wanted}; got {law.names} of shape {law.table.shape}")
    for name, value, least in (("n_train", n_train, 1), ("n_test", n_test, 1), ("seed", seed, 0)):
        check_whole(name, value, least)
    labels = law.sample(n_train + n_test, seed)
    x = draw(labels, seed + 1)
    return DataSet(
        name="shapes",
        tasks=TASKS,
        x_train=x[:n_train],
        y_train={task.name: labels[task.name][:n_train] for task in TASKS},
        x_test=x[n_train:],
        y_test={task.name: labels[task.name][n_train:] for task in TASKS},
    )


def _table(law: object) -> NDArray[np.float64]:
    try:
        return np.asarray(law, dtype=np.float64)
    except (TypeError, ValueError):
        raise InputError("the law must be a Law or a table of probabilities; got something else") from None


def correlated_law(strength: float = 0.85) -> Law:
    """Return a law under which the shape betrays the other three attributes, and they betray each other.

    The shape s = 0..3 is uniform. Given it the others are independent, and each agrees with it with probability
    q = strength: colour = s, size = s // 2 and texture = s // 2. A colour that does not agree is one of the other three
    with equal chance. All attributes are uniform by themselves, so the best guess without any other is 1 / classes.

    Meant for securing colour, size and texture while shape stays open: who knows the shape guesses each of them
    rightly with probability q exactly (for q >= 1/2). `Law.best_guess` and `Law.optima` give all other cases.

    Args:
        strength: q, in [0.5, 1]; 0.5 leaves size and texture independent of the shape.

    Raises:
        RangeError: strength lies outside.

    Example:
        >>> law = correlated_law(0.85)
        >>> round(law.best_guess("colour"), 3), round(law.best_guess("colour", given=["shape"]), 3)
        (0.25, 0.85)
        >>> round(law.best_guess("size", given=["colour", "texture"]), 3)
        0.78
    """
    if not (isinstance(strength, int | float) and 0.5 <= strength <= 1):
        raise RangeError(f"strength must lie in [0.5, 1]; got {strength!r}")
    s = np.arange(4)
    agrees = [np.eye(n)[place] for n, place in ((4, s), (2, s // 2), (2, s // 2))]
    colour, size, texture = (np.where(one == 1, strength, (1 - strength) / (one.shape[1] - 1)) for one in agrees)
    return Law(tuple(task.name for task in TASKS), np.einsum("sc,sz,st->sczt", colour, size, texture) / 4)


def load_correlated(*, strength: float = 0.85, n_train: int = 4000, n_test: int = 1000, seed: int = 0) -> DataSet:
    """Draw shapes under `correlated_law(strength)`; all else is as in `load`.

    Args:
        strength: as in `correlated_law`.
        n_train, n_test, seed: as in `load`.
    """
    drawn = load(law=correlated_law(strength), n_train=n_train, n_test=n_test, seed=seed)
    return replace(drawn, name="shapes-correlated")


def draw(labels: dict[str, Labels], seed: int) -> Images:
    """Draw one image for each row of labels: float32 (n, 3, 32, 32) in [0, 1].

    Args:
        labels: attribute -> int64 (n,).
        seed: of places, turns, shades and noise.
    """
    rng = np.random.default_rng(seed)
    n = len(labels["shape"])
    out = np.empty((n, 3, SIDE, SIDE), dtype=np.float32)
    for start in range(0, n, _CHUNK):
        part = slice(start, start + _CHUNK)
        out[part] = _draw_chunk({name: y[part] for name, y in labels.items()}, rng)
    return out


def _draw_chunk(labels: dict[str, Labels], rng: np.random.Generator) -> Images:
    n = len(labels["shape"])

    def between(low: float, high: float, *axes: int) -> Floats:
        return rng.uniform(low, high, (n, *axes)).astype(np.float32)

    radius = (_RADIUS[labels["size"]] * between(0.92, 1.08))[:, None, None]
    # A turned square reaches 1.13 radii from its centre: one radius of 8.5 * 1.08 still ends above row 27.
    reach = 1.13 * radius[:, 0, 0] + 0.5
    row = reach + between(0, 1) * (SIDE - 5 - 2 * reach)
    column = reach + between(0, 1) * (SIDE - 2 * reach)
    u, v = _turned_grid(row, column, between(-0.25, 0.25))
    inside = np.clip(0.5 - _distance(labels["shape"], u, v, radius), 0, 1)
    wave = np.sin(2 * np.pi * (u + v) / (np.sqrt(2) * _STRIPE_PERIOD) + between(0, 2 * np.pi)[:, None, None])
    striped = (labels["texture"] == 1)[:, None, None]
    shade = np.where(striped, 0.6 + 0.4 * np.clip(2 * wave, -1, 1), 1.0) * between(0.8, 1.0)[:, None, None]
    colour = np.clip(_RGB[labels["colour"]] + between(-0.08, 0.08, 3), 0, 1)[:, :, None, None]
    ground = between(0.15, 0.45)[:, None, None, None] + between(-0.05, 0.05, 3, SIDE, SIDE)
    image: Images = np.clip(ground + inside[:, None] * (colour * shade[:, None] - ground), 0, 1).astype(np.float32)
    return image


def _turned_grid(row: Floats, column: Floats, angle: Floats) -> tuple[Floats, Floats]:
    """Return for each image the coordinates of its pixels, in pixels from the figure's centre, turned by angle."""
    centres = np.arange(SIDE, dtype=np.float32) + 0.5
    dy = (centres[None, :] - row[:, None])[:, :, None]
    dx = (centres[None, :] - column[:, None])[:, None, :]
    cos, sin = np.cos(angle)[:, None, None], np.sin(angle)[:, None, None]
    return cos * dx + sin * dy, cos * dy - sin * dx


def _distance(shape: Labels, u: Floats, v: Floats, r: Floats) -> Floats:
    """Return the signed distance in pixels (outside > 0, exact at edges) to the figure of each image."""
    a, b = np.abs(u), np.abs(v)
    figures = (
        np.hypot(u, v) - r,
        np.maximum(a, b) - 0.8 * r,
        np.maximum(0.5 * np.sqrt(3) * a - 0.5 * v, v) - 0.5 * r,
        np.minimum(np.maximum(a, b / 3), np.maximum(a / 3, b)) - r / 3,
    )
    conditions = [(shape == i)[:, None, None] for i in range(len(figures))]
    distance: Floats = np.select(conditions, figures).astype(np.float32)
    return distance
