"""Imitation of another optimizer, beside the meta-loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler

from lightning_l2l.arguments import brief, check_at_least, check_callable, check_flag, is_number
from lightning_l2l.evaluation.apart import COORDINATEWISE, Apart


@dataclass(frozen=True)
class Imitation:
    """Rewards updates like those that a teacher makes of the same gradients.

    The loss of the imitation, `train/imitation_loss`, is added to the meta-loss of a truncation in meta-training:
    T sum_s |u_s - v_s|^2 / sum_s |v_s|^2 of the T updates u_s of the rule and those of the teacher, v_s; with evolution
    strategies, that of each particle. So it rewards the direction and the size.

    Args:
        weight: Factor on that loss, at least 0.
        teacher: Whom to imitate: an optimizer, with its learning rate, such as `torch.optim.Adam` or
            `lightning_l2l.evaluation.apart.MuonAndAdamW`. It is fed the gradients of the rule's own trajectory, and
            has tensors of zeros in place of parameters. Each task has its own, but for those of PyTorch that work on
            each coordinate by itself.
        schedule: Schedule of the teacher's learning rate, in *inner steps*, such as
            `torch.optim.lr_scheduler.LinearLR`; None: it stays as it is.
        cosine: Let the teacher's learning rate fall along a cosine to 0 at the last *inner step* of an episode, however
            long that is; in place of `schedule`.
        epochs: *Epochs* over which `weight` falls, evenly, to 0; None leaves it as it is.

    Raises:
        ValueError: A number is out of range, or there are two schedules.
        TypeError: `teacher` or `schedule` cannot be called.

    References:
        Chen et al., Training stronger baselines for learning to optimize, https://arxiv.org/abs/2010.09089, 2020.
    """

    weight: float
    teacher: OptimizerCallable = torch.optim.Adam
    schedule: LRSchedulerCallable | None = None
    epochs: int | None = None
    cosine: bool = False

    def __post_init__(self) -> None:
        """Check the arguments."""
        if not is_number(self.weight) or self.weight < 0:
            raise ValueError(f"imitation weight={brief(self.weight)} is not 0 or more; use 0 for none")
        check_at_least(1, optional=True, epochs=self.epochs)
        check_callable("a class, such as torch.optim.Adam", teacher=self.teacher)
        check_flag(cosine=self.cosine)
        if self.schedule is not None:
            if self.cosine:
                raise ValueError("cosine=True and a schedule are two schedules for one teacher; leave one out")
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
        shapes: Of the parameters that these are.
        num_steps: *Inner steps* of the episode, where they are known.

    Raises:
        ValueError: The teacher's schedule needs to know their number, and nobody does.
    """

    def __init__(
        self, imitation: Imitation, weight: float, theta: Tensor, shapes: Sequence[torch.Size], num_steps: int | None
    ) -> None:
        self.weight = weight
        self.shadow = torch.zeros_like(theta)  # where the teacher's updates show
        schedule: Callable[[Any], LRScheduler] | None = imitation.schedule
        if imitation.cosine:
            if num_steps is None:
                raise ValueError("a teacher with cosine=True has to know num_steps, the *inner steps* of the episode")
            schedule = partial(CosineAnnealingLR, T_max=num_steps)
        self.members: list[Any] = []  # teachers, each followed by its schedule

        def make(named: list[tuple[str, Tensor]]) -> Optimizer:
            teacher: Optimizer = imitation.teacher([p for _, p in named])
            self.members += [teacher] if schedule is None else [teacher, schedule(teacher)]
            return teacher

        self.params = [self.shadow.detach().requires_grad_()]
        self.teacher = make([("", self.params[0])])
        if type(self.teacher) not in COORDINATEWISE:
            self.members.clear()
            parts = torch.split(self.shadow, [math.prod(shape) for shape in shapes], 1)
            self.params = [part.view(len(theta), *shape) for part, shape in zip(parts, shapes, strict=True)]
            self.teacher = Apart([("", p) for p in self.params], make)

    def state_dict(self) -> list[Any]:
        """The teachers' states, and their schedules'."""
        return [one.state_dict() for one in self.members]

    def load_state_dict(self, state: list[Any]) -> None:
        """Go on as the teachers that gave this `state_dict`."""
        for one, known in zip(self.members, state, strict=True):
            one.load_state_dict(known)

    @torch.no_grad()
    def taught(self, gradient: Tensor) -> Tensor:
        """The teacher's update for a gradient `[num_tasks, coordinates of one]`; its state moves on."""
        self.shadow.zero_()
        sizes = [p[0].numel() for p in self.params]
        for p, own in zip(self.params, torch.split(gradient, sizes, 1), strict=True):
            p.grad = own.reshape(p.shape).clone()
        self.teacher.step()
        for one in self.members:
            if isinstance(one, LRScheduler):
                one.step()
        return self.shadow


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


class MissesOfEach:
    """Likewise, task by task, the sums alone.

    Attributes:
        errors: Sum of the squares of the errors so far, `[num_tasks]`.
        size: Sum of the squares of the teacher's updates so far, `[num_tasks]`.
    """

    def __init__(self, num_tasks: int, like: Tensor) -> None:
        self.errors, self.size = like.new_zeros(num_tasks), like.new_zeros(num_tasks)

    def add(self, lessons: Lessons, update: Tensor, gradient: Tensor) -> None:
        """Compare updates `[num_tasks, coordinates of one]` with the teacher's for the same gradients."""
        taught = lessons.taught(gradient)
        self.errors += (update - taught).square().sum(1)
        self.size += taught.square().sum(1)

    def loss(self, num_steps: int) -> Tensor:
        """That of the imitation, of each task."""
        return num_steps * self.errors / self.size.clamp(min=torch.finfo(self.size.dtype).tiny)
