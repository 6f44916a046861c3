"""Checkpoints that a killed process, a full disk or a damaged file cannot take with them."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import zipfile
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO

from lightning_l2l.rules.files import read_checkpoint
from lightning_l2l.runs.trainer import shown

LAST = "last.ckpt"
#: The last.ckpt before the one that is there.
PREVIOUS = "previous.ckpt"


class AtomicCheckpointIO(TorchCheckpointIO):
    """Puts a checkpoint in its place whole or not at all, and keeps the last.ckpt before.

    It is written beside its place, flushed to the disk and renamed. Lightning's own way is by the folder for temporary
    files, which may lie on another file system: from there a file is copied, not renamed.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write a checkpoint.

        Args:
            checkpoint: What `torch.save` takes.
            path: Where to; what is not on a local file system is left to Lightning.
            storage_options: None; Lightning refuses anything else.

        Raises:
            RuntimeError: It cannot be written; what was there before is as it was.
        """
        if "://" in str(path) or storage_options is not None:
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        path = Path(path)
        content = io.BytesIO()  # torch itself would not say why a file cannot be written
        torch.save(checkpoint, content)
        partial = _partial(path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with partial.open("wb") as file:
                file.write(content.getbuffer())
                file.flush()
                os.fsync(file.fileno())
            if path.name == LAST and is_whole(path):
                _keep(path)
            partial.replace(path)
            _flush_folder(path.parent)
        except OSError as error:
            with contextlib.suppress(OSError):
                partial.unlink()
            raise RuntimeError(
                f"the checkpoint {shown(path)} could not be written ({error.strerror}), and those written before are "
                "as they were; free space or see to the folder, and go on with --ckpt_path last"
            ) from error


def _partial(path: Path) -> Path:
    return path.with_name(f".{path.name}.part")


def _keep(path: Path) -> None:
    """Let PREVIOUS be what `path` is."""
    previous = path.with_name(PREVIOUS)
    partial = _partial(previous)
    partial.unlink(missing_ok=True)
    try:
        os.link(path, partial)
    except OSError:  # not every file system has hard links
        shutil.copyfile(path, partial)
    partial.replace(previous)


def _flush_folder(folder: Path) -> None:
    """Flush the names in a folder to the disk, where the system can."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def remove_partial(folder: Path) -> None:
    """Remove what killed processes have left half-written in a folder of checkpoints."""
    for path in folder.glob(".*.ckpt.part"):
        path.unlink(missing_ok=True)


def is_whole(path: Path) -> bool:
    """Whether all checksums in a checkpoint are right; torch does not look at them when it reads one."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except Exception:  # whatever a damaged file makes zipfile raise
        return False


def read_to_resume(path: Path) -> dict[str, Any]:
    """A checkpoint of `MetaOptimizer` to go on with, read without executing anything in it.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is damaged, or no checkpoint of a rule; the message offers the one before, if that can be read.
    """
    try:
        return read_checkpoint(path)
    except ValueError as error:
        previous = path.with_name(PREVIOUS)
        if path.name != LAST or not is_whole(previous):
            raise
        raise ValueError(
            f"{str(path)!r} is damaged; the checkpoint before it is whole, go on with it: --ckpt_path {shown(previous)}"
        ) from error
