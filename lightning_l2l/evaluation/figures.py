"""Drawing: the learning curves of several optimizers on the same tasks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter
from numpy.typing import NDArray
from torch import Tensor

from lightning_l2l.evaluation.results import Result

#: Colours that people with any colour vision can tell apart (Okabe and Ito), strongest contrast first.
COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000", "#999999")
_MANY = 300  # inner steps, of which curves are smoothed
DASHES = ("-", (0, (5, 1.5)), (0, (3, 1.2, 1, 1.2)), (0, (1, 1)), (0, (6, 1.2, 1, 1.2, 1, 1.2)))


def look(k: int) -> dict[str, Any]:
    """How the line of optimizer k is drawn; 0 is the rule, which stands out."""
    style = {"color": COLOURS[k % len(COLOURS)], "linestyle": DASHES[k % len(DASHES)]}
    return {**style, "linewidth": 1.6 if k else 2.4}


def tidy(axes: Axes) -> None:
    """A faint grid behind the lines, and no box around them."""
    axes.grid(True, which="major", color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def label_log_axis(axis: Axis, low: float, high: float) -> None:
    """Where a logarithmic axis has few powers of ten, label what lies between them as well."""
    if high < 300 * low:
        axis.set_major_locator(MaxNLocator(5) if high < 5 * low else LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_minor_formatter(NullFormatter())


def learning_curves(results: Sequence[Result], title: str, quantiles: tuple[float, float]) -> Figure:
    """Draw the loss by inner step: a line for the mean over the tasks, a band between two quantiles.

    The first result is the one that the others are compared with and stands out. The axis follows the means;
    a curve that leaves it has diverged. Of more than 300 steps each curve is the running mean of a hundredth of them,
    since minibatches would make it a broad stripe.

    Args:
        results: What is drawn.
        title: Title.
        quantiles: Lower and upper end of the band, in [0, 1].

    Returns:
        A figure that no window system knows of.
    """
    figure = Figure(figsize=(6.4, 4.2), dpi=150)
    axes = figure.add_axes((0.105, 0.115, 0.865, 0.815))  # an automatic layout would draw everything twice
    axes.set_yscale("log")
    low, high = _limits(results)
    num_steps = max(len(result.losses) for result in results) - 1
    window = num_steps // 100 if num_steps > _MANY else 1
    for k, result in enumerate(results):
        steps = np.arange(window - 1, len(result.losses))
        curves = [c.unfold(0, window, 1).mean(1) for c in (result.mean, *(result.quantile(q) for q in quantiles))]
        mean, lower, upper = (_within(curve, low, high) for curve in curves)
        style = look(k)
        front = (len(results) - k) / 100
        axes.fill_between(
            steps, lower, upper, color=style["color"], alpha=0.06 if k else 0.18, linewidth=0, zorder=1 + front
        )
        for edge in (lower, upper):
            axes.plot(steps, edge, **{**style, "linewidth": 0.6}, alpha=0.5, zorder=2 + front)
        axes.plot(steps, mean, **style, label=_label(result), zorder=3 + front)
    axes.set_ylim(low, high)
    label_log_axis(axes.yaxis, low, high)
    axes.set_xlim(0, num_steps)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_title(title, fontsize="medium", loc="left")
    axes.set_xlabel("Inner step")
    axes.set_ylabel("Loss" if window == 1 else f"Loss, mean of {window} steps")
    tidy(axes)
    axes.legend(framealpha=0.8, edgecolor="none", fontsize="small", loc="upper right")
    return figure


def _label(result: Result) -> str:
    rate = "" if result.lr is None else f", lr {result.lr:g}"
    return f"{result.name}{rate}" + (f" ({result.diverged:.0%} diverged)" if result.diverged else "")


def _limits(results: Sequence[Result]) -> tuple[float, float]:
    """Ends of the loss axis: room for the means, and not much more for those that explode."""
    means = np.concatenate([result.mean.numpy() for result in results])
    shown = means[np.isfinite(means) & (means > 0)]
    starts = np.array([float(result.mean[0]) for result in results])
    starts = starts[np.isfinite(starts) & (starts > 0)]
    if not shown.size:
        return 0.1, 10.0
    high = min(shown.max(), 3 * starts.max()) if starts.size else shown.max()
    low = min(shown.min(), high)
    return float(low / 4), float(high * 1.5)


def _within(values: Tensor, low: float, high: float) -> NDArray[np.float64]:
    """A curve for a log axis: kept within a decade of the axis, with a gap where it has no logarithm."""
    clipped = np.clip(values.numpy(), low / 10, high * 10)
    return np.where(values.numpy() > 0, clipped, np.nan)
