"""The whole meta-gradient, by plain autograd through everything."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_l2l.meta.episode import Episode, split
from lightning_l2l.meta.meta_gradient import MetaGradient, Truncation, weighted
from lightning_l2l.rules.base import Seen


class SecondOrder(MetaGradient):
    """Differentiates through the optimizee's gradients as well.

    Slower than `FirstOrder`, with memory that grows with the inner steps of a truncation, and in need of a task that
    can be differentiated twice.
    """

    def run(self, episode: Episode, num_steps: int, weights: Sequence[float], log_loss: bool) -> Truncation:
        """See `MetaGradient.run`."""
        losses, parts = [], episode.parts
        buffers = {k: v for k, v in episode.variables.items() if k not in episode.params}
        with torch.enable_grad():
            thetas, states = [part.theta.clone().requires_grad_() for part in parts], [part.state for part in parts]
            for t in range(num_steps + 1):
                params: dict[str, Tensor] = {}
                for part, theta in zip(parts, thetas, strict=True):
                    like = [episode.params[name] for name in part.names]
                    params.update(zip(part.names, split(theta, like), strict=True))
                per_task = episode.task.loss({**params, **buffers}, episode.batch, episode.step)
                gradients = torch.autograd.grad(
                    per_task.sum(), thetas, create_graph=t < num_steps, retain_graph=True, materialize_grads=True
                )
                if t:
                    losses.append(per_task)
                if t < num_steps:
                    for k, part in enumerate(parts):
                        seen = Seen(thetas[k], part.shapes, episode.step, episode.num_steps)
                        update, states[k] = part.rule.updates(gradients[k].flatten(), states[k], seen)
                        thetas[k] = thetas[k] + update.view_as(thetas[k])
                    episode.step += 1
        for part, theta, state, gradient in zip(parts, thetas, states, gradients, strict=True):
            part.theta.copy_(theta.detach())
            part.state, part.gradient = state.detach(), gradient.detach()
        episode.losses = losses[-1].detach()
        stacked = torch.stack(losses)
        return Truncation(stacked.detach(), weighted(stacked, weights, log_loss), stacked.new_zeros(()))
