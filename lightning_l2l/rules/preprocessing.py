"""What a rule sees of a gradient."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor


def log_and_sign(gradient: Tensor, p: float = 10.0) -> Tensor:
    r"""Magnitude on a logarithmic scale, and sign.

    .. math:: (\log|g| / p, \mathrm{sign}\,g) \text{ where } |g| \ge e^{-p}, \quad (-1, e^p g) \text{ elsewhere}

    Both features are clamped straight lines: :math:`\log|g|/p` falls to -1, and :math:`e^p g` reaches the sign,
    exactly at the threshold. So no branch is needed.

    Args:
        gradient: g, of any shape `[...]`.
        p: How many e-foldings below 1 count as magnitude rather than as zero; in (0, 87].

    Returns:
        `[2, ...]`, the first feature at least -1, the second in [-1, 1].

    Example:
        >>> log_and_sign(torch.tensor([1.0, -1.0, 0.0])).tolist()
        [[0.0, 0.0, -1.0], [1.0, -1.0, 0.0]]

    References:
        Andrychowicz et al., Learning to learn by gradient descent by gradient descent, appendix A,
        https://arxiv.org/abs/1606.04474, 2016.
    """
    # The first bound, below the second, is for derivatives of the gradient: that of log is infinite at 0.
    magnitude = gradient.abs().clamp(min=math.exp(-p) / 2).log_().div_(p).clamp(min=-1.0)
    sign = (gradient * math.exp(p)).clamp(-1.0, 1.0)
    return torch.stack([magnitude, sign])


def identity(gradient: Tensor, p: float = 10.0) -> Tensor:
    """The gradient as it is, `[...]` -> `[1, ...]`; `p` is not used."""
    return gradient.unsqueeze(0)


#: Name -> (function of gradient and p, number of features).
PREPROCESSING: dict[str, tuple[Callable[[Tensor, float], Tensor], int]] = {
    "log_and_sign": (log_and_sign, 2),
    "identity": (identity, 1),
}
