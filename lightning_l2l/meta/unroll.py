"""An episode, truncation by truncation, with the exact first-order meta-gradient.

Minibatch t belongs to theta_t: f_t(theta_t) is its loss. An inner step takes the gradient of f_t at theta_t, asks
the rule for an update and adds it; the step's loss is f_{t+1}(theta_{t+1}). So an episode of `num_steps` steps
uses num_steps + 1 minibatches, t = 0 .. num_steps, and its meta-loss sums the num_steps terms t = 1 .. num_steps.

With the gradients cut from the graph, theta_t = theta_0 + u_0 + ... + u_{t-1}, and the meta-loss of a truncation
has the gradient

    sum_s < c_s, du_s / dphi >,    c_s = grad f_{s+1}(theta_{s+1}) + ... + grad f_T(theta_T)

where every gradient in c_s is one that the rule is fed anyway; the last is the first input of the next
truncation. Hence one forward and one backward pass of the optimizee a step, and no graph that outlives it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lightning_l2l.rules.base import Memory, RuleUnroll, UpdateRule
from lightning_l2l.tasks.base import Task, check_losses, init_from_seeds
from lightning_l2l.tasks.batches import get_entries


@dataclass
class Part:
    """The coordinates of an episode that one rule updates: all of them, but for `RuleGroups`.

    Attributes:
        rule: By which.
        names: Parameters that they are.
        theta: `[num_tasks, coordinates of one]`.
        state: The rule's state, `[state_size, num_coordinates]`.
        gradient: Gradient at `theta`, `[num_tasks, coordinates of one]`.
        teacher: What the rule is to imitate, if anything: an optimizer of `shadow`.
        schedule: That of the teacher's learning rate, if it has one.
        shadow: `[num_tasks, coordinates of one]`, where the teacher's updates show.
    """

    rule: UpdateRule
    names: list[str]
    theta: Tensor
    state: Tensor
    gradient: Tensor
    teacher: Optimizer | None = None
    schedule: LRScheduler | None = None
    shadow: Tensor = field(default_factory=lambda: torch.empty(0))

    @torch.no_grad()
    def taught(self, gradient: Tensor) -> Tensor:
        """The teacher's update for a gradient `[num_tasks, coordinates of one]`; its state moves on."""
        assert self.teacher is not None
        self.shadow.zero_()
        self.shadow.grad = gradient.clone()
        self.teacher.step()
        if self.schedule is not None:
            self.schedule.step()
        return self.shadow.detach()


@dataclass
class Episode:
    """Where an episode stands: B optimizees side by side, and the rules' states for all of their coordinates.

    Attributes:
        task: What is optimised, as it is for this episode.
        batch: The data of the episode, `[num_tasks, ...]` each.
        parts: All coordinates of all optimizees, by the rule that updates them.
        params: Views of the parts' `theta` by name, `[num_tasks, ...]`, leaves of autograd.
        variables: `params` and the optimizees' buffers together, as `Task.loss` takes them.
        losses: Loss of each task at theta, `[num_tasks]`.
        step: Inner steps made so far.
    """

    task: Task
    batch: Mapping[str, Tensor]
    parts: list[Part]
    params: dict[str, Tensor]
    variables: dict[str, Tensor]
    losses: Tensor
    step: int = 0


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


