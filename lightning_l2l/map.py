"""Where a rule wins and where it breaks: `python -m lightning_l2l.map RULE --root data`.

Runs `test` on grids of tasks around those that rules are meta-trained on, each cell with tuned baselines, and draws the
outcome: `map.csv`, which grows with each cell, and `map.png`, in `map/version_N`. RULE is a checkpoint, a rule file or
the name of a shipped rule.
"""

from __future__ import annotations

import argparse
import math
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.box import SIMPLE_HEAD
from rich.table import Table

from lightning_l2l.rule_files import load_rule, save_rule
from lightning_l2l.sweep import DONE, Row, new_folder, read_csv, run_setting, write_csv
from lightning_l2l.tables import print_table

WINS, TIES, LOSES, DIVERGES = "wins", "ties", "loses", "diverges"
#: Standard errors of the difference between two means from which on it is told from chance.
SIGNIFICANT = 2.0
_ENDS = 4.0  # ratio at which a colour is at its strongest


@dataclass(frozen=True)
class Axis:
    """One property of a task.

    Attributes:
        name: As it is shown.
        values: Value, as it is shown -> flags of `test` that set it.
    """

    name: str
    values: Mapping[str, Sequence[str]]

    @classmethod
    def of(cls, name: str, field: str, *values: str) -> Axis:
        """That of a single field of the configuration."""
        return cls(name, {value: [f"--{field}={value}"] for value in values})


@dataclass(frozen=True)
class Page:
    """A grid of two properties.

    Attributes:
        name: As it is shown.
        flags: Of `test`, for all cells.
        across: Property by columns.
        down: Property by rows.
    """

    name: str
    flags: Sequence[str]
    across: Axis
    down: Axis


def pages(root: Path, *, small: bool = False) -> list[Page]:
    """The map's grids.

    Args:
        root: Folder of the data sets.
        small: Fewer cells, steps and tasks: to see whether everything runs.
    """
    sizes = (2, 4) if small else (8, 16)
    tasks = [f"--data.num_val_tasks={sizes[0]}", f"--data.num_test_tasks={sizes[1]}", f"--data.eval_tasks={sizes[1]}"]
    network = [
        "--model.task=lightning_l2l.NetworkTask",
        "--model.task.module=lightning_l2l.MLP",
        "--data=lightning_l2l.MNISTDataModule",
        f"--data.root={root}",
        "--data.num_unseen=0",
        *tasks,
        "--model.final_steps=10",
    ]
    quadratics = [
        "--model.task=lightning_l2l.Quadratic",
        "--data=lightning_l2l.QuadraticDataModule",
        f"--data.num_val_tasks={8 * sizes[0]}",
        f"--data.num_test_tasks={8 * sizes[1]}",
        f"--data.eval_tasks={8 * sizes[1]}",
    ]
    layer = "model.task.module"
    activations, depths = ["sigmoid", "tanh", "relu", "elu", "gelu"], ["1", "2", "3"]
    widths, scales = ["5", "20", "80"], ["null", "0.03", "0.1", "0.3", "1.0"]
    horizons, batches, dims = ["100", "300", "1000", "3000", "10000"], ["16", "128", "512"], ["2", "10", "50"]
    if small:
        activations, depths, widths, scales = activations[:3], depths[:1], widths[:2], scales[:1]
        horizons, batches, dims = ["20", "40"], ["16"], dims[:2]
    dimension = Axis("dimension", {dim: [f"--model.task.dim={dim}", f"--data.dim={dim}"] for dim in dims})
    steps = Axis.of("inner steps", "model.num_steps", *horizons)
    short = [*network, "--model.num_steps=20"] if small else network
    return [
        Page(
            "MLP on MNIST: activation and hidden layers",
            short,
            Axis.of("activation", f"{layer}.activation", *activations),
            Axis.of("hidden layers", f"{layer}.num_layers", *depths),
        ),
        Page(
            "MLP on MNIST: initial scale and hidden units",
            short,
            Axis.of("standard deviation of the start (null: PyTorch's)", "model.task.init_scale", *scales),
            Axis.of("hidden units", f"{layer}.hidden_size", *widths),
        ),
        Page("MLP on MNIST: inner steps and batch size", network, steps, Axis.of("batch", "data.batch_size", *batches)),
        Page("Quadratics: inner steps and dimension", quadratics, steps, dimension),
    ]


