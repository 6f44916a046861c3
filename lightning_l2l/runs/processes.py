"""The processes of a run: what ends one of them ends all, soon, and one message says why."""

from __future__ import annotations

import signal
import time
from contextlib import suppress
from subprocess import Popen, TimeoutExpired
from typing import Any

from lightning.pytorch import Trainer
from torch import distributed

#: For the process of rank 0 to say what all of them have to say, and to end the others; seconds.
_PATIENCE = 3.0


def end_together(trainer: Trainer, exception: BaseException, agreed: bool) -> None:
    """Say of several processes to end them all; to be called in each that has met an exception.

    Rank 0 ends the processes that it has started: they may wait for it for ever. Another rank lets it speak first,
    so that a mistake that all of them meet is told once.

    Args:
        trainer: Whose processes.
        exception: What has been met.
        agreed: Whether all processes are leaving by themselves.

    Raises:
        RuntimeError: The exception only says that another process is gone.
        SystemExit: The same, in rank 0, after the other has told the reason.
    """
    if trainer.world_size == 1:
        return
    if not trainer.is_global_zero or not _children(trainer):
        if _is_lost_connection(exception):
            raise _lost() from exception
        if trainer.global_rank and not isinstance(exception, KeyboardInterrupt | SystemExit):
            time.sleep(_PATIENCE)
        return
    lost = _is_lost_connection(exception)
    codes = _end_children(trainer, _PATIENCE if agreed or lost else 0)
    if lost and any(code and code > 0 for code in codes):
        raise SystemExit(1)  # that process has said why
    if lost:
        raise _lost() from exception


def _is_lost_connection(exception: BaseException) -> bool:
    text = str(exception).lower()
    named = "gloo" in text or "nccl" in text or "closed by peer" in text or "reset by peer" in text
    return isinstance(exception, distributed.DistError) or (isinstance(exception, RuntimeError) and named)


def _lost() -> RuntimeError:
    return RuntimeError(
        "another process of this run has ended or cannot be reached (if it could say why, it has); when that is "
        "mended, go on with --ckpt_path last"
    )


def _children(trainer: Trainer) -> list[Popen[Any]]:
    """Those that Lightning has started from this one; none where torchrun or Slurm start them all."""
    return [p for p in getattr(trainer.strategy.launcher, "procs", None) or [] if isinstance(p, Popen)]


def _end_children(trainer: Trainer, seconds: float) -> list[int | None]:
    """End what has not ended by itself after some seconds; gives the exit statuses of what had."""
    children = _children(trainer)
    launcher: Any = trainer.strategy.launcher
    launcher.procs.clear()  # Lightning watches these, and would kill this process when one of them fails
    deadline = time.monotonic() + seconds
    codes = []
    for child in children:
        with suppress(TimeoutExpired):
            child.wait(max(0.0, deadline - time.monotonic()))
        codes.append(child.poll())
        if child.poll() is None:
            child.send_signal(signal.SIGKILL)  # what waits for another process hears nothing else
            child.wait()
    return codes
