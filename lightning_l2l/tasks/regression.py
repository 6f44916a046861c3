"""Regression on generated data, all examples at every step: convex functions with a structure."""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.functional import softplus

from lightning_l2l.arguments import MOST, brief, check_at_least, check_fits_memory, check_positive, is_number
from lightning_l2l.tasks.base import GeneratedTask
from lightning_l2l.tasks.batches import get_fitting


class LogisticRegression(GeneratedTask):
    """Tell two clouds of points apart by a plane: mean_j log(1 + exp(-s_j (w . x_j + b))) + l2 / 2 ||w||^2.

    Each function has examples of its own, half of them of either class, s_j = 1 or -1. Those of a class are drawn from
    a Gaussian whose mean is standard Gaussian itself, and whose covariance is M M^T with the entries of M Gaussian of
    variance 1 / num_features. The start is w, b ~ N(0, I).

    Args:
        num_features: Number of coordinates of an example x_j, at least 1.
        num_examples: Of both classes together, at least 2.
        l2: Weight of the regularisation, above 0; the bias b has none.

    Raises:
        ValueError: If an argument is out of range, or the examples need more memory than there is.

    Example:
        >>> task = LogisticRegression(num_features=2, num_examples=4)
        >>> batch = {"features": torch.randn(1, 4, 2), "signs": torch.tensor([[1.0, 1.0, -1.0, -1.0]])}
        >>> task.loss({"weight": torch.zeros(1, 2), "bias": torch.zeros(1, 1)}, batch, step=0)  # log 2
        tensor([0.6931])

    References:
        Li, Malik, *Learning to optimize*, section 4.1, 2016, https://arxiv.org/abs/1606.01885
    """

    def __init__(self, num_features: int = 10, num_examples: int = 100, l2: float = 0.0005) -> None:
        check_at_least(1, num_features=num_features)
        check_at_least(2, num_examples=num_examples)
        check_positive(l2=l2)
        num_bytes = 4 * num_features * (num_examples + 2 * num_features)
        check_fits_memory(num_bytes, num_features=num_features, num_examples=num_examples)
        self.num_features, self.num_examples, self.l2 = num_features, num_examples, l2

    def init_params(self, num_tasks: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Draw ``weight`` ``[num_tasks, num_features]`` and ``bias`` ``[num_tasks, 1]``, i.i.d. standard Gaussian."""
        return {
            "weight": torch.randn(num_tasks, self.num_features, generator=generator, device="cpu"),
            "bias": torch.randn(num_tasks, 1, generator=generator, device="cpu"),
        }

    def sample(self, generator: torch.Generator) -> dict[str, Tensor]:
        """Draw ``features`` ``[num_examples, num_features]``; ``signs`` ``[num_examples]`` are the classes, 1 or -1."""
        n, d = self.num_examples, self.num_features
        signs = torch.ones(n, device="cpu")
        signs[n - n // 2 :] = -1
        clouds = []
        for count in (n - n // 2, n // 2):
            mean = torch.randn(d, generator=generator, device="cpu")
            spread = torch.randn(d, d, generator=generator, device="cpu") / d**0.5
            clouds.append(torch.randn(count, d, generator=generator, device="cpu") @ spread.T + mean)
        return {"features": torch.cat(clouds), "signs": signs}

    def loss(self, params: Mapping[str, Tensor], batch: Mapping[str, Tensor], step: int) -> Tensor:
        """The losses ``[num_tasks]``.

        Args:
            params: ``weight`` ``[num_tasks, num_features]`` and ``bias`` ``[num_tasks, 1]``.
            batch: ``features`` ``[num_tasks, num_examples, num_features]`` and ``signs`` ``[num_tasks, num_examples]``.
            step: Not used: all examples count at every step.

        Raises:
            ValueError: If a tensor is missing, or has another shape or dtype.
        """
        weight, n, d = params["weight"], self.num_examples, self.num_features
        features, signs = get_fitting(batch, self, weight, features=(n, d), signs=(n,))
        margins = signs * torch.baddbmm(params["bias"].unsqueeze(2), features, weight.unsqueeze(2)).squeeze(2)
        return softplus(-margins).mean(1) + self.l2 / 2 * weight.square().sum(1)


class Lasso(GeneratedTask):
    """Find a sparse vector from few measurements of it: f_k(x) = ||A_k x - b_k||^2 / 2 + l1 ||x||_1.

    As in sparse coding: A_k is Gaussian and its columns are scaled to norm 1, and b_k = A_k x_k, where every
    coordinate of x_k is 0 but for a share ``density`` of them, which are standard Gaussian. The start is x ~ N(0, I).
    Where a coordinate is 0 its gradient is that of the square alone (the subgradient 0 of the norm).

    Args:
        num_features: Number of coordinates of x, at least 1.
        num_measurements: Number of coordinates of b_k, at least 1; None: half as many as x has, rounded up.
        l1: Weight of the norm, above 0.
        density: Probability with which a coordinate of x_k is not 0, above 0 and up to 1.

    Raises:
        ValueError: If an argument is out of range, or the matrix needs more memory than there is.

    Example:
        >>> task = Lasso(num_features=2, num_measurements=1, l1=0.5)
        >>> batch = {"A": torch.tensor([[[1.0, -1.0]]]), "b": torch.tensor([[2.0]])}
        >>> task.loss({"x": torch.tensor([[1.0, 1.0]])}, batch, step=0)  # 2^2 / 2 + 0.5 * 2
        tensor([3.])

    References:
        Gregor, LeCun, *Learning fast approximations of sparse coding*, ICML 2010; Chen et al., *Learning to optimize: a
        primer and a benchmark*, 2021, https://arxiv.org/abs/2103.12828
    """

    def __init__(
        self,
        num_features: int = 20,
        num_measurements: int | None = None,
        l1: float = 0.1,
        density: float = 0.1,
    ) -> None:
        check_at_least(1, MOST, num_features=num_features)
        check_at_least(1, MOST, optional=True, num_measurements=num_measurements)
        check_positive(l1=l1)
        if not is_number(density) or not 0 < density <= 1:
            raise ValueError(f"density={brief(density)} is no probability above 0; use 0.1")
        self.num_features, self.l1, self.density = num_features, l1, density
        self.num_measurements = num_measurements
        self._rows = (num_features + 1) // 2 if num_measurements is None else num_measurements
        check_fits_memory(4 * num_features * self._rows, num_features=num_features, num_measurements=self._rows)

    def init_params(self, num_tasks: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Draw ``x`` ``[num_tasks, num_features]``, i.i.d. standard Gaussian."""
        return {"x": torch.randn(num_tasks, self.num_features, generator=generator, device="cpu")}

    def sample(self, generator: torch.Generator) -> dict[str, Tensor]:
        """Draw ``A`` ``[num_measurements, num_features]``, and ``b`` ``[num_measurements]`` from a sparse vector."""
        A = torch.randn(self._rows, self.num_features, generator=generator, device="cpu")
        A /= A.norm(dim=0)
        kept = torch.rand(self.num_features, generator=generator, device="cpu") < self.density
        return {"A": A, "b": A @ (kept * torch.randn(self.num_features, generator=generator, device="cpu"))}

    def loss(self, params: Mapping[str, Tensor], batch: Mapping[str, Tensor], step: int) -> Tensor:
        """The losses ``[num_tasks]``.

        Args:
            params: ``x`` ``[num_tasks, num_features]``.
            batch: ``A`` ``[num_tasks, num_measurements, num_features]`` and ``b`` ``[num_tasks, num_measurements]``.
            step: Not used: the function is the same at every step.

        Raises:
            ValueError: If a tensor is missing, or has another shape or dtype.
        """
        x = params["x"]
        A, b = get_fitting(batch, self, x, A=(self._rows, self.num_features), b=(self._rows,))
        residual = torch.baddbmm(b.unsqueeze(2), A, x.unsqueeze(2), beta=-1)  # [num_tasks, num_measurements, 1]
        return residual.square().sum((1, 2)) / 2 + self.l1 * x.abs().sum(1)
