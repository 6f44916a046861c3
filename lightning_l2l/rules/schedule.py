"""How large a step is at which moment."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from lightning_l2l.rules.tensors import Moment

Schedule = Literal["cosine", "linear", "constant"]
#: Steps over which the rate hardly falls where nobody knows how many there will be; then it falls as one over the step.
ANYTIME = 200


def rate_at(
    moment: Moment, schedule: Schedule, step_size: float | None, size: float, warmup: int, floor: float
) -> Tensor:
    """The rate of each task, `[num_tasks]`.

    Args:
        moment: When.
        schedule: How the rate falls where the number of steps is known.
        step_size: The rate at the end of warm-up; None: `size` / sqrt(num_steps).
        size: See there.
        warmup: *Inner steps* over which the rate rises.
        floor: Share of the rate that is left from the last step on.
    """
    step, known = moment.step, moment.num_steps
    rise = ((step + 1) / warmup).clamp(max=1) if warmup else torch.ones_like(step)
    if step_size is not None:
        rise = rise * step_size
    else:
        rise = rise * size / (math.sqrt(ANYTIME) if known is None else known.sqrt())
    if schedule == "constant":
        return rise
    if known is None:
        return rise / (1 + step / ANYTIME)
    gone = (step / known).clamp(max=1)
    left = (1 + (math.pi * gone).cos()) / 2 if schedule == "cosine" else 1 - gone
    return rise * (floor + (1 - floor) * left)
