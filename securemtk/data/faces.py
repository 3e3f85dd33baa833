"""CelebA and UTKFace, as their owners distribute them.

Sources: [Liu15] for CelebA, [Zha17] for UTKFace. Neither is included: both are for research alone, under their owners'
terms.
"""

import itertools
import logging
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

import numpy as np

from protocols.errors import InputError
from securemtk.data.base import DataSet, Labels
from securemtk.data.images import ImageOptions, image_set
from securemtk.data.labels import as_folder
from securemtk.data.splits import Split, few, names_of, random_split

CELEBA_IMAGES, CELEBA_ATTRIBUTES, CELEBA_PARTITION = (
    "img_align_celeba",
    "list_attr_celeba.txt",
    "list_eval_partition.txt",
)
PARTITIONS = {"train": 0, "validation": 1, "test": 2}
GENDERS = ("male", "female")
RACES = ("White", "Black", "Asian", "Indian", "Others")

# Some names of the distributed files are odd behind the date; their labels are whole.
_UTKFACE = re.compile(r"(\d{1,3})_([01])_([0-4])_\d+.*\.(jpe?g|png)", re.IGNORECASE)

StrPath = str | os.PathLike[str]
log = logging.getLogger(__name__)


def celeba(
    *,
    path: StrPath,
    attributes: str | Sequence[str] = ("Male", "Smiling", "Heavy_Makeup", "Wearing_Lipstick"),
    test_part: str = "test",
    side: int = 64,
    crop: bool = True,
    grey: bool = False,
    n_train: int | None = None,
    n_test: int | None = None,
    seed: int = 0,
    cache: StrPath | None = None,
) -> DataSet:
    """Load CelebA: a task of two classes, no and yes, for each of the chosen attributes.

    Args:
        path: folder with img_align_celeba/, list_attr_celeba.txt and list_eval_partition.txt.
        attributes: names as in the first lines of list_attr_celeba.txt.
        test_part: test or validation: which of the owners' partitions is the test part. Training is always their own.
        side, crop, grey: as in `ImageOptions`.
        n_train: at most so many training images, drawn at random; only images in use are read.
        n_test: at most so many test images.
        seed: of what is drawn at random.
        cache: folder of decoded images; inside img_align_celeba/ when absent.

    Returns:
        Images float32 (n, 3 or 1, side, side) in [0, 1].

    Raises:
        InputError: a file is missing, broken or cut off, or an attribute is unknown; the message names it.
        OSError: the cache cannot be written.
    """
    folder = as_folder(path, f"{CELEBA_IMAGES}/, {CELEBA_ATTRIBUTES} and {CELEBA_PARTITION}")
    images = as_folder(folder / CELEBA_IMAGES, "CelebA's images")
    options, chosen = ImageOptions(side, crop, grey), names_of(attributes, "attributes")
    if test_part not in ("test", "validation"):
        raise InputError(f"test_part must be test or validation; got {test_part!r}")
    files, values = _attributes(folder / CELEBA_ATTRIBUTES, chosen)
    partition = _partition(folder / CELEBA_PARTITION)
    if strangers := [name for name in files if name not in partition]:
        raise InputError(f"{folder / CELEBA_PARTITION} must name every image; got none of {few(strangers)}")
    parts = np.array([partition[name] for name in files])
    split = Split(np.flatnonzero(parts == PARTITIONS["train"]), np.flatnonzero(parts == PARTITIONS[test_part]))
    if not (len(split.train) and len(split.test)):
        raise InputError(f"{folder / CELEBA_PARTITION} must have images for train (0) and {test_part}; got none of one")
    labels = {name: (values[:, i], ("no", "yes")) for i, name in enumerate(chosen)}
    return image_set("celeba", images, files, labels, split.limited(n_train, n_test, seed), options, cache=cache)


