"""What tasks ask of a batch, and what is said of one that is not like that."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_l2l.arguments import brief
from lightning_l2l.data.minibatches import Minibatches

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


def check_minibatches(batch: Any, num_tasks: int, step: int) -> list[Tensor]:
    """Inputs and targets of a batch that has minibatch ``step`` of every task.

    Raises:
        ValueError: If it has not.
    """
    inputs, targets = get_entries(batch, "inputs", "targets")
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
