"""Rules that see the tensor which a coordinate belongs to, theta, and the time."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_l2l.rules.base import RuleUnroll, Seen, UpdateRule, cotangents


class TensorState(NamedTuple):
    """State of one tensor of each task.

    Attributes:
        coordinates: `[state_size, num_tasks, *shape]`.
        vector: `[num_tasks, vector_size(shape)]`.
    """

    coordinates: Tensor
    vector: Tensor


#: Where an optimizer's states of a parameter have those of `TensorState`.
NAMES = ("rule_state", "tensor_state")


@dataclass(frozen=True)
class Moment:
    """When an inner step is made.

    Attributes:
        step: *Inner steps* made before this one, `[num_tasks]`.
        num_steps: *Inner steps* that an optimizee is trained for, `[num_tasks]`; None: nobody knows.
    """

    step: Tensor
    num_steps: Tensor | None = None
    _found: dict[Any, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    def once(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """What `make` gives, which is asked once for a key: what is the same for all tensors of an inner step."""
        if key not in self._found:
            self._found[key] = make()
        return self._found[key]

    @classmethod
    def of(cls, step: int, num_steps: int | None, num_tasks: int, like: Tensor) -> Moment:
        """That of tasks which are equally far, on the device and of the dtype of `like`."""
        made = like.new_full((num_tasks,), step)
        return cls(made, None if num_steps is None else torch.full_like(made, num_steps))


class Clock:
    """The moments of one step of an optimizer: the same one for all tensors that are equally far.

    Args:
        step: *Inner steps* made before.
    """

    def __init__(self, step: int) -> None:
        self.step = step
        self._moments: dict[Any, Moment] = {}

    def moment(self, num_steps: int | None, num_tasks: int, like: Tensor) -> Moment:
        """See `Moment.of`."""
        key = num_steps, num_tasks, like.device, like.dtype
        if key not in self._moments:
            self._moments[key] = Moment.of(self.step, num_steps, num_tasks, like)
        return self._moments[key]


def each_task(values: Tensor) -> Tensor:
    """Tensors `[num_tasks, *shape]` as vectors `[num_tasks, coordinates of one]`."""
    return values.reshape(len(values), -1)


def over_tensor(of_task: Tensor, like: Tensor) -> Tensor:
    """A number of each task `[num_tasks]`, to go with tensors `[num_tasks, *shape]`."""
    return of_task.view(-1, *[1] * (like.dim() - 1))


class TensorRule(UpdateRule):
    """An update rule that sees a whole tensor, theta, and the time.

    A tensor is what the model calls a parameter. All tasks side by side have one of each name and shape; a rule must
    not mix them: the first dimension of all that it is given is that of the tasks, and it has to be left alone.

    A subclass keeps every constructor argument as an attribute of the same name and of a plain type, as any rule does.

    Example:
        Gradient descent with momentum, whose update has the same size for each tensor and falls with time:

        >>> class Normalized(TensorRule):
        ...     state_size = 1  # the velocity
        ...
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.log_lr = torch.nn.Parameter(torch.tensor(0.0))
        ...
        ...     def forward(self, gradient, state, theta, moment):
        ...         velocity = 0.9 * state.coordinates[0] + gradient
        ...         lr = self.log_lr.exp() / (1 + moment.step).sqrt()
        ...         size = velocity.flatten(1).norm(dim=1)
        ...         update = -(lr / size).view(-1, *[1] * (theta.dim() - 1)) * velocity
        ...         return update, TensorState(velocity[None], state.vector)
        >>> rule = Normalized()
        >>> state = rule.init_tensor((2, 2), num_tasks=1)
        >>> update, state = rule(torch.ones(1, 2, 2), state, torch.zeros(1, 2, 2), Moment(torch.zeros(1)))
        >>> update
        tensor([[[-0.5000, -0.5000],
                 [-0.5000, -0.5000]]], grad_fn=<MulBackward0>)
    """

    #: Whether it cannot work without `Moment.num_steps`.
    needs_num_steps = False
    #: Whether the state depends on the meta-parameters. Where it does not, the meta-gradient needs the memory of one
    #: inner step alone.
    remembers = True

    def vector_size(self, shape: Sequence[int]) -> int:
        """Numbers of state of a whole tensor of this shape, beside those of its coordinates."""
        return 0

    @abstractmethod
    def forward(  # type: ignore[override]
        self, gradient: Tensor, state: TensorState, theta: Tensor, moment: Moment
    ) -> tuple[Tensor, TensorState]:
        """One inner step of one tensor of each task, differentiable by autograd.

        Args:
            gradient: `[num_tasks, *shape]`.
            state: See `TensorState`.
            theta: Where the gradient was taken, `[num_tasks, *shape]`.
            moment: When.

        Returns:
            The update `[num_tasks, *shape]`, to be added to theta, and the next state.
        """

    def rate(self, moment: Moment) -> Tensor:
        """What an optimizer's weight decay is multiplied with, as with AdamW's learning rate: `[num_tasks]`."""
        return torch.ones_like(moment.step)

    @torch.no_grad()
    def step_tensor_(
        self,
        gradient: Tensor,
        state: TensorState,
        theta: Tensor,
        moment: Moment,
        weights: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """As `forward`, without a graph and with the state changed in place.

        `weights` are meta-parameters of each task's own, `[num_tasks, ...]` each, by name.
        """
        step = self if weights is None else partial(self._with, weights)
        update, after = step(gradient, state, theta, moment)
        for old, new in zip(state, after, strict=True):
            old.copy_(new)
        return update

    def _with(
        self, weights: Mapping[str, Tensor], gradient: Tensor, state: TensorState, theta: Tensor, moment: Moment
    ) -> tuple[Tensor, TensorState]:
        """As `forward`, of each task by meta-parameters of its own."""

        def one(weights: dict[str, Tensor], *tensors: Tensor, total: Tensor | None) -> tuple[Tensor, ...]:
            gradient, theta, step = (tensor[None] for tensor in tensors[:3])
            state = TensorState(tensors[3][:, None], tensors[4][None])
            given = gradient, state, theta, Moment(step, None if total is None else total[None])
            update, after = torch.func.functional_call(self, weights, given)
            return update[0], after.coordinates[:, 0], after.vector[0]

        tensors = gradient, theta, moment.step, *state
        places = ({name: 0 for name in weights}, 0, 0, 0, 1, 0)
        if moment.num_steps is None:
            found = torch.func.vmap(partial(one, total=None), places, (0, 1, 0))(dict(weights), *tensors)
        else:
            timed = lambda total, *rest: one(*rest, total=total)  # noqa: E731
            found = torch.func.vmap(timed, (0, *places), (0, 1, 0))(moment.num_steps, dict(weights), *tensors)
        return found[0], TensorState(found[1], found[2])

    def init_tensor(
        self,
        shape: Sequence[int],
        num_tasks: int = 1,
        *,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> TensorState:
        """State of a tensor before the first inner step: zeros, float32 by default."""
        dtype = dtype or torch.float32
        return TensorState(
            torch.zeros(self.state_size, num_tasks, *shape, device=device, dtype=dtype),
            torch.zeros(num_tasks, self.vector_size(shape), device=device, dtype=dtype),
        )

    def init_states(
        self,
        num_tasks: int,
        shapes: Sequence[Sequence[int]],
        *,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """See `UpdateRule.init_states`: one tensor after the other, each with its coordinates' state and its own."""
        total = num_tasks * sum(self._width(shape) for shape in shapes)
        return torch.zeros(total, device=device, dtype=dtype or torch.float32)

    def updates(self, gradient: Tensor, state: Tensor, seen: Seen | None = None) -> tuple[Tensor, Tensor]:
        """See `UpdateRule.updates`."""
        found, after = [], []
        for one in self._tensors(gradient, state, seen):
            update, new = self(*one)
            found.append(each_task(update))
            after += [new.coordinates.flatten(), new.vector.flatten()]
        return torch.cat(found, 1).flatten(), torch.cat(after)

    def step_(self, gradient: Tensor, state: Tensor, seen: Seen | None = None) -> Tensor:
        """See `UpdateRule.step_`."""
        found = [self.step_tensor_(*one) for one in self._tensors(gradient, state, seen)]
        return torch.cat([each_task(update) for update in found], 1).flatten()

    def step_each_(
        self, weights: Mapping[str, Tensor], gradient: Tensor, state: Tensor, seen: Seen | None = None
    ) -> Tensor:
        """See `UpdateRule.step_each_`."""
        found = [self.step_tensor_(*one, weights) for one in self._tensors(gradient, state, seen)]
        return torch.cat([each_task(update) for update in found], 1).flatten()

    def unroller(self, num_coordinates: int, num_steps: int, **options: Any) -> RuleUnroll:
        """See `UpdateRule.unroller`; a tensor is not cut into blocks."""
        return TensorUnroll(self)

    def _width(self, shape: Sequence[int]) -> int:
        return self.state_size * math.prod(shape) + self.vector_size(shape)

    def _tensors(
        self, gradient: Tensor, state: Tensor, seen: Seen | None
    ) -> Iterator[tuple[Tensor, TensorState, Tensor, Moment]]:
        """What `forward` takes, tensor by tensor: views."""
        if seen is None:
            raise TypeError(f"{type(self).__name__} has to see the tensors and the moment; give seen=Seen(...)")
        num_tasks = len(seen.theta)
        sizes = [math.prod(shape) for shape in seen.shapes]
        moment = Moment.of(seen.step, seen.num_steps, num_tasks, gradient)
        gradients, thetas = torch.split(gradient.view(num_tasks, -1), sizes, 1), torch.split(seen.theta, sizes, 1)
        states = torch.split(state, [num_tasks * self._width(shape) for shape in seen.shapes])
        for shape, g, s, theta in zip(seen.shapes, gradients, states, thetas, strict=True):
            whole = (num_tasks, *shape)
            rows, vector = torch.split(s, [self.state_size * g.numel(), num_tasks * self.vector_size(shape)])
            of_tensor = TensorState(rows.view(self.state_size, *whole), vector.view(num_tasks, -1))
            yield g.view(whole), of_tensor, theta.view(whole), moment


