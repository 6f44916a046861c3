"""When a run goes wrong beyond repair by the rule that made it."""

from __future__ import annotations

import math
from collections.abc import MutableMapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, distributed
from torch.optim import Adam

from lightning_l2l.arguments import brief
from lightning_l2l.rules.parameters import decay_, lr_of

#: Inner steps over which the loss is averaged, and twice of which pass before it is judged.
WINDOW = 10
#: The part of what had been gained that may be lost again.
TOLERANCE = 0.5
#: Inner steps that may pass before a loss is not above the first.
PATIENCE = 100
#: How many standard deviations of a single loss the mean may lie above that: noise alone never gets there.
DEVIATIONS = 3


def new_record() -> dict[str, Any]:
    """What `runs_away` remembers, in plain types, before the first loss."""
    running = {"steps": 0, "mean": 0.0, "variance": 0.0}
    return {**running, "first": math.nan, "improved": False, "start": math.nan, "best": math.inf, "noise": 0.0}


def runs_away(record: dict[str, Any], loss: float) -> bool:
    r"""Whether a run has lost more than half of what it had gained, or never gained anything.

    .. math:: m_t > b + (m_{10} - b) / 2 + 3 s, \qquad m_t = m_{t-1} + (l_t - m_{t-1}) / \min(t, 10)

    m is a running mean of the losses, b its smallest value so far, and s the standard deviation of the losses around
    m when it was reached. So neither the scale nor the sign of the loss matters, nor that minibatches differ. No
    judgement is made before step 20. A run that explodes at once loses nothing that it had gained: it has run away if
    each of 100 losses is above the first. A loss that is not finite does not count: its gradient is left out anyway.

    Args:
        record: As `new_record` makes it; updated.
        loss: Of this inner step.

    Example:
        >>> record = new_record()
        >>> any(runs_away(record, 1 / (1 + t)) for t in range(100))
        False
        >>> [runs_away(record, 1.0) for t in range(3)]
        [False, True, True]
    """
    if not math.isfinite(loss):
        return False
    record["steps"] += 1
    if record["steps"] == 1:
        record["first"] = loss
    else:
        record["improved"] = record["improved"] or loss <= record["first"]
    weight, off = 1 / min(record["steps"], WINDOW), loss - record["mean"]
    record["mean"] += weight * off
    record["variance"] = (1 - weight) * (record["variance"] + weight * off * off)
    if record["steps"] < WINDOW:
        return False
    if record["steps"] == WINDOW:
        record["start"] = record["mean"]
    if record["mean"] < record["best"]:
        record.update(best=record["mean"], noise=math.sqrt(record["variance"]))
    if record["steps"] > PATIENCE and not record["improved"]:
        return True
    allowed = TOLERANCE * (record["start"] - record["best"]) + DEVIATIONS * record["noise"]
    return bool(record["steps"] >= 2 * WINDOW and record["mean"] - record["best"] > allowed)


def over_ranks(loss: Any, device: torch.device) -> float:
    """A loss as a number: under `torch.distributed` the mean over all ranks, so that all decide alike.

    Raises:
        ValueError: It is not one number.
    """
    if isinstance(loss, Tensor) and loss.numel() != 1:
        raise ValueError(f"a loss of shape {list(loss.shape)} is not one number; give its mean")
    try:
        value = loss.detach() if isinstance(loss, Tensor) else torch.tensor(float(loss), dtype=torch.float64)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"the loss {brief(loss)} is no number; give the mean over the minibatch") from error
    if distributed.is_available() and distributed.is_initialized():
        value = value.to(device, torch.float32, copy=True)
        distributed.all_reduce(value)
        value /= distributed.get_world_size()
    return float(value)


def fall_back(groups: Sequence[dict[str, Any]], state: MutableMapping[Tensor, Any], lr: float) -> None:
    """A step of Adam in place of the rule.

    Args:
        groups: Of parameters; each keeps its direction, its decay and its own `lr`, a factor on that of Adam.
        state: Adam's by parameter, changed in place.
        lr: Of Adam.
    """
    given = []
    for group in groups:
        decay_([p for p in group["params"] if p.grad is not None], group)
        given.append({"params": group["params"], "lr": lr_of(group) * lr, "maximize": group["maximize"]})
    adam = Adam(given)
    adam.state = cast(Any, state)
    adam.step()
