"""A rule whose update has a size of its own for each tensor: a good direction, and what is learned beside it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import get_args

import torch
from torch import Tensor, nn

from lightning_l2l.arguments import MOST, brief, check_at_least, check_choice, check_flag, check_positive, is_number
from lightning_l2l.rules.inputs import CLIP, INPUTS, NUM_TIMES, TIME, Inputs, matrix_of, normalized, numbers, times
from lightning_l2l.rules.kernels.fused import MOST_MEANS, fused_for
from lightning_l2l.rules.kernels.normalized_kernel import NormalizedNumbers, NormalizedStep, places_of
from lightning_l2l.rules.schedule import Schedule, rate_at
from lightning_l2l.rules.sizes import TensorSize
from lightning_l2l.rules.tensors import Moment, TensorRule, TensorState, each_task, over_tensor

#: The step size at the end of warm-up, times the root of the number of inner steps.
SIZE = 0.13
_LARGEST = 1e15  # of a gradient: sums of squares over a tensor have to be a float32
#: Of the quintic x -> a x + b x^3 + c x^5, five of which bring singular values close to 1.
_QUINTIC = (3.4445, -4.7750, 2.0315)


class NormalizedMLP(TensorRule):
    r"""A direction that is good by itself, and learned: a correction of it, and the size that the tensor's update has.

    .. math::
        u_t = -\eta_t \, s \, \frac{d_t}{\mathrm{rms}(d_t)}, \quad
        d_t = \mathrm{NS}\Big(\frac{a_t}{\mathrm{rms}(a_t)} + \mathrm{MLP}(x_t)\Big), \quad
        a_t = \hat m_t / (\sqrt{\hat v_t} + \epsilon)

    with Adam's bias-corrected running means of the gradient and of its square, root mean squares over each tensor, and
    Newton-Schulz steps NS, which orthogonalise a matrix (convolutions count as matrices `[out, in * kh * kw]`). The
    last layer of the MLP starts at zero, so that the rule begins as the one without it. What the MLP sees of a
    coordinate are `inputs`, each divided by its root mean square over the tensor. The size s is 1, or with `sizing`
    what `TensorSize` gives for the tensor and the moment, which starts at 1. With `mixing` :math:`\hat m_t` has shares
    of the gradient and of the other running means, which start at 0.

    The rate :math:`\eta_t` rises over `warmup` steps and then falls, by default to 0 at the last of `num_steps`. After
    that it stays where it is. Where nobody knows the number of steps it falls as 1 / t, for as long as it takes.

    A coordinate whose gradient has never been anything but zero is not moved.

    State, beside the running means of a coordinate: for a tensor the number of its *inner steps*, where the MLP sees
    them the running means of the squares of its rows and columns, and what `TensorSize` remembers.

    Args:
        hidden_size: Units in each of the MLP's two hidden layers; 0: there is none, the direction is not corrected.
        inputs: What the MLP sees, by name: "time", and those in `inputs.INPUTS`; None: all of them.
        betas: Decays of the running means of the gradient an *inner step*, each in [0, 1). The first is that of the
            direction.
        beta2: Decay of the running mean of the squares, in [0, 1).
        eps: Epsilon, above 0: gradients far below it count as none.
        orthogonalize: Whether matrices are orthogonalised.
        normalize: Whether the direction is divided by its root mean square over the tensor; if not, it keeps what it
            has.
        step_size: Root mean square of the update of a tensor at the end of warm-up, above 0; None: 0.13 divided by the
            root of the number of inner steps.
        schedule: How the rate falls where the number of steps is known: "cosine", "linear", or "constant".
        warmup: *Inner steps* over which the rate rises; 0: none.
        floor: Share of the rate that is left at the end, from 0 to 1.
        sizing: Hidden units of what gives the size of a tensor's update; 0: it is linear. None: that is not learned.
        max_scale: Bound on that factor s, and on 1 / s; above 1. None: 100.
        mixing: With `sizing`: whether the direction is a mixture, and a learned one, of the gradient and of all its
            running means, each divided by :math:`\sqrt{\hat v_t} + \epsilon`; else it is the first running mean.

    Raises:
        ValueError: An argument is out of range.

    Example:
        >>> rule = NormalizedMLP(hidden_size=0, warmup=0)
        >>> state = rule.init_tensor((3, 2))
        >>> moment = Moment(torch.zeros(1), num_steps=torch.full((1,), 1e4))
        >>> update, state = rule(torch.randn(1, 3, 2), state, torch.zeros(1, 3, 2), moment)
        >>> round(float(update.square().mean().sqrt()), 6)
        0.0013

    References:
        Moudgil et al., Celo2: towards learned optimization free lunch, https://arxiv.org/abs/2602.19142, 2026.
        Jordan et al., Muon: an optimizer for hidden layers in neural networks, 2024.
    """

    def __init__(
        self,
        hidden_size: int = 8,
        inputs: list[str] | None = None,
        betas: tuple[float, ...] = (0.9, 0.99, 0.999),
        beta2: float = 0.99,
        eps: float = 1e-8,
        orthogonalize: bool = True,
        normalize: bool = True,
        step_size: float | None = None,
        schedule: Schedule = "cosine",
        warmup: int = 20,
        floor: float = 0.0,
        sizing: int | None = None,
        max_scale: float | None = None,
        mixing: bool = False,
    ) -> None:
        super().__init__()
        check_at_least(0, 1024, hidden_size=hidden_size)
        check_at_least(0, MOST, warmup=warmup)
        check_flag(orthogonalize=orthogonalize, normalize=normalize, mixing=mixing)
        check_choice(get_args(Schedule), schedule=schedule)
        check_positive(eps=eps)
        check_positive(optional=True, step_size=step_size)
        for name, beta in (*(("betas", one) for one in betas), ("beta2", beta2)):
            if not is_number(beta) or not 0 <= beta < 1:
                raise ValueError(f"{name}={brief(beta)} is out of range; use a number from 0 to below 1, such as 0.99")
        if not betas:
            raise ValueError("betas are no numbers; give one, such as [0.9]")
        if not is_number(floor) or not 0 <= floor <= 1:
            raise ValueError(f"floor={brief(floor)} is not from 0 to 1; use 0.0 for a rate that falls to nothing")
        check_at_least(0, 1024, optional=True, sizing=sizing)
        if max_scale is not None and not (is_number(max_scale) and max_scale > 1):
            raise ValueError(f"max_scale={brief(max_scale)} is not above 1; use a number such as 100.0")
        if mixing and sizing is None:
            raise ValueError("mixing=True without sizing: what mixes is what gives the size; use sizing=0")
        for name in inputs or ():
            check_choice((*INPUTS, TIME), inputs=name)
        self.hidden_size, self.inputs, self.betas, self.beta2, self.eps = hidden_size, inputs, list(betas), beta2, eps
        self.orthogonalize, self.normalize, self.step_size = orthogonalize, normalize, step_size
        self.schedule, self.warmup, self.floor = schedule, warmup, floor
        self.sizing, self.max_scale, self.mixing = sizing, max_scale, mixing
        self.sees = [name for name in INPUTS if hidden_size and (inputs is None or name in inputs)]
        self.kept = list(betas) if self.sees or sizing is not None else list(betas[:1])
        self.factors = list(betas) if any(INPUTS[name].of_factors for name in self.sees) else []
        self.timed = bool(hidden_size) and (inputs is None or TIME in inputs)
        self.needs_num_steps = schedule == "constant" and step_size is None
        self.remembers = sizing is not None
        self.register_buffer("place", torch.empty(0), persistent=False)  # where a rule that learns nothing is
        if hidden_size:
            width = sum(INPUTS[name].count(len(betas)) for name in self.sees) + NUM_TIMES * self.timed
            self.hidden, self.second = nn.Linear(width, hidden_size), nn.Linear(hidden_size, hidden_size)
            self.readout = nn.Linear(hidden_size, 1)
        self.sizes = None if sizing is None else TensorSize(len(betas), sizing, max_scale or 100.0, mixing)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the meta-parameters anew, those of the last layers as zeros: the rule is the unlearned one."""
        if self.hidden_size:
            self.hidden.reset_parameters()
            self.second.reset_parameters()
            nn.init.zeros_(self.readout.weight)
            nn.init.zeros_(self.readout.bias)
        if self.sizes is not None:
            self.sizes.reset_parameters()

    @property
    def like(self) -> Tensor:
        """See `UpdateRule.like`."""
        return self.place  # type: ignore[return-value]

    @property
    def state_size(self) -> int:
        """Numbers of state a coordinate: the running means of the gradient, and that of its square."""
        return len(self.kept) + 1

    def vector_size(self, shape: Sequence[int]) -> int:
        """Number of steps made, the means of squares over rows and columns, and what is remembered of the size."""
        return 1 + len(self.factors) * sum(matrix_of(shape) or ()) + (self.sizing is not None)

    def rate(self, moment: Moment) -> Tensor:
        """Root mean square of the update of a tensor, before any learned scale: `[num_tasks]`."""
        given = (self.schedule, self.step_size, SIZE, self.warmup, self.floor)
        return moment.once(given, lambda: rate_at(moment, *given))  # type: ignore[no-any-return]

    def forward(  # type: ignore[override]
        self, gradient: Tensor, state: TensorState, theta: Tensor, moment: Moment
    ) -> tuple[Tensor, TensorState]:
        """See `TensorRule.forward`."""
        gradient = gradient.clamp(-_LARGEST, _LARGEST)
        matrix = matrix_of(gradient.shape[1:])
        kept = gradient.new_tensor(self.kept).view(-1, *[1] * gradient.dim())
        means = torch.lerp(gradient, state.coordinates[:-1], kept)
        square = torch.lerp(state.coordinates[-1], gradient.square(), 1 - self.beta2)
        last = int(self.sizing is not None)
        parts = torch.split(state.vector, [1, state.vector.shape[1] - 1 - last, last], 1)
        count, factors, scale = parts[0] + 1, parts[1], parts[2]
        rows = columns = None
        if self.factors and matrix is not None:
            squares = gradient.square().reshape(-1, *matrix)
            now = torch.cat([squares.mean(2), squares.mean(1)], 1)[:, None]  # [num_tasks, 1, rows + columns]
            betas = gradient.new_tensor(self.factors)[:, None]
            found = torch.lerp(now, factors.view(len(gradient), len(betas), -1), betas)
            factors = found.flatten(1)
            unbiased = (found / (1 - betas ** count[:, :, None])).transpose(0, 1)
            rows, columns = unbiased[..., : matrix[0], None], unbiased[:, :, None, matrix[0] :]
        steps = over_tensor(count[:, 0], gradient)
        of_square = square / (1 - self.beta2**steps)
        given = Inputs(gradient, theta, means / (1 - kept**steps), of_square, self.eps, rows, columns, moment)
        direction, rate = given.means[0] / given.root, self.rate(moment)
        if self.sizes is not None:
            ratios = [gradient / given.root, *(given.means / given.root)]
            means_of = [each_task(torch.where(given.moved, one, 0.0)).square().mean(1) for one in (theta, *ratios)]
            factor, scale, mixed = self.sizes(torch.stack(means_of, 1), scale, gradient.shape[1:], moment)
            rate = rate * factor
            for share, one in zip(mixed.T, [ratios[0], *ratios[2:]], strict=False):
                direction = direction + over_tensor(share, one) * one
        if self.hidden_size:
            direction = normalized(direction, given.moved) + self._learned(given)
        after = TensorState(torch.cat([means, square[None]]), torch.cat([count, factors, scale], 1))
        if self.orthogonalize and matrix is not None:
            direction = torch.where(given.moved, direction, 0.0)
            direction = orthogonalized(direction.reshape(-1, *matrix)).view_as(gradient)
        direction = torch.where(given.moved, direction, 0.0)
        if self.normalize:
            direction = normalized(direction, given.moved)
        return -over_tensor(rate, gradient) * direction, after

    @torch.no_grad()
    def step_tensor_(
        self,
        gradient: Tensor,
        state: TensorState,
        theta: Tensor,
        moment: Moment,
        weights: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """See `TensorRule.step_tensor_`; compiled, where that can be."""
        library = fused_for(self.like, gradient, theta, *state, *(weights or {}).values())
        beyond = len(self.kept) > MOST_MEANS or (self.mixing and self.hidden_size > 0)  # what the kernel has
        if library is None or beyond or not all(one.is_contiguous() for one in state):
            return super().step_tensor_(gradient, state, theta, moment, weights)
        matrix = matrix_of(gradient.shape[1:])
        tensors = (gradient.contiguous(), theta.contiguous(), *state)
        packed = moment.once(self, lambda: self._pack(moment, weights))
        shape = () if self.sizes is None else self.sizes.of_shape(gradient.shape[1:])
        step = NormalizedStep(library, packed, matrix, tensors, shape)
        rate = self.rate(moment)
        if not self.orthogonalize or matrix is None:
            return step.update_(rate, normalize=self.normalize)
        changed = orthogonalized(step.direction.view(-1, *matrix)).reshape(gradient.shape)
        return step.update_(rate, normalize=self.normalize, changed=changed.contiguous())

    def _pack(self, moment: Moment, given: Mapping[str, Tensor] | None) -> NormalizedNumbers:
        """What the kernel has to know of this rule, with the meta-parameters as they are at this moment."""
        numbers = NormalizedNumbers(
            hidden=self.hidden_size,
            means=len(self.kept),
            times=NUM_TIMES * self.timed,
            factors=bool(self.factors),
            gain2=1 - self.beta2,
            eps=self.eps,
            largest=_LARGEST,
            clip=CLIP,
        )
        numbers.gain1[: len(self.kept)] = (1 - torch.tensor(self.kept)).tolist()  # as 1 - beta is in float32
        own = dict(self.named_parameters() if given is None else given)
        own = {name: one.detach().contiguous() for name, one in own.items()}
        if self.hidden_size:
            weights = [own[name] for name, _ in self.named_parameters() if not name.startswith("sizes.")]
            numbers.keep(weights, places_of(self.sees, len(self.kept), self.timed), torch.stack(times(moment), 1))
        if self.sizes is not None:
            weights = [own[f"sizes.{name}"] for name, _ in self.sizes.named_parameters()]
            moments = self.sizes.of_moment(moment)
            numbers.size_by(weights, moments.contiguous(), math.log(self.sizes.most), given is not None)
        return numbers

    def _learned(self, given: Inputs) -> Tensor:
        """What is added to the direction, `[num_tasks, *shape]`."""
        x = numbers(self.sees, given)
        if self.timed:
            x += [over_tensor(one, given.gradient).expand_as(given.gradient) for one in times(given.moment)]
        out = self.readout(torch.relu(self.second(torch.relu(self.hidden(torch.stack(x, -1))))))
        return out[..., 0]  # type: ignore[no-any-return]


def orthogonalized(matrices: Tensor, num_steps: int = 5) -> Tensor:
    """Bring all singular values of matrices `[num_tasks, rows, columns]` close to 1, by Newton-Schulz steps.

    Example:
        >>> matrices = torch.diag(torch.tensor([1.0, 0.2])).expand(1, 2, 2)
        >>> bool((torch.linalg.svdvals(orthogonalized(matrices)) - 1).abs().max() < 0.35)
        True
    """
    a, b, c = _QUINTIC
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    x = x / (torch.linalg.matrix_norm(x, keepdim=True) + 1e-7)
    for _ in range(num_steps):
        square = x @ x.mT
        x = torch.baddbmm(a * x, torch.baddbmm(b * square, square, square, alpha=c), x)
    return x.mT if tall else x
