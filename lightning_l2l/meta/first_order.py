"""The exact first-order meta-gradient, as in the paper.

With the gradients cut from the graph, theta_t = theta_0 + u_0 + ... + u_{t-1}, and the meta-loss of a truncation
has the gradient

    sum_s < c_s, du_s / dphi >,    c_s = grad f_{s+1}(theta_{s+1}) + ... + grad f_T(theta_T)

where every gradient in c_s is one that the rule is fed anyway; the last is the first input of the next
truncation. Hence one forward and one backward pass of the optimizee a step, and no graph that outlives it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, get_args

import torch
from torch import Tensor

from lightning_l2l.arguments import check_at_least, check_choice
from lightning_l2l.meta.episode import Episode
from lightning_l2l.meta.imitation import Misses
from lightning_l2l.meta.meta_gradient import MetaGradient, Truncation, attached, floored, weighted
from lightning_l2l.rules.base import Memory, RuleUnroll


class FirstOrder(MetaGradient):
    """The exact gradient of the meta-loss with the optimizee's gradients taken as constants.

    Args:
        memory: "fast" keeps the rule's activations of a truncation, "flat" computes them again in the backward
            pass block by block, so that memory does not grow with coordinates x steps x hidden size; "auto" is
            fast as long as the activations fit into `memory_budget`.
        memory_budget: Bytes.
        block: Coordinates that the rule treats at once; None: what suits the device.

    Raises:
        ValueError: An argument is out of range.

    References:
        Andrychowicz et al., Learning to learn by gradient descent by gradient descent,
        https://arxiv.org/abs/1606.04474, 2016.
    """

    imitates = True

    def __init__(self, memory: Memory = "auto", memory_budget: int = 2**30, block: int | None = None) -> None:
        check_choice(get_args(Memory), memory=memory)
        check_at_least(1, 2**63 - 1, memory_budget=memory_budget)
        check_at_least(1, optional=True, block=block)
        self.memory, self.memory_budget, self.block = memory, memory_budget, block
        self._buffers: dict[tuple[Any, ...], list[tuple[RuleUnroll, Tensor]]] = {}

    def run(self, episode: Episode, num_steps: int, weights: Sequence[float], log_loss: bool) -> Truncation:
        """See `MetaGradient.run`."""
        buffers = self._buffers_for(episode, num_steps)
        for part, (unroller, gradients) in zip(episode.parts, buffers, strict=True):
            gradients[0].copy_(part.gradient)
            unroller.begin(part.state, episode.seen_by(part))
        losses = []
        missed = [Misses(part.lessons, num_steps) if part.lessons is not None else None for part in episode.parts]
        for t in range(num_steps):
            for part, (unroller, gradients), misses in zip(episode.parts, buffers, missed, strict=True):
                update = unroller.step(gradients[t].view(-1), part.state, episode.seen_by(part))
                part.theta.add_(update.view(part.theta.shape))
                if misses is not None:
                    misses.add(t, update, gradients[t])
            episode.step += 1
            episode.evaluate([gradients[t + 1] for _, gradients in buffers])
            losses.append(episode.losses)
        parameters: list[Tensor] = list(episode.rule.parameters())
        meta_gradient = {p: torch.zeros_like(p) for p in parameters}
        stacked = torch.stack(losses)  # [num_steps, num_tasks]
        means = floored(stacked.mean(1)).tolist() if log_loss else [1.0] * num_steps
        of_a_task = [w / (len(episode.losses) * mean) for w, mean in zip(weights, means, strict=True)]
        total = sum((misses.size for misses in missed if misses is not None), start=episode.losses.new_zeros(()))
        imitation_loss = torch.zeros_like(total)
        for part, (unroller, gradients), misses in zip(episode.parts, buffers, missed, strict=True):
            part.gradient = gradients[num_steps].clone()
            beside = None
            if misses is not None:
                scale = num_steps / total.clamp(min=torch.finfo(total.dtype).tiny)
                imitation_loss += scale * misses.errors.square().sum()
                beside = misses.errors.mul_(2 * misses.lessons.weight * scale)
            if any(weights) or misses is not None:  # a truncation of which nothing counts needs no backward pass
                found = unroller.gradients(gradients.flatten(1), of_a_task, beside)
                meta_gradient.update(zip(part.rule.parameters(), found, strict=True))
        meta_loss = attached(weighted(stacked, weights, log_loss), list(meta_gradient.values()), parameters)
        return Truncation(stacked, meta_loss, imitation_loss)

    def _buffers_for(self, episode: Episode, num_steps: int) -> list[tuple[RuleUnroll, Tensor]]:
        """For each part its unroll, and the gradients `[num_steps + 1, num_tasks, coordinates of one]`."""
        like = episode.rule.like
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
