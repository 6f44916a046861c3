"""Where a rule wins and where it breaks: `python -m lightning_l2l map RULE [RULE ...] --root data`.

Runs `test` on grids of tasks around those that rules are meta-trained on, each cell with tuned baselines, and draws the
outcome, in `map/version_N`: `map.csv`, which grows with each cell, and two pictures a rule. `NAME.png` has the final
loss, divided by that of the best tuned baseline; `NAME_steps.png` the share of the steps after which the rule stays
below that loss. RULE is a checkpoint, a rule file or the name of a shipped rule; the baselines are tuned once for all.
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
from statistics import fmean

import torch

from lightning_l2l.commands.errors import PROG
from lightning_l2l.commands.grids import DEFAULT_ADAM, Page, pages, tuned
from lightning_l2l.commands.heat_maps import (
    DIVERGES,
    LOSES,
    SECONDS,
    STEPS,
    TIES,
    WINS,
    draw,
    draw_steps,
    shown,
    summary,
    table,
)
from lightning_l2l.commands.imports import HELP as IMPORT_HELP
from lightning_l2l.commands.imports import given_in, import_modules
from lightning_l2l.commands.sweep import DONE, Row, new_folder, read_csv, run_setting, write_csv
from lightning_l2l.evaluation.baselines import BASELINES, MORE
from lightning_l2l.evaluation.learning_curves import LEARNED
from lightning_l2l.evaluation.results import Result
from lightning_l2l.evaluation.tables import print_table
from lightning_l2l.rules import UpdateRule
from lightning_l2l.rules.describe import describe
from lightning_l2l.rules.files import load_rule, save_rule

#: Probability of a difference under chance below which it counts as one.
SIGNIFICANT = 0.05
_LAST = "curves.png"  # what `test` writes last
_NAMES = [baseline.name for baseline in (*BASELINES, *MORE)]
_EXACT = 16  # number of tasks up to which every permutation is looked at


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
    rivals = [name for name in baselines if name != DEFAULT_ADAM]
    if rivals:
        best = min(rivals, key=lambda name: means[name])
        found |= {"best": str(means[best]), "optimizer": best}
        found["ratio"] = str(means[LEARNED] / means[best]) if means[best] else "nan"
    if not math.isfinite(means[LEARNED]) or not rivals:
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
        baselines: Names of those that are tuned.
        root: Where its log folders are made.
        rules: Names of those that it is run for.
        first: Whether nothing has run yet: a mistake then ends the program.
    """

    where: Row
    flags: Sequence[str]
    baselines: Sequence[str]
    root: Path
    rules: Sequence[str]
    first: bool


@dataclass(frozen=True)
class _Run:
    """What `test` has written of an optimizer.

    Attributes:
        final: Final loss of each task.
        course: The mean over the tasks, as the only one.
    """

    final: Sequence[float]
    course: Result


def _run(cell: _Cell, rules: Mapping[str, Path]) -> list[Row]:
    """The rows of a cell, one a rule; the baselines are tuned once for all. What `test` prints goes to a file."""
    rows: list[Row] = []
    cell.root.mkdir(parents=True, exist_ok=True)
    known = (_read(path.parent) for path in cell.root.rglob(_LAST))
    baselines = next((runs for runs in known if set(cell.baselines) == set(runs) - {LEARNED, DEFAULT_ADAM}), {})
    with (cell.root / "log").open("a", encoding="utf-8") as log, redirect_stdout(log), redirect_stderr(log):
        for name in cell.rules:
            # The last flag counts.
            flags = [*cell.flags, f"--ckpt_path={rules[name]}", *(["--curves.baselines=[]"] if baselines else [])]
            before = set(cell.root.rglob(_LAST))
            _, status = run_setting(["test", *flags], {}, cell.root / name, first=cell.first and not rows)
            found = set(cell.root.rglob(_LAST)) - before
            runs = _read(found.pop().parent) if found else {}
            learned = runs.pop(LEARNED, None)
            baselines = baselines or runs
            broke = status != DONE and "diverged" not in status
            said = {} if broke else _compare(learned, baselines)
            where = {**cell.where, "rule": name, "baselines": ",".join(cell.baselines)}
            rows.append({**where, **said, "status": status if broke else DONE})
    return rows


def _compare(learned: _Run | None, baselines: Mapping[str, _Run]) -> Row:
    """What a cell says, from what `test` has written; None: the rule diverged before it wrote anything."""
    losses = [math.inf] if learned is None else learned.final
    found = verdict(losses, {name: run.final for name, run in baselines.items() if name != LEARNED})
    if "optimizer" in found:
        best = baselines[found["optimizer"]].course
        steps, seconds = (math.inf, math.inf) if learned is None else learned.course.speed_up(best)
        found |= {STEPS: str(steps), SECONDS: str(seconds)}
    return found


