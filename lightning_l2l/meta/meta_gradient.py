"""Estimators of the meta-gradient: what every one of them is given, and gives."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_l2l.meta.episode import Episode
from lightning_l2l.rules.base import UpdateRule
from lightning_l2l.tasks.base import Batch, Task


@dataclass(frozen=True)
class Truncation:
    """What a truncation of T inner steps gives.

    Attributes:
        losses: `[T, num_tasks]`, f_t(theta_t) after each of the T steps, without a graph.
        meta_loss: Scalar, the sum over the T terms, the mean over tasks, or of T logarithms of such means. Its
            `backward()` adds the meta-gradient to the rule's parameters; where the rule imitates a teacher, that of the
            imitation's loss as well.
        imitation_loss: Scalar without a graph: T sum_s |u_s - v_s|^2 / sum_s |v_s|^2 of the updates u_s and those of
            the teacher, v_s; T for updates of zero. 0 where there is no teacher.
    """

    losses: Tensor
    meta_loss: Tensor
    imitation_loss: Tensor


class MetaGradient(ABC):
    """How the gradient of the meta-loss with respect to the meta-parameters is had.

    A subclass keeps every constructor argument as an attribute of the same name and of a plain type; checkpoints
    describe it by those.
    """

    #: Whether it can have the loss of an imitation beside the meta-loss.
    imitates = False

    def start(self, task: Task, rule: UpdateRule, batch: Batch, num_steps: int | None) -> Episode:
        """Begin an episode; see `Episode.start`."""
        return Episode.start(task, rule, batch, num_steps)

    @abstractmethod
    def run(self, episode: Episode, num_steps: int, weights: Sequence[float], log_loss: bool) -> Truncation:
        """Make `num_steps` inner steps and change `episode` in place.

        Args:
            episode: Where to go on.
            num_steps: Inner steps T of this truncation.
            weights: w_t of each of its T losses.
            log_loss: Whether the terms are w_t log(mean over tasks of f_t).
        """


class _Attach(torch.autograd.Function):
    """A value whose gradient with respect to some parameters is known already."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: list[Tensor], *parameters: Tensor) -> Tensor:
        ctx.gradients = gradients
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *(grad_outputs[0] * g for g in ctx.gradients)


def attached(value: Tensor, gradients: list[Tensor], parameters: list[Tensor]) -> Tensor:
    """A value whose `backward()` adds these gradients to the parameters.

    It is an ordinary node of the graph, so that hooks on the parameters run: it is these that synchronise ranks.
    """
    return _Attach.apply(value, gradients, *parameters)  # type: ignore[no-untyped-call, no-any-return]


def weighted(losses: Tensor, weights: Sequence[float], log: bool) -> Tensor:
    """The weighted sum over inner steps of losses `[num_steps, num_tasks]`, the mean over tasks, or its logarithm."""
    means = floored(losses.mean(1)).log() if log else losses.mean(1)
    return (means * losses.new_tensor(weights)).sum()


def floored(means: Tensor) -> Tensor:
    """Means that have a logarithm."""
    return means.clamp(min=torch.finfo(means.dtype).tiny)
