"""MNIST: the minibatches on which a small network is trained in an episode."""

from pathlib import Path

import torch
from torch import Tensor

from lightning_l2l.arguments import check_at_least, check_flag, check_type
from lightning_l2l.data import idx
from lightning_l2l.data.episodes import EpisodeDataModule, Sample, Stage
from lightning_l2l.data.minibatches import Minibatches, Pool

_SIZE = 28  # height and width of an image, in pixels
_NUM_CLASSES = 10
_VAL_SHARE = 6  # one image in 6 of the training files: 10,000 of 60,000, as many as there are test images


class MNISTDataModule(EpisodeDataModule):
    """Every task is one run over randomly drawn minibatches of MNIST digits.

    A batch has `"inputs"`, uint8 in [0, 255], `[num_tasks, num_steps + 1, batch_size, 28, 28]`, `"targets"`,
    uint8 in [0, 9], `[num_tasks, num_steps + 1, batch_size]`, and `"seed"`, int64 `[num_tasks]`. Minibatch t
    is used at theta_t for t = 0, ..., num_steps, hence one more than steps. Both are `Minibatches`, cut out of
    the stage's images when they are asked for, so that an episode may be long: 8 bytes an image and step. (With
    `num_workers`, whose part it is to draw ahead, they are tensors: 10 MB a task at 100 steps of 128 images.)

    A validation or test batch has, besides, images which the task's minibatches never use: `"unseen_inputs"`,
    uint8 in [0, 255], `[num_tasks, num_unseen, 28, 28]`, and `"unseen_targets"`, uint8 in [0, 9],
    `[num_tasks, num_unseen]`. On them `Task.unseen` tells how well the trained network does on new data.

    Training, validation and test have no image in common: the test tasks draw from the `t10k` files, the
    validation tasks from the last sixth of the training files, the training tasks from the rest.

    Args:
        root: Folder of the data sets; the files are in `<root>/MNIST/raw`, packed or unpacked.
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
        root: str | Path = "data",
        num_tasks: int = 1,
        seed: int = 0,
        batch_size: int = 128,
        num_steps: int | None = None,
        episodes_per_epoch: int = 100,
        num_val_tasks: int = 10,
        num_test_tasks: int = 10,
        eval_tasks: int | None = None,
        num_workers: int = 0,
        download: bool = True,
        num_unseen: int = 1000,
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
        self._digits: dict[Stage, tuple[Pool, Pool]] = {}  # images [n, 28, 28] and labels [n] of each stage

    def prepare_data(self) -> None:
        """Downloads the files that are missing; runs on one process of each machine.

        Raises:
            RuntimeError: If they cannot be downloaded.
        """
        if self.download:
            idx.download(self.root)

    def setup(self, stage: str = "") -> None:
        """Reads the images of all stages.

        Raises:
            FileNotFoundError: If a file is missing.
            ValueError: If a file is damaged, a stage has too few images for one minibatch and those set aside, or
                `num_steps` is unknown.
        """
        super().setup(stage)
        if self._digits:
            return
        images, labels = self._read("train")
        split = len(images) - len(images) // _VAL_SHARE
        digits: dict[Stage, tuple[Tensor, Tensor]] = {
            "train": (images[:split], labels[:split]),
            "val": (images[split:], labels[split:]),
            "test": self._read("t10k"),
        }
        for name, (images, _) in digits.items():
            self._check_enough(name, len(images))
        self._digits = {name: (Pool(images), Pool(labels)) for name, (images, labels) in digits.items()}

    def sample(self, stage: Stage, generator: torch.Generator) -> Sample:
        """Draws `num_steps + 1` minibatches without replacement and, except for training, the images set aside.

        The stage's images are brought into a random order, of which the first `num_unseen` are set aside.
        Minibatches are cut from the others, in that order; when fewer than `batch_size` of them are left, from
        a fresh permutation of the same images.
        """
        if stage not in self._digits or self.num_steps is None:
            raise RuntimeError("the images are not there yet; call prepare_data() and setup() first")
        images, labels = self._digits[stage]
        num_unseen = self._num_set_aside(stage)
        unseen, seen = torch.randperm(len(images.examples), generator=generator).tensor_split([num_unseen])
        per_permutation = len(seen) // self.batch_size
        num_fresh = -(-(self.num_steps + 1) // per_permutation) - 1
        order = torch.empty(1 + num_fresh, per_permutation, self.batch_size, dtype=torch.int32)
        order[0] = seen[: order[0].numel()].view_as(order[0])
        for fresh in order[1:]:
            permutation = seen[torch.randperm(len(seen), generator=generator)]
            fresh.copy_(permutation[: fresh.numel()].view_as(fresh))
        order = order.flatten(0, 1)[: self.num_steps + 1].clone()  # a view would keep all of it
        sample: Sample = {"inputs": Minibatches(images, order), "targets": Minibatches(labels, order)}
        if num_unseen:
            sample["unseen_inputs"] = images.examples.index_select(0, unseen)
            sample["unseen_targets"] = labels.examples.index_select(0, unseen)
        return sample

    def _num_set_aside(self, stage: Stage) -> int:
        return 0 if stage == "train" else self.num_unseen

    def _check_enough(self, stage: Stage, available: int) -> None:
        """Refuses a stage whose `available` images do not make one minibatch besides those set aside."""
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
            f"{sizes} {self.batch_size + num_unseen} {stage} images, but {idx.raw_folder(self.root)} has "
            f"{available}; {remedy}"
        )

    def _read(self, prefix: str) -> tuple[Tensor, Tensor]:
        """Reads and checks the pair of files `prefix`: images `[n, 28, 28]` and labels `[n]`."""
        paths = []
        for name in (f"{prefix}-images-idx3-ubyte", f"{prefix}-labels-idx1-ubyte"):
            path = idx.find_idx(self.root, name)
            if path is None:
                folder = idx.raw_folder(self.root).resolve()
                raise FileNotFoundError(f"{folder} has no {name}(.gz); put it there, or set download=True")
            paths.append(path)
        images, labels = idx.read_idx(paths[0], num_dims=3), idx.read_idx(paths[1], num_dims=1)
        if images.shape[1:] != (_SIZE, _SIZE):
            raise ValueError(f"{paths[0]} has images of {images.shape[1:]} pixels, expected (28, 28); {idx.REMEDY}")
        if len(images) != len(labels):
            raise ValueError(f"{paths[1]} has {len(labels)} labels, expected {len(images)}, one an image; {idx.REMEDY}")
        if len(labels) and labels.max() >= _NUM_CLASSES:
            raise ValueError(f"{paths[1]} has the label {labels.max()}, expected 0 to 9; {idx.REMEDY}")
        return torch.tensor(images), torch.tensor(labels)  # copies, because the arrays are read-only
