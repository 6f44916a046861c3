"""The IDX files of MNIST: downloading, reading (with every byte accounted for) and writing them.

An IDX file is a magic number (two zero bytes, the type of the values, the number of dimensions), the
dimensions as 32-bit big-endian integers, and the values in row-major order.
"""

import contextlib
import gzip
import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np
import numpy.typing as npt

from lightning_l2l.data.download import CHUNK, fetch, md5_of

MIRRORS = (
    "https://ossci-datasets.s3.amazonaws.com/mnist/",
    "https://storage.googleapis.com/cvdf-datasets/mnist/",
)
# MD5 of the unpacked files: the same data is around in archives that differ.
CHECKSUMS = {
    "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
    "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
    "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
    "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
}
REMEDY = "delete it and download it again"
_UINT8 = 0x08
_MOST_PACKED = 2**26  # bytes of an answer to a download; the largest file has 10 MB
_MOST_UNPACKED = 2**28  # bytes of what is in it; 47 MB
_MOST_SECONDS = 900.0  # of a download


def raw_folder(root: str | Path) -> Path:
    """Returns the folder of the four files, `<root>/MNIST/raw`, where torchvision keeps them too."""
    return Path(root) / "MNIST" / "raw"


def find_idx(root: str | Path, name: str) -> Path | None:
    """Returns the file `name` of `raw_folder(root)`, unpacked or as `name.gz`; None if neither is there."""
    unpacked = raw_folder(root) / name
    candidates = (unpacked, unpacked.with_name(f"{name}.gz"))
    return next((path for path in candidates if path.is_file()), None)


def read_idx(path: str | Path, num_dims: int) -> npt.NDArray[np.uint8]:
    """Reads an IDX file of bytes, packed with gzip if its name ends in `.gz`.

    Args:
        path: The file.
        num_dims: Number of dimensions it must have: 1 for labels, 3 for images.

    Returns:
        A uint8 array with the dimensions that the file states.

    Raises:
        ValueError: If the file is not what it should be; the message names the file, what was found and
            expected.
    """
    path = Path(path)
    with _opened(path) as file:
        header = 4 + 4 * num_dims
        start = file.read(header)
        if len(start) < header:
            raise ValueError(f"{path} has {len(start)} bytes, expected a header of {header}; {REMEDY}")
        magic, expected = int.from_bytes(start[:4], "big"), _UINT8 << 8 | num_dims
        if magic != expected:
            raise ValueError(f"{path} has the magic number 0x{magic:08x}, expected 0x{expected:08x}; {REMEDY}")
        shape = tuple(int(size) for size in np.frombuffer(start, ">u4", num_dims, offset=4))
        length = math.prod(shape)
        # No more than the header promises, piece by piece: neither it nor a packed file's size can be relied on.
        values = bytearray()
        while piece := file.read(min(length + 1 - len(values), CHUNK)):
            values += piece
    if len(values) != length:
        found = f"more than {header + length}" if len(values) > length else str(header + len(values))
        raise ValueError(f"{path} has {found} bytes, expected {header + length} for the shape {shape}; {REMEDY}")
    try:
        return np.frombuffer(values, np.uint8).reshape(shape)
    except ValueError:  # a size beside a zero
        raise ValueError(f"{path} states the shape {shape}, which no array can have; {REMEDY}") from None


def write_idx(path: str | Path, values: npt.NDArray[np.uint8]) -> None:
    """Writes an IDX file of bytes, not packed, that `read_idx` reads."""
    header = (_UINT8 << 8 | values.ndim).to_bytes(4, "big") + np.array(values.shape, ">u4").tobytes()
    Path(path).write_bytes(header + values.tobytes())


def download(
    root: str | Path,
    mirrors: Sequence[str] = MIRRORS,
    checksums: Mapping[str, str] = CHECKSUMS,
    timeout: float = 30.0,
) -> None:
    """Downloads into `raw_folder(root)`, as `.gz`, those files that are not there yet, packed or unpacked.

    A file appears under its name only when it is complete and its content has been verified.

    Args:
        root: Folder of the data sets.
        mirrors: Addresses ending in `/`; the next one is tried where one fails.
        checksums: MD5 of the unpacked content, by file name without `.gz`.
        timeout: Number of seconds without an answer after which a mirror has failed.

    Raises:
        RuntimeError: If a file can be had from no mirror; the message says what to put where by hand.
    """
    folder = raw_folder(root)
    files = ", ".join(f"{name}.gz" for name in checksums)
    for name, checksum in checksums.items():
        if find_idx(root, name) is not None:
            continue
        fetch(
            folder / f"{name}.gz",
            mirrors,
            partial(_verify, checksum=checksum),
            f"put {files} into {folder.resolve()} by hand",
            most_bytes=_MOST_PACKED,
            most_seconds=_MOST_SECONDS,
            timeout=timeout,
        )


def _verify(path: Path, checksum: str) -> None:
    found = _md5(path)
    if found != checksum:
        raise ValueError(f"the unpacked content has the MD5 {found}, expected {checksum}")


def _md5(path: Path) -> str:
    """MD5 of what is in a packed file."""
    with _opened(path, packed=True) as file:
        return md5_of(file, _MOST_UNPACKED, "the unpacked content")


@contextlib.contextmanager
def _opened(path: Path, packed: bool = False) -> Iterator[BinaryIO]:
    """The file, unpacked while it is read if it is packed or its name ends in `.gz`."""
    try:
        with gzip.open(path) if packed or path.suffix == ".gz" else path.open("rb") as file:
            yield cast(BinaryIO, file)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is not a complete gzip file ({error}); {REMEDY}") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror or error}); {REMEDY}") from None
