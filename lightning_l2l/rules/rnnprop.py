"""RNNprop: an LSTM that sees what Adam sees, and whose update is bounded."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lightning_l2l.arguments import MOST, brief, check_at_least, check_flag, check_positive, is_number
from lightning_l2l.rules.base import Memory, RuleUnroll, UpdateRule
from lightning_l2l.rules.kernels.fused import MOST_MEANS, FusedLSTM, FusedRule, FusedUnroll, fused_for
from lightning_l2l.rules.lstm import (
    check_output_scale,
    check_sizes,
    draw_uniform,
    layers_of,
    register_layers,
    run_layers,
)

_LARGEST = 1e18  # of a gradient: its square has to be a float32
_SMALLEST = 1e-36  # of the running mean of squares, where a root of it is taken
_LEAST = 0.05  # of the bound, at the horizon


class RNNprop(UpdateRule):
    r"""An LSTM on gradients that are divided by their own size, with a bounded update.

    .. math::
        g_t = \alpha \tanh(w^\top h_t + b), \quad
        h_t = \mathrm{LSTM}(\mathrm{elu}(A\,(\tilde m_t, \tilde g_t) + a), h_{t-1}), \quad
        \tilde m_t = \hat m_t / (\sqrt{\hat v_t} + \epsilon), \quad
        \tilde g_t = \nabla f_t / (\sqrt{\hat v_t} + \epsilon)

    with Adam's bias-corrected running means :math:`\hat m` of the gradients and :math:`\hat v` of their squares. So
    the rule does not see how large gradients are, only how they change, and no update exceeds alpha: it is meant for
    horizons and activations other than those of meta-training.

    What goes beyond the paper, and is off by default: several means, fast and slow ones; the time as an input; and a
    bound that changes. It rises at first, alpha_t = alpha t / warmup: as with Adam, the first updates are as large as
    they can be, and leave some networks with units that never work again, of which no meta-gradient tells. And it
    falls, alpha_t = alpha / sqrt(1 + t / decay), or evenly to alpha / 20 at the horizon: without that a rule which
    never sees how large gradients are keeps on making steps as large as the noise lets it, and over thousands of steps
    comes no closer.

    A coordinate whose gradient has never been anything but zero is not moved, as under `CoordinatewiseLSTM`, and its
    running means begin with its first other gradient. The number of steps is that of the optimizee: it goes on.

    State: `[state_size, num_coordinates]`, rows (h, c) of the lowest layer first, then the running means of the
    gradient and that of its square, what the weights in each of them add up to, and the number of steps.

    Args:
        hidden_size: Hidden units a layer, and units of the input layer; at least 1.
        num_layers: LSTM layers, at least 1.
        beta1: Decay of the running mean of gradients an *inner step*, in [0, 1); a list of up to 8 has a mean for each.
        beta2: Decay of that of their squares, in [0, 1).
        eps: Epsilon, above 0: gradients far below it count as none.
        output_scale: Alpha, the bound on the absolute update; not zero.
        time: Whether the number t of *inner steps*, 1 at the first, is an input as well, as log(1 + t) / 4 - 1.
        decay: *Inner steps* after which the bound has fallen by sqrt(2), at least 1; None: it does not fall so.
        horizon: *Inner steps* that an optimizee is trained for, at least 1: from alpha at the first step the bound
            falls evenly to alpha / 20 after so many, and stays there; None: it does not fall so.
        warmup: *Inner steps* over which the bound rises to alpha, at least 1; None: it starts with that.
        wait_for_gradient: Whether a coordinate stays where it is until its first gradient other than 0. If not, it goes
            where the biases take it, as in the paper.

    Raises:
        ValueError: A size below 1 or one that needs more memory than there is, or another argument out of range.

    Example:
        >>> rule = RNNprop(hidden_size=4)
        >>> update, state = rule(torch.randn(7), rule.init_state(7))
        >>> update.shape, state.shape, bool(update.abs().max() < 0.1)
        (torch.Size([7]), torch.Size([20, 7]), True)

    References:
        Lv, Jiang, Li, Learning gradient descent: better generalization and longer horizons,
        https://arxiv.org/abs/1703.03633, 2017.
    """

    def __init__(
        self,
        hidden_size: int = 20,
        num_layers: int = 2,
        beta1: float | list[float] = 0.95,
        beta2: float = 0.95,
        eps: float = 1e-8,
        output_scale: float = 0.1,
        time: bool = False,
        decay: int | None = None,
        horizon: int | None = None,
        warmup: int | None = None,
        wait_for_gradient: bool = True,
    ) -> None:
        super().__init__()
        check_sizes(hidden_size, num_layers)
        means = list(beta1) if isinstance(beta1, list | tuple) else [beta1]
        if not 1 <= len(means) <= MOST_MEANS:
            raise ValueError(f"beta1={brief(beta1)} are {len(means)} numbers; give 1 to {MOST_MEANS}")
        for name, beta in (*(("beta1", one) for one in means), ("beta2", beta2)):
            if not is_number(beta) or not 0 <= beta < 1:
                raise ValueError(f"{name}={brief(beta)} is out of range; use a number from 0 to below 1, such as 0.95")
        check_flag(time=time, wait_for_gradient=wait_for_gradient)
        check_at_least(1, MOST, optional=True, decay=decay, horizon=horizon, warmup=warmup)
        check_positive(eps=eps)
        check_output_scale(output_scale)
        self.hidden_size, self.num_layers = hidden_size, num_layers
        self.beta1, self.beta2, self.eps, self.output_scale = beta1, beta2, eps, output_scale
        self.time, self.decay, self.horizon, self.warmup = time, decay, horizon, warmup
        self.wait_for_gradient = wait_for_gradient
        self._gains = [1 - beta for beta in means]  # of beta itself, float32 would lose digits
        register_layers(self, hidden_size, hidden_size, num_layers)
        self.readout = nn.Linear(hidden_size, 1)
        self.input = nn.Linear(len(means) + 1 + time, hidden_size)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the meta-parameters anew: uniform within 1 / sqrt(hidden_size), as `torch.nn.LSTM` does."""
        draw_uniform(self, self.hidden_size)

    @property
    def _has_clock(self) -> int:
        """Rows of state with the number of steps: 1 or 0."""
        return int(self.time or any(given is not None for given in (self.warmup, self.decay, self.horizon)))

    @property
    def state_size(self) -> int:
        """Numbers of state a coordinate: h and c of every layer, and the moments."""
        return 2 * self.hidden_size * self.num_layers + 2 * len(self._gains) + 2 + self._has_clock

    def forward(self, gradient: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """See `UpdateRule.forward`."""
        num = len(self._gains)
        sizes = [2 * self.hidden_size * self.num_layers, num, 1, num, 1, self._has_clock]
        of_layers, means, square, of_means, of_square, steps = torch.split(state, sizes)
        moving = (gradient != 0) | (of_square[0] != 0) | (not self.wait_for_gradient)
        gradient = gradient.clamp(-_LARGEST, _LARGEST)
        gains = gradient.new_tensor(self._gains)[:, None]
        means = torch.lerp(means, gradient.expand(num, -1), gains)  # [num, num_coordinates]
        square = torch.lerp(square, gradient.square(), 1 - self.beta2)
        of_means = of_means + gains * (1 - of_means)
        of_square = of_square + (1 - self.beta2) * (1 - of_square)
        steps = steps + 1
        # The bound, far below eps squared, is for derivatives of the gradient: that of a root is infinite at 0.
        size = (square / of_square).clamp(min=_SMALLEST).sqrt() + self.eps
        x = torch.cat([means / (of_means * size), gradient / size])
        if self.time:
            x = torch.cat([x, torch.log1p(steps) / 4 - 1])
        x = nn.functional.elu(self.input(x.t())).t()
        h, after = run_layers(layers_of(self, self.num_layers), x, of_layers, moving)
        update = torch.where(moving, self.output_scale * torch.tanh(self.readout(h.t())[:, 0]), 0.0)
        if self.warmup is not None:
            update = update * (steps[0] / self.warmup).clamp(max=1)
        if self.decay is not None:
            update = update / (1 + steps[0] / self.decay).sqrt()
        if self.horizon is not None:
            update = update * (1 - (1 - _LEAST) * ((steps[0] - 1) / self.horizon).clamp(max=1))
        return update, torch.cat([after, means, square, of_means * moving, of_square * moving, steps])

    @torch.no_grad()
    def step_(self, gradient: Tensor, state: Tensor) -> Tensor:
        """See `UpdateRule.step_`; compiled where it can be."""
        library = fused_for(self.readout.weight, gradient, state)
        if library and state.stride(1) == 1:
            return self._fused(library).step_(gradient.contiguous(), state)
        return super().step_(gradient, state)

    def unroller(
        self,
        num_coordinates: int,
        num_steps: int,
        *,
        memory: Memory = "auto",
        budget: int = 2**30,
        block: int | None = None,
    ) -> RuleUnroll:
        """See `UpdateRule.unroller`; compiled where it can be, else by autograd."""
        library = fused_for(self.readout.weight)
        if library:
            return FusedUnroll(lambda: self._fused(library, back=True), self.init_state(num_coordinates), num_steps)
        return super().unroller(num_coordinates, num_steps, memory=memory, budget=budget, block=block)

    def _fused(self, library: Any, *, back: bool = False) -> FusedLSTM:
        """The compiled kernel with this rule's weights as they are now; `back` for the backward pass too."""
        numbers = {"gain2": 1 - self.beta2, "eps": self.eps, "time": self.time, "waits": self.wait_for_gradient}
        numbers |= {"warmup": self.warmup or 0, "decay": self.decay or 0, "horizon": self.horizon or 0}
        rule = FusedRule.of("moments", self.hidden_size, self.num_layers, self.output_scale, self._gains, **numbers)
        return FusedLSTM(library, rule, list(self.parameters()), back=back)
