"""Any `torch.optim.Optimizer` on the same tasks, starting points and minibatches: run, tune, compare.

`rollout` is the one way in which an optimizer is evaluated, learned or not, and it knows nothing but
`torch.optim.Optimizer`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_l2l.tasks.base import Task, check_losses, init_from_seeds

Batch = Mapping[str, Tensor]
MakeOptimizer = Callable[[list[Tensor]], Optimizer]

#: Half-decade grid from which tuning starts; it is widened while the best lies on its edge.
GRID = tuple(sorted(m * 10.0**e for e in range(-3, 1) for m in (1.0, 3.0)))


@dataclass(frozen=True)
class Baseline:
    """A hand-designed optimizer: everything but its learning rate.

    Attributes:
        name: As in tables and log keys.
        optimizer: An optimizer class that works on each coordinate by itself, since the tasks lie side by side
            in one tensor.
        options: Its other arguments.
    """

    name: str
    optimizer: Callable[..., Optimizer]
    options: Mapping[str, Any] = field(default_factory=dict)

    def at(self, lr: float) -> MakeOptimizer:
        """The optimizer at a learning rate."""
        return lambda params: self.optimizer(params, lr=lr, **self.options)


BASELINES = (
    Baseline("adam", torch.optim.Adam),
    Baseline("rmsprop", torch.optim.RMSprop),
    Baseline("sgd", torch.optim.SGD),
    Baseline("nag", torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),
)


def rollout(make_optimizer: MakeOptimizer, task: Task, batch: Batch, num_steps: int, device: torch.device) -> Tensor:
    """Optimise the tasks of a batch side by side.

    Args:
        make_optimizer: From a list of parameters to an optimizer for them.
        task: What is optimised.
        batch: Data of one episode, `[num_tasks, ...]` each; "seed" determines the starting points.
        num_steps: Inner steps.
        device: Where the optimizees live.

    Returns:
        Losses `[num_steps + 1, num_tasks]`, row t is f_t(theta_t); a loss that is not a number counts as inf.

    Raises:
        ValueError: The task's loss has the wrong shape, or is not finite at the start.
    """
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
    return torch.stack(losses).nan_to_num_(nan=math.inf)


@dataclass(frozen=True)
class Tuned:
    """The outcome of tuning a baseline.

    Attributes:
        baseline: Which one.
        lr: The best learning rate.
        final_loss: Its mean final loss on the tasks it was tuned on.
        tried: Learning rate -> mean final loss, of every point tried.
    """

    baseline: Baseline
    lr: float
    final_loss: float
    tried: Mapping[float, float]


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

    def final_loss(lr: float) -> float:
        runs = [rollout(baseline.at(lr), task, batch, num_steps, device)[-1] for batch in batches]
        return float(mean_over_ranks(torch.cat(runs).mean()))

    for lr in grid:
        tried[lr] = final_loss(lr)
    for _ in range(max_widenings):
        rates = sorted(tried)
        best = min(rates, key=lambda lr: tried[lr])
        if best not in (rates[0], rates[-1]) or not math.isfinite(tried[best]):
            break
        lr = _half_decade(best, -1 if best == rates[0] else 1)
        tried[lr] = final_loss(lr)
    best = min(sorted(tried), key=lambda lr: tried[lr])
    return Tuned(baseline, best, tried[best], dict(sorted(tried.items())))


def _half_decade(lr: float, direction: int) -> float:
    """The next of ..., 0.1, 0.3, 1, 3, ... after `lr`."""
    half_decades = round(2 * math.log10(lr)) + direction
    return float(f"{(1, 3)[half_decades % 2]}e{half_decades // 2}")
