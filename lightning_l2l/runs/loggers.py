"""The loggers that give a run its folder, each one of its own, and what going on with a run asks of them."""

from __future__ import annotations

import csv
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only

from lightning_l2l.runs.folder import claim_version

#: Where runs are, below `--trainer.default_root_dir`, unless a logger says otherwise; the name is Lightning's.
RUNS = "lightning_logs"


class RunLogger(TensorBoardLogger):
    """A TensorBoardLogger whose version_N is its own, also where several runs start at the same moment.

    Raises:
        RuntimeError: The folder cannot be made.
    """

    def _get_next_version(self) -> int:
        version: int = super()._get_next_version()
        if rank_zero_only.rank:  # type: ignore[attr-defined]  # other processes ask that of rank 0
            return version
        return claim_version(Path(self.root_dir), version)


class NoLogger(Logger):
    """Logs nothing, and gives a run a folder of its own all the same: `lightning_logs/version_N`.

    Args:
        root: Where `lightning_logs` is.
        folder: The folder of a run that goes on; None: a new one.

    Raises:
        RuntimeError: When its folder is first asked for: it cannot be made.
    """

    def __init__(self, root: str | Path, folder: Path | None = None) -> None:
        super().__init__()
        self._root, self._folder = Path(root), folder

    @property
    def save_dir(self) -> str:
        """The run's folder, which other processes than that of rank 0 are told by it."""
        if self._folder is None:
            if rank_zero_only.rank:  # type: ignore[attr-defined]
                return str(self._root)
            runs = self._root / RUNS
            self._folder = runs / f"version_{claim_version(runs)}"
        return str(self._folder)

    @property
    def name(self) -> str:
        """Nothing: `save_dir` is the whole path."""
        return ""

    @property
    def version(self) -> str:
        """Nothing: `save_dir` is the whole path."""
        return ""

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Nothing."""

    def log_metrics(self, *args: Any, **kwargs: Any) -> None:
        """Nothing."""


def folders_of_loggers(configured: Any) -> list[Path]:
    """Where the loggers of a parsed configuration have their runs: what is in each is `VERSION/...`."""
    each = configured if isinstance(configured, list) else [configured]
    given = [one["init_args"] for one in each if hasattr(one, "get") and one.get("init_args")]
    found = [Path(options["save_dir"]) / (options.get("name") or "") for options in given if options.get("save_dir")]
    return [folder for folder in found if "://" not in str(folder)]


def go_on_in(folder: Path, loggers: Iterable[Any], steps_done: int) -> None:
    """Let loggers whose runs lie beside a folder log to that one, and all go on after what the run logged before.

    Args:
        folder: Of the run that goes on.
        loggers: Before they were used.
        steps_done: Outer steps of that run, up to its checkpoint.
    """
    for logger in loggers:
        if not isinstance(logger, TensorBoardLogger | CSVLogger):
            continue
        if Path(logger.root_dir).resolve() == folder.parent:
            number = folder.name.removeprefix("version_")
            logger._version = int(number) if number.isdecimal() else folder.name
        elif logger._version is None:  # elsewhere, and in a new folder
            continue
        if isinstance(logger, TensorBoardLogger):
            logger._kwargs.setdefault("purge_step", steps_done + 1)  # curves of what is going to be done again
        elif not rank_zero_only.rank:  # type: ignore[attr-defined]
            _keep_metrics(logger, Path(logger.log_dir) / "metrics.csv", steps_done)


def _keep_metrics(logger: CSVLogger, path: Path, steps_done: int) -> None:
    """Let a CSVLogger go on after the rows that it has up to a step: Lightning's own would delete its file."""
    if not path.is_file():
        return
    with path.open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if int(row["step"]) <= steps_done]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        writer: Any = logger.experiment  # deletes the file, and warns of that
    if rows:
        writer.metrics_keys = list(rows[0])
        writer.metrics = rows
        writer.save()
