"""What comes out of running an optimizer on a set of tasks: its statistics, and CSV files of them."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor, where


def final_losses(losses: Tensor, final_steps: int) -> Tensor:
    """Final loss of each task, `[num_tasks]`.

    Args:
        losses: `[num_steps + 1, num_tasks]`.
        final_steps: Number of last *inner steps* over which the mean is taken.

    Raises:
        ValueError: `final_steps` is below 1, or there are not so many inner steps.
    """
    if not 1 <= final_steps < len(losses):
        raise ValueError(f"final_steps={final_steps} is out of range; use 1 to {len(losses) - 1}, the inner steps")
    return losses[-final_steps:].mean(0)


@dataclass(frozen=True)
class Result:
    """How an optimizer did on a set of tasks.

    Attributes:
        name: As in tables and log keys.
        losses: `[num_steps + 1, num_tasks]`, float64 on the CPU, inf where a run diverged.
        lr: Its learning rate; None where it has none to tune.
        final_steps: Number of last *inner steps* whose mean is a task's final loss.
        unseen: Figures on data that the optimizees were not trained on, `[num_tasks]` each, at the last step:
            "loss", "accuracy".
        seconds_per_step: Wall-clock time of an inner step of the tasks that lie side by side; nan: not known.
    """

    name: str
    losses: Tensor
    lr: float | None = None
    final_steps: int = 1
    unseen: Mapping[str, Tensor] = field(default_factory=dict)
    seconds_per_step: float = math.nan

    @property
    def mean(self) -> Tensor:
        """Mean over the tasks, `[num_steps + 1]`; inf as soon as one of them has diverged."""
        return self.losses.mean(1)

    def quantile(self, q: float) -> Tensor:
        """Quantile over the tasks, `[num_steps + 1]`."""
        return _quantile(self.losses, q)

    @property
    def final(self) -> Tensor:
        """Final loss of each task, `[num_tasks]`."""
        return final_losses(self.losses, self.final_steps)

    @property
    def final_loss(self) -> float:
        """Mean over the tasks of the final loss."""
        return float(self.final.mean())

    def final_quantile(self, q: float) -> float:
        """Quantile over the tasks of the final loss; 0.5 is the median."""
        return float(_quantile(self.final[None], q))

    @property
    def final_standard_error(self) -> float:
        """Standard error of `final_loss`; nan for a single task or where a run diverged."""
        num_tasks = self.losses.shape[1]
        return float(self.final.std()) / math.sqrt(num_tasks) if num_tasks > 1 else math.nan

    @property
    def trajectory_loss(self) -> float:
        """Mean over the tasks and the inner steps t = 1 .. num_steps of f_t(theta_t)."""
        return float(self.losses[1:].mean())

    @property
    def diverged(self) -> float:
        """Share of the runs that ended at a loss that is not finite."""
        return 1 - float(self.losses[-1].isfinite().double().mean())

    def steps_to(self, loss: float) -> int | None:
        """First inner step at which the mean over the tasks and the last `final_steps` steps is at most `loss`."""
        return next((step for step, mean in enumerate(self._smoothed(), 1) if mean <= loss), None)

    def steps_below(self, loss: float) -> int | None:
        """First inner step from which on that mean is finite and at or below `loss`; None if it does not end so."""
        above = [step for step, mean in enumerate(self._smoothed(), 1) if not (mean <= loss and math.isfinite(mean))]
        first = above[-1] + 1 if above else 1
        return first if first < len(self.losses) else None

    def _smoothed(self) -> list[float]:
        """Mean over the tasks and the last `final_steps` steps, at the inner steps 1 to num_steps."""
        curve = self.mean.tolist()
        windows = (curve[max(1, step - self.final_steps + 1) : step + 1] for step in range(1, len(curve)))
        return [sum(window) / len(window) for window in windows]

    def speed_up(self, best: Result) -> tuple[float, float]:
        """After which share of its steps, and of its seconds, a rule is where another optimizer ends, for good.

        Unlike a ratio of losses it does not end at 1 where the loss has a floor.

        Args:
            best: The other, with as many steps.

        Returns:
            `steps_below` its final loss, divided by the number of steps; and the time that they take, divided by the
            time of all steps of the other. Inf where the rule ends above, nan where a time is not known.
        """
        steps = self.steps_below(best.final_loss)
        share = math.inf if steps is None else steps / (len(self.losses) - 1)
        return share, share * ratio(self.seconds_per_step, best.seconds_per_step)

    def row(self, best: Result | None, goal: float | None) -> dict[str, object]:
        """All figures, as in `comparison.csv`.

        Args:
            best: The best of the tuned optimizers: "ratio", "share_of_steps" and "share_of_seconds" relate to it.
            goal: Loss to which "steps_to_adam" counts.
        """
        steps, seconds = (math.nan, math.nan) if best is None else self.speed_up(best)
        return {
            "optimizer": self.name,
            "lr": self.lr,
            "final_loss": self.final_loss,
            "standard_error": self.final_standard_error,
            "median": self.final_quantile(0.5),
            "quantile_0.1": self.final_quantile(0.1),
            "quantile_0.9": self.final_quantile(0.9),
            "ratio": math.nan if best is None else ratio(self.final_loss, best.final_loss),
            "share_of_steps": steps,
            "share_of_seconds": seconds,
            "trajectory_loss": self.trajectory_loss,
            "steps_to_adam": None if goal is None else self.steps_to(goal),
            "diverged": self.diverged,
            "seconds_per_step": self.seconds_per_step,
            **{f"unseen_{name}": float(values.mean()) for name, values in self.unseen.items()},
            "num_tasks": self.losses.shape[1],
            "num_steps": len(self.losses) - 1,
            "final_steps": self.final_steps,
        }


def _quantile(values: Tensor, q: float) -> Tensor:
    found = values.quantile(q, 1)
    # Interpolation makes nan of inf - inf and of 0 * inf: there the lower of the two neighbours is meant.
    return where(found.isnan(), values.quantile(q, 1, interpolation="lower"), found)


def ratio(loss: float, reference: float) -> float:
    """`loss / reference`; nan where there is nothing to relate to, since the reference is 0 or diverged."""
    return loss / reference if reference and math.isfinite(reference) else math.nan


def best_of(results: Sequence[Result]) -> Result | None:
    """The one with the smallest mean final loss; None if there are no results."""
    return min(results, key=lambda result: result.final_loss, default=None)


def best_final_loss(results: Sequence[Result]) -> float:
    """The smallest mean final loss; nan if there are no results."""
    return min((result.final_loss for result in results), default=math.nan)


def adam_final_loss(results: Sequence[Result]) -> float | None:
    """The final loss of tuned Adam; None if it is not among the results."""
    return next((result.final_loss for result in results if result.name == "adam"), None)


def comparison_rows(results: Sequence[Result]) -> list[dict[str, object]]:
    """All figures of each optimizer, from results of which the rule's is the first."""
    best, goal = best_of(results[1:]), adam_final_loss(results)
    return [result.row(best, goal) for result in results]


