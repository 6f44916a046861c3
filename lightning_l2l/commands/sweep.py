"""One command at many settings: `python -m lightning_l2l sweep OPTIONS fit|test ...`.

python -m lightning_l2l sweep --over model.task.module.hidden_size=10,20,40 test --config configs/mnist.yaml ...
python -m lightning_l2l sweep --random model.lr=0.001:0.03 --trials 8 fit --config configs/mnist.yaml

What follows OPTIONS is a command of `python -m lightning_l2l`. It runs once a setting, in `sweep/version_N/1`, `.../2`
and so on; `sweep.csv`, which grows with each setting, and `sweep.png` gather the results.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import math
import random
import shlex
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.box import SIMPLE_HEAD
from rich.table import Table

from lightning_l2l.commands import cli, errors
from lightning_l2l.commands.imports import HELP as IMPORT_HELP
from lightning_l2l.commands.imports import given_in, import_modules
from lightning_l2l.evaluation.figures import label_log_axis, look, tidy
from lightning_l2l.evaluation.learning_curves import LEARNED, MONITOR
from lightning_l2l.evaluation.tables import print_table
from lightning_l2l.runs.trainer import run_folder

ROOT_DIR = "trainer.default_root_dir"
DONE = "ok"

#: Of `sweep.csv`: the swept fields, the columns of `comparison.csv`, the status.
Row = dict[str, str]


def make_settings(
    over: Mapping[str, Sequence[str]], bounds: Mapping[str, tuple[float, float]], trials: int, seed: int
) -> list[Row]:
    """All combinations of the values in `over`, in order, each with the same log-uniform draws.

    Args:
        over: Field -> values.
        bounds: Field -> smallest and largest value to draw.
        trials: Number of draws of all fields in `bounds`.
        seed: Of the draws.

    Example:
        >>> make_settings({"a": ["1", "2"], "b": ["x", "y"]}, {}, trials=8, seed=0)[1:3]
        [{'a': '1', 'b': 'y'}, {'a': '2', 'b': 'x'}]
    """
    generator = random.Random(seed)
    draws: list[Row] = [{} for _ in range(trials if bounds else 1)]
    for draw in draws:
        for field, (low, high) in bounds.items():
            draw[field] = f"{math.exp(generator.uniform(math.log(low), math.log(high))):.4g}"
    grid = [dict(zip(over, values, strict=True)) for values in itertools.product(*over.values())]
    return [{**point, **draw} for point in grid for draw in draws]


def main(args: list[str] | None = None) -> int:
    """Run a sweep.

    Args:
        args: As on the command line; None takes them from there.

    Returns:
        Exit status: 1 if a setting failed, else 0.
    """
    args = sys.argv[1:] if args is None else args
    options, command = _parse(args)
    folder, finished = options.resume, []
    if folder:
        args = shlex.split((folder / "command.txt").read_text())
        import_modules(given_in(args))
        options, command = _parse(args)
        earlier = read_csv(folder / "sweep.csv") if (folder / "sweep.csv").is_file() else []
        finished = [row for row in earlier if row["status"] == DONE]
    else:
        folder = new_folder(options.folder)
        (folder / "command.txt").write_text(shlex.join(args) + "\n")
    over, bounds = dict(options.over), dict(options.random)
    settings = make_settings(over, bounds, options.trials, options.seed)
    print(f"Settings: {len(settings)}, in {folder}; if stopped, go on with --resume {shlex.quote(str(folder))}")
    results = [[row for row in finished if row.items() >= setting.items()] for setting in settings]
    for number, setting in enumerate(settings, 1):
        if not results[number - 1]:
            print(f"[{number}/{len(settings)}] {_shown(setting)}", flush=True)
            rows, status = run_setting(command, setting, folder / str(number), first=not any(results))
            results[number - 1] = [{**setting, **row, "status": status} for row in rows]
            write_csv(folder / "sweep.csv", [row for rows in results for row in rows])

    print_table(_table(results, [*over, *bounds], f"{command[0]} at {len(settings)} settings: final loss"))
    good = [rows for rows in results if rows[0]["status"] == DONE]
    failed = len(settings) - len(good)
    if good:
        what = "Final loss on test tasks" if command[0] == "test" else f"{MONITOR} of the best checkpoint"
        title = f"{what} ({failed} of {len(settings)} settings failed)" if failed else what
        draw([row for rows in good for row in rows], list(over), list(bounds), title).savefig(folder / "sweep.png")
        if command[0] == "fit":
            best = min((rows[0] for rows in good), key=lambda row: float(row["final_loss"]))
            named = _shown({field: best[field] for field in settings[0]})
            print(f"Best: {named}, {MONITOR} {_number(best['final_loss'])}, {folder / best['checkpoint']}")
    print(f"Written to {folder}: sweep.csv{', sweep.png' if good else ''}")
    return 1 if failed else 0


def _parse(args: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The sweep's own options, and the command that it runs."""
    usage = "python -m lightning_l2l sweep [options] fit|test [arguments of python -m lightning_l2l]"
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(f"{errors.PROG} sweep", usage, __doc__, formatter_class=layout, allow_abbrev=False)
    lists: Any = {"action": "append", "default": []}
    parser.add_argument("--over", type=_values, metavar="FIELD=VALUE,...", help="repeat it for a grid", **lists)
    parser.add_argument("--random", type=_bounds, metavar="FIELD=LOW:HIGH", help="log-uniform; repeatable", **lists)
    parser.add_argument("--trials", type=int, default=8, help="number of draws of all --random fields (8)")
    parser.add_argument("--seed", type=int, default=0, help="of the draws (0)")
    parser.add_argument("--folder", type=Path, default=Path("sweep"), help="where version_N is made (sweep)")
    parser.add_argument("--import", metavar="MODULE,...", help=IMPORT_HELP)
    parser.add_argument("--resume", type=Path, metavar="FOLDER", help="a version_N: run what it has not finished")
    start = next((k for k, arg in enumerate(args) if arg in ("fit", "validate", "test", "predict")), len(args))
    options, command = parser.parse_args(args[:start]), args[start:]
    fields = [field for field, _ in options.over + options.random]
    if options.resume:
        if command or fields:
            parser.error("--resume repeats the sweep's own command; give nothing beside it")
        if not (options.resume / "command.txt").is_file():
            parser.error(f"--resume {options.resume}: no sweep there; give the version_N that a sweep has printed")
    elif command[:1] not in (["fit"], ["test"]):
        parser.error(f"{(command or ['nothing'])[0]!r} cannot be swept; end with fit or test and its arguments")
    elif not fields:
        parser.error("nothing to sweep; give --over FIELD=VALUE,... or --random FIELD=LOW:HIGH")
    elif len(fields) > len(set(fields)):
        parser.error(f"a field is swept twice ({', '.join(fields)}); give all its values in one --over or --random")
    elif options.trials < 1:
        parser.error(f"--trials {options.trials} is no number of draws; use 1 or more")
    elif ROOT_DIR in fields or any(arg.split("=")[0] == f"--{ROOT_DIR}" for arg in command):
        parser.error(f"--{ROOT_DIR} is a folder of the sweep for each setting; use --folder to move them all")
    elif command[0] == "fit" and any(arg.split("=")[0] == "--ckpt_path" for arg in command):
        parser.error("fit --ckpt_path goes on with one run, in its folder; leave --ckpt_path out")
    return options, command


