"""Classical test functions, each a family by where its minimum lies."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_l2l.arguments import MOST, check_at_least, check_flag, check_positive
from lightning_l2l.tasks.base import GeneratedTask
from lightning_l2l.tasks.batches import get_fitting


class Rosenbrock(GeneratedTask):
    """A curved valley: f_k(theta) = sum_i 100 (z_{i+1} - z_i^2)^2 + (1 - z_i)^2, z = theta - shift_k.

    The sum is over i = 1 .. dim - 1. The minimum, 0, is at shift_k + (1, ..., 1); from dim = 4 on there is a second,
    local one. The shift, in which one function differs from another, and the start are i.i.d. standard Gaussian. So
    the start lies about as far from the minimum as the usual one, z = (-1.2, 1), and gradients are in the thousands:
    a rule needs its inputs brought to scale, as by ``preprocessing="log_and_sign"`` or `RNNprop`.

    Args:
        dim: Number of coordinates of theta, at least 2.

    Raises:
        ValueError: If ``dim`` is no integer of 2 or more.

    Example:
        >>> task, batch = Rosenbrock(dim=2), {"shift": torch.zeros(1, 2)}
        >>> task.loss({"theta": torch.ones(1, 2)}, batch, step=0)
        tensor([0.])
        >>> task.loss({"theta": torch.tensor([[-1.2, 1.0]])}, batch, step=0)
        tensor([24.2000])

    References:
        Rosenbrock, *An automatic method for finding the greatest or least value of a function*, 1960,
        https://doi.org/10.1093/comjnl/3.3.175; as a task of learned optimizers: Wichrowska et al., *Learned optimizers
        that scale and generalize*, 2017, https://arxiv.org/abs/1703.04813
    """

    def __init__(self, dim: int = 2) -> None:
        check_at_least(2, MOST, dim=dim)
        self.dim = dim

    def init_params(self, num_tasks: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Draw ``theta`` ``[num_tasks, dim]``, i.i.d. standard Gaussian."""
        return {"theta": torch.randn(num_tasks, self.dim, generator=generator, device="cpu")}

    def sample(self, generator: torch.Generator) -> dict[str, Tensor]:
        """Draw ``shift`` ``[dim]``, i.i.d. standard Gaussian."""
        return {"shift": torch.randn(self.dim, generator=generator, device="cpu")}

    def loss(self, params: Mapping[str, Tensor], batch: Mapping[str, Tensor], step: int) -> Tensor:
        """The losses ``[num_tasks]``.

        Args:
            params: ``theta`` ``[num_tasks, dim]``.
            batch: ``shift`` ``[num_tasks, dim]``.
            step: Not used: the function is the same at every step.

        Raises:
            ValueError: If the shift is missing, or has another shape or dtype.
        """
        theta = params["theta"]
        (shift,) = get_fitting(batch, self, theta, shift=(self.dim,))
        z = theta - shift
        here, following = z[:, :-1], z[:, 1:]
        return (100 * (following - here.square()).square() + (1 - here).square()).sum(1)


class Rastrigin(GeneratedTask):
    """A bowl with a local minimum in every unit cell: f_k(theta) = sum_i z_i^2 + a_k (1 - cos(2 pi z_i)).

    Here z = theta - shift_k; the minimum, 0, is at shift_k. The shift, in which one function differs from another, and
    the start are i.i.d. standard Gaussian. The amplitude a_k is 10, as usual, or another one for every function.

    The work named below has a family with more in it, ||A x - b||^2 / 2 + 10 sum_i (1 - c_i cos(2 pi x_i)) with
    Gaussian A, b and c. It is not this one: its minima are not known, and may be negative, which no logarithmic axis
    shows.

    Args:
        dim: Number of coordinates of theta, at least 1.
        amplitude: Of the cosines, above 0.
        random_amplitude: Whether a_k is uniform in [0, ``amplitude``], drawn for every task, rather than the same for
            all: from a convex function to one full of local minima.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> batch = {"shift": torch.zeros(1, 3), "amplitude": torch.tensor([[10.0]])}
        >>> Rastrigin(dim=3).loss({"theta": torch.full((1, 3), 0.5)}, batch, step=0)
        tensor([60.7500])

    References:
        Cao, Chen, Wang, Shen, *Learning to optimize in swarms*, 2019, https://arxiv.org/abs/1911.03787; Chen et al.,
        *Learning to optimize: a primer and a benchmark*, 2021, https://arxiv.org/abs/2103.12828
    """

    def __init__(self, dim: int = 10, amplitude: float = 10.0, random_amplitude: bool = False) -> None:
        check_at_least(1, MOST, dim=dim)
        check_positive(amplitude=amplitude)
        check_flag(random_amplitude=random_amplitude)
        self.dim, self.amplitude, self.random_amplitude = dim, amplitude, random_amplitude

    def init_params(self, num_tasks: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Draw ``theta`` ``[num_tasks, dim]``, i.i.d. standard Gaussian."""
        return {"theta": torch.randn(num_tasks, self.dim, generator=generator, device="cpu")}

    def sample(self, generator: torch.Generator) -> dict[str, Tensor]:
        """Draw ``shift`` ``[dim]``, i.i.d. standard Gaussian, and ``amplitude`` ``[1]``."""
        shift = torch.randn(self.dim, generator=generator, device="cpu")
        amplitude = torch.full((1,), float(self.amplitude), device="cpu")
        if self.random_amplitude:
            amplitude *= torch.rand(1, generator=generator, device="cpu")
        return {"shift": shift, "amplitude": amplitude}

    def loss(self, params: Mapping[str, Tensor], batch: Mapping[str, Tensor], step: int) -> Tensor:
        """The losses ``[num_tasks]``.

        Args:
            params: ``theta`` ``[num_tasks, dim]``.
            batch: ``shift`` ``[num_tasks, dim]`` and ``amplitude`` ``[num_tasks, 1]``.
            step: Not used: the function is the same at every step.

        Raises:
            ValueError: If a tensor is missing, or has another shape or dtype.
        """
        theta = params["theta"]
        shift, amplitude = get_fitting(batch, self, theta, shift=(self.dim,), amplitude=(1,))
        z = theta - shift
        return (z.square() + amplitude * (1 - torch.cos(2 * math.pi * z))).sum(1)