def shapes_of(rule: UpdateRule, p: Tensor) -> dict[str, list[int]]:
    """What an optimizer keeps for a parameter: names and shapes of the rule's state."""
    if isinstance(rule, TensorRule):
        return dict(zip(NAMES, ([rule.state_size, *p.shape], [rule.vector_size(p.shape)]), strict=True))
    return {NAMES[0]: [rule.state_size, p.numel()]}


def step_tensor(
    rule: TensorRule,
    p: Tensor,
    states: dict[str, Any],
    clock: Clock,
    num_steps: int | None,
    maximize: bool,
    tasks: bool,
    decay: float | Tensor = 0.0,
) -> Tensor:
    """One inner step of a parameter of an optimizer, whose states of it are made where there are none.

    Args:
        rule: On the device of p.
        p: With a gradient.
        states: What the optimizer keeps of it, changed in place.
        clock: Of this step.
        num_steps: As far as known.
        maximize: Whether the rule is given the gradient with the other sign.
        tasks: Whether the first dimension of p is that of tasks side by side.
        decay: Times the rate of the moment, the share by which p shrinks, in place, before the rule sees it.

    Returns:
        The update, in the shape of p.
    """
    dtype, num_tasks = rule.like.dtype, len(p) if tasks else 1
    whole = p.detach() if tasks else p.detach()[None]
    if NAMES[0] not in states:
        new = rule.init_tensor(whole.shape[1:], num_tasks, device=p.device, dtype=dtype)
        states.update(zip(NAMES, new if tasks else (new.coordinates[:, 0], new.vector[0]), strict=True))
    for name in NAMES:
        states[name] = states[name].to(p.device)
    kept = [states[name] for name in NAMES]
    state = TensorState(*kept) if tasks else TensorState(kept[0].unsqueeze(1), kept[1].unsqueeze(0))
    gradient = (-p.grad if maximize else p.grad).to(dtype)  # type: ignore[operator, union-attr]
    moment = clock.moment(num_steps, num_tasks, gradient)
    if isinstance(decay, Tensor) or decay:
        rate = rule.rate(moment)
        p.mul_(1 - decay * (over_tensor(rate, p) if tasks else rate[0]).to(p.dtype))
    return rule.step_tensor_(gradient.view(whole.shape), state, whole.to(dtype), moment).view(p.shape)


