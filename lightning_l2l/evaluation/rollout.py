"""The one way in which an optimizer is evaluated, learned or not: it knows nothing but `torch.optim.Optimizer`."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_l2l.evaluation.apart import Apart
from lightning_l2l.optim import LearnedOptimizer
from lightning_l2l.tasks.base import Batch, Task, check_losses, init_from_seeds
from lightning_l2l.tasks.batches import get_entries

MakeOptimizer = Callable[[list[tuple[str, Tensor]]], Optimizer]


class SideBySide(LearnedOptimizer):
    """As `LearnedOptimizer`, of tasks in the first dimension of each parameter."""

    side_by_side = True


@dataclass(frozen=True)
class Rollout:
    """An episode of the tasks of a batch under an optimizer.

    Attributes:
        losses: `[num_steps + 1, num_tasks]`, row t is f_t(theta_t); one that is not finite counts as inf.
        unseen: What `Task.unseen` says of the last parameters, `[num_tasks]` each.
        seconds: Wall-clock time of all inner steps.
    """

    losses: Tensor
    unseen: Mapping[str, Tensor] = field(default_factory=dict)
    seconds: float = math.nan


def rollout(make_optimizer: MakeOptimizer, task: Task, batch: Batch, num_steps: int, device: torch.device) -> Rollout:
    """Optimise the tasks of a batch side by side.

    Args:
        make_optimizer: From a list of parameters with their names to an optimizer for them.
        task: What is optimised.
        batch: Data of one episode, `[num_tasks, ...]` each; "seed" determines the starting points.
        num_steps: Inner steps.
        device: Where the optimizees live.

    Raises:
        ValueError: The task's loss has the wrong shape, or is not finite at the start.
        RuntimeError: Gradients cannot be had, since inference mode is on.
    """
    if torch.is_inference_mode_enabled():
        raise RuntimeError(
            "an optimizer cannot run in inference mode, which allows no gradients; "
            "use Trainer(inference_mode=False), or leave torch.inference_mode()"
        )
    (seeds,) = get_entries(batch, "seed")
    task = task.of_episode(batch)
    params, buffers = init_from_seeds(task, seeds, device=device)
    leaves = {name: p.requires_grad_() for name, p in params.items()}
    optimizer = make_optimizer(list(leaves.items()))
    num_tasks = len(seeds)
    losses = torch.empty(0)
    averages = optimizer if isinstance(optimizer, Apart) and optimizer.mode(training=True) else None
    start = time.perf_counter()
    with torch.enable_grad():
        for t in range(num_steps + 1):
            if averages is not None:  # at the parameters that are to be used, not at those that are trained
                averages.mode(training=False)
                with torch.no_grad():
                    in_use = task.loss({**leaves, **buffers}, batch, t)
                averages.mode(training=True)
            per_task = task.loss({**leaves, **buffers}, batch, t)
            if t == 0:
                check_losses(per_task, num_tasks, at_start=True)
                losses = per_task.detach().new_empty(
                    num_steps + 1, num_tasks
                )  # not many small ones, which fragment the heap
            losses[t] = per_task.detach() if averages is None else in_use
            if t < num_steps:
                optimizer.zero_grad()
                # The sum: each task's gradient is its own, untouched by how many tasks lie beside it.
                per_task.sum().backward()  # type: ignore[no-untyped-call]
                optimizer.step()
    if device.type != "cpu":
        torch.accelerator.synchronize(device)  # the clock must not stop before the device does
    seconds = time.perf_counter() - start
    if averages is not None:
        averages.mode(training=False)
    unseen = task.unseen({**{name: p.detach() for name, p in leaves.items()}, **buffers}, batch)
    return Rollout(losses.masked_fill_(~losses.isfinite(), math.inf), unseen, seconds)
