"""Stopping a run without losing what it has done."""

from __future__ import annotations

import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info


class ResumeCheckpoint(ModelCheckpoint):
    """Writes last.ckpt after every validation, and on Ctrl-C.

    On Ctrl-C the episode under way is finished first: between two episodes everything that a run needs to go on
    is in a checkpoint, within one it is not. After the last episode of an epoch its validation is waited for as
    well. A second Ctrl-C stops at once.
    """

    def __init__(self) -> None:
        super().__init__(filename="last", enable_version_counter=False)
        self.asked = False
        self.before: Any = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the signal over."""
        super().on_train_start(trainer, pl_module)
        if threading.current_thread() is threading.main_thread():  # only there can a handler be set
            self.asked = False
            self.before = signal.signal(signal.SIGINT, self._ask)

    def _ask(self, signum: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        rank_zero_info("\nFinishing this episode; Ctrl-C once more stops at once.")

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Stop here if asked to, unless a validation is due."""
        super().on_train_batch_end(trainer, pl_module, *args)
        if not trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:
            self._stop_if_asked(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop here if asked to."""
        super().on_train_epoch_end(trainer, pl_module)
        self._stop_if_asked(trainer)

    def _stop_if_asked(self, trainer: Trainer) -> None:
        if not self.asked:
            return
        path = Path(self.dirpath or trainer.default_root_dir) / "last.ckpt"
        trainer.save_checkpoint(path)
        rank_zero_info(f"Stopped after {trainer.global_step} outer steps; go on with --ckpt_path {path}")
        self._release()
        raise KeyboardInterrupt

    def _release(self) -> None:
        if self.before is not None:
            signal.signal(signal.SIGINT, self.before)
            self.before = None

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give the signal back."""
        super().on_train_end(trainer, pl_module)
        self._release()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Give the signal back."""
        super().on_exception(trainer, pl_module, exception)
        self._release()
