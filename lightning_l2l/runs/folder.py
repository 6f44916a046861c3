"""The folder of a run: claimed by one run alone, held as long as it lasts, and looked at before it starts."""

from __future__ import annotations

import errno
import os
import shutil
import threading
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from lightning_l2l.runs.checkpoints import remove_partial
from lightning_l2l.runs.trainer import shown

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LOCK = ".lock"
#: Checkpoints of a run at most, one of them half-written: best, last, previous.
_NUM_FILES = 4
#: For what a run writes beside its checkpoints, and for what they hold beside weights; bytes.
_BESIDE = 2**20
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


class RunLogger(TensorBoardLogger):
    """A TensorBoardLogger whose version_N is its own, also where several runs start at the same moment.

    Raises:
        RuntimeError: The folder cannot be made.
    """

    def _get_next_version(self) -> int:
        version: int = super()._get_next_version()
        if rank_zero_only.rank:  # type: ignore[attr-defined]  # other processes ask that of rank 0
            return version
        while True:  # making a folder is what only one process can do
            folder = Path(self.root_dir) / f"version_{version}"
            try:
                folder.mkdir(parents=True)
            except FileExistsError:
                version += 1
            except OSError as error:
                raise _unusable(folder, error) from error
            else:
                return version


@contextmanager
def held(folders: Iterable[Path], needed: int) -> Iterator[None]:
    """Keep other runs out of folders, each of which is made if need be.

    The lock is the operating system's: it ends with the process, however that ends.

    Args:
        folders: They and their folders "checkpoints" are cleared of what killed processes have left half-written.
        needed: Bytes that there must be room for in each.

    Raises:
        RuntimeError: A folder is another run's, cannot be written to, or has too little room; then, and when the
            disk is full later on.
    """
    with ExitStack() as stack:
        for folder in folders:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                file = stack.enter_context((folder / LOCK).open("a"))
                free = shutil.disk_usage(folder).free
                _lock(file.fileno(), folder)
                file.truncate(0)
                file.write(f"{os.getpid()}\n")
                file.flush()
            except OSError as error:
                raise _unusable(folder, error) from error
            if free < needed:
                raise RuntimeError(
                    f"{shown(folder)} has room for {free / 1e6:.1f} MB, and a run with its checkpoints takes "
                    f"{needed / 1e6:.1f} MB; free space, or choose another --trainer.default_root_dir"
                )
            remove_partial(folder)
            remove_partial(folder / "checkpoints")
        before = threading.excepthook
        # TensorBoard's thread would print a traceback; the main thread meets the same error with its next curve.
        threading.excepthook = lambda args: None if _is_no_room(args.exc_value) else before(args)
        try:
            yield
        except OSError as error:
            if not _is_no_room(error):
                raise
            raise RuntimeError(
                f"a file could not be written ({error.strerror}); free space, and go on with --ckpt_path last"
            ) from error
        finally:
            threading.excepthook = before


def _is_no_room(error: BaseException | None) -> bool:
    return isinstance(error, OSError) and error.errno in _NO_ROOM


def _lock(descriptor: int, folder: Path) -> None:
    if fcntl is None:
        return
    try:
        # Not flock: that would outlive a killed process in the workers that load its data.
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        raise RuntimeError(
            f"a run is alive in {shown(folder)}; wait for its end or stop it, or start a new one without --ckpt_path"
        ) from error
    except OSError:  # a file system without locks
        return


def _unusable(folder: Path, error: OSError) -> RuntimeError:
    return RuntimeError(
        f"{shown(folder)} cannot be written to ({error.strerror}); choose another --trainer.default_root_dir, or see "
        "to its permissions and space"
    )


def folders_of(trainer: Trainer) -> list[Path]:
    """Where a run writes its checkpoints and curves; none of those that only a foreign logger knows."""
    known = trainer.logger is None or isinstance(trainer.logger, TensorBoardLogger | CSVLogger)
    found = [Path(trainer.log_dir or trainer.default_root_dir)] if known else []
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint) and callback.dirpath and "://" not in str(callback.dirpath):
            found.append(Path(callback.dirpath))
    return list(dict.fromkeys(folder.resolve() for folder in found))


def room_for(parameters: Iterable[Tensor]) -> int:
    """Bytes that the checkpoints of a run take, with two numbers a parameter for the meta-optimizer."""
    return _BESIDE + _NUM_FILES * 3 * sum(p.numel() * p.element_size() for p in parameters)
