"""How large a whole tensor's update is, and how much it is of the past: learned, from the tensor and the time."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lightning_l2l.rules.inputs import matrix_of
from lightning_l2l.rules.schedule import ANYTIME
from lightning_l2l.rules.tensors import Moment

#: The most by which the logarithm that is remembered changes over all *inner steps*, and where nobody knows how many
#: there will be over as many as were made.
_MOST_CHANGE, _OF_UNKNOWN = 10.0, 5.0
#: Largest number of rows or columns, and of *inner steps*, that is told from larger ones: beyond what is seen in
#: meta-training the factor is to stay as it is.
_LARGEST_SIDE, _MOST_STEPS = 1024, 3000
#: Most that a running mean counts in a mixture, beside the first, which counts 1.
_MOST_MIXED = 2.0


class TensorSize(nn.Module):
    r"""Sees a tensor as a whole and gives the factor s on the size of its update, and with `mixing` its direction.

    .. math::
        \log s_t = a_t + \tfrac{\log m}{2} \tanh o_2, \quad a_t = a_{t-1} + \tfrac{10}{T} \tanh o_1, \quad a_0 = 0,

    both between :math:`-\log m` and :math:`\log m`, with T inner steps and two numbers o that are linear, or those of
    an MLP, in what it sees. So s may be of the right order at once, and may grow or fall by much over time, however
    long that is. Of the tensor it sees the logarithms of the root mean squares of theta, and, divided by the root of
    the running mean of squares, as in Adam, of the gradient and of its running means, which tell how consistent
    gradients are; :math:`a_{t-1}`; rows and columns. Of the time it sees the step, the number of steps, and the share
    that is gone. The mixture is the first running mean, plus :math:`2 \tanh o_3` of the gradient and, in the same way,
    of each other running mean.

    Args:
        num_means: Running means of the gradient.
        units: Hidden ones; 0: it is linear.
        most: The bound m on s, and on 1 / s, above 1.
        mixing: Whether it gives the mixture, too.
    """

    def __init__(self, num_means: int, units: int, most: float, mixing: bool = False) -> None:
        super().__init__()
        self.most = most
        inputs = num_means + 9
        self.hidden = nn.Linear(inputs, units) if units else None
        self.readout = nn.Linear(units or inputs, 2 + num_means * mixing)

    def reset_parameters(self) -> None:
        """Draw the meta-parameters anew, those of the last layer as zeros: s is 1, and nothing is mixed."""
        if self.hidden is not None:
            self.hidden.reset_parameters()
        nn.init.zeros_(self.readout.weight)
        nn.init.zeros_(self.readout.bias)

    def forward(
        self, squares: Tensor, kept: Tensor, shape: Sequence[int], moment: Moment
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The factor on the rate, and the mixture.

        Args:
            squares: Means over the tensor of the squares of theta, of the gradient and of its running means, the latter
                divided as said above, `[num_tasks, 2 + num_means]`.
            kept: The logarithm that is remembered, `[num_tasks, 1]`.
            shape: Of the tensor.
            moment: When.

        Returns:
            s, `[num_tasks]`, the logarithm after this step, and how much the gradient and each running mean after the
            first count in the direction, `[num_tasks, num_means]` (with no `mixing` `[num_tasks, 0]`).
        """
        logs, bound = squares.clamp(min=1e-12).log() / 2, math.log(self.most)
        of_theta, of_gradient, of_means = logs[:, :1].clamp(-7, 2) / 3 + 1, logs[:, 1:2].clamp(-2, 2), logs[:, 2:] / 2
        of_shape, of_moment = logs.new_tensor(self.of_shape(shape)).expand(len(logs), -1), self.of_moment(moment)
        x = torch.cat([of_theta, of_gradient, of_means, kept / 3, of_shape, of_moment[:, :3]], 1)
        out = torch.tanh(self.readout(x if self.hidden is None else torch.relu(self.hidden(x))))
        kept = (kept + of_moment[:, 3:] * out[:, :1]).clamp(-bound, bound)
        factor = (kept[:, 0] + bound / 2 * out[:, 1]).clamp(-bound, bound).exp()
        return factor, kept, _MOST_MIXED * out[:, 2:]

    @staticmethod
    def of_shape(shape: Sequence[int]) -> list[float]:
        """What is seen of a shape: whether it counts as a matrix, its rows and its columns."""
        rows, columns = matrix_of(shape) or (1, math.prod(shape))
        return [float(rows > 1), *(math.log(min(side, _LARGEST_SIDE)) / 5 for side in (rows, columns))]

    @staticmethod
    def of_moment(moment: Moment) -> Tensor:
        """What is seen of the time, and the most that the remembered logarithm may change by: `[num_tasks, 4]`."""
        step, known = moment.step, moment.num_steps
        total = step + ANYTIME if known is None else known
        gone = torch.zeros_like(step) if known is None else (step / total).clamp(max=1)
        most = _OF_UNKNOWN if known is None else _MOST_CHANGE
        logs = torch.stack([step + 1, total], 1).clamp(max=_MOST_STEPS).log() / 5 - 1
        return torch.cat([logs, torch.stack([gone, most / total], 1)], 1)