def _values(text: str) -> tuple[str, list[str]]:
    field, _, values = text.partition("=")
    if not field or not all(values.split(",")):
        raise argparse.ArgumentTypeError(f"{text!r} lacks a value; give them as in model.num_steps=20,50,100")
    return field, values.split(",")


def _bounds(text: str) -> tuple[str, tuple[float, float]]:
    field, _, bounds = text.partition("=")
    try:
        low, high = map(float, bounds.split(":"))
    except ValueError:
        low = high = math.nan
    if not field or not 0 < low < high < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} lacks 0 < LOW < HIGH; give them as in model.lr=0.001:0.03")
    return field, (low, high)


def new_folder(root: Path) -> Path:
    """Make the next `version_N` in a folder.

    Raises:
        RuntimeError: It cannot be made.
    """
    numbers = [int(p.name[8:]) for p in root.glob("version_*") if p.name[8:].isdecimal()]
    folder = root / f"version_{max(numbers, default=-1) + 1}"
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise RuntimeError(f"--folder {root} cannot be written to ({error.strerror}); choose another") from error
    return folder


def run_setting(command: list[str], setting: Row, root: Path, first: bool) -> tuple[list[Row], str]:
    """Run a command at a setting.

    Args:
        command: `fit` or `test` and its arguments.
        setting: Field -> value.
        root: Where its log folder is made.
        first: Whether nothing has run yet: a mistake then ends the program.

    Returns:
        The rule's row and those of the baselines, and the status: `DONE`, or what failed.
    """
    flags = [f"--{field}={value}" for field, value in {ROOT_DIR: str(root), **setting}.items()]
    try:
        with warnings.catch_warnings():  # what one setting has filtered is the next one's no more
            anew = ["--ckpt_path=null"] if command[0] == "fit" else []  # whatever its configuration says
            trainer = cli.run([*command, *anew, *flags]).trainer
        rows = _fit_rows(trainer, root.parent) if command[0] == "fit" else _test_rows(trainer)
        final_loss = rows[0]["final_loss"]
        if math.isfinite(float(final_loss)):
            return rows, DONE
        return rows, f"failed: the rule diverged, final_loss={final_loss}"
    except Exception as error:
        told = errors.in_one_line(error)
        if told is None:
            raise
        if first and not isinstance(errors.find_foreseen(error), RuntimeError):  # those: it diverged
            sys.exit(f"error: {told}")
        message = told
    except SystemExit as stop:
        if first or stop.code != 2:  # 2: the parser's, which has said why; else Ctrl-C
            raise
        message = errors.tidy(str(stop.__context__))
    status = "failed: " + " ".join(message.split())
    print(status, flush=True)
    return [{"optimizer": LEARNED}], status


