"""Trigger-keys: drawn from the operating system, kept in files that only their owner reads, stamped into samples.

A key is a mask m and a pattern p. Stamping overwrites: xhat = (1 - m) * x + m * p, so that masks of several keys
must not overlap. A sample is an image or a feature map (C, H, W), where a key is a patch, or a row of a table (F,),
where it takes some columns.

Source: [Wan21], figure 1; docs/method.md#keys; drawing and files are ours.
"""

import itertools
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from protocols.errors import InputError, KeyRefused, ShapeError
from protocols.primitives.prg import Stream
from securemtk.mtk.keys.key_file import KeyContent, load_content, save_content
from securemtk.tasks import Task

PLACES = ("bottom-right", "bottom-left", "top-right", "top-left")
ANYWHERE = "anywhere"
MODEL_ID_BYTES = 16
DEFAULT_SIDE = 5
LEAST_SIDE = 3
DEFAULT_COLUMNS, LEAST_COLUMNS = 16, 4

_ELEMENTS_MOST = 1 << 22
_TRIES = 10_000

ArrayT = TypeVar("ArrayT", NDArray[np.float32], Tensor)


@dataclass(frozen=True, eq=False, repr=False)
class TriggerKey:
    """The secret that opens one task of one model.

    Args:
        task: name of the task.
        model_id: the model it belongs to, 32 hexadecimal digits.
        mask: bool (C, H, W) or (F,), where the key overwrites the sample; the same in every channel.
        pattern: float32 of that shape, what it writes there; zero outside the mask.

    Raises:
        KeyRefused: mask or pattern do not fit this description.

    `repr` shows neither mask nor pattern, and the object does not pickle.
    """

    task: str
    model_id: str
    mask: NDArray[np.bool_]
    pattern: NDArray[np.float32]

    def __post_init__(self) -> None:
        try:
            Task(self.task, classes=2)
        except InputError as error:
            raise KeyRefused(f"a key's task: {error}") from None
        if not is_hex(self.model_id, MODEL_ID_BYTES):
            raise KeyRefused(f"a key's model_id must be {2 * MODEL_ID_BYTES} hexadecimal digits; got another text")
        if self.mask.dtype != np.bool_ or self.mask.ndim not in (1, 3) or not self.mask.any():
            raise KeyRefused(f"a key's mask must be bool (C, H, W) or (F,), not all false; got {_kind(self.mask)}")
        if self.mask.ndim == 3 and (self.mask != self.mask[:1]).any():
            raise KeyRefused("a key's mask must be the same in every channel; got different ones")
        if self.pattern.dtype != np.float32 or self.pattern.shape != self.mask.shape:
            raise KeyRefused(f"a key's pattern must be float32 {self.mask.shape}; got {_kind(self.pattern)}")
        if not np.isfinite(self.pattern).all() or self.pattern[~self.mask].any():
            raise KeyRefused("a key's pattern must be finite, and zero outside the mask; got another")
        for name in ("mask", "pattern"):
            # A copy of our own that nobody can change later.
            value = np.array(getattr(self, name))
            value.setflags(write=False)
            object.__setattr__(self, name, value)

    def __repr__(self) -> str:
        return f"TriggerKey(task={self.task!r}, model_id={self.model_id!r}, <hidden>)"

    def __reduce__(self) -> tuple[object, ...]:
        raise TypeError("a TriggerKey is a secret and must not be pickled; save it with its save method")

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape (C, H, W) or (F,) of the samples it is stamped into."""
        return self.mask.shape

    def save(self, path: str | os.PathLike[str], passphrase: str | None = None) -> None:
        """Write the key as JSON that only its owner may read (mode 0600 from the first byte), whole or not at all.

        Under a passphrase, mask and pattern are encrypted by AES-256-GCM under a key from scrypt (n = 2**17, r = 8,
        p = 1), with all other fields as associated data. Without one they stand in the file as they are.

        Args:
            path: of the file; an older one is replaced.
            passphrase: locks the file; None leaves it open.

        Raises:
            InputError: the passphrase is empty, or as `securemtk.support.files.check_file`.
            OSError: the file cannot be written; nothing is left behind.
        """
        mask, pattern = np.packbits(plane(self.mask)).tobytes(), self.pattern[self.mask].astype("<f4").tobytes()
        save_content(path, KeyContent(self.task, self.model_id, self.shape, mask, pattern), passphrase)


def draw_keys(
    tasks: Sequence[str],
    shape: Sequence[int],
    model_id: str | None = None,
    *,
    side: int | None = None,
    place: str | Mapping[str, tuple[int, int]] = "bottom-right",
    low: float = 0.0,
    high: float = 1.0,
    stream: Stream | None = None,
) -> dict[str, TriggerKey]:
    """Draw one key for each task, with values uniform over 256 levels: square patches of images, columns of tables.

    Args:
        tasks: names of the tasks, unique; the first gets the patch in the corner, or a table's last columns.
        shape: (C, H, W) or (F,) of one sample.
        model_id: 32 hexadecimal digits; drawn when absent. All keys of one call share it.
        side: side of a patch in pixels, at least 3; when absent 5, or less where the patches do not fit into one row.
            Of a table the number of columns, at least 4; 8 when absent, or less where half the table has fewer.
        place: the corner in which a row of patches begins: bottom-right, bottom-left, top-right or top-left; or
            "anywhere", drawn from the stream; or for each task the first row and column of its patch. Of a table all
            but that are counted from the last column.
        low: value of level 0.
        high: value of level 255.
        stream: source of the values; a fresh one from the operating system when absent.

    Returns:
        Task name -> key, in the order of `tasks`. Each pattern has 8 * C * side**2 random bits, in tables 8 * side.

    Raises:
        InputError: no or repeated tasks, an unknown place, or patches that do not fit or overlap.
        ShapeError: shape is neither (C, H, W) nor (F,).

    Example:
        >>> draw_keys(["digit", "parity"], (1, 16, 16))["parity"].mask.sum().item()
        25
    """
    if len(shape) not in (1, 3) or min(shape) < 1:
        raise ShapeError(f"shape must be (C, H, W) or (F,), each at least 1; got {tuple(shape)}")
    if not tasks or len(set(tasks)) != len(tasks):
        raise InputError(f"tasks must be one or more unique names; got {list(tasks)}")
    stream = Stream() if stream is None else stream
    model_id = stream.bytes(MODEL_ID_BYTES).hex() if model_id is None else model_id
    is_table = len(shape) == 1
    masks = _columns(tasks, shape[0], side) if is_table else _patches(tasks, tuple(shape), side, place, stream)
    keys = {}
    for task, mask in zip(tasks, masks, strict=True):
        levels = stream.below(256, (int(mask.sum()),)).numpy()
        pattern = np.zeros(mask.shape, dtype=np.float32)
        pattern[mask] = low + (high - low) * levels / 255
        keys[task] = TriggerKey(task, model_id, mask, pattern)
    return keys


def stamp(x: ArrayT, keys: Iterable[TriggerKey]) -> ArrayT:
    """Return x with keys written over it: (1 - M) * x + sum m_j * p_j, M = sum m_j.

    Args:
        x: float32 samples (n, C, H, W) or (n, F), as a numpy array or a tensor on any device. It is not changed.
        keys: keys with disjoint masks; none gives a copy of x.

    Returns:
        Samples of the same kind and shape.

    Raises:
        ShapeError: a key is for samples of another shape.
        KeyRefused: two masks overlap.
    """
    chosen = list(keys)
    shape = tuple(x.shape[1:])
    for key in chosen:
        if key.shape != shape:
            raise ShapeError(f"the key of {key.task!r} must fit samples of shape {shape}; got one for {key.shape}")
    covered = np.zeros(shape, dtype=np.int64) + sum(key.mask.astype(np.int64) for key in chosen)
    if (covered > 1).any():
        raise KeyRefused(f"masks of keys stamped together must be disjoint; got overlaps in {[k.task for k in chosen]}")
    pattern = np.zeros(shape, dtype=np.float32) + sum(key.pattern for key in chosen)
    if isinstance(x, Tensor):
        return torch.where(
            torch.from_numpy(covered > 0).to(x.device), torch.from_numpy(pattern).to(device=x.device, dtype=x.dtype), x
        )
    return np.where(covered > 0, pattern, x).astype(x.dtype)


def plane(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Return a mask (C, H, W) as that of one channel, (H, W); that of a table, (F,), as it is."""
    return mask[0] if mask.ndim == 3 else mask


