"""MNIST: handwritten digits."""

from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from lightning_l2l.data import idx
from lightning_l2l.data.images import ImageDataModule

_SIZE = 28  # height and width of an image, in pixels
_NUM_CLASSES = 10


class MNISTDataModule(ImageDataModule):
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
            root=root,
            num_tasks=num_tasks,
            seed=seed,
            batch_size=batch_size,
            num_steps=num_steps,
            episodes_per_epoch=episodes_per_epoch,
            num_val_tasks=num_val_tasks,
            num_test_tasks=num_test_tasks,
            eval_tasks=eval_tasks,
            num_workers=num_workers,
            download=download,
            num_unseen=num_unseen,
        )

    def prepare_data(self) -> None:
        """Downloads the files that are missing; runs on one process of each machine.

        Raises:
            RuntimeError: If they cannot be downloaded.
        """
        if self.download:
            idx.download(self.root)

    def folder(self) -> Path:
        """Returns the folder of the four files."""
        return idx.raw_folder(self.root)

    def read(self, part: Literal["train", "test"]) -> tuple[Tensor, Tensor]:
        """Reads and checks a pair of files: images, uint8 `[n, 28, 28]`, and labels, uint8 `[n]`."""
        prefix = {"train": "train", "test": "t10k"}[part]
        paths = []
        for name in (f"{prefix}-images-idx3-ubyte", f"{prefix}-labels-idx1-ubyte"):
            path = idx.find_idx(self.root, name)
            if path is None:
                folder = self.folder().resolve()
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