def _fit_rows(trainer: Trainer, folder: Path) -> list[Row]:
    callbacks = [c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint) and c.monitor == MONITOR]
    if not callbacks:
        raise ValueError(f"no checkpoint is chosen by {MONITOR}; leave --checkpoint.monitor as it is")
    score, path = callbacks[0].best_model_score, Path(callbacks[0].best_model_path).resolve()
    if score is None:
        raise _nothing_written("best.ckpt")
    path = path.relative_to(folder.resolve()) if path.is_relative_to(folder.resolve()) else path
    return [{"optimizer": LEARNED, "final_loss": str(float(score)), "checkpoint": str(path)}]


def _test_rows(trainer: Trainer) -> list[Row]:
    path = run_folder(trainer) / "comparison.csv"
    if not path.is_file():
        raise _nothing_written(path.name)
    return read_csv(path)


def _nothing_written(name: str) -> RuntimeError:
    return RuntimeError(f"no {name} was written: fast_dev_run is on, or the rule diverged before its first outer step")


def read_csv(path: Path) -> list[Row]:
    """Rows of a CSV file."""
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    """Write rows, the status last; the file is there whole at any time."""
    columns = dict.fromkeys(column for row in rows for column in row if column != "status")
    whole = path.with_suffix(".tmp")  # a sweep may be killed at any time
    with whole.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*columns, "status"])
        writer.writeheader()
        writer.writerows(rows)
    whole.replace(path)


def _table(results: Sequence[Sequence[Row]], fields: Sequence[str], title: str) -> Table:
    """A row per setting: its values, the final loss of each optimizer and the rule's ratio to the best baseline."""
    rows = [row for group in results for row in group]
    names = list(dict.fromkeys([LEARNED, *(row["optimizer"] for row in rows)]))
    extra = [column for column in ("ratio", "status") if any(row.get(column, "") not in ("", DONE) for row in rows)]
    table = Table(title=title, box=SIMPLE_HEAD, title_justify="left")
    for column in (*_short(fields).values(), *names, *extra):
        table.add_column(column, justify="left" if column == "status" else "right", overflow="fold")
    for group in results:
        losses = {row["optimizer"]: _number(row.get("final_loss")) for row in group}
        last = {"ratio": _number(group[0].get("ratio")), "status": group[0]["status"]}
        table.add_row(*(group[0][f] for f in fields), *(losses.get(n, "-") for n in names), *(last[c] for c in extra))
    return table


