"""What a checkpoint says of a MetaOptimizer, in plain types, also that of an earlier version."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning_l2l.meta.first_order import FirstOrder
from lightning_l2l.meta.imitation import Imitation
from lightning_l2l.meta.second_order import SecondOrder
from lightning_l2l.rules.describe import describe, describe_call

#: Arguments of before, which `meta_gradient` and `imitation` hold now.
_OF_BEFORE = ("second_derivatives", "memory", "memory_budget", "imitation_epochs")

#: Arguments of plain types, kept as attributes of the same name.
_PLAIN = (
    *("num_steps", "unroll_length", "loss_weights", "final_steps", "lr", "anneal", "gradient_clip", "max_skipped"),
    *("log_loss", "min_steps", "num_episodes"),
)


def describe_imitation(imitation: Imitation) -> dict[str, Any] | None:
    """An imitation as a configuration has it; None where its teacher or schedule is somebody's own function."""
    try:
        schedule = imitation.schedule and describe_call(imitation.schedule)
        teacher = describe_call(imitation.teacher)
    except ValueError:
        return None
    plain = {"weight": imitation.weight, "epochs": imitation.epochs, "cosine": imitation.cosine}
    return {**plain, "teacher": teacher, "schedule": schedule}


def as_of_now(given: Mapping[str, Any]) -> dict[str, Any]:
    """Hyperparameters of a checkpoint, in the arguments that a MetaOptimizer has now.

    Raises:
        ValueError: They do not say whom the rule imitates, as those of before did not, or are out of range.

    Example:
        >>> as_of_now({"num_steps": 9, "second_derivatives": True, "imitation": 0.0})["meta_gradient"]
        {'class_path': 'lightning_l2l.meta.second_order.SecondOrder', 'init_args': {}}
    """
    found = {name: value for name, value in given.items() if name not in _OF_BEFORE}
    if any(name in given for name in _OF_BEFORE):
        second = given.get("second_derivatives", False)
        memory = {name: given[name] for name in ("memory", "memory_budget") if name in given}
        found["meta_gradient"] = describe(SecondOrder() if second else FirstOrder(**memory))
        if given.get("imitation"):
            raise ValueError(
                f"it is of an earlier version and imitates a teacher (imitation={given['imitation']}), "
                "but does not say whom"
            )
        found["imitation"] = None
    return found


def hyperparameters_of(module: Any) -> dict[str, Any]:
    """What a checkpoint says of a MetaOptimizer, in plain types."""
    try:
        described = {"task": describe(module.task), "train_task": module.train_task and describe(module.train_task)}
    except ValueError:  # somebody's own network; who loads the checkpoint has to bring it along
        described = {}
    return {
        **described,
        "rule": describe(module.rule),
        **{name: getattr(module, name) for name in _PLAIN},
        "meta_gradient": describe(module.meta_gradient),
        "imitation": module.imitation and describe_imitation(module.imitation),
        "_instantiator": "lightning.pytorch.cli.instantiate_module",
    }
