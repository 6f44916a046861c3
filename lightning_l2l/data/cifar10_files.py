"""The files of CIFAR-10: the published archive, the binary files in it, and folders of images.

A binary file is a row of records, each of them a label and the red, the green and the blue values of 32 x 32 pixels,
one byte each.
"""

import gzip
import os
import shutil
import tarfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import IO

import numpy as np
import numpy.typing as npt

from lightning_l2l.arguments import brief
from lightning_l2l.data.download import CHUNK, beside, fetch, md5_of

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")  # labels 0 to 9
MIRRORS = ("https://www.cs.toronto.edu/~kriz/",)
ARCHIVE = "cifar-10-binary.tar.gz"
CHECKSUM = "c32a1d4ab5d03f1284b67883e8d87530"  # MD5 of the archive
FOLDER = "cifar-10-batches-bin"
BATCHES = {"train": [f"data_batch_{number}.bin" for number in range(1, 6)], "test": ["test_batch.bin"]}
REMEDY = "delete it and download it again"
SIZE = 32  # height and width of an image, in pixels

Bytes = npt.NDArray[np.uint8]

_RECORD = 1 + 3 * SIZE * SIZE
_MOST_RECORDS = 10_000
_FILE_BYTES = _MOST_RECORDS * _RECORD  # of each of the six published files
_MOST_PACKED = 2**28  # bytes of the archive; it has 170 MB
_MOST_UNPACKED = 2**28  # bytes of what is in it; 184 MB
_MOST_MEMBERS = 100  # of the archive; it has 9
_MOST_SECONDS = 7200.0  # of a download


def read_batch(path: Path) -> tuple[Bytes, Bytes]:
    """Reads a binary file.

    Args:
        path: The file.

    Returns:
        Images `[n, 3, 32, 32]` and labels in [0, 9], `[n]`.

    Raises:
        ValueError: If the file is not what it should be; the message names the file, what was found and expected.
    """
    try:
        with path.open("rb") as file:
            content = file.read(_FILE_BYTES + 1)
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror or error}); {REMEDY}") from None
    if not content or len(content) % _RECORD or len(content) > _FILE_BYTES:
        found = f"more than {_FILE_BYTES}" if len(content) > _FILE_BYTES else len(content)
        raise ValueError(
            f"{path} has {found} bytes, expected {_FILE_BYTES}, or fewer in whole records of {_RECORD}; {REMEDY}"
        )
    records = np.frombuffer(content, np.uint8).reshape(-1, _RECORD)
    labels = records[:, 0]
    if labels.max() >= len(CLASSES):
        record = int((labels >= len(CLASSES)).argmax())
        raise ValueError(f"{path} has the label {labels[record]} in record {record}, expected 0 to 9; {REMEDY}")
    return records[:, 1:].reshape(-1, 3, SIZE, SIZE), labels


def find_image_folder(root: Path) -> Path | None:
    """Returns the folder with `train/<class>` for one of the classes: `<root>/cifar10` or `root`; None if neither."""
    for folder in (root / "cifar10", root):
        if any((folder / "train" / name).is_dir() for name in CLASSES):
            return folder
    return None


