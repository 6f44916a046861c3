"""A trained rule as an ordinary optimizer, and where to get one."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_l2l.rule_files import SUFFIX, fill_rule, read_rule, read_shipped, reason, shipped_rules
from lightning_l2l.rules import UpdateRule
from lightning_l2l.rules.base import RuleUnroll

STATE = "rule_state"


class LearnedOptimizer(Optimizer):
    r"""Lets a trained rule g optimise: theta <- theta + lr * g(gradient, state).

    All parameters of a group go through the rule in one call. The rule itself is not trained, and it has no
    hyperparameters to tune: `lr` multiplies its update, so that learning-rate schedules work; 1 is the rule as
    it was trained.

    State, for a parameter p: `rule_state`, `[rule.state_size, p.numel()]`, in the rule's dtype (float32)
    whatever the dtype of p.

    Args:
        params: Parameters, or groups of them as dicts, as `torch.optim.Adam` takes them.
        rule: A rule, or what `load_rule` takes.
        lr: Factor on the rule's update, at least 0.

    Raises:
        ValueError: `lr` is negative.
        RuntimeError: In `step`, for a sparse or complex gradient.

    Example:
        >>> from lightning_l2l import CoordinatewiseLSTM
        >>> model = torch.nn.Linear(3, 2)
        >>> optimizer = LearnedOptimizer(model.parameters(), CoordinatewiseLSTM())
        >>> model(torch.ones(1, 3)).sum().backward()
        >>> optimizer.step()
    """

    def __init__(self, params: Iterable[Any], rule: UpdateRule | str | Path, lr: float = 1.0) -> None:
        if lr < 0:
            raise ValueError(f"lr={lr} is negative; use 1.0 for the rule as it was trained, 0 to stand still")
        self.rule = rule if isinstance(rule, UpdateRule) else load_rule(rule)
        self._unrollers: dict[tuple[int, torch.device], RuleUnroll] = {}
        self._flat: dict[tuple[int, ...], Tensor] = {}
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One inner step.

        Args:
            closure: Evaluates the model again and returns the loss.

        Returns:
            The closure's loss, or None.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            with_gradient = [p for p in group["params"] if p.grad is not None and p.numel()]
            for device in {p.device for p in with_gradient}:
                self._step([p for p in with_gradient if p.device == device], device, group["lr"])
        return loss

    def _step(self, params: list[Tensor], device: torch.device, lr: float) -> None:
        for p in params:
            if p.grad.is_sparse or p.is_complex():  # type: ignore[union-attr]
                raise RuntimeError(
                    f"a gradient of shape {list(p.shape)} is {'complex' if p.is_complex() else 'sparse'}; "
                    "LearnedOptimizer takes dense real gradients, so give this parameter to another optimizer"
                )
        state, sizes = self._state_of(params, device), [p.numel() for p in params]
        gradient = torch.cat([p.grad.flatten() for p in params]).to(state.dtype)  # type: ignore[union-attr]
        unroller = self._unroller(gradient.numel(), device)
        unroller.begin(state)
        update = unroller.step(gradient)
        unroller.finish(state)
        for p, u in zip(params, torch.split(update, sizes), strict=True):
            p.add_(u.view(p.shape), alpha=lr)

    def _state_of(self, params: list[Tensor], device: torch.device) -> Tensor:
        """The state of all these parameters in one tensor, of which each one's own is a view."""
        sizes, key = [p.numel() for p in params], tuple(map(id, params))
        flat = self._flat.get(key)
        if flat is not None:
            own = [self.state[p].get(STATE) for p in params]
            views = torch.split(flat, sizes, 1)
            if all(s is not None and s.data_ptr() == v.data_ptr() for s, v in zip(own, views, strict=True)):
                return flat
        dtype = next(self.rule.parameters()).dtype
        for p in params:
            if STATE not in self.state[p]:
                self.state[p][STATE] = self.rule.init_state(p.numel(), device=device, dtype=dtype)
        flat = torch.cat([self.state[p][STATE] for p in params], 1)
        for p, view in zip(params, torch.split(flat, sizes, 1), strict=True):
            self.state[p][STATE] = view
        self._flat = {**{k: v for k, v in self._flat.items() if not set(k) & set(key)}, key: flat}
        return flat

    def _unroller(self, size: int, device: torch.device) -> RuleUnroll:
        if next(self.rule.parameters()).device != device:
            self.rule.to(device)
            self._unrollers.clear()
        key = (size, device)
        if key not in self._unrollers:
            self._unrollers[key] = self.rule.unroller(size, 1, memory="flat")
        return self._unrollers[key]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As `torch.optim.Optimizer.load_state_dict`; the rule's state keeps its own dtype."""
        super().load_state_dict(state_dict)
        # The base class casts floating-point state to the parameter's dtype: take the values from the source.
        saved = [p for group in state_dict["param_groups"] for p in group["params"]]
        own = [p for group in self.param_groups for p in group["params"]]
        for index, p in zip(saved, own, strict=True):
            if index in state_dict["state"]:
                self.state[p][STATE] = state_dict["state"][index][STATE].to(p.device, copy=True)

    def __getstate__(self) -> dict[str, Any]:
        """What is copied and pickled: all but the rule's buffers, which are made anew."""
        return {**super().__getstate__(), "rule": self.rule, "_unrollers": {}, "_flat": {}}


def load_rule(name_or_path: str | Path) -> UpdateRule:
    """A trained rule, in evaluation mode.

    No file can execute code: rule files are read without pickle, checkpoints with `weights_only=True`.

    Args:
        name_or_path: Name of a shipped rule ("mnist", "quadratic"), or path of a rule file (`.npz`) or of a Lightning
            checkpoint of `MetaOptimizer`.

    Raises:
        FileNotFoundError: There is neither a shipped rule nor a file of this name.
        ValueError: The file holds no rule, is damaged, or holds a rule of another size.
    """
    path = Path(name_or_path)
    if str(name_or_path) in shipped_rules():
        return read_shipped(str(name_or_path))
    if path.suffix == SUFFIX and path.is_file():
        return read_rule(path)
    checkpoint = read_checkpoint(path)
    weights = {k.removeprefix("rule."): v for k, v in checkpoint["state_dict"].items() if k.startswith("rule.")}
    return fill_rule(checkpoint["hyper_parameters"]["rule"], weights, path)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint of `MetaOptimizer`, read without executing anything in it.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is damaged, has code in it, or is no checkpoint of a rule.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"no rule at {str(path)!r}; give the path of a checkpoint that `fit` wrote, or the name of a shipped "
            f"rule: {', '.join(shipped_rules())}"
        )
    try:
        checkpoint: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a damaged file makes torch.load raise
        raise ValueError(
            f"{str(path)!r} cannot be read as a checkpoint (damaged, or with code in it), give another one: "
            f"{reason(error)}"
        ) from error
    try:
        checkpoint["hyper_parameters"]["rule"], checkpoint["state_dict"].items()
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{str(path)!r} is no checkpoint of a MetaOptimizer: it holds no rule") from error
    return checkpoint
