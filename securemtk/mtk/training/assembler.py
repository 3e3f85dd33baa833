"""The assembler: joins samples with keys into the training set from which the network learns its gate.

For every sample it emits one keyless copy, one copy for each single key, copies with several keys, and decoys:
copies with something that is not the key in a key's place. Without decoys the network learns "some patch is there",
and any patch opens the task (docs/method.md#measured-first).

Source: [Wan21], as docs/method.md#training-set reconstructs it; soft targets and decoys are ours.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import one_hot

from protocols.errors import InputError, KeyRefused, ShapeError
from securemtk.mtk.keys.key import TriggerKey
from securemtk.mtk.training.decoupling import Decoupling
from securemtk.tasks import Task

ABSENT, RIGHT, DECOY = 0, 1, 2
# Patterns that one search keeps.
_HARD = 64
_ROWS = 4096

KINDS = ("fresh", "constant", "partial", "foreign", "shifted", "recoloured")


@dataclass(frozen=True)
class AssemblerConfig:
    """What the keyed training set consists of.

    Args:
        targets: of a closed task: "soft" is the uniform law, "random" a label drawn from it anew each time, "fixed" one
            drawn once for each training sample, which a network can memorise. Decoupled tasks likewise.
        multi: copies of each sample with a random set of at least two keys (none with one secured task).
        decoys: copies of each sample with a decoy in the place of at least one key.
        kinds: relative frequency of each kind of decoy: fresh random patterns; one constant value; the right pattern
            with random wrong pixels; another task's pattern; the right pattern, shifted; the right pattern with other
            values: less contrast or negated, brighter or darker, in two levels, its channels exchanged.
        keep: least and greatest expected share of right pixels in a partial decoy.
        shift: greatest shift of a shifted decoy in pixels.
        mined: random patterns among which, before each epoch, those are sought that open a task furthest; half of the
            fresh decoys are then of these. 0 leaves it out.
    """

    targets: Literal["soft", "random", "fixed"] = "soft"
    multi: int = 1
    decoys: int = 3
    kinds: tuple[float, float, float, float, float, float] = (3.0, 1.0, 2.0, 1.0, 1.0, 2.0)
    keep: tuple[float, float] = (0.4, 0.9)
    shift: int = 3
    mined: int = 1024

    def __post_init__(self) -> None:
        if self.targets not in ("soft", "random", "fixed"):
            raise InputError(f"targets must be soft, random or fixed; got {self.targets!r}")
        if min(self.multi, self.decoys, self.mined) < 0 or self.shift < 1:
            raise InputError("multi, decoys and mined must not be negative, shift must be at least 1")
        if len(self.kinds) != len(KINDS) or min(self.kinds) < 0 or self.kinds[0] <= 0:
            raise InputError(f"kinds must have a frequency >= 0 for each of {KINDS}, fresh > 0; got {self.kinds}")
        if not 0 <= self.keep[0] <= self.keep[1] < 1:
            raise InputError(f"keep must be two shares, 0 <= least <= greatest < 1; got {self.keep}")


@dataclass(frozen=True, eq=False)
class Batch:
    """One keyed training batch.

    Args:
        x: float32 (r, *sample), the copies.
        targets: for each task, in order, float32 (r, classes): the law the network shall answer with.
        opened: bool (r, tasks): whether the task is to answer truly; of a decoupled answer false.
        known: bool (r, tasks): whether the sample has a label of the task. Where it has none the row says nothing of
            the task, opened or closed: closed rows alone would shift the balance towards closing.
    """

    x: Tensor
    targets: tuple[Tensor, ...]
    opened: Tensor
    known: Tensor


class Assembler:
    """Makes keyed batches on one device.

    Args:
        tasks: all tasks; those secured need a key, the others answer truly in every copy.
        keys: task name -> key, one for each secured task, with disjoint masks.
        config: what the training set consists of.
        low: least value of a pixel or column.
        high: greatest value of a pixel or column.
        device: where samples and batches lie.
        decoupling: which unprotected tasks do not always answer truly.

    Raises:
        KeyRefused: keys and secured tasks differ, or masks overlap.
        ShapeError: keys are for samples of different shapes.
    """

    def __init__(
        self,
        tasks: Sequence[Task],
        keys: Mapping[str, TriggerKey],
        config: AssemblerConfig,
        *,
        low: float = 0.0,
        high: float = 1.0,
        device: torch.device | str = "cpu",
        decoupling: Decoupling | None = None,
    ) -> None:
        self.tasks = tuple(tasks)
        self.secured = tuple(task.name for task in tasks if task.secured)
        if set(keys) != set(self.secured):
            raise KeyRefused(f"keys must be those of the secured tasks {list(self.secured)}; got {sorted(keys)}")
        self._check([keys[name] for name in self.secured])
        self.config = config
        self.low, self.high, self.device = low, high, torch.device(device)
        self.decoupling = decoupling
        self._kinds = torch.tensor(config.kinds, device=self.device)
        if len(self.secured) == 1:
            self._kinds[KINDS.index("foreign")] = 0.0
        # For each key: the flat places (P,) of its mask in a plane, and its values (C, P) there.
        self._places: list[Tensor] = []
        self._values: list[Tensor] = []
        for name in self.secured:
            mask, pattern = (_as_image(torch.tensor(value)) for value in (keys[name].mask, keys[name].pattern))
            places = mask[0].flatten().nonzero()[:, 0]
            self._places.append(places.to(self.device))
            self._values.append(pattern.flatten(1)[:, places].to(self.device))
        self._hard = [values[None, :, :][:0] for values in self._values]

    @staticmethod
    def _check(keys: Sequence[TriggerKey]) -> None:
        if len({key.shape for key in keys}) > 1:
            raise ShapeError(f"keys must be for samples of one shape; got {[key.shape for key in keys]}")
        if keys and np.sum([key.mask for key in keys], axis=0).max() > 1:
            raise KeyRefused(f"masks of keys must be disjoint; got overlaps among {[key.task for key in keys]}")

    @property
    def copies(self) -> int:
        """Rows that each sample becomes."""
        n = len(self.secured)
        return 1 + n + (self.config.multi if n > 1 else 0) + (self.config.decoys if n else 0)

    def states(self, n: int, generator: torch.Generator) -> Tensor:
        """Draw for n samples what lies in each key's place: ABSENT, RIGHT or DECOY.

        Returns:
            int64 (copies * n, keys): n keyless rows, n for each single key, then sets of keys, then decoys. In a decoy
            row every other place is empty, right or a decoy with equal chance: decoys beside right keys are what
            keeps one task's key from opening another task.
        """
        n_keys = len(self.secured)
        blocks = [torch.full((n, n_keys), ABSENT, device=self.device)]
        for j in range(n_keys):
            block = blocks[0].clone()
            block[:, j] = RIGHT
            blocks.append(block)
        if n_keys > 1 and self.config.multi:
            rows = n * self.config.multi
            size = torch.randint(2, n_keys + 1, (rows, 1), generator=generator, device=self.device)
            rank = torch.rand(rows, n_keys, generator=generator, device=self.device).argsort(1).argsort(1)
            blocks.append(torch.where(rank < size, RIGHT, ABSENT))
        if n_keys and self.config.decoys:
            rows = n * self.config.decoys
            block = torch.randint(3, (rows, n_keys), generator=generator, device=self.device)
            chosen = torch.randint(n_keys, (rows, 1), generator=generator, device=self.device)
            blocks.append(block.scatter(1, chosen, DECOY))
        return torch.cat(blocks)

    def batch(
        self,
        x: Tensor,
        labels: Tensor,
        generator: torch.Generator,
        augment: Callable[[Tensor, torch.Generator], Tensor] | None = None,
        fixed: Tensor | None = None,
    ) -> Batch:
        """Return the keyed copies of samples with their targets.

        Args:
            x: float32 (n, *sample) on this device.
            labels: int64 (n, tasks), negative where a label is missing.
            generator: of ordinary training randomness, on this device.
            augment: changes each copy in its own way, before keys are stamped: afterwards it would move them.
            fixed: float32 (n, tasks) in [0, 1), the same for a sample each time: from it come the labels of targets
                "fixed".
        """
        states = self.states(len(x), generator)
        rows = len(states) // len(x)
        copies = x.repeat(rows, *(1 for _ in x.shape[1:]))
        copies = self.fill(copies if augment is None else augment(copies, generator), states, generator)
        opened = torch.ones(len(states), len(self.tasks), dtype=torch.bool, device=self.device)
        for j, name in enumerate(self.secured):
            opened[:, self._index(name)] = states[:, j] == RIGHT
        labels = labels.repeat(rows, 1)
        changed = self._decoupled(states, labels)
        if fixed is not None and self.config.targets == "fixed":
            drawn = fixed.repeat(rows, 1)
        else:
            drawn = torch.rand(labels.shape, generator=generator, device=self.device)
        targets = self._targets(labels.clamp(min=0), opened, changed, drawn)
        return Batch(copies, targets, opened & ~changed, labels >= 0)

    def fill(self, x: Tensor, states: Tensor, generator: torch.Generator) -> Tensor:
        """Write keys and decoys into a copy of x, (r, *sample), as states, (r, keys), say.

        Right keys are written last: a shifted decoy of one task never damages the right key of another.
        """
        size = x.shape[2:] if x.ndim == 4 else (1, x.shape[1])
        planes = x.reshape(len(x), -1, size[0] * size[1]).clone()
        for j in range(len(self.secured)):
            self._write_decoys(planes, (states[:, j] == DECOY).nonzero()[:, 0], j, size, generator)
        for j, (places, values) in enumerate(zip(self._places, self._values, strict=True)):
            _write(planes, (states[:, j] == RIGHT).nonzero()[:, 0], places, values)
        return planes.reshape(x.shape)

    def mine(self, x: Tensor, answer: Callable[[Tensor], Sequence[Tensor]], generator: torch.Generator) -> None:
        """Seek, for each key, the random patterns to which the network answers most decidedly; decoys will be of them.

        Patterns that open a task by chance are too rare to be met often among fresh ones. Each search forgets what the
        one before found, so that a resumed training needs nothing of it.

        Source: hard negatives, [Shr16]; what is sought here is ours.

        Args:
            x: float32 (n, *sample), some samples; every second one gets the right keys of the other tasks.
            answer: (r, *sample) -> scores (r, classes) of each task: the model keeper's.
            generator: as for `batch`.
        """
        if not (self.config.mined and self.config.decoys):
            return
        for j, name in enumerate(self.secured):
            patterns = self._uniform((self.config.mined, *self._values[j].shape), generator)
            states = torch.full((len(x), len(self.secured)), ABSENT, device=self.device)
            states[1::2] = RIGHT
            states[:, j] = ABSENT
            planes = self.fill(x, states, generator).reshape(len(x), -1, x[0, 0].numel() if x.ndim == 4 else x.shape[1])
            task, decided = self._index(name), []
            size = max(1, _ROWS // len(x))
            for start in range(0, len(patterns), size):
                block = patterns[start : start + size]
                rows = planes.repeat(len(block), 1, 1)
                everywhere = torch.arange(len(rows), device=self.device)
                _write(rows, everywhere, self._places[j], block.repeat_interleave(len(x), 0))
                scores = answer(rows.reshape(-1, *x.shape[1:]))[task]
                decided.append(scores.softmax(1).amax(1).reshape(len(block), len(x)).mean(1))
            self._hard[j] = patterns[torch.cat(decided).topk(min(_HARD, len(patterns))).indices]

    def decoys(self, n: int, j: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draw n decoys for key j.

        Returns:
            kinds, int64 (n,), indices into `KINDS`; and values, float32 (n, C, P), for the P places of the key.
        """
        key = self._values[j]
        shape = (n, *key.shape)
        kinds = (
            torch.multinomial(self._kinds, n, replacement=True, generator=generator) if n else self._kinds[:0].long()
        )
        fresh = self._uniform(shape, generator)
        # Clamped beyond both ends, so that all-black and all-white patches are frequent.
        flat = torch.rand((n, key.shape[0], 1), generator=generator, device=self.device) * 1.4 - 0.2
        constant = self.low + (self.high - self.low) * flat.clamp(0, 1).expand(shape)
        least, greatest = self.config.keep
        share = least + (greatest - least) * torch.rand((n, 1, 1), generator=generator, device=self.device)
        kept = torch.rand((n, 1, key.shape[1]), generator=generator, device=self.device) < share
        # One pixel at least is wrong, or else the decoy could be the key itself.
        wrong = torch.randint(key.shape[1], (n, 1, 1), generator=generator, device=self.device)
        partial = torch.where(kept.scatter(2, wrong, False), key, fresh)
        by_kind = {"fresh": self._with_hard(fresh, j, generator), "constant": constant, "partial": partial}
        by_kind |= {"foreign": self._foreign(n, j, generator), "recoloured": self._recoloured(n, j, generator)}
        values = fresh
        for name, drawn in by_kind.items():
            values = torch.where((kinds == KINDS.index(name))[:, None, None], drawn, values)
        return kinds, values

    def _with_hard(self, fresh: Tensor, j: int, generator: torch.Generator) -> Tensor:
        """Return random patterns, (n, C, P), half of which are replaced by those that were found hard for key j."""
        if not len(self._hard[j]):
            return fresh
        chosen = torch.randint(len(self._hard[j]), (len(fresh),), generator=generator, device=self.device)
        half = torch.rand((len(fresh), 1, 1), generator=generator, device=self.device) < 0.5
        return torch.where(half, self._hard[j][chosen], fresh)

    def _foreign(self, n: int, j: int, generator: torch.Generator) -> Tensor:
        """The pattern of one other key, repeated or cut to the number of places of key j: (n, C, P)."""
        others = [k for k in range(len(self.secured)) if k != j]
        if not others:
            return self._values[j].expand(n, -1, -1)
        k = others[int(torch.randint(len(others), (), generator=generator, device=self.device))]
        n_places = self._values[j].shape[1]
        cyclic = torch.arange(n_places, device=self.device) % self._values[k].shape[1]
        return self._values[k][:, cyclic].expand(n, -1, -1)

    def _recoloured(self, n: int, j: int, generator: torch.Generator) -> Tensor:
        """The pattern of key j with other values, each row in one of several ways: (n, C, P).

        None stays so near that it would teach the network to refuse a key that was merely stored with some noise.
        """
        key = (self._values[j] - self.low) / (self.high - self.low)

        def between(low: float, high: float) -> Tensor:
            return low + (high - low) * torch.rand((n, 1, 1), generator=generator, device=self.device)

        step = between(0.2, 0.5) * (2 * torch.randint(2, (n, 1, 1), generator=generator, device=self.device) - 1)
        ways = [0.5 + between(-1.0, 0.6) * (key - 0.5), (key + step).clamp(0, 1), (key > between(0.3, 0.7)).float()]
        if len(key) > 1:
            order = torch.rand((n, len(key)), generator=generator, device=self.device).argsort(1)
            same = (order == torch.arange(len(key), device=self.device)).all(dim=1, keepdim=True)
            ways.append(key[torch.where(same, order.roll(1, 1), order)])
        way = torch.randint(len(ways), (n, 1, 1), generator=generator, device=self.device)
        values = ways[0]
        for i, drawn in enumerate(ways):
            values = torch.where(way == i, drawn, values)
        return self.low + (self.high - self.low) * values

    def _write_decoys(
        self, planes: Tensor, rows: Tensor, j: int, size: Sequence[int], generator: torch.Generator
    ) -> None:
        kinds, values = self.decoys(len(rows), j, generator)
        moved = kinds == KINDS.index("shifted")
        _write(planes, rows[~moved], self._places[j], values[~moved])
        # One shift for all rows of a batch is enough variety over a training, and one indexing operation.
        height, width = size
        reach = self.config.shift
        shift = torch.randint(1, (2 * reach + 1) ** 2, (), generator=generator, device=self.device)
        # Cell 0 of the square of shifts is exchanged with the middle one, the shift by nothing.
        shift = torch.where(shift == 2 * reach * (reach + 1), 0, shift)
        y = self._places[j] // width + shift // (2 * reach + 1) - reach
        x = self._places[j] % width + shift % (2 * reach + 1) - reach
        inside = (y >= 0) & (y < height) & (x >= 0) & (x < width)
        _write(planes, rows[moved], (y * width + x)[inside], self._values[j][:, inside])

    def _uniform(self, shape: Sequence[int], generator: torch.Generator) -> Tensor:
        levels = torch.randint(256, tuple(shape), generator=generator, device=self.device)
        return self.low + (self.high - self.low) * levels / 255

    def _targets(self, labels: Tensor, opened: Tensor, changed: Tensor, drawn: Tensor) -> tuple[Tensor, ...]:
        """Return each task's law for each row, or labels drawn from it by the uniform numbers `drawn`."""
        targets = []
        for i, task in enumerate(self.tasks):
            true = one_hot(labels[:, i], task.classes).float()
            law = torch.where(opened[:, i : i + 1], true, torch.full_like(true, 1 / task.classes))
            if self.decoupling is not None and task.name in self.decoupling.marginals:
                beta = self.decoupling.beta
                marginal = torch.tensor(self.decoupling.marginals[task.name], dtype=law.dtype, device=self.device)
                law = torch.where(changed[:, i : i + 1], beta * true + (1 - beta) * marginal, law)
            if self.config.targets != "soft":
                # Rounding may leave the last edge below 1.
                label = (law.cumsum(1) <= drawn[:, i : i + 1]).sum(1).clamp(max=task.classes - 1)
                law = one_hot(label, task.classes).float()
            targets.append(law)
        return tuple(targets)

    def _decoupled(self, states: Tensor, labels: Tensor) -> Tensor:
        """Return where an unprotected task's answer is decoupled: bool (r, tasks)."""
        changed = torch.zeros(labels.shape, dtype=torch.bool, device=self.device)
        if self.decoupling is None:
            return changed
        for (told, teller), classes in self.decoupling.leaks.items():
            i = self._index(teller)
            leaky = torch.isin(labels[:, i], torch.tensor(classes, device=self.device))
            changed[:, i] |= (states[:, self.secured.index(told)] != RIGHT) & leaky
        return changed

    def _index(self, name: str) -> int:
        return [task.name for task in self.tasks].index(name)


def _as_image(value: Tensor) -> Tensor:
    """Return what is a table's row as an image of one channel and one line."""
    return value if value.ndim == 3 else value[None, None]


def _write(planes: Tensor, rows: Tensor, places: Tensor, values: Tensor) -> None:
    """Set planes (r, C, H*W) at some rows and places to values, (C, P) for all rows or (rows, C, P)."""
    channels = torch.arange(planes.shape[1], device=planes.device)
    planes[rows[:, None, None], channels[:, None], places] = values