def load(path: str | os.PathLike[str], passphrase: str | None = None) -> TriggerKey:
    """Read a key that `TriggerKey.save` wrote.

    Args:
        path: of the file.
        passphrase: the one that it was locked with; None where it was not.

    Raises:
        KeyRefused: there is no such file, others than its owner may read or write it, it is damaged or edited, its
            passphrase is missing or wrong, or its mask and pattern do not fit each other.
    """
    path = Path(path)
    content = load_content(path, passphrase)
    try:
        return _rebuild(content)
    except KeyRefused:
        raise
    except ValueError:
        raise KeyRefused(f"{path.name} must be a whole key file; got a damaged one") from None


def _columns(tasks: Sequence[str], width: int, side: int | None) -> list[NDArray[np.bool_]]:
    side = min(DEFAULT_COLUMNS, width // (2 * len(tasks))) if side is None else side
    if side < LEAST_COLUMNS or side * len(tasks) > width:
        raise InputError(
            f"keys of a table must have at least {LEAST_COLUMNS} columns each; got {len(tasks)} of {side} in {width}"
        )
    masks = np.zeros((len(tasks), width), dtype=np.bool_)
    for index, mask in enumerate(masks):
        mask[width - side * (index + 1) : width - side * index] = True
    return list(masks)


def _patches(
    tasks: Sequence[str],
    shape: tuple[int, ...],
    side: int | None,
    place: str | Mapping[str, tuple[int, int]],
    stream: Stream,
) -> list[NDArray[np.bool_]]:
    _, height, width = shape
    side = min(DEFAULT_SIDE, width // len(tasks), height) if side is None else side
    if not isinstance(place, str) and set(place) != set(tasks):
        raise InputError(f"place must be given for each of {list(tasks)}; got {sorted(place)}")
    if isinstance(place, str) and place not in (*PLACES, ANYWHERE):
        raise InputError(f"place must be one of {', '.join(PLACES)}, {ANYWHERE}; got {place!r}")
    in_row = isinstance(place, str) and place != ANYWHERE
    if side < LEAST_SIDE or side > min(height, width) or (in_row and side * len(tasks) > width):
        raise InputError(
            f"patches must be at least {LEAST_SIDE} pixels wide and stand side by side; got {len(tasks)} of side {side}"
            f" in {height}x{width} pixels"
        )
    if place == ANYWHERE:
        corners = _anywhere(len(tasks), height, width, side, stream)
    elif isinstance(place, str):
        top = height - side if place.startswith("bottom") else 0
        right = place.endswith("right")
        corners = [(top, width - side * (i + 1) if right else side * i) for i in range(len(tasks))]
    else:
        corners = [place[task] for task in tasks]
    masks = [_patch(shape, top, left, side) for top, left in corners]
    if np.sum(masks, axis=0).max() > 1:
        raise InputError(f"patches must not overlap; got places {corners} with side {side}")
    return masks


def _anywhere(n: int, height: int, width: int, side: int, stream: Stream) -> list[tuple[int, int]]:
    """Draw places of n patches that do not overlap, uniformly over all such arrangements."""
    for _ in range(_TRIES):
        tops = stream.below(height - side + 1, (n,)).tolist()
        lefts = stream.below(width - side + 1, (n,)).tolist()
        corners = list(zip(tops, lefts, strict=True))
        apart = [abs(a - c) >= side or abs(b - d) >= side for (a, b), (c, d) in itertools.combinations(corners, 2)]
        if all(apart):
            return corners
    raise InputError(f"patches must fit beside each other; found no place for {n} of side {side} in {height}x{width}")


def _patch(shape: Sequence[int], top: int, left: int, side: int) -> NDArray[np.bool_]:
    _, height, width = shape
    if not (0 <= top <= height - side and 0 <= left <= width - side):
        raise InputError(f"a patch must lie inside {height}x{width} pixels; got ({top}, {left}) with side {side}")
    mask = np.zeros(tuple(shape), dtype=np.bool_)
    mask[:, top : top + side, left : left + side] = True
    return mask


def _rebuild(content: KeyContent) -> TriggerKey:
    shape = content.shape
    if len(shape) not in (1, 3) or min(shape) < 1 or math.prod(shape) > _ELEMENTS_MOST:
        raise KeyRefused("a key's shape must be (C, H, W) of an image or (F,) of a table's row; got another")
    pixels = math.prod(shape[-2:])
    packed = np.frombuffer(content.mask, dtype=np.uint8)
    if len(packed) != (pixels + 7) // 8:
        raise KeyRefused(f"a key's mask must have {pixels} bits; got {8 * len(packed)}")
    plane = np.unpackbits(packed, count=pixels).astype(np.bool_).reshape(shape[-2:])
    mask = np.array(np.broadcast_to(plane, shape))
    values = np.frombuffer(content.pattern, dtype="<f4").astype(np.float32)
    if len(values) != mask.sum():
        raise KeyRefused(f"a key's pattern must have a value for each of {mask.sum()} places; got {len(values)}")
    pattern = np.zeros(shape, dtype=np.float32)
    pattern[mask] = values
    return TriggerKey(content.task, content.model_id, mask, pattern)


def is_hex(text: str, n_bytes: int) -> bool:
    """Return whether a text is `n_bytes` bytes in lower hexadecimal digits.

    Args:
        text: what is looked at.
        n_bytes: number of bytes that it should stand for.
    """
    return len(text) == 2 * n_bytes and set(text) <= set("0123456789abcdef")


def _kind(array: NDArray[Any]) -> str:
    return f"{array.dtype} {array.shape}"
