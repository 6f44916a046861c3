"""Stopping a run without losing what it has done."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import torch
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info

from lightning_l2l.runs.checkpoints import LAST
from lightning_l2l.runs.processes import end_together
from lightning_l2l.runs.trainer import shown

#: What a shell says of a process that SIGTERM has ended.
TERMINATED = 128 + signal.SIGTERM


@contextmanager
def terminable() -> Iterator[None]:
    """Let SIGTERM end a command as an error does, with exit status 143, rather than drop it."""
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, _terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _terminate(signum: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit(TERMINATED)


class ResumeCheckpoint(ModelCheckpoint):
    """Writes last.ckpt after every validation, and on Ctrl-C or SIGTERM; it is to be the last of the checkpoints.

    On either signal the training step under way is finished first: between two of them everything that a run needs to
    go on is in a checkpoint, episodes that are under way, too. After the last step of an epoch its validation is waited
    for as well. A second Ctrl-C stops at once; a second SIGTERM does nothing, since clusters send it to every process,
    and these to their own. Before the first episode there is nothing to write, and both stop at once.

    Several processes stop after the same episode, whichever of them has got the signal. The signal with which Slurm
    asks for a checkpoint and the job anew (SIGUSR1) is handed on to Lightning at the end of the episode, too.

    last.ckpt holds the score of the best checkpoint, so the latter has to be on the disk before it.
    """

    def __init__(self) -> None:
        super().__init__(filename=Path(LAST).stem, enable_version_counter=False)
        self.asked = 0  # the signal
        self.requeue = False
        self._training = self._agreed = False
        self._before: dict[int, Any] = {}

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take SIGTERM over from Lightning, whose handler talks to other processes whatever these are doing."""
        self._take(signal.SIGTERM, self._on_sigterm)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take all signals over."""
        super().on_train_start(trainer, pl_module)
        self.asked, self.requeue, self._training = 0, False, True
        self._take(signal.SIGTERM, self._on_sigterm)
        self._take(signal.SIGINT, self._on_sigint)
        if SLURMEnvironment.detect():
            self._take(signal.SIGUSR1, self._on_requeue)

    def _take(self, signum: int, handler: Callable[[int, FrameType | None], None]) -> None:
        if signum not in self._before and threading.current_thread() is threading.main_thread():
            self._before[signum] = signal.signal(signum, handler)

    def _on_sigint(self, signum: int, frame: FrameType | None) -> None:
        if self.asked == signum:
            raise KeyboardInterrupt
        self.asked = signum
        rank_zero_info("\nFinishing this episode; Ctrl-C once more stops at once.")

    def _on_sigterm(self, signum: int, frame: FrameType | None) -> None:
        if not self._training:
            _terminate(signum, frame)
        self.asked = signum

    def _on_requeue(self, signum: int, frame: FrameType | None) -> None:
        self.requeue = True

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Let a run whose folder has been moved know its best checkpoint again, which Lightning would forget."""
        own = checkpoint.get("callbacks", {}).get(self.state_key, {}).get("dirpath")
        if not own or not self.dirpath or Path(str(trainer.ckpt_path)).resolve().parent != Path(self.dirpath).resolve():
            return
        folder = Path(self.dirpath)
        for state in checkpoint["callbacks"].values():
            if state.get("dirpath") == own:
                state["dirpath"] = self.dirpath
                for name in ("best_model_path", "kth_best_model_path", "last_model_path"):
                    state[name] = state[name] and str(folder / Path(state[name]).name)
                state["best_k_models"] = {str(folder / Path(p).name): v for p, v in state["best_k_models"].items()}

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
        asked, requeue = self.asked, self.requeue
        if trainer.world_size > 1:  # the signal may have come to one process, or between two of them
            wishes = torch.tensor([asked, int(requeue)], device=trainer.strategy.root_device)
            asked, requeue = trainer.strategy.reduce(wishes, reduce_op="max").tolist()
        if requeue:
            self.requeue = False
            handler = self._before.get(signal.SIGUSR1)
            if callable(handler):
                handler(signal.SIGUSR1, None)
        if asked:
            path = Path(self.dirpath or trainer.default_root_dir) / LAST
            trainer.save_checkpoint(path, weights_only=False)
            rank_zero_info(f"Stopped after {trainer.global_step} outer steps; go on with --ckpt_path {shown(path)}")
            self._agreed = True
            self._release()
            if asked == signal.SIGTERM:
                raise SystemExit(TERMINATED)
            raise KeyboardInterrupt

    def _release(self) -> None:
        self._training = False
        for signum, handler in self._before.items():
            signal.signal(signum, handler)
        self._before = {}

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give the signals back."""
        super().on_train_end(trainer, pl_module)
        self._release()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Give the signals back, and end the other processes."""
        super().on_exception(trainer, pl_module, exception)
        self._release()
        end_together(trainer, exception, self._agreed)
