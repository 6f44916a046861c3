"""CIFAR-10: small photographs of ten kinds of things, or of some of them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from lightning_l2l.arguments import brief, check_type
from lightning_l2l.data import cifar10_files as files
from lightning_l2l.data.episodes import Stage
from lightning_l2l.data.images import ImageDataModule
from lightning_l2l.data.loading import Sample
from lightning_l2l.data.options import ImageOptions, Unpack
from lightning_l2l.tasks.minibatches import Minibatches, Pool

_ALL = tuple(range(len(files.CLASSES)))
_NONE = 255  # the number of a label that a task does not have


class CIFAR10DataModule(ImageDataModule):
    """Every task is one run over randomly drawn minibatches of CIFAR-10 images.

    A batch has `"inputs"`, uint8 in [0, 255], `[num_tasks, num_steps + 1, batch_size, 3, 32, 32]`, `"targets"`,
    uint8, `[num_tasks, num_steps + 1, batch_size]`, and `"seed"`, int64 `[num_tasks]`. Minibatch t is used at
    theta_t for t = 0, ..., num_steps, hence one more than steps. Inputs are `Minibatches`, cut out of the stage's
    images when they are asked for, so that an episode may be long. (With `num_workers`, whose part it is to draw
    ahead, they are tensors: 40 MB a task at 100 steps of 128 images.)

    A validation or test batch has, besides, images which the task's minibatches never use: `"unseen_inputs"`,
    uint8 in [0, 255], `[num_tasks, num_unseen, 3, 32, 32]`, and `"unseen_targets"`, uint8, `[num_tasks, num_unseen]`.

    Training, validation and test have no image in common: the test tasks draw from the 10,000 test images, the
    validation tasks from the last sixth of the training images, the training tasks from the rest. Image folders,
    which are ordered by class, are shuffled before that, always in the same way.

    The images are taken from the first of these places that has any:

    - `<root>/cifar-10-batches-bin`: the binary files of the published archive;
    - `<root>/cifar10` or `root`: image folders `train/<class>/*` and `test/<class>/*`, the classes being airplane,
      automobile, bird, cat, deer, dog, frog, horse, ship and truck. They take Pillow: `pip install
      'lightning_l2l[images]'`;
    - the published archive `cifar-10-binary.tar.gz`, 170 MB, which `prepare_data` downloads to `root`, if it is not
      there, and unpacks.

    Args:
        root: Folder of the data sets.
        classes: Labels, 0 to 9, or names of the classes that validation and test tasks have, at least 2, such as
            `[0, 1, 2, 3, 4]` or `["cat", "dog"]`. Targets are numbered from 0 in this order. Default: all ten.
        train_classes: Those that training tasks draw from, at least as many. If they are more than `classes`, every
            training task draws as many as those at random, and numbers them in the order drawn. Default: `classes`.
        **options: See `ImageDataModule`, `PoolDataModule` and `EpisodeDataModule`.

    Raises:
        ValueError: If a size is not a positive integer, `seed`, `num_workers` or `num_unseen` is negative, or
            `classes` or `train_classes` are no distinct labels, or too few.

    References:
        Krizhevsky, Learning multiple layers of features from tiny images,
        https://www.cs.toronto.edu/~kriz/learning-features-2009-TR.pdf, 2009.
    """

    def __init__(
        self,
        root: str | Path = "data",
        *,
        classes: Sequence[int | str] | None = None,
        train_classes: Sequence[int | str] | None = None,
        **options: Unpack[ImageOptions],
    ) -> None:
        super().__init__(root, **options)
        self.classes = _labels_of(classes=classes) or _ALL
        self.train_classes = _labels_of(train_classes=train_classes) or self.classes
        if len(self.train_classes) < len(self.classes):
            raise ValueError(
                f"train_classes={brief(train_classes)} are {len(self.train_classes)} labels and classes="
                f"{brief(classes)} are {len(self.classes)}; give train_classes at least as many, or fewer classes"
            )

    def prepare_data(self) -> None:
        """Downloads and unpacks what is missing, unless there are image folders; runs on one process of each machine.

        Raises:
            RuntimeError: If the archive cannot be downloaded.
            ValueError: If it is another one than that published, or there is no room to unpack it.
        """
        if self.download and (self._has_binary_files() or files.find_image_folder(self.root) is None):
            files.download(self.root)

    def folder(self) -> Path:
        """Returns the folder of the images, or `root` if there are none."""
        if self._has_binary_files():
            return self.root / files.FOLDER
        return files.find_image_folder(self.root) or self.root

    def read(self, part: Literal["train", "test"]) -> tuple[Tensor, Tensor]:
        """Reads and checks the training or the test images: uint8 `[n, 3, 32, 32]`, and their labels, uint8 `[n]`."""
        if not self._has_binary_files():
            folder = files.find_image_folder(self.root)
            if folder is None:
                raise FileNotFoundError(
                    f"{self.root.resolve()} has neither {files.FOLDER}/data_batch_1.bin nor folders of images, such "
                    f"as train/{files.CLASSES[0]} or cifar10/train/{files.CLASSES[0]}; put them there, or set "
                    "download=True"
                )
            images, labels = (torch.from_numpy(values) for values in files.read_images(folder / part))
            if part == "train":
                order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
                images, labels = images[order], labels[order]
            return images, labels
        absent = [name for name in files.BATCHES[part] if name in files.find_missing(self.root)]
        if absent:
            folder = self.folder().resolve()
            raise FileNotFoundError(f"{folder} has no {', '.join(absent)}; put it there, or set download=True")
        batches = [files.read_batch(self.folder() / name) for name in files.BATCHES[part]]
        images, labels = (torch.from_numpy(np.concatenate(values)) for values in zip(*batches, strict=True))
        return images, labels

    def sample(self, stage: Stage, generator: torch.Generator) -> Sample:
        """Draws the labels, where training has more than one task uses, and minibatches as for any images."""
        num = len(self.classes)
        if stage != "train" or len(self.train_classes) == num:
            return super().sample(stage, generator)
        images, labels = self._pools_of(stage)
        drawn = torch.randperm(len(self.train_classes), generator=generator)[:num]
        targets, rows = _numbered(labels.examples, drawn)
        order, _ = self._draw(stage, len(rows), generator)
        inputs = Minibatches(images, rows[order.long()].int())
        # Each task has its own targets, and several tasks share one pool: plain tensors, then.
        return {"inputs": inputs, "targets": Minibatches(Pool(targets), inputs.order)[:]}

    def _choose(self, stage: Stage, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        wanted, num = self.train_classes if stage == "train" else self.classes, len(self.classes)
        kind = ""
        if wanted != _ALL:
            kind = f" of the labels {list(wanted)}"
            labels, rows = _numbered(labels, torch.tensor(wanted))
            images, labels = images[rows], labels[rows]
        if len(wanted) > num:
            kind = f" of any {num} of the labels {list(wanted)}"
        counts = torch.bincount(labels, minlength=len(wanted)).sort().values
        self._check_enough(stage, int(counts[:num].sum()), kind)
        return images, labels

    def _has_binary_files(self) -> bool:
        return len(files.find_missing(self.root)) < sum(map(len, files.BATCHES.values()))


def _numbered(labels: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """The place of each label among those wanted, uint8 `[n]`, and which rows have one of these, int64."""
    number = torch.full((len(_ALL),), _NONE, dtype=torch.uint8)
    number[wanted] = torch.arange(len(wanted), dtype=torch.uint8)
    places = number[labels.long()]
    return places, (places != _NONE).nonzero().squeeze(1)


def _labels_of(**given: Any) -> tuple[int, ...] | None:
    """The labels that an argument lists by number or name; None where it is None."""
    ((name, value),) = given.items()
    if value is None:
        return None
    check_type((list, tuple), "a list of labels, such as [0, 1, 2]", **given)
    labels: list[int] = []
    for label in value:
        if isinstance(label, str) and label in files.CLASSES:
            label = files.CLASSES.index(label)
        if not isinstance(label, int) or isinstance(label, bool) or label not in _ALL:
            raise ValueError(
                f"{name}={brief(value)} has {brief(label)}, which is no label; use 0 to {_ALL[-1]}, or "
                f"{', '.join(files.CLASSES)}"
            )
        if label in labels:
            raise ValueError(f"{name}={brief(value)} has {files.CLASSES[label]}, label {label}, twice; give it once")
        labels.append(label)
    if len(labels) < 2:
        raise ValueError(f"{name}={brief(value)} has too few labels to tell apart; give at least 2, or None for all")
    return tuple(labels)
