"""A trained rule as an ordinary optimizer."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from inspect import signature
from itertools import groupby
from pathlib import Path
from typing import Any, NoReturn, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_l2l.arguments import brief, check_callable, check_flag, check_type, is_number
from lightning_l2l.rules import RuleGroups, UpdateRule
from lightning_l2l.rules.files import load_rule
from lightning_l2l.rules.groups import rules_of
from lightning_l2l.rules.parameters import (
    MADE_BY,
    RECORD,
    check_arguments,
    check_gradient,
    check_known,
    check_options,
    decay_,
    kind_of,
    lr_of,
    saved_states,
    warn_of_habits,
)
from lightning_l2l.rules.safeguards import fall_back, new_record, over_ranks, runs_away
from lightning_l2l.rules.segments import Segment, lay_out, runs
from lightning_l2l.rules.tensors import Clock, TensorRule, step_tensor

CLOCK = "step"
SKIPPED = "num_skipped"

log = logging.getLogger(__name__)


class LearnedOptimizer(Optimizer):
    r"""Lets a trained rule g optimise: theta <- theta + lr * g(gradient, state).

    All parameters go through the rule in one pass. The rule itself is not trained, and it has no hyperparameters to
    tune: `lr` multiplies its update, so that learning-rate schedules work and groups can have a scale of their own;
    1 is the rule as it was trained. `OneCycleLR` and `CyclicLR` find no momentum to cycle, so tell them:
    `OneCycleLR(optimizer, max_lr=1.0, total_steps=1000, cycle_momentum=False)`.

    A state_dict says, in each group, which rule made the state (`made_by`) and how many steps were left out
    (`num_skipped`). It is for the same rule alone, its meta-parameters included.

    State, for a parameter p: `rule_state`, `[state_size, p.numel()]` with the size of its rule's state, in the rule's
    dtype (float32) whatever the dtype of p, on the device of p, from its first gradient on. A rule that sees its tensor
    has `[state_size, *p.shape]`, and beside it `tensor_state`, a vector, and `step`, the number that the optimizer has
    made: parameters that join later are as far in its schedule as all others.

    Args:
        params: Parameters, named parameters, or groups of them as dicts, as `torch.optim.Adam` takes them. A group may
            have its own `lr`, `num_steps`, `weight_decay`, `maximize` and `max_update`. `RuleGroups` need them named.
            What else a group has is kept and ignored, as by `torch.optim`; of `betas` and the like a warning says so.
        rule: A rule, or what `load_rule` takes; "general" is the shipped one that has proved best on optimizees which
            it was not meta-trained on. Where it is on another device than a parameter, a copy is made there.
        lr: Factor on the rule's update, at least 0; a number, or a tensor of one. Where the largest of all groups is
            below 0.01, as a learning rate of Adam, a warning says so; 0 may freeze a group.
        num_steps: Steps that will be made, at least 1, for rules that see the time, such as `NormalizedMLP`; None:
            nobody knows. Going on beyond it is allowed: the rate stays at its floor. Other rules do not mind it.
        weight_decay: Decoupled, as in `torch.optim.AdamW`: an inner step begins with theta *= 1 - lr * weight_decay.
            At least 0. Since lr is 1 here rather than 0.001, values are about 1000 times smaller than AdamW's, and a
            warning says so above 0.005; but a rule that sees its tensor multiplies it by its rate of the moment, so
            that AdamW's 0.01 to 0.1 mean what they mean there.
        maximize: Go up: the rule is given the gradient of minus the loss.
        max_update: Bound on the absolute update of a coordinate, before lr; above 0. None: no bound.
        skip_nonfinite: Leave out an inner step, its effect on the state included, where any gradient has inf or nan;
            `num_skipped` counts them, and the first is warned of. On an accelerator the host waits for this once a
            step; False avoids that.
        fallback_lr: Learning rate, times `lr`, of the Adam that takes over for good when the loss runs away, as
            `safeguards.runs_away` defines it; a line is logged. It needs the loss: `step(closure)` or
            `step(loss=loss)`, to be minimised unless all groups maximize. Above 0. None: the rule stays.
        **unknown: None: arguments of other optimizers, such as `betas` or `foreach`, are refused by name.

    Raises:
        ValueError: An option is out of its range, or a parameter's name does not tell which of `RuleGroups` is its own.
        TypeError: The rule is none, a module is given in place of its parameters, or there is no such argument.
        RuntimeError: In `step`, for a sparse or complex gradient, or `fallback_lr` without a loss.

    Example:
        >>> from lightning_l2l import CoordinatewiseLSTM
        >>> model = torch.nn.Linear(3, 2)
        >>> optimizer = LearnedOptimizer(model.parameters(), CoordinatewiseLSTM())
        >>> model(torch.ones(1, 3)).sum().backward()
        >>> optimizer.step()
    """

    #: Whether the first dimension of each parameter is that of tasks side by side, which share nothing.
    side_by_side = False

    def __init__(
        self,
        params: Iterable[Any],
        rule: UpdateRule | str | Path = "general",
        lr: float | Tensor = 1.0,
        *,
        num_steps: int | None = None,
        weight_decay: float = 0.0,
        maximize: bool = False,
        max_update: float | None = None,
        skip_nonfinite: bool = True,
        fallback_lr: float | None = None,
        **unknown: NoReturn,
    ) -> None:
        check_arguments([*signature(LearnedOptimizer).parameters][:-1], unknown)
        if fallback_lr is not None and not (is_number(fallback_lr) and fallback_lr > 0):
            raise ValueError(f"fallback_lr={brief(fallback_lr)} is not above 0; use 0.001, or None for no fallback")
        check_flag(maximize=maximize, skip_nonfinite=skip_nonfinite)
        if isinstance(params, nn.Module):
            raise TypeError(f"params is the module {type(params).__name__}; give its parameters, module.parameters()")
        check_type((UpdateRule, str, Path, Mapping), "'mnist', the path of a checkpoint, or a rule", rule=rule)
        self.rule = rule if isinstance(rule, UpdateRule) else load_rule(rule)
        self.skip_nonfinite = skip_nonfinite
        self.num_skipped = 0
        self.fallback_lr = fallback_lr
        self._copies: dict[tuple[UpdateRule, torch.device], UpdateRule] = {}
        self._rules: dict[Tensor, UpdateRule] = {}
        self._segments: list[Segment] = []
        options = {"lr": lr, "num_steps": num_steps, "weight_decay": weight_decay}
        options |= {"maximize": maximize, "max_update": max_update}
        super().__init__(params, options)
        warn_of_habits(self.param_groups, self._rule_of)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As `torch.optim.Optimizer.add_param_group`; also in the middle of training.

        Raises:
            ValueError: An option is out of its range.
        """
        options = {**self.defaults, **(param_group if isinstance(param_group, dict) else {})}  # torch refuses others
        check_options(options)
        super().add_param_group(param_group)
        try:
            self._rules = rules_of(self.rule, self.param_groups)
            check_known(param_group["num_steps"], [self._rules[p] for p in param_group["params"]])
        except ValueError:
            self.param_groups.pop()
            raise

    def _rule_of(self, p: Tensor) -> UpdateRule:
        if p not in self._rules:  # of a copy
            self._rules = rules_of(self.rule, self.param_groups)
        return self._rules[p]

    def _seen_as_tensors(self, params: Iterable[Tensor]) -> dict[Tensor, None]:
        """Those of the parameters whose rule sees more than coordinates."""
        if not isinstance(self.rule, TensorRule | RuleGroups):
            return {}
        return {p: None for p in params if isinstance(self._rule_of(p), TensorRule)}

    @property
    def handed_over(self) -> bool:
        """Whether the fallback has taken over."""
        return self.fallback_lr is not None and bool(self.param_groups[0].get(RECORD, {}).get("handed_over"))

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None, *, loss: Any = None) -> Any:
        """One inner step.

        Args:
            closure: Evaluates the model again and returns the loss.
            loss: The loss, where there is no closure; for `fallback_lr`, nothing else needs it.

        Returns:
            The loss, as far as known.
        """
        if closure is not None:
            check_callable("a function that returns the loss, or the loss itself as step(loss=loss)", closure=closure)
            with torch.enable_grad():
                found = closure()
            loss = found if loss is None else loss
        group_of = {p: k for k, group in enumerate(self.param_groups) for p in group["params"] if p.grad is not None}
        for p in group_of:
            check_gradient(p)
        if self.fallback_lr is not None and not self.handed_over:
            self._watch(loss, closure is not None)
        if self.handed_over:
            if self._usable([p.grad for p in group_of]):
                fall_back(self.param_groups, self.state, cast(float, self.fallback_lr))
            return loss
        whole = self._seen_as_tensors(group_of)
        self._lay_out(group_of.keys() - whole if whole else group_of)
        neighbours = runs(self._segments, group_of)
        fed = [(s, first, last, self._gradient(s, first, last, group_of)) for s, first, last in neighbours]
        if self._usable([*(gradient for *_, gradient in fed), *(p.grad for p in whole)]):  # type: ignore[list-item]
            clock = Clock(max((int(state[CLOCK]) for state in self.state.values() if CLOCK in state), default=0))
            for p in whole:
                self._step_tensor(p, self.param_groups[group_of[p]], clock)
            for segment, first, last, gradient in fed:
                columns = slice(segment.offsets[first], segment.offsets[last])
                with _without_autocast(gradient.device.type):
                    rule = self._rule_on(segment.rule, gradient.device)
                    update = rule.step_(gradient, segment.state[:, columns])
                for k, run in groupby(range(first, last), lambda i: group_of[segment.params[i]]):  # noqa: B023
                    self._apply(self.param_groups[k], segment, list(run), update, columns.start)
        return loss

    def _gradient(self, segment: Segment, first: int, last: int, group_of: dict[Tensor, int]) -> Tensor:
        parts = []
        for p in segment.params[first:last]:
            part = p.grad.reshape(-1)  # type: ignore[union-attr]
            parts.append(-part if self.param_groups[group_of[p]]["maximize"] else part)
        return torch.cat(parts).to(segment.state.dtype)

    def _usable(self, gradients: list[Tensor]) -> bool:
        # A finite sum takes a thirtieth of the time, and tells; of finite gradients it may overflow.
        if not self.skip_nonfinite or all(bool(g.sum().isfinite()) or bool(g.isfinite().all()) for g in gradients):
            return True
        if not self.num_skipped:
            warnings.warn(
                "a gradient has inf or nan: this inner step is left out. Further ones are counted in "
                "LearnedOptimizer.num_skipped without a warning",
                stacklevel=5,
            )
        self.num_skipped += 1
        return False

    def _apply(self, group: dict[str, Any], segment: Segment, run: list[int], update: Tensor, start: int) -> None:
        """Add to neighbours of one group what is theirs of `update`, which begins at coordinate `start`."""
        params, offsets = segment.params[run[0] : run[-1] + 1], segment.offsets[run[0] : run[-1] + 2]
        update = update[offsets[0] - start : offsets[-1] - start]
        lr, bound = lr_of(group), group["max_update"]
        if bound is not None:
            update.clamp_(-bound, bound)
        if isinstance(lr, Tensor) or lr != 1:
            update.mul_(lr)
        decay_(params, group)
        parts = torch.split(update, [p.numel() for p in params])
        torch._foreach_add_(params, [part.view(p.shape) for part, p in zip(parts, params, strict=True)])

    def _step_tensor(self, p: Tensor, group: dict[str, Any], clock: Clock) -> None:
        """An inner step of a parameter whose rule sees it as a whole."""
        with _without_autocast(p.device.type):
            rule = cast(TensorRule, self._rule_on(self._rule_of(p), p.device))
            told = group["num_steps"], group["maximize"]
            decay = lr_of(group) * group["weight_decay"] if group["weight_decay"] else 0.0
            update = step_tensor(rule, p, self.state[p], clock, *told, tasks=self.side_by_side, decay=decay)
        self.state[p][CLOCK] = torch.tensor(clock.step + 1.0)  # on the host, as Adam's
        if group["max_update"] is not None:
            update.clamp_(-group["max_update"], group["max_update"])
        lr = lr_of(group)
        p.add_(update * lr) if isinstance(lr, Tensor) else p.add_(update, alpha=lr)

    def _lay_out(self, params: Iterable[Tensor]) -> None:
        ordered = (p for group in self.param_groups for p in group["params"])
        self._segments = lay_out(self._segments, params, ordered, self.state, self._rule_of)

    def _rule_on(self, rule: UpdateRule, device: torch.device) -> UpdateRule:
        parameter = next(rule.parameters(), None)
        if parameter is None or parameter.device == device:
            return rule
        if (rule, device) not in self._copies:
            self._copies[rule, device] = copy.deepcopy(rule).to(device)
        return self._copies[rule, device]

    def _watch(self, loss: Any, has_closure: bool) -> None:
        if loss is None:
            message = "fallback_lr is set, but there is no loss to watch; use step(closure) or step(loss=loss)"
            if not has_closure:
                raise RuntimeError(message)
            warnings.warn(message, stacklevel=5)  # the closure of a framework, which had none in this step
            return
        record = self.param_groups[0].setdefault(RECORD, new_record())  # where checkpoints have it
        sign = -1 if all(group["maximize"] for group in self.param_groups) else 1
        value = over_ranks(loss, next(p.device for group in self.param_groups for p in group["params"]))
        if runs_away(record, sign * value):
            record["handed_over"] = True
            for group in self.param_groups:
                for p in group["params"]:
                    self.state.pop(p, None)
            self._segments.clear()
            log.warning(
                "The loss ran away: its running mean is %.4g and was %.4g. From its step %d on, Adam with lr %g "
                "takes the place of the rule.",
                sign * record["mean"],
                sign * record["best"],
                record["steps"],
                self.fallback_lr,
            )

    def state_dict(self) -> dict[str, Any]:
        """As `torch.optim.Optimizer.state_dict`; each group says `num_skipped`, and which rule made the state."""
        content = super().state_dict()
        for group in content["param_groups"]:
            group.update({MADE_BY: kind_of(self.rule), SKIPPED: self.num_skipped})
        return content

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As `torch.optim.Optimizer.load_state_dict`; the rule's state keeps its own dtype.

        Raises:
            ValueError: The state was saved with another optimizer, another rule or another model.
        """
        given: dict[Tensor, dict[str, Tensor]] = {}

        def before(_: Optimizer, state_dict: dict[str, Any]) -> None:
            params = [p for group in self.param_groups for p in group["params"]]
            given.update(saved_states(state_dict, params, self.rule, self._rule_of))

        def after(_: Optimizer) -> None:
            for group in self.param_groups:
                group.pop(MADE_BY, None)
                self.num_skipped = group.pop(SKIPPED, 0)
                for option in ("lr", "num_steps", "weight_decay", "maximize", "max_update"):
                    group.setdefault(option, self.defaults[option])
            # The base class casts floating-point state to the parameter's dtype: take the values from the source.
            found = [p for p, states in given.items() if states]
            whole = self._seen_as_tensors(found)
            for p in found:
                like = self._rule_of(p).like
                self.state[p].update({k: v.to(p.device, like.dtype, copy=True) for k, v in given[p].items()})
            self._segments.clear()
            self._lay_out([p for p in found if p not in whole])

        # Hooks, so that those of users find before them what they would with any other optimizer.
        handles = [
            self.register_load_state_dict_pre_hook(before),
            self.register_load_state_dict_post_hook(after, prepend=True),
        ]
        try:
            super().load_state_dict(state_dict)
        finally:
            for handle in handles:
                handle.remove()

    def __getstate__(self) -> dict[str, Any]:
        """What is copied and pickled: all but what can be made anew."""
        kept = {key: self.__dict__[key] for key in ("rule", "skip_nonfinite", "num_skipped", "fallback_lr")}
        return {**super().__getstate__(), **kept, "_copies": {}, "_segments": [], "_rules": {}}


def _without_autocast(device_type: str) -> AbstractContextManager[Any]:
    """A step may be made inside of an autocast, as Lightning's manual optimization does."""
    available = torch.amp.is_autocast_available(device_type)
    return torch.autocast(device_type, enabled=False) if available else nullcontext()
