"""A map of a rule in a line, as tables and as heat maps: what `python -m lightning_l2l map` shows of its rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import Colormap, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from rich.box import SIMPLE_HEAD
from rich.table import Table

from lightning_l2l.commands.grids import DEFAULT_ADAM, Page
from lightning_l2l.commands.sweep import Row

WINS, TIES, LOSES, DIVERGES = "wins", "ties", "loses", "diverges"
#: Of a cell: see `Result.speed_up`.
STEPS, SECONDS = "share_of_steps", "share_of_seconds"
_NEVER = "never"
_ENDS = 4.0  # ratio at which a colour is at its strongest
_HATCHED: dict[str, Any] = {"facecolor": "0.93", "edgecolor": "0.75", "hatch": "////", "linewidth": 0}


def summary(rows: Sequence[Row]) -> str:
    """The cells of a rule in a line."""
    count = {kind: sum(row.get("verdict") == kind for row in rows) for kind in (WINS, TIES, LOSES, DIVERGES)}
    line = f"{', '.join(f'{kind} {number}' for kind, number in count.items())} of {len(rows)} cells"
    pairs = [(float(row["learned"]), float(row["adam"])) for row in rows if row.get("adam")]
    ratios = [learned / adam for learned, adam in pairs if adam and math.isfinite(adam)]
    if ratios:
        line += f"; median of learned / tuned Adam {median(ratios):.3f}"
    pairs = [(float(row["learned"]), float(row[DEFAULT_ADAM])) for row in rows if row.get(DEFAULT_ADAM)]
    if pairs:
        better = sum(learned <= default for learned, default in pairs)
        line += f"; no worse than Adam at its default learning rate in {better} of {len(pairs)}"
    steps, seconds = _known(rows, STEPS), _known(rows, SECONDS)
    if steps:
        below = len(steps) - steps.count(math.inf)
        line += f"; stays below the best tuned optimizer's final loss in {below} of {len(steps)}"
        line += f", median share of the steps: {_share(median(steps))}"
        line += f", of the seconds: {_share(median(seconds))}" if seconds else ""
    return line


def table(page: Page, rows: Sequence[Row]) -> Table:
    """A page as ratios and verdicts, from the rows of one rule."""
    found = Table(title=page.name, box=SIMPLE_HEAD, title_justify="left")
    found.add_column(page.down.name, justify="right")
    for across in page.across.values:
        found.add_column(across, justify="right")
    for down, line in zip(page.down.values, _cells(page, rows), strict=True):
        found.add_row(down, *(f"{shown(cell)} {cell.get('verdict', 'not run')}" for cell in line))
    return found


def shown(cell: Row) -> str:
    """The ratio of a cell; "-" where there is none, or it is infinite."""
    return _number(float(cell.get("ratio") or "nan"))


def draw(pages: Sequence[Page], rows: Sequence[Row], title: str) -> Figure:
    """A heat map a page of the ratios: blue where the rule wins, red where it loses, crossed out where it diverges.

    Bold where it wins or loses by more than chance.

    Args:
        pages: What is drawn.
        rows: Of `map.csv`, those of one rule.
        title: Title.
    """
    scale = _Scale(_strength, shown, colormaps["RdBu_r"], Normalize(-1, 1))
    return _draw(pages, rows, title, scale)


def draw_steps(pages: Sequence[Page], rows: Sequence[Row], name: str) -> Figure:
    """A heat map a page of the shares of the steps: the darker, the sooner; hatched where the rule never stays below.

    Bold and crossed out as in `draw`.

    Args:
        pages: What is drawn.
        rows: Of `map.csv`, those of one rule.
        name: That of the rule.
    """
    scale = _Scale(_steps, lambda cell: _share(_steps(cell)), colormaps["Blues_r"], Normalize(0, 1.25))
    what = "share of the steps after which its loss stays below\nthe final loss of the best tuned optimizer; dark: soon"
    figure = _draw(pages, rows, f"{name}: {what}", scale)
    cells = [cell for page in pages for line in _cells(page, rows) for cell in line]
    shares = _known(cells, STEPS)
    label = f"{_NEVER}: its loss ends above, in {shares.count(math.inf)} of {len(shares)} cells"
    label += "; -: not known" if len(shares) < len(cells) else ""
    figure.legend(handles=[Patch(**_HATCHED, label=label)], loc="outside lower left", frameon=False, fontsize="small")
    return figure


@dataclass(frozen=True)
class _Scale:
    """How cells are drawn.

    Attributes:
        value: What gives a cell its colour: nan for none, inf for hatched.
        text: What is written in it.
        colours: Of the values.
        norm: Their range.
    """

    value: Callable[[Row], float]
    text: Callable[[Row], str]
    colours: Colormap
    norm: Normalize


def _draw(pages: Sequence[Page], rows: Sequence[Row], title: str, scale: _Scale) -> Figure:
    columns = min(2, len(pages))
    lines = math.ceil(len(pages) / columns)
    rows_of = [max(len(p.down.values) for p in pages[columns * k : columns * (k + 1)]) for k in range(lines)]
    heights = [1.1 + 0.36 * max(number, 3) for number in rows_of]
    figure = Figure(figsize=(5.6 * columns, 0.5 + sum(heights)), dpi=130, layout="constrained")
    grid = list(figure.subplots(lines, columns, squeeze=False, height_ratios=heights).flat)
    for page, axes in zip(pages, grid, strict=False):
        _draw_page(page, _cells(page, rows), axes, scale)
    for axes in grid[len(pages) :]:
        axes.set_visible(False)
    figure.suptitle(title, fontsize="medium", x=0.01, ha="left")
    return figure


def _draw_page(page: Page, cells: Sequence[Sequence[Row]], axes: Axes, scale: _Scale) -> None:
    values = [[scale.value(cell) for cell in line] for line in cells]
    axes.imshow(values, cmap=scale.colours, norm=scale.norm, aspect="auto")
    for y, line in enumerate(cells):
        for x, cell in enumerate(line):
            hatched = math.isinf(values[y][x])
            finite = math.isfinite(values[y][x])
            red, green, blue, _ = scale.colours(scale.norm(values[y][x])) if finite else (1.0,) * 4
            dark = 0.2126 * red + 0.7152 * green + 0.0722 * blue < 0.5  # luminance
            if hatched:
                axes.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, **_HATCHED))
            axes.text(
                x,
                y,
                scale.text(cell),
                ha="center",
                va="center",
                fontsize="small",
                color="white" if dark else "black",
                fontweight="bold" if cell.get("verdict") in (WINS, LOSES) else "normal",
                bbox={"facecolor": _HATCHED["facecolor"], "edgecolor": "none", "pad": 1} if hatched else None,
            )
            if cell.get("verdict") == DIVERGES:
                axes.plot([x - 0.5, x + 0.5], [y - 0.5, y + 0.5], color="black", linewidth=1)
                axes.plot([x - 0.5, x + 0.5], [y + 0.5, y - 0.5], color="black", linewidth=1)
    axes.set_xticks(range(len(page.across.values)), list(page.across.values))
    axes.set_yticks(range(len(page.down.values)), list(page.down.values))
    axes.set_xlabel(page.across.name)
    axes.set_ylabel(page.down.name)
    axes.set_title(page.name, fontsize="small", loc="left")
    axes.tick_params(length=0)


def _cells(page: Page, rows: Sequence[Row]) -> list[list[Row]]:
    """The row of each cell, line by line; an empty one where it was not run."""
    return [
        [
            next((row for row in rows if row.items() >= page.where(down, across).items()), {})
            for across in page.across.values
        ]
        for down in page.down.values
    ]


def _strength(cell: Row) -> float:
    """Colour of a cell, from -1 for wins to 1 for loses."""
    ratio = float(cell.get("ratio") or "nan")
    if cell.get("verdict") == DIVERGES:
        return 1.0
    return max(-1.0, min(1.0, math.log(ratio) / math.log(_ENDS))) if 0 < ratio < math.inf else 0.0


def _steps(cell: Row) -> float:
    return float(cell.get(STEPS) or "nan")


def _known(rows: Sequence[Row], column: str) -> list[float]:
    """The values of a column that are there; inf is one."""
    values = [float(row.get(column) or "nan") for row in rows]
    return [value for value in values if not math.isnan(value)]


def _share(value: float) -> str:
    return _NEVER if value == math.inf else f"{value:.1g}" if 0 < value < 0.01 else _number(value)


def _number(value: float) -> str:
    return f"{value:.2f}" if 0.01 <= value < 100 else f"{value:.0e}" if math.isfinite(value) else "-"
