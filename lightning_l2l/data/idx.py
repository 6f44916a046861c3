"""The IDX files of MNIST: downloading, reading (with every byte accounted for) and writing them.

An IDX file is a magic number (two zero bytes, the type of the values, the number of dimensions), the
dimensions as 32-bit big-endian integers, and the values in row-major order.
"""

import gzip
import hashlib
import os
import shutil
import zlib
from collections.abc import Mapping, Sequence
from http.client import HTTPException
from pathlib import Path
from urllib.request import urlopen

import numpy as np
import numpy.typing as npt
from rich.progress import wrap_file

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
    content = _read_unpacked(Path(path))
    header = 4 + 4 * num_dims
    if len(content) < header:
        raise ValueError(f"{path} has {len(content)} bytes, expected a header of {header}; {REMEDY}")
    magic, expected = int.from_bytes(content[:4], "big"), _UINT8 << 8 | num_dims
    if magic != expected:
        raise ValueError(f"{path} has the magic number 0x{magic:08x}, expected 0x{expected:08x}; {REMEDY}")
    shape = tuple(int(size) for size in np.frombuffer(content, ">u4", num_dims, offset=4))
    length = header + int(np.prod(shape, dtype=object))
    if len(content) != length:
        raise ValueError(f"{path} has {len(content)} bytes, expected {length} for the shape {shape}; {REMEDY}")
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)


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
    for name in checksums:
        if find_idx(root, name) is not None:
            continue
        failures = []
        for mirror in mirrors:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                _fetch(f"{mirror}{name}.gz", folder / f"{name}.gz", checksums[name], timeout)
                break
            except (OSError, HTTPException, ValueError) as error:
                failures.append(f"{mirror}: {error}")
        else:
            files = ", ".join(f"{name}.gz" for name in checksums)
            raise RuntimeError(
                f"{name}.gz could not be downloaded ({'; '.join(failures)}); "
                f"put {files} into {folder.resolve()} by hand"
            )


def _fetch(url: str, path: Path, checksum: str, timeout: float) -> None:
    part = path.with_name(f".{path.name}.{os.getpid()}.part")  # same folder, hence same disk: the move is atomic
    try:
        with urlopen(url, timeout=timeout) as response, part.open("wb") as file:
            size = int(response.headers.get("Content-Length", 0))
            with wrap_file(response, size, description=path.name, transient=True) as reader:
                shutil.copyfileobj(reader, file)
        found = hashlib.md5(_read_unpacked(part, packed=True), usedforsecurity=False).hexdigest()
        if found != checksum:
            raise ValueError(f"the unpacked content has the MD5 {found}, expected {checksum}")
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def _read_unpacked(path: Path, packed: bool | None = None) -> bytes:
    if not (path.suffix == ".gz" if packed is None else packed):
        return path.read_bytes()
    try:
        with gzip.open(path) as file:
            return file.read()
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is not a complete gzip file ({error}); {REMEDY}") from None