class TensorUnroll(RuleUnroll):
    """The inner steps without a graph, then all of them again with one.

    Where the rule's state does not depend on the meta-parameters (`TensorRule.remembers`), an update depends on them
    through its own step alone, and the graph is that of one step.
    """

    def __init__(self, rule: TensorRule) -> None:
        self.rule = rule

    def begin(self, state: Tensor, seen: Seen | None = None) -> None:
        """See `RuleUnroll.begin`."""
        if seen is None:
            raise TypeError(f"{type(self.rule).__name__} has to see the tensors and the moment; give seen=Seen(...)")
        self.first = state.clone()
        self.seen = Seen(seen.theta.clone(), seen.shapes, seen.step, seen.num_steps)

    def step(self, gradient: Tensor, state: Tensor, seen: Seen | None = None) -> Tensor:
        """See `RuleUnroll.step`."""
        return self.rule.step_(gradient, state, seen)

    def gradients(self, gradients: Tensor, weights: Sequence[float], beside: Tensor | None = None) -> list[Tensor]:
        """See `RuleUnroll.gradients`."""
        parameters = list(self.rule.parameters())
        if not parameters:
            return []
        totals = [torch.zeros_like(p) for p in parameters]
        of_updates = cotangents(gradients, weights, beside)
        state, theta = self.first, self.seen.theta
        total = gradients.new_zeros(())
        for s, (gradient, cotangent) in enumerate(zip(gradients[:-1], of_updates, strict=True)):
            seen = Seen(theta, self.seen.shapes, self.seen.step + s, self.seen.num_steps)
            with torch.enable_grad():
                update, state = self.rule.updates(gradient, state, seen)
                total = total + torch.dot(update, cotangent)
            theta = theta + update.detach().view_as(theta)
            if not self.rule.remembers or s == len(of_updates) - 1:
                found = torch.autograd.grad(total, parameters, materialize_grads=True)
                for sum_, one in zip(totals, found, strict=True):
                    sum_ += one
                state, total = state.detach(), torch.zeros_like(total)
        return totals
