"""Stopping a run without losing what it has done."""

from __future__ import annotations

import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info


class FinishEpisode(Callback):
    """On Ctrl-C: finish the episode, write last.ckpt, and stop; on a second one, stop at once.

    Between two episodes everything that a run needs to go on is in a checkpoint; within one it is not. The
    checkpoint is written where the run's `ModelCheckpoint` of the name "last" writes.
    """

    def __init__(self) -> None:
        self.asked = False
        self.before: Any = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the signal over."""
        if threading.current_thread() is threading.main_thread():  # only there can a handler be set
            self.asked = False
            self.before = signal.signal(signal.SIGINT, self._ask)

    def _ask(self, signum: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        rank_zero_info("\nFinishing this episode; Ctrl-C once more stops at once.")

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Stop here if asked to."""
        self._stop_if_asked(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop here if asked to."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._stop_if_asked(trainer)

    def _stop_if_asked(self, trainer: Trainer) -> None:
        if not self.asked:
            return
        path = self._path(trainer)
        trainer.save_checkpoint(path)
        rank_zero_info(f"Stopped after {trainer.global_step} outer steps; go on with --ckpt_path {path}")
        self._release()
        raise KeyboardInterrupt

    def _path(self, trainer: Trainer) -> Path:
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, ModelCheckpoint) and callback.filename == "last" and callback.dirpath:
                return Path(callback.dirpath) / "last.ckpt"
        return Path(trainer.log_dir or trainer.default_root_dir) / "checkpoints" / "last.ckpt"

    def _release(self) -> None:
        if self.before is not None:
            signal.signal(signal.SIGINT, self.before)
            self.before = None

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give the signal back."""
        self._release()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Give the signal back."""
        self._release()
