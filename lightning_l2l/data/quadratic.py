"""Synthetic quadratics: the data of f(theta) = ||W theta - y||^2 with random W and y."""

from lightning_l2l.arguments import check_fits_memory
from lightning_l2l.data.generated import GeneratedDataModule
from lightning_l2l.data.options import EpisodeOptions, Unpack
from lightning_l2l.tasks.quadratic import Quadratic


class QuadraticDataModule(GeneratedDataModule):
    """Random least-squares problems, a new one for every task; nothing is downloaded.

    A batch has `"W"`, float32 `[num_tasks, dim, dim]`, `"y"`, float32 `[num_tasks, dim]`, all entries
    independent standard Gaussians, and `"seed"`, int64 `[num_tasks]`.

    Args:
        num_tasks: Number of tasks side by side in a training batch of each process.
        dim: Number of coordinates of theta, and of rows of W.
        **options: See `EpisodeDataModule`.

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
        *,
        dim: int = 10,
        **options: Unpack[EpisodeOptions],
    ) -> None:
        super().__init__(Quadratic(dim), num_tasks, **options)
        most = max(num_tasks, self.eval_tasks)
        check_fits_memory(4 * most * dim * (dim + 1), dim=dim, num_tasks=num_tasks, eval_tasks=self.eval_tasks)
        self.dim = dim
