"""Tables on the console, and the same as Markdown."""

from __future__ import annotations

import html
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from lightning_l2l.evaluation.results import Result, adam_final_loss, best_final_loss, best_of, ratio


@dataclass(frozen=True)
class Budget:
    """What the tuning of the hand-designed optimizers cost.

    Attributes:
        rates: Learning rates tried, by optimizer.
        num_tasks: Validation tasks on which each was tried.
    """

    rates: Mapping[str, int]
    num_tasks: int


def summary_table(results: Sequence[Result], best: float | None) -> Table:
    """What `fit` ends with.

    Args:
        results: On the validation tasks, the rule's first and then those of the baselines.
        best: Final loss of the rule's best checkpoint; None stands for the rule as it is in `results`.
    """
    learned, *baselines = results
    num_tasks = learned.losses.shape[1]
    final_loss = learned.final_loss if best is None else best
    which = "learned" if best is None else "learned (best checkpoint)"
    # A mean that is finite says that no run has diverged.
    diverged = [0.0 if math.isfinite(final_loss) else learned.diverged, *(b.diverged for b in baselines)]
    table = _table(f"Final loss ({_when(learned)}), mean over {num_tasks} validation tasks")
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


def comparison_tables(results: Sequence[Result], budget: Budget | None) -> list[Table]:
    """What `test` prints: the final losses, and how the optimizers got there.

    Args:
        results: On the test tasks, the rule's first and then those of the baselines.
        budget: How the baselines were tuned; None if there are none.
    """
    return [_final_losses_table(results, budget), _course_table(results)]


def _final_losses_table(results: Sequence[Result], budget: Budget | None) -> Table:
    num_steps, num_tasks = len(results[0].losses) - 1, results[0].losses.shape[1]
    table = _table(f"Final loss ({_when(results[0])}) on {num_tasks} test tasks")
    if budget is not None:
        spent = ", ".join(f"{name} {count}" for name, count in budget.rates.items())
        table.caption = (
            "Same tasks, starting points and minibatches for all. lr: tuned by the mean final loss on validation "
            f"tasks; budget: {spent} rates x {budget.num_tasks} tasks x {num_steps} steps. s.e.: standard error of the "
            "mean. ratio: mean by the smallest mean of the tuned optimizers."
        )
    for column in ("lr", "mean", "s.e.", "median", "10 %", "90 %", "ratio"):
        table.add_column(column, justify="right")
    reference = best_final_loss(results[1:])
    for r in results:
        quantiles = [r.final_quantile(q) for q in (0.5, 0.1, 0.9)]
        numbers = [_number(x) for x in (r.lr, r.final_loss, r.final_standard_error, *quantiles)]
        table.add_row(r.name, *numbers, _ratio(r.final_loss, reference))
    return table


def _course_table(results: Sequence[Result]) -> Table:
    num_steps, num_tasks, goal = len(results[0].losses) - 1, results[0].losses.shape[1], adam_final_loss(results)
    table = _table(f"Course of the {num_steps} steps, means over {num_tasks} test tasks")
    table.caption = "mean: loss of all steps; diverged: of the runs; ms a step: of a batch of tasks side by side"
    columns = ["mean", "diverged", "ms a step"]
    if goal is not None:
        columns.append("to Adam's")
        table.caption += "; to Adam's: steps until tuned Adam's final loss is reached, - if it is not"
    best = best_of(results[1:])
    if best is not None:
        columns.append("to the best's")
        table.caption += (
            "; to the best's: share of the steps/of the seconds after which the loss stays below the final loss of "
            "the best tuned optimizer"
        )
    figures = list(results[0].unseen)
    if figures:
        columns += [f"unseen {name}" for name in figures]
        table.caption += "; unseen: the final optimizees on data that they were not trained on"
    for column in columns:
        table.add_column(column, justify="right")
    for r in results:
        row = [_number(r.trajectory_loss), f"{r.diverged:.0%}", _number(1000 * r.seconds_per_step)]
        if goal is not None:
            steps = r.steps_to(goal)
            row.append("-" if steps is None else str(steps))
        if best is not None:
            row.append("/".join(_share(share) for share in r.speed_up(best)))
        unseen = {name: float(r.unseen[name].mean()) for name in figures}
        table.add_row(r.name, *row, *(f"{v:.1%}" if name == "accuracy" else _number(v) for name, v in unseen.items()))
    return table


def print_table(table: Table) -> None:
    """Print to the standard output as it is now."""
    Console().print(table)


def to_markdown(table: Table) -> str:
    """A table with its title above and its caption below; text in it that means something in Markdown is escaped."""
    header = [str(column.header) for column in table.columns]
    rows = zip(*([str(cell) for cell in column.cells] for column in table.columns), strict=True)
    ends = ["---:" if column.justify == "right" else "---" for column in table.columns]
    lines = [_line(map(_escape, header)), _line(ends), *(_line(map(_escape, row)) for row in rows)]
    parts = [f"**{_escape(str(table.title))}**", "\n".join(lines)]
    if table.caption:
        parts.append(_escape(str(table.caption)))
    return "\n\n".join(parts)


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _escape(text: str) -> str:
    return re.sub(r"([\\`*_\[\]#|])", r"\\\1", html.escape(text, quote=False))


def _when(result: Result) -> str:
    first, last = len(result.losses) - result.final_steps, len(result.losses) - 1
    return f"after {last} steps" if first == last else f"mean of steps {first} to {last}"


def _table(title: str) -> Table:
    table = Table(title=title, box=SIMPLE_HEAD, title_justify="left", caption_justify="left")
    table.add_column("optimizer", no_wrap=True)
    return table


def _number(value: float | None) -> str:
    if value is None or math.isnan(value):
        return "-"
    return f"{value:.4g}" if abs(value) >= 1e-3 or not value else f"{value:.1e}"


def _share(value: float) -> str:
    return f"{value:.2f}" if math.isfinite(value) else "-"


def _ratio(loss: float, reference: float) -> str:
    value = ratio(loss, reference)
    return "-" if math.isnan(value) else f"{value:.3f}"
