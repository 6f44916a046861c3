"""Images with labels: the minibatches on which a small network is trained in an episode."""

from abc import abstractmethod
from pathlib import Path
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from lightning_l2l.arguments import check_at_least, check_flag, check_type
from lightning_l2l.data.episodes import Stage
from lightning_l2l.data.options import PoolOptions, Unpack
from lightning_l2l.data.pools import PoolDataModule

_VAL_SHARE = 6  # one training image in 6: of MNIST 10,000 of 60,000, as many as there are test images
_AT_ONCE = 1000  # images that are reduced together: what they need fits a processor's cache


class ImageDataModule(PoolDataModule):
    """Every task is one run over randomly drawn minibatches. A subclass says where the images come from.

    A batch is that of a `PoolDataModule`: its inputs are images, its targets, one number each, their labels.

    The test tasks draw from the test images, the validation tasks from the last sixth of the training images, the
    training tasks from the rest.

    Args:
        root: Folder of the data sets.
        download: Whether files that are missing are downloaded, by `prepare_data`.
        num_unseen: Number of images that each validation or test task sets aside; 0 for none.
        image_size: Pixels along each side to which the images are reduced, each the mean of an area; at most as many
            as they have. Default: they stay as they are.
        **options: See `PoolDataModule` and `EpisodeDataModule`.

    Raises:
        ValueError: If a size is not a positive integer, or `seed`, `num_workers` or `num_unseen` is
            negative.
    """

    kind: ClassVar[str] = "images"

    def __init__(
        self,
        root: str | Path = "data",
        *,
        download: bool = True,
        num_unseen: int = 1000,
        image_size: int | None = None,
        **options: Unpack[PoolOptions],
    ) -> None:
        super().__init__(num_unseen=num_unseen, **options)
        check_at_least(1, optional=True, image_size=image_size)
        check_type((str, Path), "the path of a folder, such as 'data'", root=root)
        check_at_least(0, num_unseen=num_unseen)  # None would set more aside where there are more images
        check_flag(download=download)
        self.root = Path(root)
        self.download = download
        self.image_size = image_size

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

    def source(self, stage: Stage) -> str:
        """The folder of the images."""
        return str(self.folder())

    def read_stages(self) -> dict[Stage, tuple[Tensor, Tensor]]:
        """Reads the images, those of the training in two parts."""
        images, labels = self._reduced(*self.read("train"))
        split = len(images) - len(images) // _VAL_SHARE
        return {
            "train": (images[:split], labels[:split]),
            "val": (images[split:], labels[split:]),
            "test": self._reduced(*self.read("test")),
        }

    def _reduced(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Images of the size that is asked for."""
        size, sides = self.image_size, images.shape[-2:]
        if size is None:
            return images, labels
        if size > min(sides):
            raise ValueError(f"image_size={size} exceeds the {min(sides)} pixels of an image; use that or fewer")
        planes = images.view(len(images), -1, *sides)
        small = [
            interpolate(p.float(), (size, size), mode="area").round().byte() for p in torch.split(planes, _AT_ONCE)
        ]
        return torch.cat(small).view(*images.shape[:-2], size, size), labels
