"""Where a rule wins and where it breaks: `python -m lightning_l2l map RULE [RULE ...] --root data`.

Runs `test` on grids of tasks around those that rules are meta-trained on, each cell with tuned baselines, and draws the
outcome: `map.csv`, which grows with each cell, and a picture a rule, in `map/version_N`. RULE is a checkpoint, a rule
file or the name of a shipped rule; the baselines are tuned once for all of them.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import re
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.box import SIMPLE_HEAD
from rich.table import Table

from lightning_l2l.commands.errors import PROG
from lightning_l2l.commands.grids import DEFAULT_ADAM, Page, pages
from lightning_l2l.commands.imports import HELP as IMPORT_HELP
from lightning_l2l.commands.imports import given_in, import_modules
from lightning_l2l.commands.sweep import DONE, Row, new_folder, read_csv, run_setting, write_csv
from lightning_l2l.evaluation.learning_curves import LEARNED
from lightning_l2l.evaluation.tables import print_table
from lightning_l2l.rules import UpdateRule
from lightning_l2l.rules.describe import describe
from lightning_l2l.rules.files import load_rule, save_rule

WINS, TIES, LOSES, DIVERGES = "wins", "ties", "loses", "diverges"
#: Probability of a difference under chance below which it counts as one.
SIGNIFICANT = 0.05
_EXACT = 16  # number of tasks up to which every permutation is looked at
_ENDS = 4.0  # ratio at which a colour is at its strongest


def verdict(learned: Sequence[float], baselines: Mapping[str, Sequence[float]]) -> Row:
    """What a cell says: the rule beside the best of the tuned baselines, on the same tasks.

    Args:
        learned: Final loss of each task under the rule.
        baselines: The same under each baseline.

    Returns:
        "learned", "best", "optimizer" (which is best), "ratio" (of the means) and "verdict": the rule "diverges" where
        any of its runs does, "wins" or "loses" where `chance` gives so large a mean difference with a probability
        below `SIGNIFICANT`, else "ties". "adam" and "adam_default" are the final losses of these two.
    """
    means = {name: fmean(losses) for name, losses in {LEARNED: learned, **baselines}.items()}
    found = {name: str(means[name]) for name in (LEARNED, "adam", DEFAULT_ADAM) if name in means}
    tuned = [name for name in baselines if name != DEFAULT_ADAM]
    if tuned:
        best = min(tuned, key=lambda name: means[name])
        found |= {"best": str(means[best]), "optimizer": best}
        found["ratio"] = str(means[LEARNED] / means[best]) if means[best] else "nan"
    if not math.isfinite(means[LEARNED]) or not tuned:
        return {**found, "verdict": DIVERGES}
    if not math.isfinite(means[best]):
        return {**found, "verdict": WINS}
    differences = [a - b for a, b in zip(learned, baselines[best], strict=True)]
    if chance(differences) < SIGNIFICANT:
        return {**found, "verdict": WINS if fmean(differences) < 0 else LOSES}
    return {**found, "verdict": TIES}


def chance(differences: Sequence[float]) -> float:
    """Probability of so large a mean, were it chance which of two optimizers is which: a paired permutation test.

    Unlike the standard error, it holds where few runs decide the mean, as those do that have nearly diverged.

    Args:
        differences: Finite, one a task. Up to 16, all of their signs are looked at, else 65,536 drawn ones.

    Example:
        >>> chance([1.0, 2.0, 1e9, 1.0, 1.0, 3.0])  # all tasks agree, and that by chance in 2 of 64 cases
        0.03125
    """
    values, number = torch.tensor(differences, dtype=torch.float64), len(differences)
    if number <= _EXACT:
        flips = torch.arange(2**number)[:, None].bitwise_right_shift(torch.arange(number)) & 1
    else:
        flips = torch.randint(2, (2**_EXACT, number), generator=torch.Generator().manual_seed(0))
    sums = ((1 - 2 * flips).double() @ values).abs()
    return (sums >= (1 - 1e-9) * values.sum().abs()).double().mean().item()


@dataclass(frozen=True)
class _Cell:
    """A cell that is to be run.

    Attributes:
        where: Grid and properties, as `map.csv` has them.
        flags: Of `test`.
        root: Where its log folders are made.
        rules: Names of those that it is run for.
        first: Whether nothing has run yet: a mistake then ends the program.
    """

    where: Row
    flags: Sequence[str]
    root: Path
    rules: Sequence[str]
    first: bool


def _run(cell: _Cell, rules: Mapping[str, Path]) -> list[Row]:
    """The rows of a cell, one a rule; the baselines are tuned once for all. What `test` prints goes to a file."""
    rows: list[Row] = []
    cell.root.mkdir(parents=True, exist_ok=True)
    known = (_losses(path) for path in cell.root.rglob("tasks.csv"))
    baselines = next((losses for learned, losses in known if losses), {})
    with (cell.root / "log").open("a", encoding="utf-8") as log, redirect_stdout(log), redirect_stderr(log):
        for name in cell.rules:
            # The last flag counts.
            flags = [*cell.flags, f"--ckpt_path={rules[name]}", *(["--curves.baselines=[]"] if baselines else [])]
            before = set(cell.root.rglob("tasks.csv"))
            _, status = run_setting(["test", *flags], {}, cell.root / name, first=cell.first and not rows)
            found = set(cell.root.rglob("tasks.csv")) - before
            learned, losses = _losses(found.pop()) if found else ([math.inf], {})
            baselines = baselines or losses
            broke = status != DONE and "diverged" not in status
            said = {} if broke else verdict(learned, baselines)
            rows.append({**cell.where, "rule": name, **said, "status": status if broke else DONE})
    return rows


def _losses(path: Path) -> tuple[list[float], dict[str, list[float]]]:
    """Final losses of each task under the rule, and under each baseline, from `tasks.csv`."""
    rows = read_csv(path)
    losses = {key: [float(row[key]) for row in rows] for key in (rows[0] if rows else {}) if key != "task"}
    return losses.pop(LEARNED, [math.inf]), losses


def _run_all(
    cells: Sequence[_Cell], rules: Mapping[str, Path], jobs: int, modules: Sequence[str]
) -> Iterator[list[Row]]:
    """The rows of each cell, in order; processes import the modules first."""
    if jobs == 1:
        yield from (_run(cell, rules) for cell in cells)
        return
    threads = max(1, torch.get_num_threads() // jobs)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, context, initializer=_begin, initargs=(threads, modules)) as pool:
        try:
            found = [pool.submit(_run, cell, rules) for cell in cells]
            yield from (future.result() for future in found)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _begin(threads: int, modules: Sequence[str]) -> None:
    torch.set_num_threads(threads)
    import_modules(modules)


def main(args: list[str] | None = None) -> int:
    """Draw maps.

    Args:
        args: As on the command line; None takes them from there.

    Returns:
        Exit status: 1 if a cell could not be run, else 0.
    """
    args = sys.argv[1:] if args is None else args
    parser = argparse.ArgumentParser(
        f"{PROG} map",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("rules", metavar="RULE", nargs="+", help="a checkpoint, a rule file, or a shipped rule's name")
    parser.add_argument("--root", type=Path, default=Path("data"), help="folder of the data sets (data)")
    only = "the grids whose names have this text; repeatable"
    parser.add_argument("--only", action="append", default=[], metavar="TEXT", help=only)
    parser.add_argument("--small", action="store_true", help="a few cells with few steps, to see whether all runs")
    parser.add_argument("--jobs", type=int, default=1, help="cells that run side by side, in processes (1)")
    parser.add_argument("--folder", type=Path, default=Path("map"), help="where version_N is made (map)")
    parser.add_argument("--import", metavar="MODULE,...", help=IMPORT_HELP)
    resume = "a version_N: run what it has not; a further RULE meets the baselines that are tuned there already"
    parser.add_argument("--resume", type=Path, metavar="FOLDER", help=resume)
    options = parser.parse_intermixed_args(args)
    known = pages(options.root, small=options.small)
    chosen = [page for page in known if any(text in page.name for text in options.only or [""])]
    for text in options.only:
        if not any(text in page.name for page in known):
            parser.error(f"--only {text!r} is in the name of no grid: {', '.join(page.name for page in known)}")
    if options.jobs < 1:
        parser.error(f"--jobs {options.jobs} is no number of processes; use 1 or more")
    names = [Path(rule).stem for rule in options.rules]
    if len(set(names)) < len(names):
        parser.error(f"two rules have one name ({', '.join(names)}), and their pictures would, too; rename a file")
    try:
        loaded = [load_rule(rule) for rule in options.rules]
    except (FileNotFoundError, ValueError) as error:
        parser.error(str(error))
    folder: Path = options.resume or new_folder(options.folder)
    rules = {name: folder / f"{name}.npz" for name in names}
    rows = read_csv(folder / "map.csv") if (folder / "map.csv").is_file() else []
    rows = [row for row in rows if row["status"] == DONE]
    for rule, (name, path) in zip(loaded, rules.items(), strict=True):
        if path.is_file() and not _same(load_rule(path), rule):
            rows = [row for row in rows if row["rule"] != name]
        save_rule(rule, path)
    missing = _missing(chosen, rows, list(rules), folder / "runs")
    repeat = shlex.join([*args, *([] if options.resume else ["--resume", str(folder)])])
    print(f"Cells: {len(missing)}, in {folder}; if stopped, go on with: python -m lightning_l2l map {repeat}")
    for number, found in enumerate(_run_all(missing, rules, options.jobs, given_in(args)), 1):
        rows += found
        write_csv(folder / "map.csv", rows)
        grid, *place = missing[number - 1].where.values()
        said = ", ".join(f"{row['rule']} {_shown(row)} {row.get('verdict', row['status'])}" for row in found)
        print(f"[{number}/{len(missing)}] {grid}: {', '.join(place)}: {said}", flush=True)
    shown = [row for row in rows if any(row["grid"] == page.name for page in chosen)]
    for name in names:
        own = [row for row in shown if row["rule"] == name]
        for page in chosen:
            print_table(table(page, own))
        draw(chosen, own, f"{name}: final loss / that of the best tuned optimizer").savefig(folder / f"{name}.png")
        print(f"{name}: {summary(own)}")
    print(f"Written to {folder}: map.csv, {', '.join(f'{name}.png' for name in names)}")
    return int(any(row["status"] != DONE for row in shown))


def _same(rule: UpdateRule, other: UpdateRule) -> bool:
    """Whether two rules have the same description and weights."""
    own, others = rule.state_dict(), other.state_dict()
    return describe(rule) == describe(other) and all(torch.equal(own[name], others[name]) for name in own)


def _missing(pages: Sequence[Page], done: Sequence[Row], rules: Sequence[str], root: Path) -> list[_Cell]:
    """The cells that are to be run, with the rules that they are to be run for."""
    found: list[_Cell] = []
    for page in pages:
        for down, flags in page.down.values.items():
            for across, more in page.across.values.items():
                where = {"grid": page.name, page.down.name: down, page.across.name: across}
                has = {row["rule"] for row in done if row.items() >= where.items()}
                lacks = [name for name in rules if name not in has]
                if lacks:
                    place = root / "-".join(re.sub(r"\W+", "_", part) for part in where.values())
                    first = not (done or found)
                    found.append(_Cell(where, [*page.flags, *flags, *more], place, lacks, first))
    return found


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
    return line


def table(page: Page, rows: Sequence[Row]) -> Table:
    """A page as ratios and verdicts, from the rows of one rule."""
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
        rows: Of `map.csv`, those of one rule.
        title: Title.
    """
    columns = min(2, len(pages))
    lines = math.ceil(len(pages) / columns)
    rows_of = [max(len(p.down.values) for p in pages[columns * k : columns * (k + 1)]) for k in range(lines)]
    heights = [1.1 + 0.36 * max(number, 3) for number in rows_of]
    figure = Figure(figsize=(5.6 * columns, 0.5 + sum(heights)), dpi=130, layout="constrained")
    grid = list(figure.subplots(lines, columns, squeeze=False, height_ratios=heights).flat)
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
