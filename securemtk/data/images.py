"""Image files as arrays of one size: decoded once, then read from a cache on disk.

The cache is one .npy file of bytes for each list of files and options, so that it is read without decoding and
without holding it in memory. It holds the samples: it lies beside them unless another place is named, is readable by
its owner alone, and may be deleted at any time.
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import PIL
from numpy.typing import NDArray
from PIL import Image, ImageOps

from protocols.errors import InputError
from securemtk.data.base import DataSet, Images, Labels
from securemtk.data.splits import Split, as_path, check_flag, check_whole, few
from securemtk.support.files import whole_file
from securemtk.support.progress import progress_bar
from securemtk.tasks import Task

CACHE = ".securemtk-cache"
LEAST_SIDE, MOST_SIDE = 8, 1024
MOST_PIXELS = 1 << 26

_FORMAT = 1
_CHUNK = 256

Bytes = NDArray[np.uint8]


@dataclass(frozen=True)
class ImageOptions:
    """How image files become arrays.

    Args:
        side: images are resized (bilinear, antialiased) to side x side pixels, 8..1024.
        crop: cut the greatest square out of the middle first; without it the whole image is squeezed into the square.
        grey: one channel instead of red, green and blue.

    Raises:
        InputError: side or a flag is not as above.
    """

    side: int = 64
    crop: bool = False
    grey: bool = False

    def __post_init__(self) -> None:
        if check_whole("side", self.side, LEAST_SIDE) > MOST_SIDE:
            raise InputError(f"side must be at most {MOST_SIDE}; got {self.side}")
        check_flag("crop", self.crop)
        check_flag("grey", self.grey)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape (C, H, W) of one image."""
        return (1 if self.grey else 3), self.side, self.side


def read_images(
    folder: Path, names: Sequence[str], options: ImageOptions, cache: str | os.PathLike[str] | None = None
) -> Bytes:
    """Return image files as uint8 (n, C, side, side), mapped from the cache; they are decoded if they are not in it.

    Files count as those of the cache if their names, sizes and times of change are the same. While they are decoded
    memory holds a few hundred of them, and a bar is drawn on stderr if that is a terminal.

    Args:
        folder: where the files lie.
        names: of the files.
        options: how they become arrays.
        cache: folder of the cache; `CACHE` inside `folder` when absent.

    Raises:
        InputError: files are missing, or are no images of 8 bits a channel; all of them are counted.
        OSError: the cache cannot be written; nothing is left behind.
    """
    target = (folder / CACHE if cache is None else as_path("cache", cache)) / f"{_key(folder, names, options)}.npy"
    shape = (len(names), *options.shape)
    found = _cached(target, shape)
    if found is None:
        target.parent.mkdir(parents=True, exist_ok=True)
        _decode(target, shape, [folder / name for name in names], options)
        found = _cached(target, shape)
    if found is None:
        raise InputError(f"the cache must not change while it is read; got another file at {target}")
    return found


def image_set(
    name: str,
    folder: Path,
    files: Sequence[str],
    labels: Mapping[str, tuple[Labels, tuple[str, ...]]],
    split: Split,
    options: ImageOptions,
    *,
    cache: str | os.PathLike[str] | None,
    left_out: Sequence[str] = (),
) -> DataSet:
    """Read those files that the split names, and join them with their labels.

    Args:
        name: of the data set.
        folder: where the files lie.
        files: names of all files.
        labels: task -> labels int64 (all files,), and the names of its classes.
        split: places in `files`; those in no part are not read.
        options, cache: as in `read_images`.
        left_out: names of files that could not be used.
    """
    chosen = np.sort(np.concatenate([split.train, split.test]))
    raw = read_images(folder, [files[i] for i in chosen], options, cache)
    return DataSet(
        name=name,
        tasks=tuple(Task.named(task, classes) for task, (_, classes) in labels.items()),
        x_train=_floats(raw, np.searchsorted(chosen, split.train)),
        y_train={task: y[split.train] for task, (y, _) in labels.items()},
        x_test=_floats(raw, np.searchsorted(chosen, split.test)),
        y_test={task: y[split.test] for task, (y, _) in labels.items()},
        left_out=tuple(left_out),
    )


def _floats(raw: Bytes, places: NDArray[np.intp]) -> Images:
    out = np.empty((len(places), *raw.shape[1:]), dtype=np.float32)
    for start in range(0, len(places), _CHUNK):
        part = slice(start, start + _CHUNK)
        np.divide(raw[places[part]], np.float32(255), out=out[part])
    return out


def _key(folder: Path, names: Sequence[str], options: ImageOptions) -> str:
    # Pillow's version too: another one may decode or resize another way.
    digest = hashlib.sha256(json.dumps([_FORMAT, PIL.__version__, asdict(options)], sort_keys=True).encode())
    missing = []
    for name in names:
        try:
            status = os.stat(folder / name)
        except OSError:
            missing.append(name)
            continue
        digest.update(json.dumps([name, status.st_size, status.st_mtime_ns]).encode())
    if missing:
        raise InputError(f"{folder} must hold all image files; {len(missing)} of {len(names)} missing: {few(missing)}")
    return digest.hexdigest()[:32]


def _cached(target: Path, shape: tuple[int, ...]) -> Bytes | None:
    try:
        found = np.load(target, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    return found if isinstance(found, np.ndarray) and (found.dtype, found.shape) == (np.uint8, shape) else None


def _decode(target: Path, shape: tuple[int, ...], paths: Sequence[Path], options: ImageOptions) -> None:
    broken: list[str] = []
    with (
        whole_file(target, private=True) as file,
        # Pillow decodes without Python's lock.
        ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool,
        progress_bar("read images") as progress,
    ):
        np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
        # Part by part, for a pool takes all it is given into memory.
        for start in range(0, len(paths), _CHUNK):
            part = paths[start : start + _CHUNK]
            for path, found in zip(part, pool.map(lambda path: _read(path, options), part), strict=True):
                if isinstance(found, str):
                    broken.append(f"{path.name}: {found}")
                else:
                    file.write(found.tobytes())
            progress("", (start + len(part)) / len(paths))
        if broken:
            raise InputError(
                f"files in {paths[0].parent} must be images of 8 bits a channel; "
                f"{len(broken)} of {len(paths)} are not: {few(broken)}"
            )


def _read(path: Path, options: ImageOptions) -> Bytes | str:
    """Return one image, uint8 (C, side, side), or what is wrong with it."""
    try:
        with Image.open(path) as image:
            if image.width * image.height > MOST_PIXELS:
                return f"more than {MOST_PIXELS} pixels"
            if image.mode[0] in "IF":
                return f"mode {image.mode}"
            upright = ImageOps.exif_transpose(image).convert("L" if options.grey else "RGB")
    # Pillow's readers raise what they come across in a damaged file.
    except Exception as error:
        return type(error).__name__
    size, how = (options.side, options.side), Image.Resampling.BILINEAR
    square = ImageOps.fit(upright, size, how) if options.crop else upright.resize(size, how)
    pixels = np.asarray(square, dtype=np.uint8).reshape(*size, options.shape[0])
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))
