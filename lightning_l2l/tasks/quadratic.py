"""Random quadratic functions."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_l2l.arguments import MOST, brief, check_at_least, is_number
from lightning_l2l.tasks.base import GeneratedTask, mix_seed
from lightning_l2l.tasks.batches import form, get_entries


class Quadratic(GeneratedTask):
    """Least squares with a random matrix: f_k(theta) = ||W_k theta - y_k||^2, the squares summed.

    W_k and y_k stay the same for the whole episode. The start is theta ~ N(0, I). With noise the loss at a step is that
    with y_k plus a Gaussian vector that the task's seed and the step give.

    Args:
        dim: Number of coordinates of theta, at least 1; W_k is ``dim`` x ``dim``.
        noise: Standard deviation of that, at least 0.

    Raises:
        ValueError: If ``dim`` is no positive integer, or ``noise`` is negative.

    Example:
        >>> task = Quadratic(dim=2)
        >>> batch = {"W": torch.eye(2).expand(3, 2, 2), "y": torch.zeros(3, 2)}
        >>> task.loss({"theta": torch.ones(3, 2)}, batch, step=0)
        tensor([2., 2., 2.])

    References:
        Andrychowicz et al., *Learning to learn by gradient descent by gradient descent*, section 3.1, 2016,
        https://arxiv.org/abs/1606.04474
    """

    def __init__(self, dim: int = 10, noise: float = 0.0) -> None:
        check_at_least(1, MOST, dim=dim)
        if not is_number(noise) or not 0 <= noise < math.inf:
            raise ValueError(f"noise={brief(noise)} is not 0 or more; use 0.0 for none")
        self.dim, self.noise = dim, noise

    def init_params(self, num_tasks: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Draw ``theta`` ``[num_tasks, dim]``, i.i.d. standard Gaussian."""
        return {"theta": torch.randn(num_tasks, self.dim, generator=generator, device="cpu")}

    def sample(self, generator: torch.Generator) -> dict[str, Tensor]:
        """Draw ``W`` ``[dim, dim]`` and ``y`` ``[dim]``, i.i.d. standard Gaussian."""
        return {
            "W": torch.randn(self.dim, self.dim, generator=generator, device="cpu"),
            "y": torch.randn(self.dim, generator=generator, device="cpu"),
        }

    def loss(self, params: Mapping[str, Tensor], batch: Mapping[str, Tensor], step: int) -> Tensor:
        """Evaluate the quadratics.

        Args:
            params: ``theta`` ``[num_tasks, dim]``.
            batch: ``W`` ``[num_tasks, dim, dim]`` and ``y`` ``[num_tasks, dim]``.
            step: Of the noise, where there is any; it takes ``seed`` ``[num_tasks]`` in the batch.

        Returns:
            The losses ``[num_tasks]``.

        Raises:
            ValueError: If a tensor is missing, or has another shape or dtype.
        """
        theta, (W, y) = params["theta"], get_entries(batch, "W", "y")
        num_tasks, dim = len(theta), self.dim
        if W.shape != (num_tasks, dim, dim) or y.shape != (num_tasks, dim) or theta.shape != (num_tasks, dim):
            raise ValueError(
                f"W {list(W.shape)}, y {list(y.shape)} and theta {list(theta.shape)} do not fit "
                f"Quadratic(dim={dim}), which takes [num_tasks, dim, dim], [num_tasks, dim] and "
                "[num_tasks, dim]; give the task and the data the same dim"
            )
        if not (W.dtype == y.dtype == theta.dtype and W.device == y.device == theta.device):
            raise ValueError(
                f"W is {form(W)} on {W.device}, y {form(y)} on {y.device} and theta {form(theta)} on {theta.device}; "
                "give the data the dtype and device of theta"
            )
        if self.noise:
            y = y + self.noise * self._drawn(batch, step).to(y)
        # Few operators: at this size each costs more than its arithmetic.
        residual = torch.baddbmm(y.unsqueeze(2), W, theta.unsqueeze(2), beta=-1)  # [num_tasks, dim, 1]
        return (residual * residual).sum((1, 2))

    def _drawn(self, batch: Mapping[str, Tensor], step: int) -> Tensor:
        (seeds,) = get_entries(batch, "seed")
        generator = torch.Generator()
        rows = []
        for seed in seeds.tolist():
            generator.manual_seed(mix_seed(seed, 1 + step))
            rows.append(torch.randn(self.dim, generator=generator, device="cpu"))
        return torch.stack(rows)
