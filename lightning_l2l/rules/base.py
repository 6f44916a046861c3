"""What every update rule is, and how one that knows nothing of speed is unrolled."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any, Literal

import torch
from torch import Tensor, nn

Memory = Literal["auto", "fast", "flat"]

#: Coordinates in one block on the CPU: the block's buffers stay in the cache.
CPU_BLOCK = 4096
#: Coordinates in one block elsewhere: large enough to fill the device, small enough to bound its memory.
DEVICE_BLOCK = 2**18


def block_size(like: Tensor) -> int:
    """Coordinates in a block, as suits the tensor's device."""
    return CPU_BLOCK if like.is_cpu else DEVICE_BLOCK


def blocks(num_coordinates: int, largest: int) -> Iterator[slice]:
    """Cut `num_coordinates` into blocks of nearly equal size, each of at most `largest` coordinates."""
    count = max(-(-num_coordinates // largest), 1)
    size = -(-num_coordinates // count)
    size = max(min(-(-size // 8) * 8, largest), 1)  # whole vector registers
    for start in range(0, num_coordinates, size):
        yield slice(start, min(start + size, num_coordinates))


@dataclass(frozen=True)
class Seen:
    """What a rule may see beside gradient and state; those that work on each coordinate by itself ignore it.

    Attributes:
        theta: Where the gradient was taken, `[num_tasks, coordinates of one]`.
        shapes: Of the tensors that lie one after the other in a row of it.
        step: *Inner steps* made before this one.
        num_steps: *Inner steps* that an optimizee is trained for; None: nobody knows.
    """

    theta: Tensor
    shapes: Sequence[Sequence[int]]
    step: int = 0
    num_steps: int | None = None


class UpdateRule(nn.Module, ABC):
    """A learned g: gradient and state of a coordinate -> its update and next state.

    A rule is coordinatewise: coordinate k of the update depends on coordinate k of gradient and state alone, with
    meta-parameters that all coordinates share. So one call serves all parameters of all tasks, and a backward
    pass may go through the coordinates block by block.

    A subclass keeps every constructor argument as an attribute of the same name and of a plain type; checkpoints
    and rule files describe it by those.

    Example:
        One of your own: momentum, whose learning rate is the meta-parameter.

        >>> class HeavyBall(UpdateRule):
        ...     state_size = 1  # the velocity
        ...
        ...     def __init__(self, decay: float = 0.9):
        ...         super().__init__()
        ...         self.decay, self.log_lr = decay, nn.Parameter(torch.tensor(0.0))
        ...
        ...     def forward(self, gradient, state):
        ...         velocity = self.decay * state[0] + gradient
        ...         return -self.log_lr.exp() * velocity, velocity.unsqueeze(0)
        >>> rule = HeavyBall()
        >>> state = rule.init_state(num_coordinates=2)
        >>> for _ in range(2):
        ...     print(rule.step_(torch.tensor([1.0, -2.0]), state))
        tensor([-1.,  2.])
        tensor([-1.9000,  3.8000])
    """

    @property
    @abstractmethod
    def state_size(self) -> int:
        """Numbers of state a coordinate."""

    @abstractmethod
    def forward(self, gradient: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """One inner step, differentiable by autograd.

        Args:
            gradient: `[num_coordinates]`.
            state: `[state_size, num_coordinates]`.

        Returns:
            The update `[num_coordinates]`, to be added to the optimizee's parameters, and the next state.
        """

    @property
    def like(self) -> Tensor:
        """A tensor with the device and the dtype of the rule, which may have nothing that is learned."""
        return next(chain(self.parameters(), self.buffers()), torch.empty(0))

    def by_name(self, names: Iterable[str | None]) -> list[tuple[UpdateRule, list[Any]]]:
        """Which rule updates which parameters: here this one all of them; `RuleGroups` has several.

        Args:
            names: Of the parameters; None of those that have none.

        Returns:
            Rules, each with its names in the order given.
        """
        return [(self, list(names))]

    def updates(self, gradient: Tensor, state: Tensor, seen: Seen | None = None) -> tuple[Tensor, Tensor]:
        """One inner step of all tensors of all tasks, differentiable by autograd.

        Args:
            gradient: `[num_coordinates]`.
            state: As `init_states` made it.
            seen: What else there is to see.

        Returns:
            The update `[num_coordinates]`, and the next state.
        """
        return self(gradient, state)  # type: ignore[no-any-return]

    @torch.no_grad()
    def step_(self, gradient: Tensor, state: Tensor) -> Tensor:
        """One inner step without a graph, the state changed in place.

        Args:
            gradient: `[num_coordinates]`.
            state: `[state_size, num_coordinates]`, the columns adjacent in memory, the rows perhaps apart.

        Returns:
            The update `[num_coordinates]`.
        """
        update = torch.empty_like(gradient)
        for part in blocks(len(gradient), block_size(gradient)):
            update[part], state[:, part] = self(gradient[part], state[:, part])
        return update

    @torch.no_grad()
    def step_each_(
        self, weights: Mapping[str, Tensor], gradient: Tensor, state: Tensor, seen: Seen | None = None
    ) -> Tensor:
        """As `step_`, of each task by meta-parameters of its own.

        Args:
            weights: Those of each task, `[num_tasks, ...]`, by the names of `named_parameters`.
            gradient: `[num_coordinates]` of all tasks, one task after the other.
            state: As `init_states` made it.
            seen: What else there is to see.

        Returns:
            The update `[num_coordinates]`.
        """
        num_tasks = len(next(iter(weights.values())))
        gradients = gradient.view(num_tasks, -1)
        states = state.view(self.state_size, *gradients.shape)
        updates = torch.empty_like(gradients)
        if gradient.is_cpu and type(self).step_ is not UpdateRule.step_:  # compiled, most likely
            alone = _Step(self)
            for k in range(num_tasks):
                own = {f"rule.{name}": values[k] for name, values in weights.items()}
                updates[k] = torch.func.functional_call(alone, own, (gradients[k], states[:, k]))
            return updates.view(-1)
        step = torch.func.vmap(partial(torch.func.functional_call, self), (0, (0, 1)), (0, 1))
        for part in blocks(gradients.shape[1], max(block_size(gradient) // num_tasks, 8)):
            given = gradients[:, part], states[:, :, part]
            updates[:, part], states[:, :, part] = step(dict(weights), given)
        return updates.view(-1)

    def init_state(
        self, num_coordinates: int, *, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> Tensor:
        """State before the first inner step: zeros `[state_size, num_coordinates]`, float32 by default."""
        return torch.zeros(self.state_size, num_coordinates, device=device, dtype=dtype or torch.float32)

    def init_states(
        self,
        num_tasks: int,
        shapes: Sequence[Sequence[int]],
        *,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """State before the first inner step of tensors of these shapes, of so many tasks side by side."""
        return self.init_state(num_tasks * sum(map(math.prod, shapes)), device=device, dtype=dtype)

    def unroller(
        self,
        num_coordinates: int,
        num_steps: int,
        *,
        memory: Memory = "auto",
        budget: int = 2**30,
        block: int | None = None,
    ) -> RuleUnroll:
        """Buffers for unrolling this rule; made once and used for truncation after truncation.

        Args:
            num_coordinates: Coordinates of all tasks together.
            num_steps: Inner steps of a truncation.
            memory: "fast" keeps all activations until the backward pass, "flat" computes them again block by
                block, "auto" is fast where the activations fit into `budget`.
            budget: Bytes.
            block: Coordinates in a block; by default what suits the device.
        """
        return AutogradUnroll(self, num_coordinates, block=block)


class _Step(nn.Module):
    """`UpdateRule.step_` as a forward pass, for `functional_call`."""

    def __init__(self, rule: UpdateRule) -> None:
        super().__init__()
        self.rule = rule

    def forward(self, gradient: Tensor, state: Tensor) -> Tensor:
        return self.rule.step_(gradient, state)


class RuleUnroll(ABC):
    """A truncation of a rule: `begin`, `step` as often as there are inner steps, and `gradients`.

    Nothing here is recorded by autograd; tensors that are returned are valid until the next call.
    """

    @abstractmethod
    def begin(self, state: Tensor, seen: Seen | None = None) -> None:
        """Start from `state` and what there is to see at the first step, with the meta-parameters as they are now."""

    @abstractmethod
    def step(self, gradient: Tensor, state: Tensor, seen: Seen | None = None) -> Tensor:
        """One inner step: gradient `[num_coordinates]` -> update `[num_coordinates]`.

        `state` is the same tensor at every step, at first as it was given to `begin`; it is the unroll's to write to,
        and after the last step it holds the state after it.
        """

    @abstractmethod
    def gradients(self, gradients: Tensor, weights: Sequence[float], beside: Tensor | None = None) -> list[Tensor]:
        """Gradient of the meta-loss with respect to each of `rule.parameters()`, all gradients counted as constants.

        With the gradients g_0 .. g_T and the updates u_0 .. u_{T-1} that `step` made of the first T, that is the
        gradient of sum_t w_t <g_t, u_0 + ... + u_{t-1}>, t = 1 .. T, and of sum_s <b_s, u_s>, s = 0 .. T - 1.

        Args:
            gradients: `[num_steps + 1, num_coordinates]`, what was fed to `step` and the gradient after the last one.
            weights: w_1 .. w_T.
            beside: b_0 .. b_{T-1}, `[num_steps, num_coordinates]`; None: zeros.
        """


def cotangents(gradients: Tensor, weights: Sequence[float], beside: Tensor | None = None) -> Tensor:
    """What each update is multiplied with: c_s = w_{s+1} g_{s+1} + ... + w_T g_T, plus what is `beside`, `[T, ...]`."""
    total = torch.empty_like(gradients[1:])
    torch.mul(gradients[-1], weights[-1], out=total[-1])
    for s in range(len(weights) - 2, -1, -1):
        torch.add(total[s + 1], gradients[s + 1], alpha=weights[s], out=total[s])
    return total if beside is None else total.add_(beside)


class AutogradUnroll(RuleUnroll):
    """Any rule: the inner steps without a graph, then one block of coordinates after the other with one.

    Args:
        rule: The rule.
        num_coordinates: Coordinates of all tasks together.
        block: Coordinates in a block; by default what suits the device.
    """

    def __init__(self, rule: UpdateRule, num_coordinates: int, *, block: int | None = None) -> None:
        self.rule, like = rule, rule.like
        self.blocks = list(blocks(num_coordinates, block or block_size(like)))
        self.first = rule.init_state(num_coordinates, device=like.device, dtype=like.dtype)

    def begin(self, state: Tensor, seen: Seen | None = None) -> None:
        """See `RuleUnroll.begin`."""
        self.first.copy_(state)

    def step(self, gradient: Tensor, state: Tensor, seen: Seen | None = None) -> Tensor:
        """See `RuleUnroll.step`."""
        return self.rule.step_(gradient, state)

    def gradients(self, gradients: Tensor, weights: Sequence[float], beside: Tensor | None = None) -> list[Tensor]:
        """See `RuleUnroll.gradients`."""
        parameters = list(self.rule.parameters())
        totals = [torch.zeros_like(p) for p in parameters]
        for part in self.blocks:
            given = gradients[:, part]
            with torch.enable_grad():
                state = self.first[:, part]
                total = given.new_zeros(())
                of_updates = cotangents(given, weights, None if beside is None else beside[:, part])
                for gradient, cotangent in zip(given[:-1], of_updates, strict=True):
                    update, state = self.rule(gradient, state)
                    total = total + torch.dot(update, cotangent)
                found = torch.autograd.grad(total, parameters, materialize_grads=True)
            for sum_, one in zip(totals, found, strict=True):
                sum_ += one
        return totals
