"""Synthetic quadratics: the data of f(theta) = ||W theta - y||^2 with random W and y."""

from lightning_l2l.arguments import check_fits_memory
from lightning_l2l.data.generated import GeneratedDataModule
from lightning_l2l.tasks.quadratic import Quadratic


class QuadraticDataModule(GeneratedDataModule):
    """Random least-squares problems, a new one for every task; nothing is downloaded.

    A batch has `"W"`, float32 `[num_tasks, dim, dim]`, `"y"`, float32 `[num_tasks, dim]`, all entries
    independent standard Gaussians, and `"seed"`, int64 `[num_tasks]`.

    Args:
        num_tasks: Number of tasks side by side in a training batch of each process.
        seed: Seed of all tasks, 0 or more.
        dim: Number of coordinates of theta, and of rows of W.
        num_steps: Number of *inner steps* of an episode; the data does not depend on it.
        episodes_per_epoch: Number of training batches in an epoch.
        num_val_tasks: Number of validation tasks, over all processes.
        num_test_tasks: Number of test tasks, over all processes.
        eval_tasks: Number of tasks side by side in a validation or test batch of each process. Default:
            `num_tasks`.
        num_workers: Number of worker processes; drawing the numbers is so cheap that 0 is the fastest.

    Raises:
        ValueError: If a size is not a positive integer or needs more memory than there is, or `seed` or
            `num_workers` is negative.

    Example:
        >>> batch = next(iter(QuadraticDataModule(num_tasks=4, dim=3).train_dataloader()))
        >>> {name: tuple(values.shape) for name, values in batch.items()}
        {'W': (4, 3, 3), 'y': (4, 3), 'seed': (4,)}

    References:
        Andrychowicz et al., Learning to learn by gradient descent by gradient descent, section 3.1,
        https://arxiv.org/abs/1606.04474, 2016.
    """

    def __init__(
        self,
        num_tasks: int = 128,
        seed: int = 0,
        dim: int = 10,
        num_steps: int | None = None,
        episodes_per_epoch: int = 100,
        num_val_tasks: int = 128,
        num_test_tasks: int = 128,
        eval_tasks: int | None = None,
        num_workers: int = 0,
    ) -> None:
        super().__init__(
            Quadratic(dim),
            num_tasks=num_tasks,
            seed=seed,
            num_steps=num_steps,
            episodes_per_epoch=episodes_per_epoch,
            num_val_tasks=num_val_tasks,
            num_test_tasks=num_test_tasks,
            eval_tasks=eval_tasks,
            num_workers=num_workers,
        )
        most = max(num_tasks, self.eval_tasks)
        check_fits_memory(4 * most * dim * (dim + 1), dim=dim, num_tasks=num_tasks, eval_tasks=self.eval_tasks)
        self.dim = dim
