"""Episodes of meta-training that are under way: outer steps lie between their truncations."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, distributed

from lightning_l2l.arguments import MOST, check_at_least
from lightning_l2l.meta.episode import Episode
from lightning_l2l.meta.unroll import Unroll
from lightning_l2l.tasks.base import Batch, mix_seed

LossWeights = Literal["all", "linear", "last", "tail"]


def _tail(steps: int) -> list[float]:
    count = -(-steps // 10)
    return [0.0] * (steps - count) + [steps / count] * count


#: Number of steps T -> w_1 .. w_T, mean 1.
LOSS_WEIGHTS: Mapping[str, Callable[[int], list[float]]] = {
    "all": lambda steps: [1.0] * steps,
    "linear": lambda steps: [2 * t / (steps + 1) for t in range(1, steps + 1)],
    "tail": _tail,
    "last": lambda steps: [0.0] * (steps - 1) + [float(steps)],
}


@dataclass
class Underway:
    """An episode, and what there is to say of it at its end.

    Attributes:
        episode: Where it stands.
        weights: w_t of all of its *inner steps*.
        origin: The epoch and the number of the batch that its data are.
        meta_loss: Sum over its truncations so far, scalar.
        imitation_loss: Likewise.
        largest: Of the norms of the meta-gradients that it had a part in, scalar.
    """

    episode: Episode
    weights: list[float]
    origin: tuple[int, int]
    meta_loss: Tensor
    imitation_loss: Tensor
    largest: Tensor

    @classmethod
    def start(cls, unroll: Unroll, batch: Batch, origin: tuple[int, int], weights: list[float]) -> Underway:
        """Begin an episode of as many *inner steps* as there are weights."""
        episode = unroll.start(batch, origin[0], len(weights))
        return cls(episode, weights, origin, *(episode.losses.new_zeros(()) for _ in range(3)))

    @property
    def ended(self) -> bool:
        """Whether it has had all of its inner steps."""
        return self.episode.step >= len(self.weights)

    def run(self, unroll: Unroll, num_steps: int) -> Tensor | None:
        """A truncation of so many inner steps: its meta-loss, or None where nothing of it counts."""
        weights = self.weights[self.episode.step : self.episode.step + num_steps]
        truncation = unroll.run(self.episode, num_steps, weights)
        self.imitation_loss += truncation.imitation_loss
        if not any(weights) and not self.episode.imitates:
            return None
        self.meta_loss += truncation.meta_loss.detach()
        return truncation.meta_loss

    def state_dict(self) -> dict[str, Any]:
        """All that its data do not say."""
        episode = self.episode
        buffers = [name for name in episode.variables if name not in episode.params]
        return {
            "origin": list(self.origin),
            "num_steps": len(self.weights),
            "step": episode.step,
            "parts": [[part.theta, part.state, part.gradient] for part in episode.parts],
            "buffers": {name: episode.variables[name] for name in buffers},
            "lessons": [part.lessons.state_dict() for part in episode.parts if part.lessons is not None],
            "losses": episode.losses,
            "beside": None if episode.beside is None else dict(vars(episode.beside)),
            "so_far": [self.meta_loss, self.imitation_loss, self.largest],
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where an episode of the same data stood."""
        episode, like = self.episode, self.episode.losses
        episode.step, episode.losses = state["step"], state["losses"].to(like)
        for part, kept in zip(episode.parts, state["parts"], strict=True):
            for own, values in zip((part.theta, part.state, part.gradient), kept, strict=True):
                own.copy_(values)
        for name, values in state["buffers"].items():
            episode.variables[name].copy_(values)
        taught = [part.lessons for part in episode.parts if part.lessons is not None]
        for lessons, known in zip(taught, state["lessons"], strict=True):
            lessons.load_state_dict(known)
        if episode.beside is not None:
            vars(episode.beside).update({name: values.to(like) for name, values in state["beside"].items()})
        self.meta_loss, self.imitation_loss, self.largest = (values.to(like) for values in state["so_far"])


def drawn_length(shortest: int, longest: int, unit: int, seed: int, origin: tuple[int, int]) -> int:
    """A number of *inner steps*, log-uniform between two multiples of `unit`, and such a multiple itself.

    Args:
        shortest: At least `unit`.
        longest: At least as many.
        unit: What divides it.
        seed: It is a function of that and of `origin`, so the same on all processes.
        origin: An epoch and the number of a batch.
    """
    share = mix_seed(mix_seed(seed, origin[0]), origin[1]) / 2**64
    return unit * round(math.exp(math.log(shortest) * (1 - share) + math.log(longest) * share) / unit)


def check_episodes(num_steps: int, unroll_length: int, min_steps: int | None, num_episodes: int) -> None:
    """Refuse lengths of episodes, or a number of them, that cannot be.

    Raises:
        ValueError: A number is below 1, one is no multiple of `unroll_length`, or the shortest episodes are longer.
    """
    check_at_least(1, num_episodes=num_episodes)
    check_at_least(1, MOST, optional=True, min_steps=min_steps)
    if num_steps % unroll_length:
        found = [str(d) for d in range(1, num_steps + 1) if num_steps % d == 0]
        remedy = " or ".join([", ".join(found[:-1]), found[-1]]) if len(found) > 1 else found[0]
        raise ValueError(f"unroll_length={unroll_length} does not divide num_steps={num_steps}; use {remedy}")
    if min_steps is not None and (min_steps % unroll_length or min_steps > num_steps):
        raise ValueError(
            f"min_steps={min_steps} is no multiple of unroll_length={unroll_length} up to num_steps={num_steps}; use "
            f"{unroll_length}, or None for episodes of num_steps all"
        )


def kept_of_all(underway: Sequence[Underway]) -> list[Any]:
    """For a checkpoint: the episodes under way, process by process."""
    own = [one.state_dict() for one in underway]
    if not (distributed.is_available() and distributed.is_initialized()):
        return [own]
    found: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(found, own)
    return found


def taken_up(kept: Sequence[Any], module: Any) -> list[Underway]:
    """The episodes of this process again, from a checkpoint's.

    Args:
        kept: What `kept_of_all` gave.
        module: The MetaOptimizer, whose Trainer has its loader.
    """
    trainer = module.trainer
    found: list[Underway] = []
    if len(kept) != trainer.world_size or not hasattr(trainer.train_dataloader, "batch_of"):
        if any(kept):
            rank_zero_warn("The episodes that were under way are left out: processes or data are not as they were.")
        return found
    for state in kept[trainer.global_rank]:
        epoch, number = state["origin"]
        batch = module.transfer_batch_to_device(trainer.train_dataloader.batch_of(epoch, number), module.device, 0)
        weights = module.weights_of(state["num_steps"])
        found.append(Underway.start(module.unroll, batch, (epoch, number), weights))
        found[-1].load_state_dict(state)
    return found