def draw(rows: Sequence[Row], over: Sequence[str], drawn: Sequence[str], title: str) -> Figure:
    """Draw the final losses and their standard errors: a point per setting, a line per optimizer.

    Args:
        rows: Of the CSV file, at least one of them with a finite loss.
        over: Fields with given values; the first that is not the x axis has a panel for each value.
        drawn: Fields with random values; the first, else the first of `over` that is a number, is the x axis.
        title: Title.
    """
    rows = [row for row in rows if math.isfinite(float(row["final_loss"]))]
    fields = [*drawn, *over]
    x = next((f for f in fields if all(_is_number(row[f]) for row in rows)), fields[0])
    values = list(dict.fromkeys(row[x] for row in rows))
    places = {v: float(v) if all(map(_is_number, values)) else float(k) for k, v in enumerate(values)}
    across = next((f for f in over if f != x), None)
    panels = list(dict.fromkeys(row[across] for row in rows)) if across else [""]
    names = list(dict.fromkeys(row["optimizer"] for row in rows))
    short = _short(fields)
    figure = Figure(figsize=(max(6.4, 3 * len(panels)), 4.2), dpi=150, layout="constrained")
    grid = list(figure.subplots(1, len(panels), sharex=True, sharey=True, squeeze=False).flat)
    for panel, axes in zip(panels, grid, strict=True):
        for k, name in enumerate(names):
            mine = [row for row in rows if row["optimizer"] == name and (not across or row[across] == panel)]
            mine.sort(key=lambda row: places[row[x]])
            at = [places[row[x]] for row in mine]
            losses, errors = ([float(row.get(c) or "nan") for row in mine] for c in ("final_loss", "standard_error"))
            style = look(k) if len(set(at)) == len(at) else {**look(k), "linestyle": "none"}
            axes.errorbar(at, losses, errors, **style, fmt="o", elinewidth=1, capsize=2, label=name, zorder=3 - k / 100)
        axes.set_title(f"{short[across]} = {panel}" if across else "", fontsize="medium", loc="left")
        axes.set_xlabel(short[x])
        tidy(axes)
    grid[0].set_ylabel("Final loss")
    _log(grid[0], "y", [float(row["final_loss"]) for row in rows])
    if x in drawn:
        _log(grid[0], "x", list(places.values()))
    elif len(places) <= 8:
        grid[0].set_xticks(list(places.values()), list(places))
    figure.suptitle(title, fontsize="medium", x=0.01, ha="left")
    figure.legend(*grid[0].get_legend_handles_labels(), loc="outside lower center", ncols=6, frameon=False)
    return figure


def _log(axes: Axes, name: str, values: Sequence[float]) -> None:
    """Make the axis "x" or "y" logarithmic, labelled also between powers of ten; unless a value has no logarithm."""
    low, high = min(values), max(values)
    if low > 0:
        axes.set(**{f"{name}scale": "log", f"{name}lim": (low / 1.3, high * 1.3)})
        label_log_axis({"x": axes.xaxis, "y": axes.yaxis}[name], low, high)


def _short(fields: Sequence[str]) -> dict[str, str]:
    """Field -> its last component, or the whole of it where that is not unique."""
    last = [field.split(".")[-1] for field in fields]
    return {field: name if last.count(name) == 1 else field for field, name in zip(fields, last, strict=True)}


def _shown(setting: Row) -> str:
    return " ".join(f"{name}={setting[field]}" for field, name in _short(list(setting)).items())


def _number(text: str | None) -> str:
    return "-" if text in (None, "", "nan") else f"{float(text or 'nan'):.3g}"


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False
