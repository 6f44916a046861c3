"""A data set of one's own, of which the minibatches of an episode are drawn."""

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, TensorDataset

from lightning_l2l.arguments import brief, check_at_least, check_fits_memory, check_type
from lightning_l2l.data.episodes import MOST_SEED, Stage
from lightning_l2l.data.options import PoolOptions, Unpack
from lightning_l2l.data.pools import PoolDataModule
from lightning_l2l.tasks.batches import form
from lightning_l2l.tasks.seeding import global_rng

_EXAMPLE = "a torch.utils.data.Dataset of (input, target) pairs"
_SHARE = 0.15  # of the examples, for validation and again for test
_LARGEST_BYTE = 255


class DatasetDataModule(PoolDataModule):
    """Every task is one run over randomly drawn minibatches of a `torch.utils.data.Dataset` of your own.

    A batch is that of a `PoolDataModule`: `"inputs"`, `[num_tasks, num_steps + 1, batch_size, ...]`, `"targets"`,
    likewise, and `"seed"`; in validation and test also `"unseen_inputs"` and `"unseen_targets"`.

    An example is a pair (input, target) of tensors, NumPy arrays or numbers. All inputs have the same shape and dtype,
    and all targets have. Inputs keep their dtype: `NetworkTask` divides those of uint8 by 255, as pixels, and leaves
    others, such as the tokens of a text in int64, as they are. Targets that are integers, such as classes, become
    uint8, of which `NetworkTask` makes int64, or int64 where they are not from 0 to 255; floating-point targets, of a
    regression, keep their dtype.

    `setup` reads every example once and holds it in memory. A random augmentation in the data set is frozen by that:
    each example is augmented once, and always in the same way if it draws torch's random numbers.

    Training, validation and test have no example in common. They are parts of a random permutation of the examples,
    which depends on `split_seed` alone.

    Args:
        dataset: Examples to be split.
        test_dataset: Examples of the test tasks. Default: a part of `dataset`.
        val_size: Of the examples in `dataset`, the share, between 0 and 1, or the number, 1 or more, for validation.
        test_size: The share, or the number, for the test. Default: 0.15; with a `test_dataset` nothing.
        split_seed: Seed of the split, 0 or more. It is not `seed`, so that other tasks have the same split.
        num_unseen: Number of examples that each validation or test task sets aside; 0 for none. Default: half of the
            stage's, but at most 1000, and so many that a minibatch is left.
        **options: See `PoolDataModule` and `EpisodeDataModule`.

    Raises:
        TypeError: If a data set is none of `torch.utils.data`, or one without a number of examples.
        ValueError: If a size is out of range, or there are two sources of test examples.

    Example:
        >>> points = torch.rand(200, 2, generator=torch.Generator().manual_seed(0))
        >>> dataset = TensorDataset(points, points.sum(1) > 1)
        >>> data = DatasetDataModule(dataset, num_tasks=3, num_steps=10, batch_size=8)
        >>> data.setup()
        >>> batch = next(iter(data.val_dataloader()))
        >>> {name: tuple(values.shape) for name, values in batch.items() if "inputs" in name}
        {'inputs': (3, 11, 8, 2), 'unseen_inputs': (3, 15, 2)}
    """

    def __init__(
        self,
        dataset: Dataset,  # type: ignore[type-arg]  # of Dataset[Any] the command line would know no subclasses
        *,
        test_dataset: Dataset | None = None,  # type: ignore[type-arg]
        val_size: int | float = _SHARE,
        test_size: int | float | None = None,
        split_seed: int = 0,
        num_unseen: int | None = None,
        **options: Unpack[PoolOptions],
    ) -> None:
        super().__init__(num_unseen=num_unseen, **options)
        _check_dataset(dataset=dataset)
        if test_dataset is not None:
            _check_dataset(test_dataset=test_dataset)
            if test_size is not None:
                raise ValueError(
                    f"test_size={brief(test_size)} takes test examples from dataset, and test_dataset has them too; "
                    "give one of the two"
                )
        _check_size(val_size=val_size, test_size=_SHARE if test_size is None else test_size)
        check_at_least(0, MOST_SEED, split_seed=split_seed)
        self.dataset, self.test_dataset = dataset, test_dataset
        self.val_size, self.test_size, self.split_seed = val_size, test_size, split_seed

    def source(self, stage: Stage) -> str:
        """The data set, by its class, and how it is split."""
        if stage == "test" and self.test_dataset is not None:
            return f"test_dataset, a {type(self.test_dataset).__name__},"
        return f"dataset, a {type(self.dataset).__name__} split by {self._sizes()},"

    def read_stages(self) -> dict[Stage, tuple[Tensor, Tensor]]:
        """Reads and splits the examples.

        Raises:
            TypeError: If an example is no pair, or has what is no tensor and cannot become one.
            ValueError: If examples differ in shape or dtype, or there are too few to be split.
        """
        total = _length(self.dataset, "dataset")
        apart = 0 if self.test_dataset is None else _length(self.test_dataset, "test_dataset")
        num_test = 0 if apart else _count(self._test_share(), total)
        num_val = _count(self.val_size, total)
        num_train = total - num_val - num_test
        if num_train < 1:
            raise ValueError(
                f"{self._sizes()} leave none of the {total} examples of dataset for training; use smaller ones, or "
                "give more examples"
            )
        numbers: dict[Stage, int] = {"train": num_train, "val": num_val, "test": apart or num_test}
        for stage, number in numbers.items():
            self._check_enough(stage, number)  # before the examples are read, which may take long
        places = torch.randperm(total, generator=torch.Generator().manual_seed(self.split_seed))
        inputs, targets = self._read(self.dataset, "dataset", places)
        ends = [num_train, num_train + num_val]
        parts = zip(inputs.tensor_split(ends), targets.tensor_split(ends), strict=True)
        stages: dict[Stage, tuple[Tensor, Tensor]] = dict(zip(("train", "val", "test"), parts, strict=True))
        if self.test_dataset is not None:
            stages["test"] = self._read(self.test_dataset, "test_dataset", torch.arange(apart))
            for what, ours, theirs in zip(("inputs", "targets"), (inputs, targets), stages["test"], strict=True):
                if ours.shape[1:] != theirs.shape[1:]:
                    raise ValueError(
                        f"{what} of test_dataset are {form(theirs[0])}, and those of dataset {form(ours[0])}; give "
                        "them the same shape"
                    )
        return stages

    def _test_share(self) -> int | float:
        return _SHARE if self.test_size is None else self.test_size

    def _sizes(self) -> str:
        of_test = "" if self.test_dataset is not None else f" and test_size={self._test_share()}"
        return f"val_size={self.val_size}{of_test}"

    def _read(self, dataset: Dataset[Any], name: str, places: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs and targets, example i of them at `places[i]`, so that what is split need not be copied."""
        if type(dataset) is TensorDataset and len(dataset.tensors) == 2:
            check_fits_memory(sum(one.nbytes for one in dataset.tensors), **{name: type(dataset).__name__})
            order = places.argsort()
            inputs, targets = (one.detach().cpu().index_select(0, order) for one in dataset.tensors)
            return inputs, _narrowed(targets)
        held: list[Tensor] = []
        with global_rng(torch.Generator().manual_seed(self.split_seed)):
            for index, place in enumerate(places.tolist()):
                pair = _pair(dataset[index], f"example {index} of {name}")
                if not held:
                    num_bytes = len(places) * sum(one.nbytes for one in pair)
                    check_fits_memory(num_bytes, **{name: type(dataset).__name__})
                    held = [torch.empty(len(places), *one.shape, dtype=one.dtype) for one in pair]
                for what, rows, one in zip(("an input", "a target"), held, pair, strict=True):
                    if rows.shape[1:] != one.shape or rows.dtype != one.dtype:
                        raise ValueError(
                            f"example {index} of {name} has {what} {form(one)}, and example 0 one {form(rows[0])}; "
                            "give all examples the same shape and dtype"
                        )
                    rows[place] = one
        inputs, targets = held
        return inputs, _narrowed(targets)


def _check_dataset(**datasets: Any) -> None:
    check_type(Dataset, f"{_EXAMPLE}, such as TensorDataset(inputs, targets)", **datasets)
    for name, dataset in datasets.items():
        if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
            raise TypeError(
                f"{name} is a {type(dataset).__name__}, which has no number of examples or no example by its number; "
                "give a Dataset with __len__ and __getitem__, such as TensorDataset(inputs, targets)"
            )


def _check_size(**sizes: Any) -> None:
    for name, size in sizes.items():
        share = isinstance(size, float) and 0 < size < 1
        if not share and (not isinstance(size, int) or isinstance(size, bool) or size < 1):
            raise ValueError(
                f"{name}={brief(size)} is neither a share between 0 and 1 nor a number of 1 or more; use "
                f"{name}={_SHARE}"
            )


def _length(dataset: Any, name: str) -> int:
    total = len(dataset)
    if not total:
        raise ValueError(f"{name} is a {type(dataset).__name__} without examples; give one that has some")
    return total


def _count(size: int | float, total: int) -> int:
    return size if isinstance(size, int) else max(round(size * total), 1)


def _pair(example: Any, name: str) -> list[Tensor]:
    """Input and target of an example."""
    if not isinstance(example, tuple | list) or len(example) != 2:
        size = f" of {len(example)}" if isinstance(example, tuple | list) else ""
        raise TypeError(f"{name} is a {type(example).__name__}{size}; give {_EXAMPLE}")
    return [_tensor(value, f"{name} has {what}") for what, value in zip(("an input", "a target"), example, strict=True)]


def _tensor(value: Any, name: str) -> Tensor:
    remedy = "give the Dataset a transform to dense tensors of numbers, such as torchvision's ToTensor for images"
    if isinstance(value, Tensor):
        if value.layout != torch.strided or value.is_meta:
            raise TypeError(f"{name} {form(value)}; {remedy}")
        return value.detach()
    if isinstance(value, float):
        return torch.tensor(value)
    try:
        if isinstance(value, int | np.ndarray | np.generic):
            return torch.from_numpy(np.array(value, order="C"))  # a copy, for torch takes no negative strides
    except TypeError:  # of numbers that torch does not have, or of texts
        pass
    raise TypeError(f"{name} that is a {type(value).__name__}; {remedy}")


def _narrowed(targets: Tensor) -> Tensor:
    """Integers in a byte each where that has room for all of them, as the labels of images are; else as classes."""
    if targets.is_floating_point() or targets.is_complex() or not targets.numel():
        return targets
    targets = targets.long()
    return targets.byte() if targets.min() >= 0 and targets.max() <= _LARGEST_BYTE else targets
