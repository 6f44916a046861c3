"""The folder of a run: claimed by one run alone, held as long as it lasts, and looked at before it starts."""

from __future__ import annotations

import errno
import os
import shutil
import threading
from collections.abc import Container, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch import Tensor

from lightning_l2l.runs.checkpoints import remove_partial
from lightning_l2l.runs.trainer import has_folder, run_folder, shown

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LOCK = ".lock"
#: Checkpoints of a run at most, one of them half-written: best, last, previous.
_NUM_FILES = 4
#: For what a run writes beside its checkpoints, and for what they hold beside weights; bytes.
_BESIDE = 2**20
_UNWRITABLE = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS),  # no room
    *(errno.EACCES, errno.EPERM, errno.ENOENT, errno.EEXIST, errno.ENOTDIR, errno.EISDIR),
    *(errno.ENAMETOOLONG, errno.ELOOP),
)
#: What commands write into the folder of a run, beside checkpoints and TensorBoard's files, whose names are unique.
FILES = (
    "config.yaml",
    "hparams.yaml",
    "metrics.csv",
    "comparison.csv",
    "tasks.csv",
    "curves.csv",
    "curves.png",
    "predictions.csv",
    "proposals.png",
)


def claim_version(root: Path, version: int = 0) -> int:
    """Make the first folder `version_N` that is not there yet, and give its N.

    Args:
        root: Where.
        version: N to begin with.

    Raises:
        RuntimeError: It cannot be made.
    """
    while True:  # making a folder is what only one process can do
        folder = root / f"version_{version}"
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            version += 1
        except OSError as error:
            raise unusable(folder, error) from error
        else:
            return version


def refuse_to_overwrite(trainer: Trainer, fits: bool, own: Path | None, checkpoints: Container[Path]) -> None:
    """Refuse to begin a run that would overwrite files which it did not write itself.

    Of a logger whose folder is not known before the run starts, that is left to who writes there.

    Args:
        trainer: Of the run.
        fits: Whether it writes checkpoints.
        own: The folder of the run that it goes on with, if any.
        checkpoints: Folders in which the checkpoints are its own.

    Raises:
        RuntimeError: There are some.
    """
    found, places = [], [folder for folder in folders_of(trainer) if fits]
    if has_folder(trainer):
        folder = run_folder(trainer).resolve()
        more = [Path(one.log_dir) for one in trainer.loggers[1:] if isinstance(one, CSVLogger | TensorBoardLogger)]
        # Where a run goes on, it has been seen to that its other loggers do.
        found = [place / name for place in [folder, *(more if own is None else [])] for name in FILES]
        places = [folder / "checkpoints" if place == folder else place for place in places]
    found += [path for place in places for path in sorted(place.glob("*.ckpt"))]
    others = [path for path in found if path.exists() and (own is None or not path.is_relative_to(own))]
    others = [path for path in others if path.suffix != ".ckpt" or path.parent not in checkpoints]
    if others:
        raise would_overwrite(others)


def would_overwrite(paths: Sequence[Path]) -> RuntimeError:
    """What to say of files that a run would overwrite, and did not write."""
    more = f" and {len(paths) - 1} more" if len(paths) > 1 else ""
    return RuntimeError(
        f"{shown(paths[0])}{more} would be overwritten, and this run did not write it; go on with that run by "
        "--ckpt_path, or choose another --trainer.default_root_dir, --trainer.logger.version or --checkpoint.dirpath"
    )


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
                raise unusable(folder, error) from error
            if free < needed:
                raise RuntimeError(
                    f"{shown(folder)} has room for {free / 1e6:.1f} MB, and a run with its checkpoints takes "
                    f"{needed / 1e6:.1f} MB; free space, or choose another --trainer.default_root_dir"
                )
            remove_partial(folder)
            remove_partial(folder / "checkpoints")
        with told("free space or see to the folder, and go on with --ckpt_path last"):
            yield


@contextmanager
def told(remedy: str) -> Iterator[None]:
    """Tell in one line that a file could not be written.

    Args:
        remedy: What to do then.

    Raises:
        RuntimeError: In place of an OSError of that kind.
    """
    before = threading.excepthook
    # TensorBoard's thread would print a traceback; the main thread meets the same error with its next curve.
    threading.excepthook = lambda args: None if _is_unwritable(args.exc_value) else before(args)
    try:
        yield
    except OSError as error:
        if not _is_unwritable(error):
            raise
        named = f"{shown(error.filename)} " if isinstance(error.filename, str | Path) else "a file "
        raise RuntimeError(f"{named}could not be opened or written ({error.strerror}); {remedy}") from error
    finally:
        threading.excepthook = before


def _is_unwritable(error: BaseException | None) -> bool:
    return isinstance(error, OSError) and error.errno in _UNWRITABLE


def _lock(descriptor: int, folder: Path) -> None:
    if fcntl is None:
        return
    try:
        # Not flock: that would outlive a killed process in the workers that load its data.
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        raise RuntimeError(
            f"a run is alive in {shown(folder)}; wait for its end or stop it, or give this one a folder of its own by "
            "another --trainer.default_root_dir (with a --trainer.logger: by its save_dir)"
        ) from error
    except OSError:  # a file system without locks
        return


def unusable(folder: Path, error: OSError) -> RuntimeError:
    """What to say where a folder cannot be made or written to."""
    return RuntimeError(
        f"{shown(folder)} cannot be written to ({error.strerror}); choose another --trainer.default_root_dir, or see "
        "to its permissions and space"
    )


def folders_of(trainer: Trainer) -> list[Path]:
    """Where a run writes its checkpoints and curves, its own folder first; none that only a foreign logger knows."""
    found = [run_folder(trainer)] if has_folder(trainer) else []
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint) and callback.dirpath and "://" not in str(callback.dirpath):
            found.append(Path(callback.dirpath))
    return list(dict.fromkeys(folder.resolve() for folder in found))


def room_for(parameters: Iterable[Tensor]) -> int:
    """Bytes that the checkpoints of a run take, with two numbers a parameter for the meta-optimizer."""
    return _BESIDE + _NUM_FILES * 3 * sum(p.numel() * p.element_size() for p in parameters)
