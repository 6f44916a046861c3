"""What TensorBoard shows of a comparison: a run per optimizer, whose curves overlay in one chart, and tables."""

from __future__ import annotations

import shlex
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from lightning.pytorch.loggers import TensorBoardLogger
from rich.table import Table
from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # type: ignore[import-untyped]
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from lightning_l2l.evaluation.results import Result, comparison_rows
from lightning_l2l.evaluation.tables import to_markdown

#: Group of the tags that are to be seen first. TensorBoard sorts groups by name and unfolds the first two of them;
#: others here are "epoch", "test", "train" and "val".
FIRST_GROUP = "curves"
#: Characters of a command on one line; a text card cuts off what is too wide for it.
_WIDTH = 100


def curve_folder(logger: TensorBoardLogger, name: str) -> str:
    """Where an optimizer's own run is."""
    return str(Path(logger.log_dir) / "curves" / name)


def curve_tag(stage: str) -> str:
    """Tag of an optimizer's loss by inner step, on the tasks of a stage, "val" or "test"."""
    return f"{FIRST_GROUP}/{stage}_loss_by_inner_step"


def figure_tag(stage: str) -> str:
    """Tag of the figure with bands; it sorts behind the curves, so that it is the card beside them."""
    return f"{FIRST_GROUP}/{stage}_loss_with_quantiles"


def write_curve(writer: SummaryWriter, result: Result, stage: str) -> None:
    """Write a curve in the place of the last one: to readers, a session that starts voids what was there."""
    start = Event(session_log=SessionLog(status=SessionLog.START))
    cast(Any, writer.file_writer).add_event(start, step=0)
    for step, loss in enumerate(result.mean.tolist()):
        writer.add_scalar(curve_tag(stage), loss, step)
    writer.flush()


def write_table(writer: SummaryWriter, name: str, table: Table, commands: Mapping[str, str | None]) -> None:
    """Write a text card: a table, and commands below their titles, without those that are None.

    Its step is 0, so that a session that starts voids it as well.

    Args:
        writer: Where.
        name: The tag is `results/<name>`, to which TensorBoard's writer appends "/text_summary".
        table: As on the console.
        commands: By title.
    """
    parts = [to_markdown(table)]
    for title, command in commands.items():
        if command is not None:
            parts += [title, textwrap.indent(command, 4 * " ")]  # indented, it is code, whatever is in it
    text = "\n\n".join(parts).encode(errors="replace").decode()  # file names may hold what UTF-8 cannot
    writer.add_text(f"results/{name}", text, 0)
    writer.flush()


def command_line() -> str | None:
    """What was typed to start this process; None if that was no command of this package."""
    program, *arguments = sys.argv
    path = Path(program)
    if path.name == "__main__.py" and path.parent.name == "lightning_l2l":
        words = ["python", "-m", "lightning_l2l"]
    elif path.stem == "lightning-l2l":
        words = [path.stem]
    else:
        return None
    if not arguments:  # Python code that calls `main` has given them
        return None
    line = shlex.join([*words, *arguments])
    return line if len(line) <= _WIDTH else " ".join(words) + "".join(_broken(arguments))


def _broken(arguments: Sequence[str]) -> Iterator[str]:
    for argument in arguments:
        gap = " \\\n  " if argument.startswith("--") else " "
        yield gap + shlex.quote(argument)


def write_test(logger: TensorBoardLogger, results: Sequence[Result], tables: Sequence[Table]) -> None:
    """Write every optimizer's curve on the test tasks, its row of the comparison as HParams, and the tables.

    Args:
        logger: Where.
        results: The rule's first.
        tables: The final losses and the course, as text cards in the rule's run.
    """
    fixed = ("optimizer", "lr", "num_tasks", "num_steps", "final_steps")
    for result, row in zip(results, comparison_rows(results), strict=True):
        figures = {f"test/{name}": value for name, value in row.items() if name not in fixed and value is not None}
        settings = {name: "-" if row[name] is None else str(row[name]) for name in ("optimizer", "lr")}
        with SummaryWriter(curve_folder(logger, result.name), purge_step=0) as writer:
            write_curve(writer, result, "test")
            # Not by add_hparams: that writes a second file, which the session of the first voids if it is read later.
            for summary in hparams(settings, figures):  # type: ignore[no-untyped-call]
                cast(Any, writer.file_writer).add_summary(summary)
            for name, value in figures.items():
                writer.add_scalar(name, value, 0)
            if result is results[0]:
                write_table(writer, "test_final_loss", tables[0], {"Made by:": command_line()})
                write_table(writer, "test_steps", tables[1], {})
