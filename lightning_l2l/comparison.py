"""Any `torch.optim.Optimizer` on the same tasks, starting points and minibatches: run, tune, compare.

`rollout` is the one way in which an optimizer is evaluated, learned or not, and it knows nothing but
`torch.optim.Optimizer`. What it returns becomes a `Result`: the statistics of tables, curves and CSV files.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_l2l.tasks.base import Task, check_losses, init_from_seeds

Batch = Mapping[str, Tensor]
MakeOptimizer = Callable[[list[Tensor]], Optimizer]

#: Half-decade grid from which tuning starts; it is widened while the best lies on its edge.
GRID = tuple(float(f"{m}e{e}") for e in range(-3, 1) for m in (1, 3))


@dataclass(frozen=True)
class Baseline:
    """A hand-designed optimizer: everything but its learning rate.

    Attributes:
        name: As in tables and log keys.
        optimizer: An optimizer class that works on each coordinate by itself, since the tasks lie side by
            side in one tensor.
        options: Its other arguments.
    """

    name: str
    optimizer: type[Optimizer]
    options: Mapping[str, Any] = field(default_factory=dict)

    def at(self, lr: float) -> MakeOptimizer:
        """The optimizer at a learning rate."""
        make: Callable[..., Optimizer] = self.optimizer
        return lambda params: make(params, lr=lr, **self.options)


BASELINES = (
    Baseline("adam", torch.optim.Adam),
    Baseline("rmsprop", torch.optim.RMSprop),
    Baseline("sgd", torch.optim.SGD),
    Baseline("nag", torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),
)


def find_baselines(
    given: Sequence[str | Baseline], reserved: Sequence[str] = (), known: Sequence[Baseline] = BASELINES
) -> tuple[Baseline, ...]:
    """Look up those that are given by name.

    Args:
        given: Names or baselines.
        reserved: Names that no baseline may have.
        known: Where names are looked up.

    Raises:
        ValueError: A name is unknown, occurs twice, or cannot name a folder.
    """
    by_name = {baseline.name: baseline for baseline in known}
    found: list[Baseline] = []
    for item in given:
        if isinstance(item, str) and item not in by_name:
            raise ValueError(
                f"unknown baseline {item!r}; use {', '.join(by_name)}, or give an optimizer by its class, as "
                "{name: adamw, optimizer: torch.optim.AdamW, options: {}}"
            )
        baseline = by_name[item] if isinstance(item, str) else item
        if baseline.name in (*reserved, *(b.name for b in found)):
            raise ValueError(f"the name {baseline.name!r} is taken; give this baseline another one")
        if not baseline.name.strip(".") or set(baseline.name) & set("/\\"):
            raise ValueError(f"baseline name {baseline.name!r} cannot name a folder; use letters and digits")
        found.append(baseline)
    return tuple(found)


def rollout(make_optimizer: MakeOptimizer, task: Task, batch: Batch, num_steps: int, device: torch.device) -> Tensor:
    """Optimise the tasks of a batch side by side.

    Args:
        make_optimizer: From a list of parameters to an optimizer for them.
        task: What is optimised.
        batch: Data of one episode, `[num_tasks, ...]` each; "seed" determines the starting points.
        num_steps: Inner steps.
        device: Where the optimizees live.

    Returns:
        Losses `[num_steps + 1, num_tasks]`, row t is f_t(theta_t); one that is not finite counts as inf.

    Raises:
        ValueError: The task's loss has the wrong shape, or is not finite at the start.
        RuntimeError: Gradients cannot be had, since inference mode is on.
    """
    if torch.is_inference_mode_enabled():
        raise RuntimeError(
            "an optimizer cannot run in inference mode, which allows no gradients; "
            "use Trainer(inference_mode=False), or leave torch.inference_mode()"
        )
    params, buffers = init_from_seeds(task, batch["seed"], device=device)
    leaves = {name: p.requires_grad_() for name, p in params.items()}
    optimizer = make_optimizer(list(leaves.values()))
    num_tasks = len(batch["seed"])
    losses = []
    with torch.enable_grad():
        for t in range(num_steps + 1):
            per_task = task.loss({**leaves, **buffers}, batch, t)
            if t == 0:
                check_losses(per_task, num_tasks, at_start=True)
            losses.append(per_task.detach())
            if t < num_steps:
                optimizer.zero_grad()
                # The sum: each task's gradient is its own, untouched by how many tasks lie beside it.
                per_task.sum().backward()  # type: ignore[no-untyped-call]
                optimizer.step()
    stacked = torch.stack(losses)
    return stacked.masked_fill_(~stacked.isfinite(), math.inf)


@dataclass(frozen=True)
class Tuned:
    """The outcome of tuning a baseline.

    Attributes:
        baseline: Which one.
        lr: The best learning rate.
        final_loss: Its mean final loss on the tasks it was tuned on.
        tried: Learning rate -> mean final loss, of every point tried.
        losses: `[num_steps + 1, num_tasks]` at the best learning rate, of this process' tasks.
    """

    baseline: Baseline
    lr: float
    final_loss: float
    tried: Mapping[float, float]
    losses: Tensor = field(compare=False, repr=False)


def tune(
    baseline: Baseline,
    task: Task,
    batches: Sequence[Batch],
    num_steps: int,
    device: torch.device,
    *,
    grid: Iterable[float] = GRID,
    max_widenings: int = 8,
    mean_over_ranks: Callable[[Tensor], Tensor] = lambda x: x,
) -> Tuned:
    """Choose a learning rate by the mean final loss f_T(theta_T), as the paper does.

    Of equally good ones it takes the smallest; so where every run diverges, it goes on to smaller ones.

    Args:
        baseline: What is tuned.
        task: What is optimised.
        batches: The tasks to tune on.
        num_steps: Inner steps.
        device: Where the optimizees live.
        grid: Learning rates to start from, half a decade apart.
        max_widenings: How often the grid may grow by a point while the best lies on its edge.
        mean_over_ranks: Averages a number over the processes that share the tasks.
    """
    tried: dict[float, float] = {}
    runs: dict[float, Tensor] = {}

    def attempt(lr: float) -> None:
        make = baseline.at(lr)
        runs[lr] = torch.cat([rollout(make, task, batch, num_steps, device) for batch in batches], 1)
        tried[lr] = float(mean_over_ranks(runs[lr][-1].mean()))

    def best() -> float:
        return min(sorted(tried), key=lambda lr: tried[lr])

    for lr in grid:
        attempt(lr)
    for _ in range(max_widenings):
        if best() == min(tried):
            attempt(_half_decade(best(), -1))
        elif best() == max(tried):
            attempt(_half_decade(best(), 1))
        else:
            break
    return Tuned(baseline, best(), tried[best()], dict(sorted(tried.items())), runs[best()])


def _half_decade(lr: float, direction: int) -> float:
    """The next of ..., 0.1, 0.3, 1, 3, ... after `lr`."""
    half_decades = round(2 * math.log10(lr)) + direction
    return float(f"{(1, 3)[half_decades % 2]}e{half_decades // 2}")


@dataclass(frozen=True)
class Result:
    """How an optimizer did on a set of tasks.

    Attributes:
        name: As in tables and log keys.
        losses: `[num_steps + 1, num_tasks]`, float64 on the CPU, inf where a run diverged.
        lr: Its learning rate; None where it has none to tune.
    """

    name: str
    losses: Tensor
    lr: float | None = None

    @property
    def mean(self) -> Tensor:
        """Mean over the tasks, `[num_steps + 1]`; inf as soon as one of them has diverged."""
        return self.losses.mean(1)

    def quantile(self, q: float) -> Tensor:
        """Quantile over the tasks, `[num_steps + 1]`."""
        found = self.losses.quantile(q, 1)
        # Interpolation makes nan of inf - inf and of 0 * inf: there the lower of the two neighbours is meant.
        return torch.where(found.isnan(), self.losses.quantile(q, 1, interpolation="lower"), found)

    @property
    def final_loss(self) -> float:
        """Mean over the tasks of f_T(theta_T)."""
        return float(self.mean[-1])

    @property
    def final_median(self) -> float:
        """Median over the tasks of f_T(theta_T)."""
        return float(self.quantile(0.5)[-1])

    @property
    def final_standard_error(self) -> float:
        """Standard error of `final_loss`; nan for a single task or where a run diverged."""
        num_tasks = self.losses.shape[1]
        return float(self.losses[-1].std()) / math.sqrt(num_tasks) if num_tasks > 1 else math.nan

    @property
    def diverged(self) -> float:
        """Share of the runs that ended at a loss that is not finite."""
        return 1 - float(self.losses[-1].isfinite().double().mean())


def ratio(loss: float, reference: float) -> float:
    """`loss / reference`; nan where there is nothing to relate to, since the reference is 0 or diverged."""
    return loss / reference if reference and math.isfinite(reference) else math.nan


def write_comparison(path: Path, results: Sequence[Result], reference: float) -> None:
    """Write a CSV file with one row per optimizer.

    Args:
        path: Where.
        results: The rows.
        reference: Final loss to which "ratio" relates.
    """
    header = "optimizer,lr,final_loss,median,standard_error,diverged,ratio,num_tasks,num_steps".split(",")
    rows: list[list[object]] = []
    for r in results:
        rows.append([r.name, "" if r.lr is None else r.lr, r.final_loss, r.final_median, r.final_standard_error])
        rows[-1] += [r.diverged, ratio(r.final_loss, reference), r.losses.shape[1], len(r.losses) - 1]
    _write_csv(path, header, rows)


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
