"""What an optimizer checks: the options of a group, a gradient, and a state that is loaded."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_l2l.arguments import brief, check_at_least, is_number
from lightning_l2l.rules.base import UpdateRule
from lightning_l2l.rules.tensors import TensorRule


def check_options(options: Mapping[str, Any]) -> None:
    """Refuse options of a group that are out of their range.

    Raises:
        ValueError: With the option, its value, and what to use.
    """
    lr, decay, bound = options["lr"], options["weight_decay"], options["max_update"]
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError(f"lr of shape {list(lr.shape)} is not one number; give each group its own lr")
    if not (is_number(lr) or isinstance(lr, Tensor)) or not lr >= 0:
        raise ValueError(f"lr={brief(lr)} is not 0 or more; use 1.0 for the rule as it was trained, 0 to stand still")
    if not is_number(decay) or not decay >= 0:
        raise ValueError(f"weight_decay={brief(decay)} is not 0 or more; use 0 for none")
    if bound is not None and not (is_number(bound) and bound > 0):
        raise ValueError(f"max_update={brief(bound)} is not above 0; use None for no bound")
    check_at_least(1, optional=True, num_steps=options["num_steps"])


def check_known(num_steps: int | None, rules: Iterable[UpdateRule]) -> None:
    """Refuse to go without `num_steps` where one of the rules cannot.

    Raises:
        ValueError: One cannot.
    """
    if num_steps is None and any(isinstance(rule, TensorRule) and rule.needs_num_steps for rule in rules):
        raise ValueError("this rule needs to know how many steps will be made; give num_steps=10_000")


def check_gradient(p: Tensor) -> None:
    """Refuse a parameter whose gradient is none that a rule can take.

    Raises:
        RuntimeError: It is complex or sparse.
    """
    kind = "complex" if p.is_complex() else "sparse" if p.grad.layout != torch.strided else None  # type: ignore
    if kind is not None:
        raise RuntimeError(
            f"a gradient of shape {list(p.shape)} is {kind}; LearnedOptimizer takes dense real gradients, "
            "so give this parameter to another optimizer"
        )


def check_state(name: str, state: Any, p: Tensor, wanted: list[int]) -> None:
    """Refuse a loaded state that does not fit a parameter.

    Raises:
        ValueError: With both shapes.
    """
    if not (isinstance(state, Tensor) and state.layout == torch.strided):
        raise ValueError(f"{name} is {brief(state)}, no dense tensor of shape {wanted}; give another file")
    if list(state.shape) != wanted:
        raise ValueError(
            f"a state of shape {list(state.shape)} does not fit a parameter of shape {list(p.shape)}, "
            f"which takes {wanted}: it was saved with another rule or another model"
        )
