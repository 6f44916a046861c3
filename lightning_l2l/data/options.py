"""Types of the arguments that data modules hand on to the class that they derive from.

For type checkers and editors alone: the classes that take the arguments have their defaults and say what they mean.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypedDict

if TYPE_CHECKING:
    from typing_extensions import Unpack as Unpack  # by this name: what other modules may import from here
else:

    class Unpack:
        """Stands in for typing's `Unpack`, of which the command line's parser takes the names without defaults.

        Of `**options` that are no `Unpack` it takes names, types, defaults and help from the parent's constructor.
        """

        def __class_getitem__(cls, options: Any) -> Any:
            return options


class CommonOptions(TypedDict, total=False):
    """What all data modules take with the same defaults; see `EpisodeDataModule`."""

    seed: int
    num_steps: int | None
    episodes_per_epoch: int
    eval_tasks: int | None
    num_workers: int


class EpisodeOptions(CommonOptions, total=False):
    """Those, and how many validation and test tasks there are; see `EpisodeDataModule`."""

    num_val_tasks: int
    num_test_tasks: int


class PoolOptions(EpisodeOptions, total=False):
    """What those take that draw minibatches of examples; see `PoolDataModule`."""

    num_tasks: int
    batch_size: int


class ImageOptions(PoolOptions, total=False):
    """What those take that draw minibatches of images; see `ImageDataModule`."""

    download: bool
    num_unseen: int
    image_size: int | None
