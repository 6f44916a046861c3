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
        **options: See `ImageDataModule`, `PoolDataModule` and `EpisodeDataModule`.

    Raises:
        ValueError: If a size is not a positive integer, or `seed`, `num_workers` or `num_unseen` is
            negative.
    """

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
