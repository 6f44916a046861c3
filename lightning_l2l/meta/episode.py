"""An episode: where B optimizees side by side stand, and what evaluates them.

Minibatch t belongs to theta_t: f_t(theta_t) is its loss. An inner step takes the gradient of f_t at theta_t, asks
the rule for an update and adds it; the step's loss is f_{t+1}(theta_{t+1}). So an episode of `num_steps` steps
uses num_steps + 1 minibatches, t = 0 .. num_steps, and its meta-loss sums the num_steps terms t = 1 .. num_steps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_l2l.meta.imitation import Lessons
from lightning_l2l.rules.base import Seen, UpdateRule
from lightning_l2l.tasks.base import Batch, Task, check_losses, init_from_seeds
from lightning_l2l.tasks.batches import get_entries


@dataclass
class Part:
    """The coordinates of an episode that one rule updates: all of them, but for `RuleGroups`.

    Attributes:
        rule: By which.
        names: Parameters that they are.
        shapes: Of those parameters.
        theta: `[num_tasks, coordinates of one]`.
        state: The rule's, as `UpdateRule.init_states` makes it.
        gradient: Gradient at `theta`, `[num_tasks, coordinates of one]`.
        lessons: What the rule is to imitate, if anything.
    """

    rule: UpdateRule
    names: list[str]
    shapes: list[torch.Size]
    theta: Tensor
    state: Tensor
    gradient: Tensor
    lessons: Lessons | None = None


@dataclass
class Episode:
    """Where an episode stands: B optimizees side by side, and the rules' states for all of their coordinates.

    Attributes:
        rule: By what they are optimised.
        task: What is optimised, as it is for this episode.
        batch: The data of the episode, `[num_tasks, ...]` each.
        parts: All coordinates of all optimizees, by the rule that updates them.
        params: Views of the parts' `theta` by name, `[num_tasks, ...]`, leaves of autograd.
        variables: `params` and the optimizees' buffers together, as `Task.loss` takes them.
        losses: Loss of each task at theta, `[num_tasks]`.
        num_steps: *Inner steps* that the episode is to have, if that is known: some rules see it.
        step: Inner steps made so far.
        beside: What the estimator of the meta-gradient keeps of the episode.
    """

    rule: UpdateRule
    task: Task
    batch: Batch
    parts: list[Part]
    params: dict[str, Tensor]
    variables: dict[str, Tensor]
    losses: Tensor
    num_steps: int | None = None
    step: int = 0
    beside: Any = None

    @property
    def imitates(self) -> bool:
        """Whether the rule has a teacher in this episode."""
        return any(part.lessons is not None for part in self.parts)

    @classmethod
    def start(cls, task: Task, rule: UpdateRule, batch: Batch, num_steps: int | None = None) -> Episode:
        """Begin an episode at the starting points that `batch["seed"]` `[num_tasks]` determines.

        Args:
            task: What is optimised.
            rule: By what.
            batch: The data of the episode.
            num_steps: *Inner steps* that it is to have, if known.

        Raises:
            ValueError: The task's loss has the wrong shape, or is not finite at the start.
        """
        (seeds,) = get_entries(batch, "seed")
        like = rule.like
        task = task.of_episode(batch)
        start, buffers = init_from_seeds(task, seeds, device=like.device)
        parts, params = [], {}
        for one, names in rule.by_name(start):
            theta = torch.cat([start[name].flatten(1) for name in names], 1)
            for name, values in zip(names, split(theta, [start[name] for name in names]), strict=True):
                params[name] = values.detach().requires_grad_()
            shapes = [start[name].shape[1:] for name in names]
            state = one.init_states(len(theta), shapes, device=like.device, dtype=like.dtype)
            parts.append(Part(one, names, shapes, theta, state, torch.empty_like(theta)))
        episode = cls(rule, task, batch, parts, params, {**params, **buffers}, like.new_empty(0), num_steps)
        episode.evaluate([part.gradient for part in parts])
        check_losses(episode.losses, len(seeds), at_start=True)
        return episode

    def seen_by(self, part: Part) -> Seen:
        """What the rule of a part may see beside gradient and state, before the next inner step."""
        return Seen(part.theta, part.shapes, self.step, self.num_steps)

    def evaluate(self, gradients: list[Tensor]) -> None:
        """Loss of each task and its gradient at theta, part by part, on the minibatch that belongs to it."""
        with torch.enable_grad():
            losses = self.task.loss(self.variables, self.batch, self.step)
            if self.step == 0:
                check_losses(losses, len(self.parts[0].theta), at_start=False)
            found = torch.autograd.grad(losses.sum(), list(self.params.values()), materialize_grads=True)
        of_name = dict(zip(self.params, found, strict=True))
        for part, gradient in zip(self.parts, gradients, strict=True):
            torch.cat([of_name[name].flatten(1) for name in part.names], 1, out=gradient)
        self.losses = losses.detach()


def split(theta: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Views of theta `[num_tasks, coordinates of one]` in the shapes `[num_tasks, ...]` of these tensors."""
    parts = torch.split(theta, [math.prod(one.shape[1:]) for one in like], 1)
    return [part.view(one.shape) for part, one in zip(parts, like, strict=True)]