def utkface(
    *,
    path: StrPath,
    age_edges: Sequence[int] = (31, 46),
    test_share: float = 0.2,
    side: int = 64,
    crop: bool = False,
    grey: bool = False,
    n_train: int | None = None,
    n_test: int | None = None,
    seed: int = 0,
    cache: StrPath | None = None,
) -> DataSet:
    """Load UTKFace with tasks age (bins), gender (2) and race (5), from the names of its files.

    Files are named age_gender_race_date.jpg (also .jpg.chip.jpg). Those with other names are left out: a warning is
    logged that counts them, and `DataSet.left_out` names them all.

    Args:
        path: folder of the images.
        age_edges: first age of each bin but the first, ascending: (31, 46) are the bins 0-30, 31-45 and 46+.
        test_share: share of the images for testing, drawn at random.
        side, crop, grey: as in `ImageOptions`.
        n_train: at most so many training images, drawn at random; only images in use are read.
        n_test: at most so many test images.
        seed: of what is drawn at random.
        cache: folder of decoded images; inside the folder when absent.

    Returns:
        Images float32 (n, 3 or 1, side, side) in [0, 1].

    Raises:
        InputError: the folder holds no such file, or a file is broken; the message names it.
        OSError: the cache cannot be written.
    """
    folder = as_folder(path, "images named age_gender_race_date.jpg")
    options, edges = ImageOptions(side, crop, grey), _edges(age_edges)
    found = sorted(entry.name for entry in os.scandir(folder) if entry.is_file() and not entry.name.startswith("."))
    matches = {name: _UTKFACE.fullmatch(name) for name in found}
    files = [name for name, match in matches.items() if match]
    left_out = [name for name, match in matches.items() if not match]
    if not files:
        raise InputError(f"{folder} must hold images named age_gender_race_date.jpg; got {few(found) or 'no file'}")
    if left_out:
        log.warning(
            "%s: %d of %d files left out, not named age_gender_race_date.jpg: %s",
            *(folder, len(left_out), len(found), few(left_out)),
        )
    values = np.array([[int(part) for part in match.groups()[:3]] for match in matches.values() if match])
    bins = [0, *edges]
    ages = (*(f"{a}-{b - 1}" for a, b in itertools.pairwise(bins)), f"{bins[-1]}+")
    labels = {
        "age": (np.digitize(values[:, 0], edges).astype(np.int64), ages),
        "gender": (values[:, 1].astype(np.int64), GENDERS),
        "race": (values[:, 2].astype(np.int64), RACES),
    }
    split = random_split(len(files), test_share, seed).limited(n_train, n_test, seed)
    return image_set("utkface", folder, files, labels, split, options, cache=cache, left_out=left_out)


def _edges(edges: Sequence[int]) -> list[int]:
    ages = list(edges) if isinstance(edges, Sequence) else []
    if not ages or not all(isinstance(age, int) for age in ages) or sorted({*ages, 0}) != [0, *ages]:
        raise InputError(f"age_edges must be one or more whole numbers above 0, ascending; got {edges!r}")
    return ages


@contextmanager
def _lines(path: Path) -> Iterator[TextIO]:
    try:
        with open(path, encoding="utf-8") as file:
            yield file
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else type(error).__name__
        raise InputError(f"{path} must be a readable text file as CelebA's owners distribute it; got: {why}") from None


def _attributes(path: Path, chosen: Sequence[str]) -> tuple[list[str], Labels]:
    """Read how many images there are, the names of the attributes, and a line of -1 and 1 for each image."""
    files, values = [], []
    with _lines(path) as file:
        count, names = file.readline().strip(), file.readline().split()
        if not count.isdecimal() or not names:
            raise InputError(f"{path} must begin with the number of images and the names of attributes; got others")
        if unknown := [name for name in chosen if name not in names]:
            raise InputError(f"attributes must be among {', '.join(names)}; got {few(unknown)}")
        places = [1 + names.index(name) for name in chosen]
        for line, text in enumerate(file, start=3):
            words = text.split()
            if len(words) != 1 + len(names) or not {words[i] for i in places} <= {"-1", "1"}:
                raise InputError(
                    f"{path}, line {line}, must be a file name and {len(names)} values -1 or 1; got another"
                )
            files.append(words[0])
            values.append([words[i] == "1" for i in places])
    if len(files) != int(count) or len(set(files)) != len(files):
        raise InputError(f"{path} must name {count} images, as its first line says, each once; got {len(files)} lines")
    return files, np.array(values, dtype=np.int64).reshape(len(files), len(chosen))


def _partition(path: Path) -> dict[str, int]:
    """Read a line for each image: its name, and 0 (training), 1 (validation) or 2 (test)."""
    found = {}
    with _lines(path) as file:
        for line, text in enumerate(file, start=1):
            words = text.split()
            if len(words) != 2 or words[1] not in ("0", "1", "2"):
                raise InputError(f"{path}, line {line}, must be a file name and 0, 1 or 2; got another")
            found[words[0]] = int(words[1])
    return found
