"""Estimators of the meta-gradient: what every one of them is given, and gives."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_l2l.meta.episode import Episode


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

    @abstractmethod
    def run(self, episode: Episode, num_steps: int, weights: Sequence[float], log_loss: bool) -> Truncation:
        """Make `num_steps` inner steps and change `episode` in place.

        Args:
            episode: Where to go on.
            num_steps: Inner steps T of this truncation.
            weights: w_t of each of its T losses.
            log_loss: Whether the terms are w_t log(mean over tasks of f_t).
        """


def weighted(losses: Tensor, weights: Sequence[float], log: bool) -> Tensor:
    """The weighted sum over inner steps of losses `[num_steps, num_tasks]`, the mean over tasks, or its logarithm."""
    means = floored(losses.mean(1)).log() if log else losses.mean(1)
    return (means * losses.new_tensor(weights)).sum()


def floored(means: Tensor) -> Tensor:
    """Means that have a logarithm."""
    return means.clamp(min=torch.finfo(means.dtype).tiny)