def verdict(rows: Sequence[Row]) -> Row:
    """What a cell says: the rule beside the best of the tuned baselines.

    Args:
        rows: Of `comparison.csv`, the rule's first.

    Returns:
        "learned", "best", "optimizer" (which is best), "ratio" and "verdict": the rule "diverges" where any of its runs
        does, "wins" or "loses" where the means differ by more than `SIGNIFICANT` standard errors, else "ties".
    """
    learned, *baselines = rows
    loss = float(learned.get("final_loss") or "inf")
    if not baselines:  # the rule has not come that far
        return {"learned": str(loss), "verdict": DIVERGES}
    best = min(baselines, key=lambda row: float(row["final_loss"]))
    reference = float(best["final_loss"])
    found = {"learned": str(loss), "best": str(reference), "optimizer": best["optimizer"]}
    found["ratio"] = str(loss / reference) if reference else "nan"
    if not math.isfinite(loss) or float(learned["diverged"]):
        return {**found, "verdict": DIVERGES}
    error = math.hypot(*(float(row["standard_error"] or "nan") for row in (learned, best)))
    if abs(loss - reference) > SIGNIFICANT * error:
        return {**found, "verdict": WINS if loss < reference else LOSES}
    return {**found, "verdict": TIES}


def main(args: list[str] | None = None) -> int:
    """Draw a map.

    Args:
        args: As on the command line; None takes them from there.

    Returns:
        Exit status: 1 if a cell could not be run, else 0.
    """
    args = sys.argv[1:] if args is None else args
    parser = argparse.ArgumentParser("map", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rule", metavar="RULE", help="a checkpoint, a rule file, or the name of a shipped rule")
    parser.add_argument("--root", type=Path, default=Path("data"), help="folder of the data sets (data)")
    parser.add_argument("--only", default="", metavar="TEXT", help="the grids whose names have this text")
    parser.add_argument("--small", action="store_true", help="a few cells with few steps, to see whether all runs")
    parser.add_argument("--folder", type=Path, default=Path("map"), help="where version_N is made (map)")
    parser.add_argument("--resume", type=Path, metavar="FOLDER", help="a version_N: run what it has not finished")
    options = parser.parse_args(args)
    chosen = [page for page in pages(options.root, small=options.small) if options.only in page.name]
    if not chosen:
        parser.error(f"--only {options.only!r} is in the name of no grid: {', '.join(p.name for p in pages(Path()))}")
    try:
        rule = load_rule(options.rule)
    except (FileNotFoundError, ValueError) as error:
        parser.error(str(error))
    folder: Path = options.resume or new_folder(options.folder)
    done = read_csv(folder / "map.csv") if (folder / "map.csv").is_file() else []
    save_rule(rule, folder / "rule.npz")
    repeat = shlex.join([*args, "--resume", str(folder)])
    print(f"Grids: {len(chosen)}, in {folder}; if stopped, go on with: python -m lightning_l2l.map {repeat}")
    rows: list[Row] = []
    for page in chosen:
        for down, flags in page.down.values.items():
            for across, more in page.across.values.items():
                cell = {"grid": page.name, page.down.name: down, page.across.name: across}
                row = next((row for row in done if row["status"] == DONE and row.items() >= cell.items()), None)
                if row is None:
                    print(f"[{page.name}] {down}, {across}", flush=True)
                    command = ["test", *page.flags, *flags, *more, f"--ckpt_path={folder / 'rule.npz'}"]
                    found, status = run_setting(command, {}, folder / "runs" / str(len(rows)), first=not rows)
                    broke = status != DONE and "diverged" not in status
                    row = {**cell, **({} if broke else verdict(found)), "status": status if broke else DONE}
                rows.append(row)
                write_csv(folder / "map.csv", rows)
    for page in chosen:
        print_table(table(page, rows))
    draw(chosen, rows, f"{options.rule}: final loss / that of the best tuned optimizer").savefig(folder / "map.png")
    count = {kind: sum(row.get("verdict") == kind for row in rows) for kind in (WINS, TIES, LOSES, DIVERGES)}
    print(", ".join(f"{kind} {number}" for kind, number in count.items()), f"of {len(rows)} cells")
    print(f"Written to {folder}: map.csv, map.png")
    return int(any(row["status"] != DONE for row in rows))


def table(page: Page, rows: Sequence[Row]) -> Table:
    """A page as ratios and verdicts."""
    found = Table(title=page.name, box=SIMPLE_HEAD, title_justify="left")
    found.add_column(page.down.name, justify="right")
    for across in page.across.values:
        found.add_column(across, justify="right")
    for down in page.down.values:
        cells = [_cell(page, rows, down, across) for across in page.across.values]
        found.add_row(down, *(f"{_shown(cell)} {cell.get('verdict', 'not run')}" for cell in cells))
    return found


def draw(pages: Sequence[Page], rows: Sequence[Row], title: str) -> Figure:
    """A heat map a page: blue where the rule wins, red where it loses, crossed out where it diverges.

    Args:
        pages: What is drawn.
        rows: Of `map.csv`.
        title: Title.
    """
    columns = min(2, len(pages))
    lines = math.ceil(len(pages) / columns)
    figure = Figure(figsize=(5.6 * columns, 0.6 + 2.6 * lines), dpi=130, layout="constrained")
    grid = list(figure.subplots(lines, columns, squeeze=False).flat)
    for page, axes in zip(pages, grid, strict=False):
        _draw_page(page, rows, axes)
    for axes in grid[len(pages) :]:
        axes.set_visible(False)
    figure.suptitle(title, fontsize="medium", x=0.01, ha="left")
    return figure


def _draw_page(page: Page, rows: Sequence[Row], axes: Axes) -> None:
    cells = [[_cell(page, rows, down, across) for across in page.across.values] for down in page.down.values]
    strength = [[_strength(cell) for cell in line] for line in cells]
    axes.imshow(strength, cmap="RdBu_r", vmin=-1, vmax=1, aspect="auto")
    for y, line in enumerate(cells):
        for x, cell in enumerate(line):
            bold = cell.get("verdict") in (WINS, LOSES)
            dark = abs(strength[y][x]) > 0.6
            style: dict[str, Any] = {"color": "white" if dark else "black", "fontweight": "bold" if bold else "normal"}
            axes.text(x, y, _shown(cell), ha="center", va="center", fontsize="small", **style)
            if cell.get("verdict") == DIVERGES:
                axes.plot([x - 0.5, x + 0.5], [y - 0.5, y + 0.5], color="black", linewidth=1)
                axes.plot([x - 0.5, x + 0.5], [y + 0.5, y - 0.5], color="black", linewidth=1)
    axes.set_xticks(range(len(page.across.values)), list(page.across.values))
    axes.set_yticks(range(len(page.down.values)), list(page.down.values))
    axes.set_xlabel(page.across.name)
    axes.set_ylabel(page.down.name)
    axes.set_title(page.name, fontsize="small", loc="left")
    axes.tick_params(length=0)


def _cell(page: Page, rows: Sequence[Row], down: str, across: str) -> Row:
    wanted = {"grid": page.name, page.down.name: down, page.across.name: across}
    return next((row for row in rows if row.items() >= wanted.items()), {})


def _strength(cell: Row) -> float:
    """Colour of a cell, from -1 for wins to 1 for loses."""
    ratio = float(cell.get("ratio") or "nan")
    if cell.get("verdict") == DIVERGES:
        return 1.0
    return max(-1.0, min(1.0, math.log(ratio) / math.log(_ENDS))) if 0 < ratio < math.inf else 0.0


def _shown(cell: Row) -> str:
    ratio = float(cell.get("ratio") or "nan")
    return f"{ratio:.2f}" if 0.01 <= ratio < 100 else f"{ratio:.0e}" if math.isfinite(ratio) else "-"


if __name__ == "__main__":
    sys.exit(main())
