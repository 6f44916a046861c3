"""Episodes of a task under a rule, truncation by truncation, with their meta-gradients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from lightning_l2l.meta.episode import Episode
from lightning_l2l.meta.first_order import FirstOrder
from lightning_l2l.meta.imitation import Imitation, Lessons
from lightning_l2l.meta.meta_gradient import MetaGradient, Truncation
from lightning_l2l.rules.base import UpdateRule
from lightning_l2l.tasks.base import Batch, Task


@dataclass
class Unroll:
    """Runs episodes of a task under a rule.

    Args:
        task: What is optimised.
        rule: By what it is optimised; its parameters are the meta-parameters.
        meta_gradient: How the meta-gradient is had.
        imitation: Of another optimizer, if any.
        log_loss: Let the terms of the meta-loss be w_t log(mean over tasks of f_t), so that episodes with losses of
            different scale count alike. For losses that are not negative; below the smallest normal number they count
            as that.

    Raises:
        ValueError: The estimator cannot have an imitation.
    """

    task: Task
    rule: UpdateRule
    meta_gradient: MetaGradient = field(default_factory=FirstOrder)
    imitation: Imitation | None = None
    log_loss: bool = False

    def __post_init__(self) -> None:
        """Refuse what does not go together."""
        if self.imitation is not None and not self.meta_gradient.imitates:
            name = type(self.meta_gradient).__name__
            raise ValueError(f"imitation and meta_gradient={name} do not go together; leave one out")

    def start(self, batch: Batch, epoch: int = 0, num_steps: int | None = None) -> Episode:
        """Begin an episode at the starting points that `batch["seed"]` `[num_tasks]` determines.

        Args:
            batch: Its data.
            epoch: From 0; the weight of an imitation may depend on it.
            num_steps: *Inner steps* that the episode is to have, for rules that see it; None: nobody knows.

        Raises:
            ValueError: The task's loss has the wrong shape, or is not finite at the start.
        """
        episode = self.meta_gradient.start(self.task, self.rule, batch, num_steps)
        weight = 0.0 if self.imitation is None else self.imitation.weight_at(epoch)
        if self.imitation is not None and weight:
            for part in episode.parts:
                part.lessons = Lessons(self.imitation, weight, part.theta, part.shapes, num_steps)
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
        return self.meta_gradient.run(episode, num_steps, weights, self.log_loss)
