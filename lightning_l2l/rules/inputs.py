"""What an MLP may see of a coordinate: numbers that do not depend on the units of anything."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from lightning_l2l.rules.tensors import Moment, each_task, over_tensor

#: The input that is the moment, and how many numbers it has: `times`.
TIME = "time"
NUM_TIMES = 2
#: Largest absolute gradient that the input "clipped" shows.
CLIP = 0.1


@dataclass
class Inputs:
    """What there is to make inputs of, for one tensor of each task.

    Attributes:
        gradient: `[num_tasks, *shape]`.
        theta: `[num_tasks, *shape]`.
        means: Running means of the gradient, unbiased, `[betas, num_tasks, *shape]`.
        square: That of its square, unbiased, `[num_tasks, *shape]`.
        eps: What is added to its root.
        rows: Running means of the squares of a row, unbiased, `[betas, num_tasks, rows, 1]`; None: it is no matrix.
        columns: Those of a column, `[betas, num_tasks, 1, columns]`.
        moment: When.
    """

    gradient: Tensor
    theta: Tensor
    means: Tensor
    square: Tensor
    eps: float
    rows: Tensor | None
    columns: Tensor | None
    moment: Moment

    @cached_property
    def moved(self) -> Tensor:
        """Where a gradient has been other than zero, `[num_tasks, *shape]`; nan is other than zero."""
        return self.square != 0

    @cached_property
    def root(self) -> Tensor:
        """Root of the running mean of squares, plus epsilon."""
        return self.square.sqrt() + self.eps

    def of_matrix(self, of: Callable[[Tensor, Tensor], Tensor]) -> list[Tensor]:
        """Numbers made of rows and columns, in the shape of the tensor; zeros where it is no matrix."""
        if self.rows is None or self.columns is None:
            return [torch.zeros_like(self.gradient)] * len(self.means)
        found = of(self.rows, self.columns).expand(-1, -1, self.rows.shape[2], self.columns.shape[3])
        return list(found.reshape(-1, *self.gradient.shape))

    def factored(self, values: Tensor) -> list[Tensor]:
        """Values `[betas or 1, num_tasks, *shape]` divided by the root of what rows and columns give for the square."""
        if self.rows is None:
            return [torch.zeros_like(self.gradient)] * len(self.means)
        whole = (-1, len(self.gradient), self.rows.shape[2], self.columns.shape[3])  # type: ignore[union-attr]

        def divided(rows: Tensor, columns: Tensor) -> Tensor:
            expected = rows * columns / rows.mean(2, keepdim=True).clamp(min=torch.finfo(rows.dtype).tiny)
            return values.reshape(whole) / (expected.sqrt() + self.eps)

        return self.of_matrix(divided)


@dataclass(frozen=True)
class Input:
    """One of `INPUTS`.

    Attributes:
        of: Makes its numbers, each `[num_tasks, *shape]`.
        of_means: Whether it takes the running means of the gradient.
        of_factors: Whether it takes those of rows and columns.
    """

    of: Callable[[Inputs], list[Tensor]]
    of_means: bool = False
    of_factors: bool = False

    def count(self, num_betas: int) -> int:
        """How many numbers it has."""
        return num_betas if self.of_means or self.of_factors else 1


INPUTS = {
    "gradient": Input(lambda i: [i.gradient]),
    "clipped": Input(lambda i: [i.gradient.clamp(-CLIP, CLIP)]),
    "theta": Input(lambda i: [i.theta]),
    "square": Input(lambda i: [i.square]),
    "inverse": Input(lambda i: [1 / i.root]),
    "ratio": Input(lambda i: [i.gradient / i.root]),
    "means": Input(lambda i: list(i.means), of_means=True),
    "mean_ratios": Input(lambda i: list(i.means / i.root), of_means=True),
    "rows": Input(lambda i: i.of_matrix(lambda rows, _: rows), of_factors=True),
    "columns": Input(lambda i: i.of_matrix(lambda _, columns: columns), of_factors=True),
    "inverse_rows": Input(lambda i: i.of_matrix(lambda rows, _: 1 / (rows.sqrt() + i.eps)), of_factors=True),
    "inverse_columns": Input(lambda i: i.of_matrix(lambda _, columns: 1 / (columns.sqrt() + i.eps)), of_factors=True),
    "factored": Input(lambda i: i.factored(i.gradient), of_factors=True),
    "factored_means": Input(lambda i: i.factored(i.means), of_means=True, of_factors=True),
}


def numbers(names: Sequence[str], given: Inputs) -> list[Tensor]:
    """The inputs of these names, each number divided by its root mean square over the tensor; 0 where nothing moved."""
    found = [one for name in names for one in INPUTS[name].of(given)]
    return [normalized(torch.where(given.moved, one, 0.0)) for one in found]


def times(moment: Moment) -> list[Tensor]:
    """The moment as two numbers, each `[num_tasks]`: the logarithm of the step, and the share of all that is gone."""
    gone = torch.zeros_like(moment.step) if moment.num_steps is None else moment.step / moment.num_steps
    return [torch.log1p(moment.step) / 10, gone.clamp(max=1)]


def normalized(values: Tensor, moved: Tensor | None = None) -> Tensor:
    """Values `[num_tasks, *shape]` divided by their root mean square, of each task by itself.

    Args:
        values: Finite ones.
        moved: Which of them count; the others should be zero. None: all.
    """
    squares = each_task(values).square().sum(1)
    count = values[0].numel() if moved is None else each_task(moved).sum(1).clamp(min=1)
    size = (squares / count).clamp(min=torch.finfo(values.dtype).tiny).sqrt()
    return values / over_tensor(size, values)


def matrix_of(shape: Sequence[int]) -> tuple[int, int] | None:
    """Rows and columns of a tensor that counts as a matrix `[out, in * kh * kw]`, with more than one of both."""
    columns = 1
    for size in shape[1:]:
        columns *= size
    return (shape[0], columns) if len(shape) > 1 and shape[0] > 1 and columns > 1 else None
