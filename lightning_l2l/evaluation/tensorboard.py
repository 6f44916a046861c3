"""What TensorBoard shows of a comparison: a run per optimizer, whose curves overlay in one chart, and its HParams."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # type: ignore[import-untyped]
from torch.utils.tensorboard import SummaryWriter

from lightning_l2l.evaluation.results import Result, comparison_rows


def curve_folder(logger: TensorBoardLogger, name: str) -> str:
    """Where an optimizer's own run is."""
    return str(Path(logger.log_dir) / "curves" / name)


def write_curve(writer: SummaryWriter, result: Result, stage: str) -> None:
    """Write a curve in the place of the last one: to readers, a session that starts voids what was there."""
    start = Event(session_log=SessionLog(status=SessionLog.START))
    cast(Any, writer.file_writer).add_event(start, step=0)
    for step, loss in enumerate(result.mean.tolist()):
        writer.add_scalar(f"{stage}/loss_by_inner_step", loss, step)
    writer.flush()


def write_test(logger: TensorBoardLogger, results: Sequence[Result]) -> None:
    """Write every optimizer's curve on the test tasks, and its row of the comparison as HParams.

    Args:
        logger: Where.
        results: The rule's first.
    """
    fixed = ("optimizer", "lr", "num_tasks", "num_steps", "final_steps")
    for result, row in zip(results, comparison_rows(results), strict=True):
        figures = {f"test/{name}": value for name, value in row.items() if name not in fixed and value is not None}
        settings = {name: "-" if row[name] is None else str(row[name]) for name in ("optimizer", "lr")}
        with SummaryWriter(curve_folder(logger, result.name), purge_step=0) as writer:
            write_curve(writer, result, "test")
            writer.add_hparams(settings, figures, run_name=".")
