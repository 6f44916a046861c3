"""The data of a mixture of tasks."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch

from lightning_l2l.arguments import brief, check_type, is_number
from lightning_l2l.data.episodes import EpisodeDataModule, Stage, task_seed
from lightning_l2l.data.loading import Sample
from lightning_l2l.data.options import EpisodeOptions, Unpack

# The package imports `data` first; what `tasks` needs of it is imported above.
from lightning_l2l.tasks.transforms import Mixture, made_of


class MixtureDataModule(EpisodeDataModule):
    """Episodes whose data is that of one member, another from one episode to the next: the data of a `Mixture`.

    A batch has what the member's batches have and `"member"`, int64 `[num_tasks]`: the number of the member, from 0,
    the same for all tasks. In training it is drawn for every episode by the seed, the epoch and the number of the
    batch, hence the same on all processes. In validation and test the members take turns, batch by batch, so that each
    has its share.

    Of a member nothing but its data is used: how many tasks there are, and their seed, is said here.

    Args:
        members: A data module for each task of the `Mixture`, in the same order. One that takes its task from the
            module being trained takes the one at its place.
        weights: How often the members are drawn in training, in proportion; positive. Default: all alike.
        num_tasks: Number of tasks side by side in a training batch of each process.
        root: Folder of the data sets, of all members that have one. Default: each has its own.
        **options: See `EpisodeDataModule`. `seed` is also that of the choice of members. All `eval_tasks` of a
            validation or test batch are of one member, so that there must be as many batches as members.

    Raises:
        ValueError: If a size is not a positive integer, `seed` or `num_workers` is negative, there are no members, or
            the weights are not one positive number for each.
        TypeError: If a member is no data module of episodes, or a mixture itself.
    """

    def __init__(
        self,
        members: Sequence[EpisodeDataModule],
        weights: Sequence[float] | None = None,
        num_tasks: int = 32,
        root: str | Path | None = None,
        **options: Unpack[EpisodeOptions],
    ) -> None:
        super().__init__(num_tasks, **options)
        check_type((list, tuple), "a list of data modules, such as [QuadraticDataModule()]", members=members)
        if not members:
            raise ValueError(f"members={brief(members)} are none; give a data module for each task of the Mixture")
        for member in members:
            check_type(EpisodeDataModule, "data modules of episodes, such as QuadraticDataModule()", members=member)
            if isinstance(member, MixtureDataModule):
                raise TypeError("members has a MixtureDataModule, which says itself what is drawn; list its members")
        self.members, self.weights = list(members), weights
        self.root = root
        for member in self.members:
            if root is not None and hasattr(member, "root"):
                member.root = Path(root)
        self._up_to = _up_to(weights, len(members))
        self.needs_num_steps = any(member.needs_num_steps for member in members)

    def prepare_data(self) -> None:
        """Has the members download what they lack; runs on one process of each machine."""
        for member in self.members:
            member.prepare_data()

    def setup(self, stage: str = "") -> None:
        """Sets up the members, each as if the module being trained had its task alone.

        Raises:
            ValueError: If the trained module's task is no `Mixture` or one of another number of tasks, or a
                validation or test has fewer batches than there are members.
        """
        super().setup(stage)
        tasks = self._tasks()
        for member, task in zip(self.members, tasks, strict=True):
            module = SimpleNamespace(num_steps=self.num_steps, **({} if task is None else {"task": task}))
            member.trainer = cast(Any, SimpleNamespace(lightning_module=module, training=False))
            member.setup(stage)

    def sample(self, stage: Stage, generator: torch.Generator) -> Sample:
        """Draws a member for this task alone, and its data."""
        return self._sample(self._member(float(torch.rand((), generator=generator))), stage, generator)

    def sample_for(self, stage: Stage, epoch: int, number: int, generator: torch.Generator) -> Sample:
        """Draws the data of one task of the member which the batch is of."""
        if stage == "train":
            share = task_seed(self.seed, f"{stage}/member", epoch, number) / 2**63
            return self._sample(self._member(share), stage, generator)
        return self._sample(number % len(self.members), stage, generator)

    def _eval_dataloader(self, stage: Stage, total: int) -> Any:
        loader: Any = super()._eval_dataloader(stage, total)
        if len(loader) < len(self.members):
            most = total // (len(self.members) * loader.sampler.num_replicas)
            remedy = f"eval_tasks={most} or fewer" if most else f"num_{stage}_tasks={len(self.members)} or more"
            raise ValueError(
                f"num_{stage}_tasks={total} in batches of eval_tasks={self.eval_tasks} are {len(loader)}, and each of "
                f"the {len(self.members)} members must have one; use {remedy}"
            )
        return loader

    def _member(self, share: float) -> int:
        """The member drawn by a number that is uniform in [0, 1)."""
        return next(k for k, up_to in enumerate(self._up_to) if share < up_to or k == len(self._up_to) - 1)

    def _sample(self, member: int, stage: Stage, generator: torch.Generator) -> Sample:
        return {**self.members[member].sample(stage, generator), "member": torch.tensor(member)}

    def _tasks(self) -> list[Any]:
        """The trained module's task for each member; None where there is none."""
        task = getattr(self.trained, "task", None)
        if task is None:
            return [None] * len(self.members)
        mixture = next((one for one in made_of(task) if isinstance(one, Mixture)), None)
        if mixture is None:
            raise ValueError(
                f"MixtureDataModule is the data of a Mixture, and the task is {brief(type(task).__name__)}; give the "
                "module the task Mixture, of a task for each of the data module's members"
            )
        if len(mixture.tasks) != len(self.members):
            raise ValueError(
                f"the Mixture has {len(mixture.tasks)} tasks and MixtureDataModule {len(self.members)} members; give "
                "each task its data module, in the same order"
            )
        return list(mixture.tasks)


def _up_to(weights: Sequence[float] | None, number: int) -> list[float]:
    """Where the shares of the members end, the last at 1."""
    if weights is None:
        weights = [1.0] * number
    good = isinstance(weights, list | tuple) and len(weights) == number
    if not good or not all(is_number(weight) and weight > 0 for weight in weights):
        raise ValueError(f"weights={brief(weights)} are not a positive number for each of {number} members")
    return [part / sum(weights) for part in accumulate(weights)]
