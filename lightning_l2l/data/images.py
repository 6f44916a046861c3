"""Images with labels: the minibatches on which a small network is trained in an episode."""

from abc import abstractmethod
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from lightning_l2l.arguments import check_at_least, check_flag, check_type
from lightning_l2l.data.episodes import EpisodeDataModule, Sample, Stage
from lightning_l2l.tasks.minibatches import Minibatches, Pool

_VAL_SHARE = 6  # one training image in 6: of MNIST 10,000 of 60,000, as many as there are test images


class ImageDataModule(EpisodeDataModule):
    """Every task is one run over randomly drawn minibatches. A subclass says where the images come from.

    A batch has `"inputs"`, `[num_tasks, num_steps + 1, batch_size, ...]`, `"targets"`,
    `[num_tasks, num_steps + 1, batch_size]`, and `"seed"`, int64 `[num_tasks]`. Minibatch t is used at theta_t
    for t = 0, ..., num_steps, hence one more than steps. Inputs and targets are `Minibatches`, cut out of the
    stage's images when they are asked for.

    A validation or test batch has, besides, images which the task's minibatches never use: `"unseen_inputs"`,
    `[num_tasks, num_unseen, ...]`, and `"unseen_targets"`, `[num_tasks, num_unseen]`.

    The test tasks draw from the test images, the validation tasks from the last sixth of the training images, the
    training tasks from the rest.

    Args:
        root: Folder of the data sets.
        num_tasks: Number of tasks side by side in a training batch of each process.
        seed: Seed of all tasks, 0 or more.
        batch_size: Number of images in a minibatch of the optimizee.
        num_steps: Number of *inner steps* of an episode. Default: the `num_steps` of the module being
            trained.
        episodes_per_epoch: Number of training batches in an epoch.
        num_val_tasks: Number of validation tasks, over all processes.
        num_test_tasks: Number of test tasks, over all processes.
        eval_tasks: Number of tasks side by side in a validation or test batch of each process. Default:
            `num_tasks`.
        num_workers: Number of worker processes that draw the minibatches.
        download: Whether files that are missing are downloaded, by `prepare_data`.
        num_unseen: Number of images that each validation or test task sets aside; 0 for none.

    Raises:
        ValueError: If a size is not a positive integer, or `seed`, `num_workers` or `num_unseen` is
            negative.
    """

    def __init__(
        self,
        root: str | Path,
        num_tasks: int,
        seed: int,
        batch_size: int,
        num_steps: int | None,
        episodes_per_epoch: int,
        num_val_tasks: int,
        num_test_tasks: int,
        eval_tasks: int | None,
        num_workers: int,
        download: bool,
        num_unseen: int,
    ) -> None:
        super().__init__(
            num_tasks=num_tasks,
            seed=seed,
            num_steps=num_steps,
            episodes_per_epoch=episodes_per_epoch,
            num_val_tasks=num_val_tasks,
            num_test_tasks=num_test_tasks,
            eval_tasks=eval_tasks,
            num_workers=num_workers,
        )
        check_type((str, Path), "the path of a folder, such as 'data'", root=root)
        check_at_least(1, batch_size=batch_size)
        check_at_least(0, num_unseen=num_unseen)
        check_flag(download=download)
        self.root = Path(root)
        self.batch_size = batch_size
        self.download = download
        self.num_unseen = num_unseen
        self._pools: dict[Stage, tuple[Pool, Pool]] = {}  # images [n, ...] and labels [n] of each stage

    @abstractmethod
    def folder(self) -> Path:
        """Returns the folder of the images, for messages."""

    @abstractmethod
    def read(self, part: Literal["train", "test"]) -> tuple[Tensor, Tensor]:
        """Reads and checks the training or the test images.

        Returns:
            Images `[n, ...]` and labels, uint8 `[n]`, the same and in the same order every time; those of the
            training, whose last are for validation, not in the order of their labels.

        Raises:
            FileNotFoundError: If a file is missing.
            ValueError: If one is damaged.
        """

    def setup(self, stage: str = "") -> None:
        """Reads the images of all stages.

        Raises:
            FileNotFoundError: If a file is missing.
            ValueError: If a file is damaged, a stage has too few images for one minibatch and those set aside, or
                `num_steps` is unknown.
        """
        super().setup(stage)
        if self._pools:
            return
        images, labels = self.read("train")
        split = len(images) - len(images) // _VAL_SHARE
        found: dict[Stage, tuple[Tensor, Tensor]] = {
            "train": (images[:split], labels[:split]),
            "val": (images[split:], labels[split:]),
            "test": self.read("test"),
        }
        found = {name: self._choose(name, *examples) for name, examples in found.items()}
        self._pools = {name: (Pool(images), Pool(labels)) for name, (images, labels) in found.items()}

    def sample(self, stage: Stage, generator: torch.Generator) -> Sample:
        """Draws `num_steps + 1` minibatches without replacement and, except for training, the images set aside.

        The stage's images are brought into a random order, of which the first `num_unseen` are set aside.
        Minibatches are cut from the others, in that order; when fewer than `batch_size` of them are left, from
        a fresh permutation of the same images.
        """
        images, labels = self._pools_of(stage)
        order, unseen = self._draw(stage, len(images.examples), generator)
        sample: Sample = {"inputs": Minibatches(images, order), "targets": Minibatches(labels, order)}
        if len(unseen):
            sample["unseen_inputs"] = images.examples.index_select(0, unseen)
            sample["unseen_targets"] = labels.examples.index_select(0, unseen)
        return sample

    def _choose(self, stage: Stage, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The images and labels of the stage that its tasks use: all of them, if they are enough."""
        self._check_enough(stage, len(images))
        return images, labels

    def _pools_of(self, stage: Stage) -> tuple[Pool, Pool]:
        if stage not in self._pools or self.num_steps is None:
            raise RuntimeError("the images are not there yet; call prepare_data() and setup() first")
        return self._pools[stage]

    def _draw(self, stage: Stage, num_images: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Minibatches, int32 `[num_steps + 1, batch_size]`, and those set aside, `[num_unseen]`, of so many images."""
        assert self.num_steps is not None  # else there are no pools
        unseen, seen = torch.randperm(num_images, generator=generator).tensor_split([self._num_set_aside(stage)])
        per_permutation = len(seen) // self.batch_size
        num_fresh = -(-(self.num_steps + 1) // per_permutation) - 1
        order = torch.empty(1 + num_fresh, per_permutation, self.batch_size, dtype=torch.int32)
        order[0] = seen[: order[0].numel()].view_as(order[0])
        for fresh in order[1:]:
            permutation = seen[torch.randperm(len(seen), generator=generator)]
            fresh.copy_(permutation[: fresh.numel()].view_as(fresh))
        return order.flatten(0, 1)[: self.num_steps + 1].clone(), unseen  # a view would keep all of it

    def _num_set_aside(self, stage: Stage) -> int:
        return 0 if stage == "train" else self.num_unseen

    def _check_enough(self, stage: Stage, available: int, kind: str = "") -> None:
        """Refuses a stage whose `available` images, of the `kind` named, make no minibatch besides those set aside."""
        num_unseen = self._num_set_aside(stage)
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
            f"{sizes} {self.batch_size + num_unseen} {stage} images{kind}, but {self.folder()} has "
            f"{available}; {remedy}"
        )
