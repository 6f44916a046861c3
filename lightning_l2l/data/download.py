"""Downloading a file: from the first of several mirrors that works, verified before it appears under its name."""

import hashlib
import os
import time
from collections.abc import Callable, Sequence
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import urlsplit
from urllib.request import urlopen

from rich.progress import Progress

CHUNK = 2**20  # bytes read at a time


def fetch(
    path: Path,
    mirrors: Sequence[str],
    verify: Callable[[Path], None],
    remedy: str,
    most_bytes: int,
    most_seconds: float,
    timeout: float,
) -> None:
    """Downloads a file, which appears under its name only when it is complete and verified.

    Args:
        path: Where to; its name is also the file's name at the mirrors. Folders that are missing are made.
        mirrors: Addresses ending in `/`; the next one is tried where one fails.
        verify: Raises a ValueError for a file with another content than the one wanted.
        remedy: What a user can do where all mirrors fail, for the message.
        most_bytes: Number of bytes after which an answer is given up.
        most_seconds: Number of seconds after which one is.
        timeout: Number of seconds without an answer after which a mirror has failed.

    Raises:
        RuntimeError: If the file can be had from no mirror; the message says why, and the remedy.
    """
    failures = []
    for mirror in mirrors:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            _fetch(f"{mirror}{path.name}", path, verify, most_bytes, most_seconds, timeout)
            return
        except (OSError, HTTPException, ValueError) as error:
            failures.append(f"{mirror}: {' '.join(str(error).split())[:200]}")
    raise RuntimeError(f"{path.name} could not be downloaded ({'; '.join(failures)}); {remedy}")


def _fetch(
    url: str, path: Path, verify: Callable[[Path], None], most_bytes: int, most_seconds: float, timeout: float
) -> None:
    part = beside(path)
    deadline = time.monotonic() + most_seconds
    try:
        with urlopen(url, timeout=timeout) as response, part.open("wb") as file:
            if urlsplit(response.url).scheme not in (urlsplit(url).scheme, "https"):
                raise ValueError(f"it leads elsewhere, to {response.url}")
            size, received = int(response.headers.get("Content-Length") or 0), 0
            with Progress(transient=True) as progress:
                bar = progress.add_task(path.name, total=size or None)
                while piece := _read_some(response):
                    received += file.write(piece)
                    progress.advance(bar, len(piece))
                    if received > most_bytes:
                        raise ValueError(f"the answer has more than {most_bytes} bytes")
                    if time.monotonic() > deadline:
                        raise ValueError(f"it took more than {most_seconds:g} seconds")
            if received < size:
                raise ValueError(f"the answer ended after {received} of {size} bytes")
            file.flush()
            os.fsync(file.fileno())
        verify(part)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def beside(path: Path) -> Path:
    """Where a file is written until it is complete: in the same folder, hence on the same disk; the move is atomic."""
    return path.with_name(f".{path.name}.{os.getpid()}.part")


def md5_of(file: BinaryIO, most_bytes: int, what: str) -> str:
    """MD5 of what is left to read of a file.

    Raises:
        ValueError: If that is more than `most_bytes`; the message begins with `what` it is.
    """
    md5, size = hashlib.md5(usedforsecurity=False), 0
    while piece := file.read(CHUNK):
        md5.update(piece)
        size += len(piece)
        if size > most_bytes:
            raise ValueError(f"{what} has more than {most_bytes} bytes")
    return md5.hexdigest()


def _read_some(response: Any) -> bytes:
    # What has arrived, rather than a full chunk: one that trickles in would not be given up in time.
    found: bytes = response.read1(CHUNK) if isinstance(response, HTTPResponse) else response.read(CHUNK)
    return found