def read_images(folder: Path) -> tuple[Bytes, Bytes]:
    """Reads the images `<folder>/<class>/*` in any format that Pillow reads, hidden files left out.

    Args:
        folder: It has a folder for each of the ten classes.

    Returns:
        Images `[n, 3, 32, 32]` and labels in [0, 9], `[n]`, ordered by label and file name.

    Raises:
        ImportError: If Pillow is not installed.
        FileNotFoundError: If a class has no image.
        ValueError: If a file is no 32 x 32 RGB image.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError(
            f"{folder} has image files, and reading them needs Pillow ({error}); pip install 'lightning_l2l[images]'"
        ) from None
    paths, labels = _list_images(folder)
    images = np.empty((len(paths), 3, SIZE, SIZE), np.uint8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Pillow, about what does not matter here, such as metadata
        for number, path in enumerate(paths):
            try:
                with Image.open(path) as image:  # this reads the header only
                    # An EPS file would be drawn by running another program on it.
                    as_wanted = image.size == (SIZE, SIZE) and image.mode == "RGB" and image.format != "EPS"
                    found = f"{image.format} of {image.width} x {image.height} pixels and mode {image.mode}"
                    if as_wanted:
                        images[number] = np.asarray(image).transpose(2, 0, 1)
            except Exception as error:  # the readers of damaged files raise nearly anything
                told = getattr(error, "strerror", None) or _told(error)
                told = "no format fits it" if str(path) in told else told
                raise ValueError(f"{path} cannot be read as an image ({told}); delete or replace it") from None
            if not as_wanted:
                raise ValueError(
                    f"{path} is {found}, expected an image of {SIZE} x {SIZE} pixels and mode RGB; delete or replace it"
                )
    return images, labels


def _list_images(folder: Path) -> tuple[list[Path], Bytes]:
    """The files of all classes and their labels."""
    paths: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(CLASSES):
        kind = folder / name
        found = [path for path in kind.iterdir() if not path.name.startswith(".")] if kind.is_dir() else []
        if not found:
            raise FileNotFoundError(
                f"{kind.resolve()} has no images; put those of the class there, one folder for each of the ten classes"
            )
        paths += sorted(found)
        labels += [label] * len(found)
    return paths, np.array(labels, np.uint8)


def _told(error: Exception) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:200]


def download(root: Path, mirrors: Sequence[str] = MIRRORS, checksum: str = CHECKSUM, timeout: float = 30.0) -> None:
    """Unpacks into `<root>/cifar-10-batches-bin` those files that are not there yet.

    The archive is taken from `root`, or downloaded to there. It is verified before anything is unpacked.

    Args:
        root: Folder of the data sets.
        mirrors: Addresses ending in `/`; the next one is tried where one fails.
        checksum: MD5 of the archive.
        timeout: Number of seconds without an answer after which a mirror has failed.

    Raises:
        RuntimeError: If the archive can be had from no mirror; the message says what to put where by hand.
        ValueError: If the archive found in `root` is another one, or cannot be unpacked.
    """
    if not find_missing(root):
        return

    def verify(path: Path) -> None:
        with path.open("rb") as file:
            found = md5_of(file, _MOST_PACKED, "the archive")
        if found != checksum:
            raise ValueError(f"the archive has the MD5 {found}, expected {checksum}")

    archive = root / ARCHIVE
    if archive.exists():
        try:
            verify(archive)
        except (OSError, ValueError) as error:
            raise ValueError(f"{archive} cannot be used ({error}); {REMEDY}") from None
    else:
        remedy = f"put {ARCHIVE} into {root.resolve()} by hand"
        fetch(archive, mirrors, verify, remedy, _MOST_PACKED, _MOST_SECONDS, timeout)
    unpack(archive, root)


def find_missing(root: Path) -> list[str]:
    """Names of the binary files that are not in `<root>/cifar-10-batches-bin`."""
    return [name for names in BATCHES.values() for name in names if not (root / FOLDER / name).is_file()]


def unpack(archive: Path, root: Path) -> None:
    """Takes the six binary files out of the archive, those that are missing, and nothing else.

    They are looked for by their names, so that no name in an archive decides where something is written. Each file
    appears complete.

    Raises:
        ValueError: If one of them is not there or not as published, or the archive is damaged.
    """
    wanted = {f"{FOLDER}/{name}": root / FOLDER / name for name in find_missing(root)}
    try:
        (root / FOLDER).mkdir(parents=True, exist_ok=True)
        with _Inflated(archive) as file, tarfile.open(fileobj=file, mode="r|") as tar:
            for number, member in enumerate(tar):
                if number >= _MOST_MEMBERS:
                    raise ValueError(f"it has more than {_MOST_MEMBERS} members")
                if member.size > _FILE_BYTES:  # would take long to skip
                    raise ValueError(f"{brief(member.name)} has {member.size} bytes, expected at most {_FILE_BYTES}")
                path = wanted.pop(member.name, None)
                if path is None:
                    continue
                content = tar.extractfile(member) if member.isreg() and not member.issparse() else None
                if content is None:
                    raise ValueError(f"{member.name} is no regular file")
                if member.size != _FILE_BYTES:
                    raise ValueError(f"{member.name} has {member.size} bytes, expected {_FILE_BYTES}")
                _write(path, content)
                if not wanted:
                    break
        if wanted:
            raise ValueError(f"it has no {FOLDER}/ with {', '.join(path.name for path in wanted.values())}")
    except Exception as error:  # of a damaged archive the reader raises nearly anything
        if isinstance(error, OSError) and error.errno is not None:
            raise ValueError(
                f"{archive} cannot be unpacked to {root / FOLDER} ({error.strerror}); make room there, or let it be "
                "written to"
            ) from None
        raise ValueError(f"{archive} cannot be unpacked ({_told(error)}); {REMEDY}") from None


def _write(path: Path, content: IO[bytes]) -> None:
    part = beside(path)
    try:
        with part.open("wb") as file:
            shutil.copyfileobj(content, file, CHUNK)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


class _Inflated(gzip.GzipFile):
    """What is in a gzip file, to be read once, and not much more of it than the published archive has."""

    _size = 0

    def read(self, size: int | None = -1) -> bytes:
        """Reads on, up to the limit."""
        piece = super().read(size)
        self._size += len(piece)
        if self._size > _MOST_UNPACKED:
            raise ValueError(f"the unpacked content has more than {_MOST_UNPACKED} bytes")
        return piece
