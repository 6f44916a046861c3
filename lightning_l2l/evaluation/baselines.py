"""Hand-designed optimizers that rules are compared with, and the tuning of their learning rates."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, LRScheduler

from lightning_l2l.arguments import brief, check_callable, check_choice, check_positive, check_type
from lightning_l2l.evaluation.apart import COORDINATEWISE, Apart, MuonAndAdamW, of_package
from lightning_l2l.evaluation.results import final_losses
from lightning_l2l.evaluation.rollout import MakeOptimizer, Rollout, rollout
from lightning_l2l.tasks.base import Batch, Task

#: Half-decade grid from which tuning starts; it is widened while the best lies on its edge.
GRID = tuple(float(f"{m}e{e}") for e in range(-3, 1) for m in (1, 3))


@dataclass(frozen=True)
class Baseline:
    """A hand-designed optimizer: everything but its learning rate.

    Attributes:
        name: As in tables and log keys; it names a folder as well.
        optimizer: An optimizer class, or a function that makes one.
        options: Its other arguments.
        lr: A learning rate to keep to, above 0, such as the one that it has by default; None: it is tuned.
        schedule: Makes the schedule of the learning rate, in *inner steps*, from the optimizer, such as
            `torch.optim.lr_scheduler.LinearLR`; what is tuned is the rate that it starts from. None: it stays.
        decay: "cosine" or "linear": the rate falls to 0 at the last inner step, whatever their number. In place of
            `schedule`.
        apart: Whether each task gets an optimizer of its own, so that it may look at whole tensors or at all of them;
            without it the tasks lie side by side in one tensor, which is faster. None: wherever it is none of
            PyTorch's that work on each coordinate by itself.
    """

    name: str
    optimizer: Callable[..., Optimizer]
    options: Mapping[str, Any] = field(default_factory=dict)
    lr: float | None = None
    schedule: Callable[[Optimizer], LRScheduler] | None = None
    decay: Literal["cosine", "linear"] | None = None
    apart: bool | None = None

    def __post_init__(self) -> None:
        """Refuse what is no optimizer or cannot name a folder.

        Raises:
            ValueError: The name cannot name a folder, or `lr` is not above 0.
            TypeError: An argument is of another type.
        """
        if self.schedule is not None:
            check_callable("a function of the optimizer that makes a schedule", schedule=self.schedule)
        if self.decay is not None:
            check_choice(("cosine", "linear"), decay=self.decay)
            if self.schedule is not None:
                raise ValueError(f"baseline {self.name} has decay={self.decay} and a schedule; leave one out")
        check_positive(optional=True, lr=self.lr)
        check_type(str, "a text", name=self.name)
        if not self.name.strip(".") or not self.name.isprintable() or set(self.name) & set("/\\"):
            raise ValueError(f"baseline name={brief(self.name)} cannot name a folder; use letters and digits")
        is_function = callable(self.optimizer) and not isinstance(self.optimizer, type)
        if not (is_function or (isinstance(self.optimizer, type) and issubclass(self.optimizer, Optimizer))):
            raise TypeError(f"optimizer={brief(self.optimizer)} is no class of optimizers; give torch.optim.Adagrad")
        check_type(Mapping, "its other arguments by name, such as {'eps': 1.0e-8}", options=self.options)

    def at(self, lr: float, num_steps: int | None = None) -> MakeOptimizer:
        """The optimizer at a learning rate.

        Args:
            lr: The rate, or what it starts from.
            num_steps: *Inner steps* after which `decay` ends.

        Raises:
            ValueError: It has a `decay`, and nobody says how many steps there are.
        """
        if self.decay is not None and num_steps is None:
            raise ValueError(f"baseline {self.name} has decay={self.decay}; give num_steps")

        def make(named: list[tuple[str, Tensor]]) -> Optimizer:
            optimizer = self.optimizer([p for _, p in named], lr=lr, **self.options)
            make_schedule = self.schedule if self.decay is None else _to_zero(self.decay, num_steps or 1)
            if make_schedule is not None:
                schedule = make_schedule(optimizer)
                optimizer.register_step_post_hook(lambda *_: schedule.step())
            return optimizer

        apart = self.optimizer not in COORDINATEWISE if self.apart is None else self.apart
        return (lambda named: Apart(named, make)) if apart else make


def _to_zero(decay: str, num_steps: int) -> Callable[[Optimizer], LRScheduler]:
    if decay == "cosine":
        return lambda optimizer: CosineAnnealingLR(optimizer, num_steps)
    return lambda optimizer: LinearLR(optimizer, 1.0, 0.0, num_steps)


BASELINES = (
    Baseline("adam", torch.optim.Adam),
    Baseline("rmsprop", torch.optim.RMSprop),
    Baseline("sgd", torch.optim.SGD),
    Baseline("nag", torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),
    Baseline("adamw", torch.optim.AdamW),
)
#: More, for the asking: what people use today.
MORE = (
    Baseline("adamw_cosine", torch.optim.AdamW, decay="cosine"),
    Baseline("nag_cosine", torch.optim.SGD, {"momentum": 0.9, "nesterov": True}, decay="cosine"),
    Baseline("muon_cosine", MuonAndAdamW, decay="cosine"),
    Baseline("prodigy", of_package("prodigyopt", "Prodigy"), lr=1.0, decay="cosine"),
    Baseline("schedulefree", of_package("schedulefree", "AdamWScheduleFree")),
)


def find_baselines(
    given: Sequence[str | Baseline], reserved: Sequence[str] = (), known: Sequence[Baseline] = (*BASELINES, *MORE)
) -> tuple[Baseline, ...]:
    """Look up those that are given by name.

    Args:
        given: Names or baselines.
        reserved: Names that no baseline may have.
        known: Where names are looked up.

    Raises:
        ValueError: A name is unknown or occurs twice.
        TypeError: They are no list.
    """
    check_type((list, tuple), "a list, such as ['adam', 'sgd']", baselines=given)
    by_name = {baseline.name: baseline for baseline in known}
    found: list[Baseline] = []
    for item in given:
        if not isinstance(item, Baseline) and not (isinstance(item, str) and item in by_name):
            raise ValueError(
                f"unknown baseline {brief(item)}; use {', '.join(by_name)}, or give an optimizer by its class, as "
                "{name: adagrad, optimizer: torch.optim.Adagrad, options: {}}"
            )
        baseline = by_name[item] if isinstance(item, str) else item
        if baseline.name in (*reserved, *(b.name for b in found)):
            raise ValueError(f"the name {baseline.name!r} is taken; give this baseline another one")
        found.append(baseline)
    return tuple(found)


@dataclass(frozen=True)
class Tuned:
    """The outcome of tuning a baseline.

    Attributes:
        baseline: Which one.
        lr: The best learning rate.
        final_loss: Its mean final loss on the tasks it was tuned on.
        tried: Learning rate -> mean final loss, of every point tried.
        rollouts: Those at the best learning rate, of this process' batches.
    """

    baseline: Baseline
    lr: float
    final_loss: float
    tried: Mapping[float, float]
    rollouts: Sequence[Rollout] = field(compare=False, repr=False)


def tune(
    baseline: Baseline,
    task: Task,
    batches: Sequence[Batch],
    num_steps: int,
    device: torch.device,
    *,
    final_steps: int = 1,
    grid: Iterable[float] = GRID,
    max_widenings: int = 8,
    mean_over_ranks: Callable[[Tensor], Tensor] = lambda x: x,
) -> Tuned:
    """Choose a learning rate by the mean final loss, as the paper does.

    Of equally good ones it takes the smallest; so where every run diverges, it goes on to smaller ones. A baseline with
    a learning rate of its own keeps to that.

    Args:
        baseline: What is tuned.
        task: What is optimised.
        batches: The tasks to tune on.
        num_steps: Inner steps.
        device: Where the optimizees live.
        final_steps: Number of last *inner steps* whose mean is a task's final loss.
        grid: Learning rates to start from, half a decade apart.
        max_widenings: How often the grid may grow by a point while the best lies on its edge.
        mean_over_ranks: Averages a number over the processes that share the tasks.
    """
    tried: dict[float, float] = {}
    runs: dict[float, list[Rollout]] = {}

    def attempt(lr: float) -> None:
        runs[lr] = [rollout(baseline.at(lr, num_steps), task, batch, num_steps, device) for batch in batches]
        final = torch.cat([final_losses(run.losses, final_steps) for run in runs[lr]])
        tried[lr] = float(mean_over_ranks(final.mean()))

    def best() -> float:
        return min(sorted(tried), key=lambda lr: tried[lr])

    for lr in grid if baseline.lr is None else (baseline.lr,):
        attempt(lr)
    for _ in range(max_widenings if baseline.lr is None else 0):
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
