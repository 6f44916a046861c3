"""The data of tasks that say themselves how it is drawn."""

from __future__ import annotations

import torch

from lightning_l2l.arguments import check_type
from lightning_l2l.data.episodes import EpisodeDataModule, Stage
from lightning_l2l.data.loading import Sample
from lightning_l2l.data.options import EpisodeOptions, Unpack

# The package imports `data` first; what `tasks` needs of it is imported above.
from lightning_l2l.tasks.base import GeneratedTask
from lightning_l2l.tasks.transforms import made_of


class GeneratedDataModule(EpisodeDataModule):
    """Functions of a task whose data is drawn, a new one for every task of a batch; nothing is downloaded.

    A batch has what the task's `sample` returns, each tensor with the tasks as a new first dimension, and `"seed"`,
    int64 `[num_tasks]`.

    Args:
        task: Of which the data is, such as `Rosenbrock()`. Default: that of the module being trained.
        num_tasks: Number of tasks side by side in a training batch of each process.
        **options: See `EpisodeDataModule`.

    Raises:
        ValueError: If a size is not a positive integer, or `seed` or `num_workers` is negative.
        TypeError: If the data of `task` is not drawn.

    Example:
        >>> from lightning_l2l.tasks import Rosenbrock
        >>> batch = next(iter(GeneratedDataModule(Rosenbrock(dim=3), num_tasks=4).train_dataloader()))
        >>> {name: tuple(values.shape) for name, values in batch.items()}
        {'shift': (4, 3), 'seed': (4,)}
    """

    needs_num_steps = False

    def __init__(
        self,
        task: GeneratedTask | None = None,
        num_tasks: int = 128,
        **options: Unpack[EpisodeOptions],
    ) -> None:
        super().__init__(num_tasks, **options)
        example = "a task whose data is drawn, such as Rosenbrock()"
        check_type((GeneratedTask, type(None)), f"{example}, or None for that of the trained module", task=task)
        self.task = task
        self._given_task = task  # a later Trainer may bring another module with another task

    def setup(self, stage: str = "") -> None:
        """Finds the task.

        Raises:
            ValueError: If neither the data module nor the trained module has one whose data is drawn.
        """
        super().setup(stage)
        found = self._given_task or getattr(self.trained, "task", None)
        drawn = [one for one in made_of(found) if isinstance(one, GeneratedTask)]
        if not drawn:
            theirs = (
                "there is no module that has one" if found is None else f"data of {type(found).__name__} is not drawn"
            )
            raise ValueError(
                f"GeneratedDataModule(task=None) draws the data of the trained module's task, and {theirs}; give it a "
                "task such as Rosenbrock(), or use the task's own data module"
            )
        self.task = drawn[0]

    def sample(self, stage: Stage, generator: torch.Generator) -> Sample:
        """Draws the data of one task; all stages have the same distribution."""
        if self.task is None:
            raise RuntimeError("the task is not known yet; call setup() first, or give it")
        return dict(self.task.sample(generator))
