"""Optimizers that look at whole tensors, or at a whole model: each task gets one of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

#: Those of PyTorch that work on each coordinate by itself, so that tasks may lie side by side in one tensor.
COORDINATEWISE = tuple(
    getattr(torch.optim, name)
    for name in (
        "ASGD",
        "Adadelta",
        "Adagrad",
        "Adam",
        "AdamW",
        "Adamax",
        "NAdam",
        "RAdam",
        "RMSprop",
        "Rprop",
        "SGD",
    )
)


class Apart(Optimizer):
    """One optimizer a task, for parameters that have the tasks side by side in their first dimension.

    Args:
        named: Names and parameters `[num_tasks, ...]`.
        make: From a list of a task's parameters with their names to the optimizer for them.
    """

    def __init__(self, named: list[tuple[str, Tensor]], make: Callable[[list[tuple[str, Tensor]]], Optimizer]) -> None:
        super().__init__([p for _, p in named], {})
        self.stacked = [p for _, p in named]
        num_tasks = len(self.stacked[0])
        # Views: what an optimizer writes to a task's parameter is in the stacked one.
        self.of_task = [[p.detach()[k].requires_grad_() for p in self.stacked] for k in range(num_tasks)]
        names = [name for name, _ in named]
        self.optimizers = [make(list(zip(names, params, strict=True))) for params in self.of_task]

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step of each task's optimizer."""
        for k, (params, optimizer) in enumerate(zip(self.of_task, self.optimizers, strict=True)):
            for p, whole in zip(params, self.stacked, strict=True):
                p.grad = None if whole.grad is None else whole.grad[k]
            optimizer.step()

    def mode(self, training: bool) -> bool:
        """Change to the parameters that are trained, or to those that are to be used, where these differ.

        Returns:
            Whether they differ.
        """
        modes = [getattr(optimizer, "train" if training else "eval", None) for optimizer in self.optimizers]
        for change in modes:
            if change is not None:
                change()
        return any(change is not None for change in modes)


class MuonAndAdamW(Optimizer):
    """`torch.optim.Muon` for matrices, convolutions among them, and `torch.optim.AdamW` for what is no matrix.

    Args:
        params: Parameters of one model.
        lr: Learning rate of both: Muon's update is scaled to the size of AdamW's.
        weight_decay: Of both.
        momentum: Of Muon.
    """

    def __init__(
        self, params: Iterable[Tensor], lr: float = 1e-3, weight_decay: float = 0.0, momentum: float = 0.95
    ) -> None:
        if not hasattr(torch.optim, "Muon"):
            raise RuntimeError(f"torch {torch.__version__} has no Muon; leave it out, or install torch 2.9 or newer")
        given = list(params)
        super().__init__(given, {"lr": lr})
        self.matrices = [p for p in given if p.dim() > 1]
        self.flat = [p.detach().view(len(p), -1).requires_grad_() for p in self.matrices]
        others = [p for p in given if p.dim() < 2]
        self.members: list[Optimizer] = []
        if self.flat:
            options = {"momentum": momentum, "adjust_lr_fn": "match_rms_adamw"}
            self.members.append(torch.optim.Muon(self.flat, lr=lr, weight_decay=weight_decay, **options))  # type: ignore[arg-type]
        if others:
            self.members.append(torch.optim.AdamW(others, lr=lr, weight_decay=weight_decay))

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step of both."""
        for p, flat in zip(self.matrices, self.flat, strict=True):
            flat.grad = None if p.grad is None else p.grad.reshape(flat.shape)
        for member in self.members:
            for group in member.param_groups:
                group["lr"] = self.param_groups[0]["lr"]  # which a schedule may have changed
            member.step()


def of_package(package: str, name: str) -> Callable[..., Optimizer]:
    """An optimizer of a package that need not be installed.

    Raises:
        ValueError: When it is made and the package is missing.
    """

    def make(*args: Any, **options: Any) -> Optimizer:
        try:
            found: Optimizer = getattr(import_module(package), name)(*args, **options)
        except ImportError as error:
            raise ValueError(f"{name} needs {package}; pip install 'lightning_l2l[baselines]'") from error
        return found

    return make
