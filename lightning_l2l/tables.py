"""Tables on the console."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from lightning_l2l.comparison import Result, Tuned, ratio


def best_final_loss(results: Sequence[Result]) -> float:
    """The smallest mean final loss; nan if there are no results."""
    return min((result.final_loss for result in results), default=math.nan)


def summary_table(results: Sequence[Result], best: float | None) -> Table:
    """What `fit` ends with.

    Args:
        results: On the validation tasks, the rule's first and then those of the baselines.
        best: Final loss of the rule's best checkpoint; None stands for the rule as it is in `results`.
    """
    learned, *baselines = results
    num_steps, num_tasks = len(learned.losses) - 1, learned.losses.shape[1]
    final_loss = learned.final_loss if best is None else best
    which = "learned" if best is None else "learned (best checkpoint)"
    # A mean that is finite says that no run has diverged.
    diverged = [0.0 if math.isfinite(final_loss) else learned.diverged, *(b.diverged for b in baselines)]
    table = _table(f"Loss after {num_steps} steps, mean over {num_tasks} validation tasks")
    for column in ("learning rate", "final loss", "ratio to best"):
        table.add_column(column, justify="right")
    if any(diverged):
        table.add_column("diverged", justify="right")
    reference = best_final_loss(baselines)
    losses = [final_loss, *(b.final_loss for b in baselines)]
    for result, loss, share in zip(results, losses, diverged, strict=True):
        name = which if result is learned else result.name
        row = [name, _number(result.lr), _number(loss), _ratio(loss, reference)]
        table.add_row(*row, *([f"{share:.0%}"] if any(diverged) else []))
    return table


def comparison_table(results: Sequence[Result], tuned: Sequence[Tuned], num_tuning_tasks: int) -> Table:
    """What `test` prints.

    Args:
        results: On the test tasks, the rule's first and then those of the baselines.
        tuned: How the baselines were tuned.
        num_tuning_tasks: On how many validation tasks.
    """
    num_steps, num_tasks = len(results[0].losses) - 1, results[0].losses.shape[1]
    table = _table(f"Loss after {num_steps} steps on {num_tasks} test tasks")
    if tuned:
        counts = sorted({len(t.tried) for t in tuned})
        points = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
        table.caption = (
            "Same tasks, starting points and minibatches for all. lr: tuned by the mean final loss on "
            f"validation tasks; budget of each optimizer: {points} rates x {num_tuning_tasks} tasks x "
            f"{num_steps} steps. ratio: mean by the smallest mean of the tuned optimizers."
        )
    for column in ("lr", "mean", "median", "std. error", "diverged", "ratio"):
        table.add_column(column, justify="right")
    reference = best_final_loss(results[1:])
    for r in results:
        numbers = [_number(x) for x in (r.lr, r.final_loss, r.final_median, r.final_standard_error)]
        table.add_row(r.name, *numbers, f"{r.diverged:.0%}", _ratio(r.final_loss, reference))
    return table


def print_table(table: Table) -> None:
    """Print to the standard output as it is now."""
    Console().print(table)


def _table(title: str) -> Table:
    table = Table(title=title, box=SIMPLE_HEAD, title_justify="left", caption_justify="left")
    table.add_column("optimizer", no_wrap=True)
    return table


def _number(value: float | None) -> str:
    return "-" if value is None or math.isnan(value) else f"{value:.4g}"


def _ratio(loss: float, reference: float) -> str:
    value = ratio(loss, reference)
    return "-" if math.isnan(value) else f"{value:.3f}"