def write_comparison(path: Path, results: Sequence[Result]) -> None:
    """Write a CSV file with one row per optimizer, the rule's first."""
    rows = comparison_rows(results)
    _write_csv(path, list(rows[0]), [list(row.values()) for row in rows])


def write_tasks(path: Path, results: Sequence[Result]) -> None:
    """Write a CSV file with one row per task: the final loss that each optimizer reached on it."""
    columns = [result.final.tolist() for result in results]
    rows = [[task, *losses] for task, losses in enumerate(zip(*columns, strict=True))]
    _write_csv(path, ["task", *(result.name for result in results)], rows)


def write_curves(path: Path, results: Sequence[Result], quantiles: tuple[float, float]) -> None:
    """Write a CSV file with one row per optimizer and inner step: mean and two quantiles over the tasks."""
    columns = [(r.name, [r.mean.tolist(), *(r.quantile(q).tolist() for q in quantiles)]) for r in results]
    rows = [[name, step, *values] for name, curves in columns for step, values in enumerate(zip(*curves, strict=True))]
    _write_csv(path, ["optimizer", "step", "mean", *(f"quantile_{q:g}" for q in quantiles)], rows)


def write_predictions(path: Path, losses: Tensor) -> None:
    """Write a CSV file with one row per task and inner step, from losses `[num_steps + 1, num_tasks]`."""
    curves = losses.T.tolist()
    rows = [[task, step, loss] for task, curve in enumerate(curves) for step, loss in enumerate(curve)]
    _write_csv(path, ["task", "step", "loss"], rows)


def _write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)
