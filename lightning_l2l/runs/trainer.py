"""What callbacks ask of a run: its tasks over all processes, its loggers, its folder."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor, distributed
from torch.utils.data import DataLoader

from lightning_l2l.tasks.base import Batch


def gather(trainer: Trainer, values: Tensor) -> Tensor:
    """Values `[n, num_tasks]` of all processes, in the order of the tasks: process r of R has r, r + R, ..."""
    parts = [values]
    if trainer.world_size > 1:  # not by the strategy: it calls what torch 2.13 says is deprecated
        parts = [torch.empty_like(values) for _ in range(trainer.world_size)]
        distributed.all_gather(parts, values.contiguous())
    return torch.stack(parts, 2).flatten(1).cpu().double()


def validation_batches(trainer: Trainer, loaders: Any) -> Iterator[Batch]:
    """This process' batches on its device, as many of them as validation has."""
    for index, loader in enumerate(CombinedLoader(loaders, "sequential").flattened):
        share = trainer.limit_val_batches  # a float is one of all batches, an int a number of them
        limit = share if isinstance(share, int) else None if share == 1 else int(share * len(loader))
        for batch in islice(_independent(loader), limit):
            converted = trainer.precision_plugin.convert_input(batch)
            yield trainer.strategy.batch_to_device(converted, dataloader_idx=index)


def _independent(loader: Iterable[Any]) -> Iterable[Any]:
    """The loader with workers of its own: persistent ones serve one iteration at a time, here Lightning's."""
    if not isinstance(loader, DataLoader):
        return loader
    own = copy.copy(loader)
    own._iterator = None
    return own


def has_folder(trainer: Trainer) -> bool:
    """Whether the folder of the run is known before it starts; some loggers of others ask their server for it."""
    logger = trainer.logger
    return logger is None or isinstance(logger, TensorBoardLogger | CSVLogger) or not logger.name


def run_folder(trainer: Trainer) -> Path:
    """The folder of the run; all processes must ask. With loggers of others it is where they have the checkpoints."""
    folder = Path(trainer.log_dir or trainer.default_root_dir)
    if has_folder(trainer):
        return folder
    version = trainer.logger.version  # type: ignore[union-attr]
    version = version if isinstance(version, str) else f"version_{version}"
    return Path(trainer.strategy.broadcast(str(folder / str(trainer.logger.name) / version)))  # type: ignore[union-attr]


def log_folder(trainer: Trainer) -> Path:
    """Where files go; all processes must ask."""
    folder = run_folder(trainer)
    if writes(trainer):
        folder.mkdir(parents=True, exist_ok=True)
    return folder


def writes(trainer: Trainer) -> bool:
    """Whether this process writes files."""
    return trainer.is_global_zero and not trainer.fast_dev_run  # type: ignore[attr-defined]


def shown(path: str | Path) -> str:
    """A path as short as a user would type it."""
    path = Path(path).resolve()
    here = Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


def figure_due(trainer: Trainer, every_n_epochs: int) -> bool:
    """Whether this validation has a figure: every so many epochs, the last one, and outside of training always."""
    done = trainer.current_epoch + 1
    return trainer.state.fn != TrainerFn.FITTING or done % every_n_epochs == 0 or done == trainer.max_epochs


def tensorboards(trainer: Trainer) -> list[TensorBoardLogger]:
    """Those that this process writes to."""
    if not trainer.is_global_zero:
        return []
    return [logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]
