"""Imitation of another optimizer, beside the meta-loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lightning_l2l.arguments import brief, check_at_least, check_callable, is_number


@dataclass(frozen=True)
class Imitation:
    """Rewards updates like those that a teacher makes of the same gradients.

    The loss of the imitation, `train/imitation_loss`, is added to the meta-loss of a truncation in meta-training:
    T sum_s |u_s - v_s|^2 / sum_s |v_s|^2 of the T updates u_s of the rule and those of the teacher, v_s.

    Args:
        weight: Factor on that loss, at least 0.
        teacher: Whom to imitate: an optimizer that works on each coordinate by itself, with its learning rate. It is
            fed the gradients of the rule's own trajectory.
        schedule: Schedule of the teacher's learning rate, in *inner steps*, such as
            `torch.optim.lr_scheduler.LinearLR`; None: it stays as it is.
        epochs: *Epochs* over which `weight` falls, evenly, to 0; None leaves it as it is.

    Raises:
        ValueError: A number is out of range.
        TypeError: `teacher` or `schedule` cannot be called.

    References:
        Chen et al., Training stronger baselines for learning to optimize, https://arxiv.org/abs/2010.09089, 2020.
    """

    weight: float
    teacher: OptimizerCallable = torch.optim.Adam
    schedule: LRSchedulerCallable | None = None
    epochs: int | None = None

    def __post_init__(self) -> None:
        """Check the arguments."""
        if not is_number(self.weight) or self.weight < 0:
            raise ValueError(f"imitation weight={brief(self.weight)} is not 0 or more; use 0 for none")
        check_at_least(1, optional=True, epochs=self.epochs)
        check_callable("a class, such as torch.optim.Adam", teacher=self.teacher)
        if self.schedule is not None:
            check_callable("a function of the optimizer that makes a schedule", schedule=self.schedule)

    def weight_at(self, epoch: int) -> float:
        """The weight in an epoch, from 0."""
        return self.weight if self.epochs is None else self.weight * max(1 - epoch / self.epochs, 0.0)


class Lessons:
    """What a teacher makes of the gradients of one part of an episode.

    Args:
        imitation: Of whom.
        weight: Of the imitation's loss in this episode.
        theta: `[num_tasks, coordinates of one]`, a tensor like those that the teacher is to update.
    """

    def __init__(self, imitation: Imitation, weight: float, theta: Tensor) -> None:
        self.weight = weight
        self.shadow = torch.zeros_like(theta).requires_grad_()  # where the teacher's updates show
        make: Callable[[list[Tensor]], Optimizer] = imitation.teacher
        self.teacher = make([self.shadow])
        schedule: Callable[[Any], LRScheduler] | None = imitation.schedule
        self.schedule = schedule and schedule(self.teacher)

    def state_dict(self) -> list[Any]:
        """The teacher's state, and its schedule's."""
        return [self.teacher.state_dict(), self.schedule and self.schedule.state_dict()]

    def load_state_dict(self, state: list[Any]) -> None:
        """Go on as the teacher that gave this `state_dict`."""
        self.teacher.load_state_dict(state[0])
        if self.schedule is not None:
            self.schedule.load_state_dict(state[1])

    @torch.no_grad()
    def taught(self, gradient: Tensor) -> Tensor:
        """The teacher's update for a gradient `[num_tasks, coordinates of one]`; its state moves on."""
        self.shadow.zero_()
        self.shadow.grad = gradient.clone()
        self.teacher.step()
        if self.schedule is not None:
            self.schedule.step()
        return self.shadow.detach()


class Misses:
    """By how much the updates of a part, in one truncation, miss the teacher's.

    Attributes:
        lessons: The teacher.
        errors: `[num_steps, num_coordinates]`.
        size: Sum of the squares of the teacher's updates so far.
    """

    def __init__(self, lessons: Lessons, num_steps: int) -> None:
        self.lessons = lessons
        self.errors = lessons.shadow.new_empty(num_steps, lessons.shadow.numel())
        self.size = lessons.shadow.new_zeros(())

    def add(self, step: int, update: Tensor, gradient: Tensor) -> None:
        """Compare an update `[num_coordinates]` with the teacher's for the same gradient."""
        taught = self.lessons.taught(gradient)
        torch.sub(update, taught.view(-1), out=self.errors[step])
        self.size += taught.square().sum()