@dataclass
class Unroll:
    """Runs episodes of a task under a rule.

    Args:
        task: What is optimised.
        rule: By what it is optimised; its parameters are the meta-parameters.
        second_derivatives: Differentiate through the gradients as well, by plain autograd through everything:
            slower, and in need of a task that can be differentiated twice.
        memory: "fast" keeps the rule's activations of a truncation, "flat" computes them again in the backward
            pass block by block, so that memory does not grow with coordinates x steps x hidden size; "auto" is
            fast as long as the activations fit into `memory_budget`.
        memory_budget: Bytes.
        block: Coordinates that the rule treats at once; None: what suits the device.
        teacher: Makes the optimizer that the rule is to imitate from a list of parameters; it is fed the gradients of
            the rule's own trajectory and has to work on each coordinate by itself.
        teacher_schedule: Makes the schedule of its learning rate, in *inner steps*, from that optimizer, if it has one.
        imitation: Factor on the loss of the imitation, at least 0; it may be changed between truncations.
        log_loss: Let the terms of the meta-loss be w_t log(mean over tasks of f_t), so that episodes with losses of
            different scale count alike. For losses that are not negative; below the smallest normal number they count
            as that.
    """

    task: Task
    rule: UpdateRule
    second_derivatives: bool = False
    memory: Memory = "auto"
    memory_budget: int = 2**30
    block: int | None = None
    teacher: Callable[[list[Tensor]], Optimizer] | None = None
    teacher_schedule: Callable[[Any], LRScheduler] | None = None
    imitation: float = 0.0
    log_loss: bool = False
    _buffers: dict[tuple[Any, ...], list[tuple[RuleUnroll, Tensor]]] = field(default_factory=dict, repr=False)

    def start(self, batch: Mapping[str, Tensor]) -> Episode:
        """Begin an episode at the starting points that `batch["seed"]` `[num_tasks]` determines.

        Raises:
            ValueError: The task's loss has the wrong shape, or is not finite at the start.
        """
        (seeds,) = get_entries(batch, "seed")
        like = next(self.rule.parameters())
        task = self.task.of_episode(batch)
        start, buffers = init_from_seeds(task, seeds, device=like.device)
        parts, params = [], {}
        for rule, names in self.rule.by_name(start):
            theta = torch.cat([start[name].flatten(1) for name in names], 1)
            for name, values in zip(names, _split(theta, [start[name] for name in names]), strict=True):
                params[name] = values.detach().requires_grad_()
            state = rule.init_state(theta.numel(), device=like.device, dtype=like.dtype)
            part = Part(rule, names, theta, state, torch.empty_like(theta))
            if self.teacher is not None and self.imitation:
                part.shadow = torch.zeros_like(theta).requires_grad_()
                part.teacher = self.teacher([part.shadow])
                part.schedule = self.teacher_schedule and self.teacher_schedule(part.teacher)
            parts.append(part)
        episode = Episode(task, batch, parts, params, {**params, **buffers}, like.new_empty(0))
        self._evaluate(episode, [part.gradient for part in parts])
        check_losses(episode.losses, len(seeds), at_start=True)
        return episode

    def run(self, episode: Episode, num_steps: int, weights: Sequence[float] | None = None) -> Truncation:
        """Make `num_steps` inner steps and change `episode` in place; call `backward()` on the meta-loss returned.

        Args:
            episode: Where to go on.
            num_steps: Inner steps T of this truncation.
            weights: w_t of each of its T losses; None: 1 for all.
        """
        weights = [1.0] * num_steps if weights is None else weights
        if len(weights) != num_steps:
            raise ValueError(f"{len(weights)} weights for num_steps={num_steps}; give one an inner step")
        if self.second_derivatives:
            if any(part.teacher is not None for part in episode.parts):
                raise ValueError("imitation needs no second derivatives; leave one of the two out")
            return self._run_by_autograd(episode, num_steps, weights)
        buffers = self._buffers_for(episode, num_steps)
        for part, (unroller, gradients) in zip(episode.parts, buffers, strict=True):
            gradients[0].copy_(part.gradient)
            unroller.begin(part.state)
        losses = []
        lessons = [_Lesson(part, num_steps) if part.teacher is not None else None for part in episode.parts]
        for t in range(num_steps):
            for part, (unroller, gradients), lesson in zip(episode.parts, buffers, lessons, strict=True):
                update = unroller.step(gradients[t].view(-1), part.state)
                part.theta.add_(update.view(part.theta.shape))
                if lesson is not None:
                    lesson.add(t, update, part.taught(gradients[t]))
            episode.step += 1
            self._evaluate(episode, [gradients[t + 1] for _, gradients in buffers])
            losses.append(episode.losses)
        parameters: list[Tensor] = list(self.rule.parameters())
        meta_gradient = {p: torch.zeros_like(p) for p in parameters}
        stacked = torch.stack(losses)  # [num_steps, num_tasks]
        means = _floored(stacked.mean(1)).tolist() if self.log_loss else [1.0] * num_steps
        of_a_task = [w / (len(episode.losses) * mean) for w, mean in zip(weights, means, strict=True)]
        total = sum((lesson.size for lesson in lessons if lesson is not None), start=episode.losses.new_zeros(()))
        imitation_loss = torch.zeros_like(total)
        for part, (unroller, gradients), lesson in zip(episode.parts, buffers, lessons, strict=True):
            part.gradient = gradients[num_steps].clone()
            beside = None
            if lesson is not None:
                scale = num_steps / total.clamp(min=torch.finfo(total.dtype).tiny)
                imitation_loss += scale * lesson.errors.square().sum()
                beside = lesson.errors.mul_(2 * self.imitation * scale)
            if any(weights) or lesson is not None:  # a truncation of which nothing counts needs no backward pass
                found = unroller.gradients(gradients.flatten(1), of_a_task, beside)
                meta_gradient.update(zip(part.rule.parameters(), found, strict=True))
        meta_loss = _attach(_weighted(stacked, weights, self.log_loss), list(meta_gradient.values()), parameters)
        return Truncation(stacked, meta_loss, imitation_loss)

    def _buffers_for(self, episode: Episode, num_steps: int) -> list[tuple[RuleUnroll, Tensor]]:
        """For each part its unroll, and the gradients `[num_steps + 1, num_tasks, coordinates of one]`."""
        like = next(self.rule.parameters())
        key = (*((part.rule, part.theta.shape) for part in episode.parts), num_steps, like.device, like.dtype)
        if key not in self._buffers:
            self._buffers.clear()  # another size: the old buffers may be large
            total = sum(part.theta.numel() for part in episode.parts)
            made = []
            for part in episode.parts:
                count = part.theta.numel()
                options: dict[str, Any] = {"memory": self.memory, "budget": self.memory_budget * count // total}
                unroller = part.rule.unroller(count, num_steps, **options, block=self.block)
                made.append((unroller, like.new_empty(num_steps + 1, *part.theta.shape)))
            self._buffers[key] = made
        return self._buffers[key]

    def _evaluate(self, episode: Episode, gradients: list[Tensor]) -> None:
        """Loss of each task and its gradient at theta, part by part, on the minibatch that belongs to it."""
        with torch.enable_grad():
            losses = episode.task.loss(episode.variables, episode.batch, episode.step)
            if episode.step == 0:
                check_losses(losses, len(episode.parts[0].theta), at_start=False)
            found = torch.autograd.grad(losses.sum(), list(episode.params.values()), materialize_grads=True)
        of_name = dict(zip(episode.params, found, strict=True))
        for part, gradient in zip(episode.parts, gradients, strict=True):
            torch.cat([of_name[name].flatten(1) for name in part.names], 1, out=gradient)
        episode.losses = losses.detach()

    def _run_by_autograd(self, episode: Episode, num_steps: int, weights: Sequence[float]) -> Truncation:
        losses, parts = [], episode.parts
        buffers = {k: v for k, v in episode.variables.items() if k not in episode.params}
        with torch.enable_grad():
            thetas, states = [part.theta.clone().requires_grad_() for part in parts], [part.state for part in parts]
            for t in range(num_steps + 1):
                params: dict[str, Tensor] = {}
                for part, theta in zip(parts, thetas, strict=True):
                    like = [episode.params[name] for name in part.names]
                    params.update(zip(part.names, _split(theta, like), strict=True))
                per_task = episode.task.loss({**params, **buffers}, episode.batch, episode.step)
                gradients = torch.autograd.grad(
                    per_task.sum(), thetas, create_graph=t < num_steps, retain_graph=True, materialize_grads=True
                )
                if t:
                    losses.append(per_task)
                if t < num_steps:
                    for k, part in enumerate(parts):
                        update, states[k] = part.rule(gradients[k].flatten(), states[k])
                        thetas[k] = thetas[k] + update.view_as(thetas[k])
                    episode.step += 1
        for part, theta, state, gradient in zip(parts, thetas, states, gradients, strict=True):
            part.theta.copy_(theta.detach())
            part.state, part.gradient = state.detach(), gradient.detach()
        episode.losses = losses[-1].detach()
        stacked = torch.stack(losses)
        return Truncation(stacked.detach(), _weighted(stacked, weights, self.log_loss), stacked.new_zeros(()))


class _Lesson:
    """By how much the updates of a part miss the teacher's.

    Attributes:
        errors: `[num_steps, num_coordinates]`.
        size: Sum of the squares of the teacher's updates so far.
    """

    def __init__(self, part: Part, num_steps: int) -> None:
        self.errors = part.theta.new_empty(num_steps, part.theta.numel())
        self.size = part.theta.new_zeros(())

    def add(self, step: int, update: Tensor, taught: Tensor) -> None:
        torch.sub(update, taught.view(-1), out=self.errors[step])
        self.size += taught.square().sum()


def _split(theta: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Views of theta `[num_tasks, coordinates of one]` in the shapes `[num_tasks, ...]` of these tensors."""
    parts = torch.split(theta, [math.prod(one.shape[1:]) for one in like], 1)
    return [part.view(one.shape) for part, one in zip(parts, like, strict=True)]


def _weighted(losses: Tensor, weights: Sequence[float], log: bool) -> Tensor:
    """The weighted sum over inner steps of losses `[num_steps, num_tasks]`, the mean over tasks, or its logarithm."""
    means = _floored(losses.mean(1)).log() if log else losses.mean(1)
    return (means * losses.new_tensor(weights)).sum()


def _floored(means: Tensor) -> Tensor:
    return means.clamp(min=torch.finfo(means.dtype).tiny)


class _Attach(torch.autograd.Function):
    """A value whose gradient with respect to some parameters is known already."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: list[Tensor], *parameters: Tensor) -> Tensor:
        ctx.gradients = gradients
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *(grad_outputs[0] * g for g in ctx.gradients)


def _attach(value: Tensor, gradients: list[Tensor], parameters: list[Tensor]) -> Tensor:
    # An ordinary node of the graph, so that hooks on the parameters run: it is these that synchronise ranks.
    return _Attach.apply(value, gradients, *parameters)  # type: ignore[no-untyped-call, no-any-return]
