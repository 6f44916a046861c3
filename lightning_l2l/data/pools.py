"""Minibatches of examples that all tasks of a stage draw from, and examples that a task sets aside."""

from abc import abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from lightning_l2l.arguments import check_at_least
from lightning_l2l.data.episodes import EpisodeDataModule, Stage
from lightning_l2l.data.loading import Sample
from lightning_l2l.data.options import CommonOptions, Unpack
from lightning_l2l.tasks.minibatches import Minibatches, Pool

_MOST_UNSEEN = 1000  # examples set aside where nobody says how many: an accuracy to within 0.03


class PoolDataModule(EpisodeDataModule):
    """Every task is one run over randomly drawn minibatches. A subclass says where the examples come from.

    A batch has `"inputs"`, `[num_tasks, num_steps + 1, batch_size, ...]`, `"targets"`, of which an example may have
    any shape too, and `"seed"`, int64 `[num_tasks]`. Minibatch t is used at theta_t for t = 0, ..., num_steps, hence
    one more than steps. Inputs and targets are `Minibatches`, cut out of the stage's examples when they are asked for.
    (With `num_workers`, whose part it is to draw ahead, they are tensors.)

    A validation or test batch has, besides, examples which the task's minibatches never use: `"unseen_inputs"`,
    `[num_tasks, num_unseen, ...]`, and `"unseen_targets"`. On them `Task.unseen` tells how well the trained network
    does on new data.

    Args:
        num_tasks: Number of tasks side by side in a training batch of each process.
        batch_size: Number of examples in a minibatch of the optimizee.
        num_val_tasks: Number of validation tasks, over all processes.
        num_test_tasks: Number of test tasks, over all processes.
        num_unseen: Number of examples that each validation or test task sets aside; 0 for none. Default: half of the
            stage's, but at most 1000, and so many that a minibatch is left.
        **options: See `EpisodeDataModule`.

    Raises:
        ValueError: If a size is not a positive integer, or `seed`, `num_workers` or `num_unseen` is negative.
    """

    kind: ClassVar[str] = "examples"  # what they are called in messages

    def __init__(
        self,
        num_tasks: int = 1,
        *,
        batch_size: int = 128,
        num_val_tasks: int = 10,
        num_test_tasks: int = 10,
        num_unseen: int | None = None,
        **options: Unpack[CommonOptions],
    ) -> None:
        super().__init__(num_tasks, num_val_tasks=num_val_tasks, num_test_tasks=num_test_tasks, **options)
        check_at_least(1, batch_size=batch_size)
        check_at_least(0, optional=True, num_unseen=num_unseen)
        self.batch_size = batch_size
        self.num_unseen = num_unseen
        self._pools: dict[Stage, tuple[Pool, Pool]] = {}  # inputs [n, ...] and targets [n, ...] of each stage

    @abstractmethod
    def source(self, stage: Stage) -> str:
        """What has the examples of a stage, for messages."""

    @abstractmethod
    def read_stages(self) -> dict[Stage, tuple[Tensor, Tensor]]:
        """Reads inputs `[n, ...]` and targets `[n, ...]` of each stage, the same and in the same order every time."""

    def setup(self, stage: str = "") -> None:
        """Reads the examples of all stages.

        Raises:
            FileNotFoundError: If a file is missing.
            ValueError: If the examples are damaged, a stage has too few for one minibatch and those set aside, or
                `num_steps` is unknown.
        """
        super().setup(stage)
        if self._pools:
            return
        found = {name: self._choose(name, *examples) for name, examples in self.read_stages().items()}
        self._pools = {name: (Pool(inputs), Pool(targets)) for name, (inputs, targets) in found.items()}

    def sample(self, stage: Stage, generator: torch.Generator) -> Sample:
        """Draws `num_steps + 1` minibatches without replacement and, except for training, the examples set aside.

        The stage's examples are brought into a random order, of which the first `num_unseen` are set aside.
        Minibatches are cut from the others, in that order; when fewer than `batch_size` of them are left, from
        a fresh permutation of the same examples.
        """
        inputs, targets = self._pools_of(stage)
        order, unseen = self._draw(stage, len(inputs.examples), generator)
        sample: Sample = {"inputs": Minibatches(inputs, order), "targets": Minibatches(targets, order)}
        if len(unseen):
            sample["unseen_inputs"] = inputs.examples.index_select(0, unseen)
            sample["unseen_targets"] = targets.examples.index_select(0, unseen)
        return sample

    def _choose(self, stage: Stage, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """The inputs and targets of the stage that its tasks use: all of them, if they are enough."""
        self._check_enough(stage, len(inputs))
        return inputs, targets

    def _pools_of(self, stage: Stage) -> tuple[Pool, Pool]:
        if stage not in self._pools or self.num_steps is None:
            raise RuntimeError(f"the {self.kind} are not there yet; call prepare_data() and setup() first")
        return self._pools[stage]

    def _draw(self, stage: Stage, available: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Minibatches, int32 `[num_steps + 1, batch_size]`, and those set aside, `[num_unseen]`, of the available."""
        assert self.num_steps is not None  # else there are no pools
        num_unseen = self._num_set_aside(stage, available)
        unseen, seen = torch.randperm(available, generator=generator).tensor_split([num_unseen])
        per_permutation = len(seen) // self.batch_size
        num_fresh = -(-(self.num_steps + 1) // per_permutation) - 1
        order = torch.empty(1 + num_fresh, per_permutation, self.batch_size, dtype=torch.int32)
        order[0] = seen[: order[0].numel()].view_as(order[0])
        for fresh in order[1:]:
            permutation = seen[torch.randperm(len(seen), generator=generator)]
            fresh.copy_(permutation[: fresh.numel()].view_as(fresh))
        return order.flatten(0, 1)[: self.num_steps + 1].clone(), unseen  # a view would keep all of it

    def _num_set_aside(self, stage: Stage, available: int) -> int:
        if stage == "train":
            return 0
        if self.num_unseen is None:
            return max(min(available // 2, available - self.batch_size, _MOST_UNSEEN), 0)
        return self.num_unseen

    def _check_enough(self, stage: Stage, available: int, of: str = "") -> None:
        """Refuses a stage whose examples, those `of` which, make no minibatch besides those set aside."""
        num_unseen = self._num_set_aside(stage, available)
        if available >= self.batch_size + num_unseen:
            return
        sizes, remedy = f"batch_size={self.batch_size} needs", f"use batch_size={available} or fewer"
        if not available:
            remedy = "put the full data set there"
        elif num_unseen:
            sizes = f"batch_size={self.batch_size} and num_unseen={num_unseen} need"
            spare = available - self.batch_size
            remedy = f"use num_unseen={spare} or fewer" if spare >= 0 else f"{remedy}, and num_unseen=0"
        raise ValueError(
            f"{sizes} {self.batch_size + num_unseen} {stage} {self.kind}{of}, but {self.source(stage)} has "
            f"{available}; {remedy}"
        )
