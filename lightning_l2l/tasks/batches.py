"""What tasks ask of a batch, and what is said of one that is not like that."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_l2l.arguments import brief
from lightning_l2l.tasks.minibatches import Minibatches

_MISFITS = (AssertionError, IndexError, RuntimeError, ValueError)
_PACKAGES = (Path(__file__).parents[1], Path(torch.__file__).parent)


def form(value: object) -> str:
    """Shape and type of a tensor, or the type of what is none, for a message."""
    if isinstance(value, Minibatches):
        return f"{list(value.shape)} {str(value.dtype).removeprefix('torch.')}"
    if isinstance(value, Tensor):
        kind = " without data" if value.is_meta else "" if value.layout == torch.strided else " sparse"
        return f"{list(value.shape)} {str(value.dtype).removeprefix('torch.')}{kind}"
    return f"no tensor but a {type(value).__name__}"


def get_entries(batch: Any, *names: str) -> list[Tensor]:
    """Entries of a batch.

    Args:
        batch: The episode's data.
        *names: Of the tensors.

    Returns:
        The tensors, in this order.

    Raises:
        ValueError: If the batch is no mapping, or an entry is missing, no tensor or without a dimension for the tasks.
    """
    if not isinstance(batch, Mapping):
        raise ValueError(f"a batch is {form(batch)}; give a dictionary of tensors with {', '.join(names)}")
    for name in names:
        if name not in batch:
            has = ", ".join(brief(key) for key in batch) or "nothing"
            raise ValueError(f"the batch has no {name!r}, it has {has}; give the task the data that it is for")
        entry = batch[name]
        if isinstance(entry, Minibatches):
            continue
        if not isinstance(entry, Tensor) or entry.dim() == 0 or entry.layout != torch.strided or entry.is_meta:
            raise ValueError(f"{name!r} of the batch is {form(entry)}; give a dense tensor [num_tasks, ...]")
    return [batch[name] for name in names]


def get_fitting(batch: Any, taker: object, like: Tensor, **shapes: tuple[int, ...]) -> list[Tensor]:
    """Entries of a batch that have the shapes which a task takes.

    Args:
        batch: The episode's data.
        taker: The task, for the message.
        like: Parameters ``[num_tasks, ...]``, with whose dtype and device the entries go.
        **shapes: Of one task's part of each entry.

    Returns:
        The tensors ``[num_tasks, *shape]``, in this order.

    Raises:
        ValueError: If one is missing, or has another shape, dtype or device.
    """
    entries = get_entries(batch, *shapes)
    for (name, shape), entry in zip(shapes.items(), entries, strict=True):
        wanted = [len(like), *shape]
        if list(entry.shape) != wanted:
            raise ValueError(
                f"{name!r} of the batch is {form(entry)} and {type(taker).__name__} takes {wanted}; give the task and "
                "the data the same sizes"
            )
        if entry.dtype != like.dtype or entry.device != like.device:
            raise ValueError(
                f"{name!r} of the batch is {form(entry)} on {entry.device} and the parameters are {form(like)} on "
                f"{like.device}; give the data the dtype and device of the parameters"
            )
    return entries


def check_minibatches(batch: Any, num_tasks: int, step: int, of_targets: str = "targets") -> list[Tensor]:
    """Inputs and targets of a batch that has minibatch ``step`` of every task.

    Raises:
        ValueError: If it has not.
    """
    inputs, targets = get_entries(batch, "inputs", of_targets)
    if inputs.dim() < 3 or targets.dim() < 3 or not len(inputs) == len(targets) == num_tasks:
        raise ValueError(
            f"inputs are {form(inputs)} and targets {form(targets)}; give [num_tasks, num_steps + 1, n, ...] and "
            "[num_tasks, num_steps + 1, n], one entry of 'seed' for each task"
        )
    if step >= min(inputs.shape[1], targets.shape[1]):
        raise ValueError(
            f"the batch has {min(inputs.shape[1], targets.shape[1])} minibatches and the episode wants more; give the "
            "data num_steps + 1 of them, by the same num_steps as that of the module"
        )
    return [inputs, targets]


def check_fit(error: Exception, network: nn.Module, inputs: Tensor, targets: Tensor) -> None:
    """Say that the data do not fit the network, where an error from within torch means that.

    One from somebody's own module is left as it is: its traceback shows where.

    Raises:
        ValueError: The data do not fit; the error is its cause.
    """
    path, trace = Path(__file__), error.__traceback__
    while trace is not None:
        path, trace = Path(trace.tb_frame.f_code.co_filename), trace.tb_next
        if not any(path.is_relative_to(package) for package in _PACKAGES):
            return
    told = " ".join(str(error).split())[:300]
    own = isinstance(error, ValueError) and path.is_relative_to(_PACKAGES[0])
    if not own and isinstance(error, _MISFITS) and "memory" not in told:
        raise ValueError(
            f"{type(network).__name__} and its loss do not take inputs {form(inputs)} and targets "
            f"{form(targets)}: {told}; give it data that it is for"
        ) from error
