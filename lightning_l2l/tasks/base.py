"""The interface of a task, reproducible starting points, and the check of a task's losses."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_l2l.tasks.batches import form

#: The data of one episode, `[num_tasks, ...]` each.
Batch = Mapping[str, Tensor]

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


class Task(ABC):
    """A family of functions f_k(theta_k), k = 1..num_tasks, evaluated side by side.

    The function f_k of an episode is given by its data, entry k of a batch; the task says how the optimizee
    looks and what its loss is. A task holds no state of an episode, and it is not an ``nn.Module``: the
    optimizee's parameters must not become parameters of the LightningModule that owns the task.

    Example:
        One of your own: the slope of a line is fitted to minibatches of points.

        >>> class Slope(Task):
        ...     def init_params(self, num_tasks, generator):
        ...         return {"slope": torch.randn(num_tasks, 1, generator=generator)}
        ...
        ...     def loss(self, params, batch, step):
        ...         x, y = (batch[name].select(1, step) for name in ("inputs", "targets"))  # [num_tasks, batch_size]
        ...         return (params["slope"] * x - y).square().mean(1)
        >>> batch = {"inputs": torch.ones(1, 5, 8), "targets": torch.zeros(1, 5, 8)}
        >>> Slope().loss({"slope": torch.tensor([[3.0]])}, batch, step=4)
        tensor([9.])
    """

    @abstractmethod
    def init_params(self, num_tasks: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Draw the optimizee's starting parameters.

        Args:
            num_tasks: How many independent copies to draw.
            generator: A CPU generator, the only source of randomness; the global RNG is left as it was.

        Returns:
            Floating-point tensors ``[num_tasks, ...]`` on the CPU, by parameter name.
        """

    def init_buffers(self, num_tasks: int) -> dict[str, Tensor]:
        """What each copy keeps besides its parameters and does not train, such as batch-norm statistics.

        Args:
            num_tasks: How many copies to make.

        Returns:
            Tensors ``[num_tasks, ...]`` on the CPU, by buffer name; none by default.
        """
        return {}

    def of_episode(self, batch: Mapping[str, Tensor]) -> Task:
        """The task as it is for the length of an episode: what it draws for that is drawn once.

        Args:
            batch: The episode's data, tensors ``[num_tasks, ...]``, and ``seed`` ``[num_tasks]``.

        Returns:
            A task; by default this one, which draws nothing.
        """
        return self

    @abstractmethod
    def loss(self, params: Mapping[str, Tensor], batch: Mapping[str, Tensor], step: int) -> Tensor:
        """Evaluate every task's loss at one inner step.

        Args:
            params: The parameters ``[num_tasks, ...]``, never changed. The buffers may be merged in: they are
                then updated in place. Where they are absent, the initial buffers are used and what would have
                been written to them is dropped.
            batch: The episode's data, tensors ``[num_tasks, ...]``.
            step: The inner step, from 0: it selects the minibatch, where a task has any.

        Returns:
            The losses ``[num_tasks]``; entry k depends on entry k of ``params`` and ``batch`` only.
        """

    def unseen(self, params: Mapping[str, Tensor], batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """How well every task's optimizee does on data on which it has not been trained.

        Args:
            params: The parameters ``[num_tasks, ...]``, with or without the buffers; neither is changed.
            batch: The episode's data, tensors ``[num_tasks, ...]``.

        Returns:
            Figures ``[num_tasks]`` by name, such as ``"accuracy"``, without gradients; none by default.
        """
        return {}


class GeneratedTask(Task):
    """A task whose data is drawn from a distribution, not read from files; `GeneratedDataModule` draws it.

    Example:
        One of your own: bowls in the plane, each with another centre.

        >>> class Bowl(GeneratedTask):
        ...     def sample(self, generator):
        ...         return {"centre": torch.randn(2, generator=generator)}
        ...
        ...     def init_params(self, num_tasks, generator):
        ...         return {"x": torch.zeros(num_tasks, 2)}
        ...
        ...     def loss(self, params, batch, step):
        ...         return (params["x"] - batch["centre"]).square().sum(1)
        >>> from lightning_l2l.data import GeneratedDataModule
        >>> batch = next(iter(GeneratedDataModule(Bowl(), num_tasks=3).train_dataloader()))
        >>> Bowl().loss({"x": batch["centre"] + 1}, batch, step=0)
        tensor([2., 2., 2.])
    """

    @abstractmethod
    def sample(self, generator: torch.Generator) -> dict[str, Tensor]:
        """Draw what makes one function of the family.

        Args:
            generator: A CPU generator, the only source of randomness; the global RNG is left as it was.

        Returns:
            Tensors on the CPU by name, without a dimension for the tasks.
        """


def mix_seed(seed: int, stream: int) -> int:
    """Derive the seed of one of a task's random streams (the splitmix64 generator).

    Two reasons not to use a seed as it is: torch's CPU generator only looks at the lower 32 bits, and a start
    drawn from the very numbers that gave the task its data would be correlated with them.

    Args:
        seed: A 64-bit integer, signed or not.
        stream: Number of the stream, from 0.

    Returns:
        An integer in [0, 2^64), each of whose bits depends on every bit of the arguments.

    References:
        Steele, Lea, Flood, *Fast Splittable Pseudorandom Number Generators*, OOPSLA 2014,
        https://doi.org/10.1145/2660193.2660195
    """
    mask = 0xFFFFFFFFFFFFFFFF
    z = (seed + (stream + 1) * 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return z ^ (z >> 31)


def init_from_seeds(
    task: Task,
    seeds: Tensor,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Starting point of an episode: task k's start is a function of ``seeds[k]`` alone.

    Every start is drawn by itself and on the CPU, so that it is the same on any device, for any number of
    tasks in the batch and for any split of the tasks over processes.

    Args:
        task: The task.
        seeds: One seed per task, int64 ``[num_tasks]``.
        device: Where the tensors go; the CPU by default.
        dtype: Type to which floating-point tensors are cast; the task's own by default.

    Returns:
        The parameters and the buffers, each a dictionary of tensors ``[num_tasks, ...]``.

    Raises:
        ValueError: If ``seeds`` is not a one-dimensional, non-empty tensor of integers.

    Example:
        >>> from lightning_l2l.tasks import Quadratic
        >>> params, buffers = init_from_seeds(Quadratic(dim=3), torch.tensor([7, 8, 9]))
        >>> params["theta"].shape
        torch.Size([3, 3])
        >>> alone, _ = init_from_seeds(Quadratic(dim=3), torch.tensor([9]))
        >>> bool((alone["theta"][0] == params["theta"][2]).all())
        True
    """
    if not isinstance(seeds, Tensor) or seeds.dim() != 1 or len(seeds) == 0 or seeds.dtype not in _INTEGERS:
        raise ValueError(f"seeds are {form(seeds)}; give one seed per task, an int64 tensor [num_tasks]")
    generator = torch.Generator()
    starts = [task.init_params(1, generator.manual_seed(mix_seed(seed, 0))) for seed in seeds.tolist()]
    params = {name: torch.cat([start[name] for start in starts]) for name in starts[0]}
    buffers = task.init_buffers(len(starts))

    def move(tensor: Tensor) -> Tensor:
        return tensor.to(device, dtype if tensor.is_floating_point() else None)

    return (
        {name: move(tensor) for name, tensor in params.items()},
        {name: move(tensor) for name, tensor in buffers.items()},
    )


def check_losses(losses: Tensor, num_tasks: int, *, at_start: bool) -> None:
    """Refuse losses from which nothing can be learnt, and say what to do about it.

    Args:
        losses: What ``Task.loss`` returned.
        num_tasks: How many tasks the batch holds.
        at_start: Whether this is the first step of an episode. Only there must the losses be finite (a check
            that waits for the device); later on, an optimizer may well diverge.

    Raises:
        ValueError: If they are no floating-point tensor ``[num_tasks]``, or a loss at the start is not finite.
    """
    if not isinstance(losses, Tensor) or losses.shape != (num_tasks,) or not losses.is_floating_point():
        raise ValueError(
            f"Task.loss returned {form(losses)}, expected [num_tasks] = [{num_tasks}]; "
            "return one loss per task, with no reduction over tasks"
        )
    if at_start and not bool(torch.isfinite(losses).all()):
        bad = (~torch.isfinite(losses)).nonzero().flatten().tolist()
        shown = ", ".join(f"{k}: {losses[k].item()}" for k in bad[:5]) + (", ..." if len(bad) > 5 else "")
        raise ValueError(
            f"the loss is not finite at the start of the episode for {len(bad)} of {num_tasks} tasks "
            f"(task: loss = {shown}); check the scale of the data and of the initial parameters (init_scale)"
        )