def _read(folder: Path) -> dict[str, _Run]:
    """What `test` has written there, by optimizer."""
    finals, curves = read_csv(folder / "tasks.csv"), read_csv(folder / "curves.csv")
    found = {}
    for row in read_csv(folder / "comparison.csv"):
        name = row["optimizer"]
        means = [float(point["mean"]) for point in curves if point["optimizer"] == name]
        losses = torch.tensor(means, dtype=torch.float64)[:, None]  # [num_steps + 1, 1]
        final_steps, seconds = int(row["final_steps"]), float(row["seconds_per_step"])
        course = Result(name, losses, final_steps=final_steps, seconds_per_step=seconds)
        found[name] = _Run([float(task[name]) for task in finals], course)
    return found


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
    beside = f"what every cell is compared with, of {', '.join(_NAMES)} (three to five of the first five, by grid)"
    parser.add_argument("--baselines", type=_baselines, default=[], metavar="NAME,...", help=beside)
    parser.add_argument("--small", action="store_true", help="a few cells with few steps, to see whether all runs")
    parser.add_argument("--jobs", type=int, default=1, help="cells that run side by side, in processes (1)")
    parser.add_argument("--folder", type=Path, default=Path("map"), help="where version_N is made (map)")
    parser.add_argument("--import", metavar="MODULE,...", help=IMPORT_HELP)
    resume = "a version_N: run what it has not; a further RULE meets the baselines that are tuned there already"
    parser.add_argument("--resume", type=Path, metavar="FOLDER", help=resume)
    options = parser.parse_intermixed_args(args)
    known = pages(options.root, small=options.small, baselines=options.baselines)
    chosen = [page for page in known if any(text in page.name for text in options.only or [""])]
    for text in options.only:
        if not any(text in page.name for page in known):
            parser.error(f"--only {text!r} is in the name of no grid: {', '.join(page.name for page in known)}")
    if options.jobs < 1:
        parser.error(f"--jobs {options.jobs} is no number of processes; use 1 or more")
    names = [Path(rule).stem for rule in options.rules]
    pictures = [f"{name}{end}.png" for name in names for end in ("", "_steps")]
    if len(set(pictures)) < len(pictures):
        parser.error(f"two pictures would have one name ({', '.join(pictures)}); rename a file")
    try:
        loaded = [load_rule(rule) for rule in options.rules]
    except (FileNotFoundError, ValueError) as error:
        parser.error(str(error))
    folder: Path = options.resume or new_folder(options.folder)
    rules = {name: folder / f"{name}.npz" for name in names}
    rows = read_csv(folder / "map.csv") if (folder / "map.csv").is_file() else []
    rows = [row for row in rows if row["status"] == DONE]
    if other := _other_baselines(chosen, rows, options.baselines):
        parser.error(f"--resume {folder}: {other}; go on with the --baselines of then, or draw a new map")
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
        said = ", ".join(f"{row['rule']} {shown(row)} {row.get('verdict', row['status'])}" for row in found)
        print(f"[{number}/{len(missing)}] {grid}: {', '.join(place)}: {said}", flush=True)
    shown_rows = [row for row in rows if any(row["grid"] == page.name for page in chosen)]
    for name in names:
        own = [row for row in shown_rows if row["rule"] == name]
        for page in chosen:
            print_table(table(page, own))
        draw(chosen, own, f"{name}: final loss / that of the best tuned optimizer").savefig(folder / f"{name}.png")
        draw_steps(chosen, own, name).savefig(folder / f"{name}_steps.png")
        print(f"{name}: {summary(own)}")
    print(f"Written to {folder}: map.csv, {', '.join(pictures)}")
    return int(any(row["status"] != DONE for row in shown_rows))


def _same(rule: UpdateRule, other: UpdateRule) -> bool:
    """Whether two rules have the same description and weights."""
    own, others = rule.state_dict(), other.state_dict()
    return describe(rule) == describe(other) and all(torch.equal(own[name], others[name]) for name in own)


def _baselines(text: str) -> list[str]:
    """Names of baselines; brackets may stand around them, as `test` wants it."""
    names = [name.strip() for name in text.strip("[] ").split(",")]
    for name in names:
        if name not in _NAMES:
            raise argparse.ArgumentTypeError(f"unknown baseline {name!r}; use {', '.join(_NAMES)}")
    return list(dict.fromkeys(names))


def _other_baselines(pages: Sequence[Page], done: Sequence[Row], given: Sequence[str]) -> str | None:
    """What a cell was compared with, if it is not what it would be compared with now."""
    for where, flags in (cell for page in pages for cell in page.cells()):
        for row in (row for row in done if row.items() >= where.items()):
            was = row.get("baselines", "")  # maps of before have no such column
            if set(was.split(",")) != set(tuned(flags)) if was else given:
                return f"{where['grid']!r} was compared with {was or 'the baselines of its own'}"
    return None


def _missing(pages: Sequence[Page], done: Sequence[Row], rules: Sequence[str], root: Path) -> list[_Cell]:
    """The cells that are to be run, with the rules that they are to be run for."""
    found: list[_Cell] = []
    for where, flags in (cell for page in pages for cell in page.cells()):
        has = {row["rule"] for row in done if row.items() >= where.items()}
        lacks = [name for name in rules if name not in has]
        if lacks:
            place = root / "-".join(re.sub(r"\W+", "_", part) for part in where.values())
            found.append(_Cell(where, flags, tuned(flags), place, lacks, first=not (done or found)))
    return found
