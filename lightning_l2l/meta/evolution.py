"""Meta-gradients by evolution strategies: from losses alone, of perturbed copies of the rule."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from lightning_l2l.arguments import check_choice, check_flag, check_positive
from lightning_l2l.meta.episode import Episode
from lightning_l2l.meta.imitation import MissesOfEach
from lightning_l2l.meta.meta_gradient import MetaGradient, Truncation, attached, floored
from lightning_l2l.rules.base import UpdateRule
from lightning_l2l.tasks.base import Batch, Task
from lightning_l2l.tasks.batches import get_entries
from lightning_l2l.tasks.minibatches import Minibatches

#: What the loss of an imitation counts as at most, an *inner step*; that of updates of zero is 1.
_WORST = 100.0

#: How long a perturbation lasts.
Lasts = Literal["truncation", "episode"]


@dataclass
class Pairs:
    """What there is beside an episode whose tasks are pairs: the first of each, then the second of each.

    Attributes:
        total: Of the perturbations of the first of each pair since the episode began, `[num_pairs, meta-parameters]`.
        largest: What a loss counts as at most, `[2 * num_pairs]`.
    """

    total: Tensor
    largest: Tensor


class EvolutionStrategies(MetaGradient):
    r"""From losses alone: no derivative of anything, and so no bias by what a derivative leaves out.

    A task is a pair of particles, which have the same start and the same minibatches, and rules whose meta-parameters
    are perturbed by :math:`\epsilon` and :math:`-\epsilon`. With the meta-losses :math:`L_\pm` of a truncation,

    .. math::
        g = \frac{1}{B} \sum_{i=1}^B \frac{L_{+,i} - L_{-,i}}{2 \sigma^2} \, \xi_i

    estimates the gradient of the meta-loss, smoothed over :math:`\sigma`, where :math:`\xi` is the sum of a particle's
    perturbations since its episode began: so the losses of a truncation tell about the perturbations of those before
    it, and truncating adds no bias (PES). The more truncations, the more variance: a perturbation that lasts the
    whole episode has less (ES-Single). For whole episodes at once let `unroll_length` be `num_steps`.

    For rules of some hundred meta-parameters and any horizon. The perturbations are a function of a task's seed and of
    the number of inner steps made. The terms of the meta-loss are those of each particle, with `log_loss`
    w_t log(f_t) in place of the logarithm of a mean over tasks. An imitation's loss is that of each particle. A network
    with dropout draws for each of a pair.

    Args:
        std: Standard deviation :math:`\sigma` of the perturbations, above 0.
        lasts: How long one lasts: "truncation" or "episode".
        sign: Count the sign of each difference alone, times the mean w_t of the truncation and :math:`2 \sigma`: no
            task outweighs others, and the size of the gradient means nothing.
        largest: A loss counts as at most this many times that of the same optimizee at its start, above 0; nan counts
            as that. So a particle that diverges does not decide alone. None: no bound.
        bound: The difference of a pair counts as at most this, an *inner step* of weight 1; above 0. With `log_loss`,
            0.2 is a fifth: so tasks whose losses fall by orders of magnitude do not decide alone. None: no bound.

    Raises:
        ValueError: An argument is out of range.

    References:
        Vicol et al., Unbiased gradient estimation in unrolled computation graphs with persistent evolution strategies,
        https://arxiv.org/abs/2112.13835, 2021.
        Vicol, Low-variance gradient estimation in unrolled computation graphs with ES-Single,
        https://arxiv.org/abs/2304.11153, 2023.
    """

    imitates = True

    def __init__(
        self,
        std: float = 0.01,
        lasts: Lasts = "truncation",
        sign: bool = False,
        largest: float | None = 10.0,
        bound: float | None = None,
    ) -> None:
        check_positive(std=std)
        check_choice(get_args(Lasts), lasts=lasts)
        check_flag(sign=sign)
        check_positive(optional=True, largest=largest, bound=bound)
        self.std, self.lasts, self.sign, self.largest, self.bound = std, lasts, sign, largest, bound

    def start(self, task: Task, rule: UpdateRule, batch: Batch, num_steps: int | None) -> Episode:
        """See `MetaGradient.start`: an episode of twice as many tasks."""
        twice = {name: _twice(given) for name, given in batch.items()}
        episode = super().start(task, rule, twice, num_steps)
        size = sum(p.numel() for p in rule.parameters())
        bound = torch.full_like(episode.losses, torch.inf)
        if self.largest is not None:
            bound = self.largest * episode.losses.abs()
        episode.beside = Pairs(episode.losses.new_zeros(len(bound) // 2, size), bound)
        return episode

    def run(self, episode: Episode, num_steps: int, weights: Sequence[float], log_loss: bool) -> Truncation:
        """See `MetaGradient.run`."""
        pairs: Pairs = episode.beside
        num_pairs = len(pairs.total)
        parameters: list[Tensor] = list(episode.rule.parameters())
        own = self._perturbation(episode)
        pairs.total = pairs.total + own if self.lasts == "truncation" else own
        sizes = [p.numel() for p in parameters]
        offsets = torch.split(torch.cat([own, -own]), sizes, 1)
        perturbed = {p: p.detach() + e.view(-1, *p.shape) for p, e in zip(parameters, offsets, strict=True)}
        particles = [{name: perturbed[p] for name, p in part.rule.named_parameters()} for part in episode.parts]
        losses = []
        misses = MissesOfEach(2 * num_pairs, episode.losses)
        for _ in range(num_steps):
            for part, given in zip(episode.parts, particles, strict=True):
                update = part.rule.step_each_(given, part.gradient.view(-1), part.state, episode.seen_by(part))
                update = update.view(part.theta.shape)
                if part.lessons is not None:
                    misses.add(part.lessons, update, part.gradient)
                part.theta.add_(update)
            episode.step += 1
            episode.evaluate([part.gradient for part in episode.parts])
            losses.append(episode.losses)
        stacked = torch.stack(losses)  # [num_steps, 2 * num_pairs]
        counted = torch.where(stacked <= pairs.largest, stacked, pairs.largest)  # nan is not
        terms = floored(counted).log() if log_loss else counted
        of_particle = (terms * terms.new_tensor(weights)[:, None]).sum(0)
        difference = of_particle[:num_pairs] - of_particle[num_pairs:]
        if self.bound is not None:
            most = self.bound * sum(weights)
            difference = difference.clamp(-most, most)
        missed = misses.loss(num_steps).nan_to_num(num_steps * _WORST).clamp(max=num_steps * _WORST)
        taught = next((part.lessons.weight for part in episode.parts if part.lessons is not None), 0.0)
        if taught:
            difference = difference + taught * (missed[:num_pairs] - missed[num_pairs:])
        if self.sign:
            difference = difference.sign() * (sum(weights) / num_steps) * 2 * self.std
        difference = difference / (2 * self.std**2)
        found = difference @ pairs.total / num_pairs
        gradients = [part.view_as(p) for part, p in zip(torch.split(found, sizes), parameters, strict=True)]
        meta_loss = attached(of_particle.mean(), gradients, parameters)
        return Truncation(stacked.view(num_steps, 2, num_pairs).mean(1), meta_loss, missed.mean())

    def _perturbation(self, episode: Episode) -> Tensor:
        """That of the first of each pair, `[num_pairs, meta-parameters]`: the same on every device."""
        total = episode.beside.total
        (seeds,) = get_entries(episode.batch, "seed")
        step = episode.step if self.lasts == "truncation" else 0
        rows = []
        for seed in seeds[: len(total)].tolist():
            generator = torch.Generator().manual_seed((seed * 2_654_435_761 + step * 40_503 + 1) % 2**63)
            rows.append(torch.randn(total.shape[1], generator=generator))
        return self.std * torch.stack(rows).to(total)


def _twice(given: Tensor | Minibatches) -> Any:
    """An entry of a batch, for the first of each pair and then for the second."""
    if isinstance(given, Minibatches):
        return Minibatches(given.pool, torch.cat([given.order, given.order]))
    return torch.cat([given, given])
