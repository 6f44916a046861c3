"""Tasks made of other tasks, so that in meta-training a rule meets more than what it is tested on."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NoReturn, get_args

import torch
from torch import Tensor

from lightning_l2l.arguments import MOST, brief, check_at_least, check_choice, check_type, is_number
from lightning_l2l.tasks.base import Task, mix_seed
from lightning_l2l.tasks.batches import form, get_entries

Unit = Literal["coordinate", "tensor", "task"]

_MOST_SCALING = 20.0
_TARGETS = 1 << 33  # stream of random numbers; below are those of starts, steps and unseen data


def made_of(task: Any) -> Iterator[Any]:
    """The task, and those that it is made of one after the other, from the outside in; a `Mixture` ends it."""
    while task is not None:
        yield task
        task = getattr(task, "task", None)


class RandomScaling(Task):
    r"""Another task, each of its coordinates measured in a unit of its own: F(theta) = f(c theta), from theta_0 / c.

    The factors c = exp(u), u uniform in [-bound, bound], are drawn anew for every episode and every coordinate, or for
    every tensor or task, by the task's seed. A rule that learns on such tasks cannot rely on how large parameters and
    gradients are.

    Args:
        task: The other task.
        bound: Of the logarithm of the factors, in (0, 20].
        unit: What has a factor of its own: each "coordinate", each "tensor", or each "task".

    Raises:
        ValueError: If ``bound`` is out of range, or ``unit`` is unknown.
        TypeError: If ``task`` is none.

    Example:
        >>> from lightning_l2l.tasks import Quadratic
        >>> task, batch = RandomScaling(Quadratic(dim=2)), {"seed": torch.tensor([7, 8])}
        >>> batch |= {"W": torch.eye(2).expand(2, 2, 2), "y": torch.zeros(2, 2)}
        >>> params = {"theta": torch.ones(2, 2)}
        >>> bool((task.loss(params, batch, step=0) == Quadratic(dim=2).loss(params, batch, step=0)).any())
        False

    References:
        Lv, Jiang, Li, *Learning gradient descent: better generalization and longer horizons*, 2017,
        https://arxiv.org/abs/1703.03633
    """

    def __init__(self, task: Task, bound: float = 3.0, unit: Unit = "coordinate") -> None:
        check_type(Task, "a Task, such as Quadratic()", task=task)
        if not is_number(bound) or not 0 < bound <= _MOST_SCALING:
            raise ValueError(f"bound={brief(bound)} is out of range; use a number above 0 and up to 20, such as 3.0")
        check_choice(get_args(Unit), unit=unit)
        self.task, self.bound, self.unit = task, bound, unit
        self._factors: dict[str, Tensor] | None = None  # by parameter, [num_tasks, ...]; known within an episode

    def init_params(self, num_tasks: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Draw the task's starting parameters and then the factors by which they are divided."""
        start, factors = self._draw(num_tasks, generator)
        return {name: value / factors[name] for name, value in start.items()}

    def init_buffers(self, num_tasks: int) -> dict[str, Tensor]:
        """Those of the task."""
        return self.task.init_buffers(num_tasks)

    def of_episode(self, batch: Mapping[str, Tensor]) -> Task:
        """The task with the factors of these seeds, which are drawn once."""
        (seeds,) = get_entries(batch, "seed")
        generator, found = torch.Generator(), copy.copy(self)
        found.task = self.task.of_episode(batch)
        drawn = [found._draw(1, generator.manual_seed(mix_seed(seed, 0)))[1] for seed in seeds.tolist()]
        found._factors = {name: torch.cat([one[name] for one in drawn]) for name in drawn[0]}
        return found

    def loss(self, params: Mapping[str, Tensor], batch: Mapping[str, Tensor], step: int) -> Tensor:
        """The task's losses ``[num_tasks]`` at c theta; ``batch`` needs ``seed`` ``[num_tasks]`` besides its own."""
        if self._factors is None:
            return self.of_episode(batch).loss(params, batch, step)
        return self.task.loss(self._scaled(params), batch, step)

    def unseen(self, params: Mapping[str, Tensor], batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The task's figures at c theta."""
        if self._factors is None:
            return self.of_episode(batch).unseen(params, batch)
        return self.task.unseen(self._scaled(params), batch)

    def _scaled(self, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        assert self._factors is not None
        self._factors = {name: factor.to(params[name]) for name, factor in self._factors.items()}  # once, if at all
        return {**params, **{name: params[name] * factor for name, factor in self._factors.items()}}

    def _draw(self, num_tasks: int, generator: torch.Generator) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        start = self.task.init_params(num_tasks, generator)
        factors: dict[str, Tensor] = {}
        for name, value in start.items():
            shape = value.shape if self.unit == "coordinate" else (num_tasks, *[1] * (value.dim() - 1))
            if self.unit == "task" and factors:
                factors[name] = next(iter(factors.values())).view(shape).to(value)
                continue
            uniform = torch.rand(shape, generator=generator, dtype=value.dtype)
            factors[name] = uniform.mul_(2 * self.bound).sub_(self.bound).exp_()
        return start, factors


class ConvexTerm(Task):
    """Another task and beside it a convex function of parameters of its own: F(theta, x) = f(theta) + mean((x - v)^2).

    The target v and the start of x are uniform in [-1, 1] and drawn for every episode by the task's seed. So a rule
    keeps learning to descend where f has become difficult.

    Args:
        task: The other task; no `ConvexTerm` itself.
        dim: Number of coordinates of x, at least 1.

    Raises:
        ValueError: If ``dim`` is no positive integer, or the task is made of a `ConvexTerm` already.
        TypeError: If ``task`` is none.

    References:
        Lv, Jiang, Li, *Learning gradient descent: better generalization and longer horizons*, 2017,
        https://arxiv.org/abs/1703.03633
    """

    def __init__(self, task: Task, dim: int = 20) -> None:
        check_type(Task, "a Task, such as Quadratic()", task=task)
        check_at_least(1, MOST, dim=dim)
        if any(isinstance(one, ConvexTerm) for one in made_of(task)):
            raise ValueError(f"task={brief(task)} has a ConvexTerm already; give it one, not two")
        self.task, self.dim = task, dim
        self._targets: Tensor | None = None  # [num_tasks, dim]; known within an episode

    def init_params(self, num_tasks: int, generator: torch.Generator) -> dict[str, Tensor]:
        """The task's starting parameters and ``convex`` ``[num_tasks, dim]``.

        Raises:
            ValueError: If the task has a parameter ``convex`` of its own.
        """
        start = self.task.init_params(num_tasks, generator)
        if "convex" in start:
            raise ValueError(f"task={brief(self.task)} has a parameter 'convex' already; call it otherwise")
        return {**start, "convex": self._draw(num_tasks, generator)}

    def init_buffers(self, num_tasks: int) -> dict[str, Tensor]:
        """Those of the task."""
        return self.task.init_buffers(num_tasks)

    def of_episode(self, batch: Mapping[str, Tensor]) -> Task:
        """The task with the targets of these seeds, which are drawn once."""
        (seeds,) = get_entries(batch, "seed")
        generator = torch.Generator()
        targets = [self._draw(1, generator.manual_seed(mix_seed(seed, _TARGETS))) for seed in seeds.tolist()]
        found = copy.copy(self)
        found.task, found._targets = self.task.of_episode(batch), torch.cat(targets)
        return found

    def loss(self, params: Mapping[str, Tensor], batch: Mapping[str, Tensor], step: int) -> Tensor:
        """The sums ``[num_tasks]``; ``batch`` needs ``seed`` ``[num_tasks]`` besides what the task needs."""
        if self._targets is None:
            return self.of_episode(batch).loss(params, batch, step)
        x = params["convex"]
        self._targets = self._targets.to(x)
        return self.task.loss(params, batch, step) + (x - self._targets).square().mean(1)

    def unseen(self, params: Mapping[str, Tensor], batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The task's figures."""
        if self._targets is None:
            return self.of_episode(batch).unseen(params, batch)
        return self.task.unseen(params, batch)

    def _draw(self, num_tasks: int, generator: torch.Generator) -> Tensor:
        return torch.rand(num_tasks, self.dim, generator=generator, device="cpu").mul_(2).sub_(1)


class Mixture(Task):
    """In every episode one of several tasks, the same for all copies side by side; the batch says which.

    `MixtureDataModule` makes such batches, with data that goes with the task. So a rule is meta-trained on tasks of
    different kinds in turn, on numbers of parameters, too, that differ. The losses stay as the tasks have them:
    where those of one are larger by orders of magnitude, so are its meta-gradients (see ``gradient_clip``) and its
    part in a mean over episodes.

    Outside of an episode it is known how it is made, but not which parameters it has.

    Args:
        tasks: The members; none is a `Mixture` itself.

    Raises:
        ValueError: If there are none.
        TypeError: If they are no list of tasks, or one is a `Mixture`.

    Example:
        >>> from lightning_l2l.tasks import Quadratic
        >>> mixture = Mixture([Quadratic(dim=2), Quadratic(dim=5)])
        >>> mixture.of_episode({"member": torch.tensor([1, 1, 1])}).init_params(3, torch.Generator())["theta"].shape
        torch.Size([3, 5])

    References:
        Wichrowska et al., *Learned optimizers that scale and generalize*, section 4, 2017,
        https://arxiv.org/abs/1703.04813; Metz et al., *Using a thousand optimization tasks to learn hyperparameter
        search strategies*, 2020, https://arxiv.org/abs/2002.11887
    """

    def __init__(self, tasks: Sequence[Task]) -> None:
        check_type((list, tuple), "a list of tasks, such as [Quadratic(), Rosenbrock()]", tasks=tasks)
        if not tasks:
            raise ValueError(f"tasks={brief(tasks)} are none; give some, such as [Quadratic(), Rosenbrock()]")
        for task in tasks:
            check_type(Task, "a list of tasks, such as [Quadratic(), Rosenbrock()]", tasks=task)
            if any(isinstance(one, Mixture) for one in made_of(task)):
                raise TypeError(f"tasks={brief(tasks)} has a Mixture as a member; list its members themselves")
        self.tasks = list(tasks)

    def of_episode(self, batch: Mapping[str, Tensor]) -> Task:
        """The member that the batch is of.

        Args:
            batch: ``member`` ``[num_tasks]``, integers, all the same; and what the member needs.

        Raises:
            ValueError: If the batch says of no member that it is of that alone.
        """
        if "member" not in batch:
            raise ValueError(
                "the batch has no 'member', which says of which of the mixture's tasks it is; use MixtureDataModule, "
                "with a data module for each task"
            )
        (member,) = get_entries(batch, "member")
        numbers = sorted(set(member.flatten().tolist()))
        if len(numbers) != 1 or member.is_floating_point() or not 0 <= numbers[0] < len(self.tasks):
            raise ValueError(
                f"'member' of the batch is {form(member)} with {brief(numbers)}; give int64 [num_tasks], the same "
                f"number from 0 to {len(self.tasks) - 1} for all"
            )
        return self.tasks[int(numbers[0])].of_episode(batch)

    def init_params(self, num_tasks: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Known of an episode's member only: ``of_episode(batch).init_params(...)``."""
        self._refuse()

    def init_buffers(self, num_tasks: int) -> dict[str, Tensor]:
        """Known of an episode's member only: ``of_episode(batch).init_buffers(...)``."""
        self._refuse()

    def loss(self, params: Mapping[str, Tensor], batch: Mapping[str, Tensor], step: int) -> Tensor:
        """The member's losses ``[num_tasks]``."""
        return self.of_episode(batch).loss(params, batch, step)

    def unseen(self, params: Mapping[str, Tensor], batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The member's figures."""
        return self.of_episode(batch).unseen(params, batch)

    def _refuse(self) -> NoReturn:
        raise ValueError(
            "which parameters a Mixture has is known within an episode only; use mixture.of_episode(batch)"
        )
