"""An optimizer's parameters: what is checked of their options, gradients and saved state, and what options do."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_l2l.arguments import brief, check_at_least, is_number
from lightning_l2l.rules.base import UpdateRule
from lightning_l2l.rules.tensors import NAMES, TensorRule, shapes_of

#: Where the first group has what `safeguards.runs_away` remembers.
RECORD = "loss_record"
#: Where a saved group says which rule made the state.
MADE_BY = "made_by"
#: Factors on the update below this are taken for learning rates of Adam, 0 excepted.
SMALL_LR = 0.01
#: Decays above this are taken for values of AdamW, which multiplies them by a learning rate of about 0.001.
LARGE_DECAY = 0.005
#: Hyperparameters of torch's optimizers that no rule has.
_OF_OTHERS = (
    *("alpha", "amsgrad", "betas", "capturable", "centered", "dampening"),
    *("differentiable", "eps", "foreach", "fused", "momentum", "nesterov"),
)


def check_arguments(known: Iterable[str], unknown: Mapping[str, Any]) -> None:
    """Refuse arguments that an optimizer of a trained rule does not have, such as Adam's.

    Raises:
        TypeError: There is one.
    """
    for name, value in unknown.items():
        raise TypeError(
            f"{name}={brief(value)} is no argument of LearnedOptimizer, whose rule has no hyperparameters: it is used "
            f"as it was trained. Remove {name}, or use one of {', '.join(known)}"
        )


def warn_of_habits(groups: Sequence[Mapping[str, Any]], rule_of: Callable[[Tensor], UpdateRule]) -> None:
    """Warn of values that are usual for Adam and mean something else here, each kind once.

    A group may have a small `lr` beside one that has not, and 0, which freezes it.

    Args:
        groups: Of parameters, with the options of each.
        rule_of: The rule that updates a parameter.
    """
    largest = max(float(group["lr"]) for group in groups)
    if 0 < largest < SMALL_LR:
        warnings.warn(
            f"lr={largest:g} is a factor on the rule's own update here, not a learning rate: 1.0 is the rule as it was "
            "trained. Leave lr out; where the loss jumps, use 0.1",
            stacklevel=3,
        )
    for group in groups:
        lr, decay = float(group["lr"]), group["weight_decay"]
        coordinatewise = any(not isinstance(rule_of(p), TensorRule) for p in group["params"])
        if lr >= SMALL_LR and decay > LARGE_DECAY and coordinatewise:
            warnings.warn(
                f"weight_decay={decay:g} takes {100 * lr * decay:.2g} % off each parameter in every step: it is "
                f"multiplied by lr={lr:g}, where AdamW has about 0.001. Use a value about 1000 times smaller than "
                f"AdamW's, such as {decay / 1000:g}",
                stacklevel=3,
            )
            break
    found = [name for name in _OF_OTHERS if any(group.get(name) for group in groups)]
    if found:
        warnings.warn(
            f"a group of parameters has {', '.join(found)}: the rule has no such hyperparameter and ignores it. "
            "Remove it",
            stacklevel=3,
        )


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


def kind_of(rule: UpdateRule) -> str:
    """Which rule it is, in a line: its class, those of its members, and a fingerprint of its meta-parameters.

    Other arguments are left out: a version of the package to come may have more of them.

    Example:
        >>> from lightning_l2l import CoordinatewiseLSTM, NormalizedMLP
        >>> kind_of(NormalizedMLP(hidden_size=0))
        'NormalizedMLP'
        >>> kind_of(CoordinatewiseLSTM()).startswith("CoordinatewiseLSTM with the meta-parameters ")
        True
    """
    kind, *members = [type(one).__name__ for one in rule.modules() if isinstance(one, UpdateRule)]
    kind += f" of {', '.join(members)}" if members else ""
    weights = [value for value in rule.state_dict().values() if isinstance(value, Tensor)]
    if not weights:
        return kind
    content = b"".join(value.detach().cpu().float().contiguous().numpy().tobytes() for value in weights)
    return f"{kind} with the meta-parameters {hashlib.sha256(content).hexdigest()[:8]}"


def saved_states(
    state_dict: Mapping[str, Any], params: Sequence[Tensor], rule: UpdateRule, rule_of: Callable[[Tensor], UpdateRule]
) -> dict[Tensor, dict[str, Tensor]]:
    """What a state_dict has of a rule's state, as far as its parameters match: the base class says where not.

    Args:
        state_dict: Of a `LearnedOptimizer`. One from before it said which rule made it is taken for one of this rule.
        params: Of the optimizer, group by group.
        rule: Of the optimizer.
        rule_of: The rule that updates a parameter: this one, or a member.

    Returns:
        By parameter and name.

    Raises:
        ValueError: Another optimizer or another rule made it, or a state does not fit its parameter.
    """
    groups = state_dict["param_groups"]
    saved = [state_dict["state"].get(k, {}) for group in groups for k in group["params"]]
    handed_over = any(group.get(RECORD, {}).get("handed_over") for group in groups)
    foreign = [name for state in saved if NAMES[0] not in state and not handed_over for name in state]
    foreign += [name for group in groups if "max_update" not in group for name in _OF_OTHERS if name in group]
    if foreign:
        raise ValueError(
            f"this state_dict has {', '.join(dict.fromkeys(foreign))}: another optimizer saved it, such as Adam, and "
            "a rule cannot go on from there. Load the weights of the model alone, and let the optimizer start anew"
        )
    kind = kind_of(rule)
    for group in groups:
        if group.get(MADE_BY, kind) != kind:
            raise ValueError(
                f"this state_dict was saved with another rule, {brief(group[MADE_BY], 200)}, and the optimizer has "
                f"{brief(kind, 200)}. Make the optimizer with the rule that it was saved with; to go on with this one "
                f"all the same, remove {MADE_BY!r} from each of state_dict['param_groups']"
            )
    given = {}
    for p, state in zip(params, saved, strict=False):
        shapes = shapes_of(rule_of(p), p)
        given[p] = {name: state[name] for name in shapes if state.get(name) is not None}
        for name, found in given[p].items():
            _check_state(name, found, p, shapes[name])
    return given


def _check_state(name: str, state: Any, p: Tensor, wanted: list[int]) -> None:
    if not (isinstance(state, Tensor) and state.layout == torch.strided):
        raise ValueError(f"{name} is {brief(state)}, no dense tensor of shape {wanted}; give another file")
    if list(state.shape) != wanted:
        raise ValueError(
            f"a state of shape {list(state.shape)} does not fit a parameter of shape {list(p.shape)}, "
            f"which takes {wanted}: it was saved with another rule or another model"
        )


def lr_of(group: Mapping[str, Any]) -> Any:
    """A number, or a tensor without dimensions: on an accelerator it is not waited for."""
    return group["lr"].view(()) if isinstance(group["lr"], Tensor) else group["lr"]


def decay_(params: list[Tensor], group: Mapping[str, Any]) -> None:
    """Shrink parameters of a group by its decoupled weight decay, in place: theta *= 1 - lr * weight_decay."""
    if group["weight_decay"] and params:
        torch._foreach_mul_(params, 1 - lr_of(group) * group["weight_decay"])
