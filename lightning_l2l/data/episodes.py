"""Episodes as a data set: task k of epoch e is a function of (seed, stage, e, k) and of nothing else.

Hence a task does not depend on the number of workers or processes, nor on what ran before it. The epoch
travels with the index from the sampler to the worker, so that a worker needs no state of its own and may
outlive the epoch.
"""

from abc import ABC, abstractmethod
from hashlib import blake2b
from typing import Any, Literal

import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, Dataset

from lightning_l2l.arguments import MOST, check_at_least, check_fits_memory
from lightning_l2l.data.loading import (
    EpisodeLoader,
    EpisodeSampler,
    Sample,
    leave_stopping_to_the_run,
    num_processes,
    side_by_side,
)
from lightning_l2l.tasks.minibatches import Minibatches

Stage = Literal["train", "val", "test"]

MOST_SEED = 2**64 - 1
_MOST_WORKERS = 256


def task_seed(seed: int, stage: str, epoch: int, index: int) -> int:
    """Hashes the coordinates of a task to the seed of its random numbers; the same on every machine.

    PyTorch's CPU generator looks at the low 32 bits only, so two given tasks are the same one with
    probability 2^-32.

    Args:
        seed: Seed of the whole data module, 0 or more.
        stage: Name of the stream, such as `"train"`; different names give unrelated seeds.
        epoch: Number of the epoch, from 0.
        index: Number of the task within the epoch, from 0, counted over all processes.

    Returns:
        An integer in [0, 2^63).

    Raises:
        ValueError: If `seed` is negative.

    Example:
        >>> task_seed(0, "train", 0, 0) == task_seed(0, "train", 0, 0)
        True
        >>> task_seed(0, "train", 0, 1) == task_seed(0, "train", 1, 0)
        False
    """
    check_at_least(0, MOST_SEED, seed=seed)
    digest = blake2b(f"{seed}/{stage}/{epoch}/{index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


class EpisodeDataModule(LightningDataModule, ABC):
    """Batches of tasks. A subclass says in `sample` what the data of one task is; all else is here.

    A batch holds what `sample` returns, each tensor with the tasks as a new first dimension, and `"seed"`,
    int64 `[num_tasks]`: one seed per task, for its starting point and its noise, unrelated to the data's own
    random numbers. Training has new tasks in every epoch; validation and test tasks are always the same.

    Args:
        num_tasks: Number of tasks side by side in a training batch of each process.
        seed: Seed of all tasks, 0 or more.
        num_steps: Number of *inner steps* of an episode. Default: the `num_steps` of the module being
            trained.
        episodes_per_epoch: Number of training batches in an epoch.
        num_val_tasks: Number of validation tasks, over all processes.
        num_test_tasks: Number of test tasks, over all processes.
        eval_tasks: Number of tasks side by side in a validation or test batch of each process; the last batch
            may have fewer. Default: `num_tasks`.
        num_workers: Number of worker processes that load data; 0 loads it in the process that trains.

    Raises:
        ValueError: If a size is not a positive integer, or `seed` or `num_workers` is negative.

    Example:
        One of your own: points on a line through the origin, another slope in every task.

        >>> class LineDataModule(EpisodeDataModule):
        ...     def sample(self, stage, generator):
        ...         x = torch.randn(self.num_steps + 1, 16, generator=generator)
        ...         return {"inputs": x, "targets": torch.randn(1, generator=generator) * x}
        >>> data = LineDataModule(num_tasks=8, num_steps=10)
        >>> {name: tuple(values.shape) for name, values in next(iter(data.train_dataloader())).items()}
        {'inputs': (8, 11, 16), 'targets': (8, 11, 16), 'seed': (8,)}
    """

    needs_num_steps: bool = True  # whether the data depends on the number of inner steps

    def __init__(
        self,
        num_tasks: int,
        seed: int = 0,
        num_steps: int | None = None,
        episodes_per_epoch: int = 100,
        num_val_tasks: int = 128,
        num_test_tasks: int = 128,
        eval_tasks: int | None = None,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        check_at_least(1, MOST, num_tasks=num_tasks)
        check_at_least(1, MOST, optional=True, num_steps=num_steps, eval_tasks=eval_tasks)
        check_at_least(1, episodes_per_epoch=episodes_per_epoch)
        check_at_least(1, num_val_tasks=num_val_tasks, num_test_tasks=num_test_tasks)
        check_at_least(0, MOST_SEED, seed=seed)
        check_at_least(0, _MOST_WORKERS, num_workers=num_workers)
        self.num_tasks = num_tasks
        self.seed = seed
        self.num_steps = num_steps
        self.episodes_per_epoch = episodes_per_epoch
        self.num_val_tasks = num_val_tasks
        self.num_test_tasks = num_test_tasks
        self.eval_tasks = num_tasks if eval_tasks is None else eval_tasks
        self.num_workers = num_workers
        self._given_num_steps = num_steps  # a later Trainer may bring another module with other `num_steps`

    @abstractmethod
    def sample(self, stage: Stage, generator: torch.Generator) -> Sample:
        """Draws the data of one task.

        Args:
            stage: Whether the task is for training, validation or test.
            generator: CPU generator, seeded for this task; the only source of randomness allowed.

        Returns:
            Tensors, or `Minibatches` in place of them, by name, without a dimension for the tasks.
        """

    def sample_for(self, stage: Stage, epoch: int, number: int, generator: torch.Generator) -> Sample:
        """As `sample`, for a task of a certain batch, which is counted over all processes; by default all are alike.

        Args:
            stage: As there.
            epoch: Number of the epoch, from 0; in validation and test always 0.
            number: Number of the batch within the epoch, from 0; that of batch j is j on all processes.
            generator: As there.
        """
        return self.sample(stage, generator)

    @property
    def trained(self) -> Any:
        """The module that is being trained or evaluated; None where there is no Trainer."""
        return None if self.trainer is None else self.trainer.lightning_module

    def setup(self, stage: str = "") -> None:
        """Makes the data of all stages available whatever `stage` is: `test` tunes on validation tasks.

        Raises:
            ValueError: If `num_steps` is needed and neither the data module nor the trained module says it.
        """
        self.num_steps = self._given_num_steps or getattr(self.trained, "num_steps", None)
        if self.num_steps is None and self.needs_num_steps:
            raise ValueError(
                f"{type(self).__name__} has num_steps=None and no module with `num_steps` is being trained; "
                "give num_steps, the number of inner steps of an episode, such as num_steps=100"
            )
        check_at_least(1, MOST, optional=True, num_steps=self.num_steps)

    def train_dataloader(self) -> DataLoader[Sample]:
        """Returns `episodes_per_epoch` batches of `num_tasks` tasks on each process."""
        width = self.num_tasks * num_processes()
        total = self.episodes_per_epoch * width
        sampler = EpisodeSampler(total, num_done=self._num_done)
        return EpisodeLoader(_Episodes(self, "train", total, width), **self._options(self.num_tasks, sampler))

    def val_dataloader(self) -> DataLoader[Sample]:
        """Returns the validation tasks in batches of `eval_tasks`."""
        return self._eval_dataloader("val", self.num_val_tasks)

    def test_dataloader(self) -> DataLoader[Sample]:
        """Returns the test tasks in batches of `eval_tasks`."""
        return self._eval_dataloader("test", self.num_test_tasks)

    def predict_dataloader(self) -> DataLoader[Sample]:
        """Returns the test tasks in batches of `eval_tasks`."""
        return self.test_dataloader()

    def _eval_dataloader(self, stage: Stage, total: int) -> DataLoader[Sample]:
        sampler = EpisodeSampler(total, fixed=True)
        episodes = _Episodes(self, stage, total, self.eval_tasks * num_processes())
        return DataLoader(episodes, **self._options(self.eval_tasks, sampler))

    def _options(self, batch_size: int, sampler: EpisodeSampler) -> dict[str, Any]:
        # All by keyword: `Trainer.predict` builds the loader anew and stumbles over a positional batch_size.
        return dict(
            batch_size=batch_size,
            sampler=sampler,
            collate_fn=side_by_side,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=leave_stopping_to_the_run if self.num_workers else None,
        )

    def _num_done(self) -> int:
        """Number of this epoch's tasks that the run being resumed had finished on this process, else 0."""
        if self.trainer is None or not self.trainer.training:
            return 0
        # `batch_idx` is that of the last batch done, -1 at the start of an epoch. An episode that was
        # interrupted half way is not done: the loops have stepped back by then, and it is run again.
        return (self.trainer.fit_loop.batch_idx + 1) * self.num_tasks

    def __getstate__(self) -> dict[str, Any]:
        # Spawned workers get a copy of this object; the Trainer would drag the model along.
        return {**self.__dict__, "trainer": None}


class _Episodes(Dataset[Sample]):
    """Maps (epoch, index) to the data of one task; an index alone, from another sampler, is of epoch 0.

    The batches of all processes with the same number have `width` tasks together.
    """

    def __init__(self, data: EpisodeDataModule, stage: Stage, num_tasks: int, width: int) -> None:
        self.data = data
        self.stage = stage
        self.num_tasks = num_tasks
        self.width = width

    def __len__(self) -> int:
        return self.num_tasks

    def __getitem__(self, key: tuple[int, int] | int) -> Sample:
        return self.__getitems__([key])[0]

    def __getitems__(self, keys: list[tuple[int, int] | int]) -> list[Sample]:
        generator = torch.Generator()  # one for all: seeding it anew is cheaper than making it
        samples: list[Sample] = []
        for key in keys:
            epoch, index = key if isinstance(key, tuple) else (0, key)
            generator.manual_seed(task_seed(self.data.seed, self.stage, epoch, index))
            sample = dict(self.data.sample_for(self.stage, epoch, index // self.width, generator))
            if not samples:  # before the others are drawn, which may be a million
                one = sum((v.order if isinstance(v, Minibatches) else v).nbytes for v in sample.values())
                check_fits_memory(len(keys) * one, num_tasks=len(keys))
            sample["seed"] = torch.tensor(task_seed(self.data.seed, f"{self.stage}/start", epoch, index))
            samples.append(sample)
        return samples
