"""Where a rule wins and where it breaks: the grids, the verdicts and the command."""

import csv
import math
import sys
from pathlib import Path

import pytest

from lightning_l2l import cli
from lightning_l2l.map import Axis, Page, draw, main, pages, table, verdict


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lightning-l2l"])


def row(name, loss, error=0.01, diverged=0.0):
    return {
        "optimizer": name,
        "final_loss": str(loss),
        "standard_error": "" if error is None else str(error),
        "diverged": str(diverged),
    }


@pytest.mark.parametrize(
    "learned, wanted",
    [
        (row("learned", 0.9), "wins"),
        (row("learned", 1.1), "loses"),
        (row("learned", 1.02), "ties"),
        (row("learned", 0.9, error=0.06), "ties"),
        (row("learned", math.inf, error=None), "diverges"),
        (row("learned", 0.9, diverged=0.125), "diverges"),
    ],
)
def test_a_difference_counts_from_two_standard_errors_on_and_a_diverged_run_always(learned, wanted):
    found = verdict([learned, row("sgd", 3.0), row("adam", 1.0), row("nag", 2.0)])
    assert found["verdict"] == wanted and found["optimizer"] == "adam"
    assert float(found["ratio"]) == pytest.approx(float(learned["final_loss"]))


def test_a_rule_without_a_comparison_has_diverged():
    assert verdict([{"optimizer": "learned"}])["verdict"] == "diverges"


@pytest.mark.parametrize("small", [True, False])
def test_every_cell_is_a_command_that_the_parser_takes(small, tmp_path, capsys):
    assert len(pages(tmp_path)) == 4
    for page in pages(tmp_path, small=small):
        lines, columns = list(page.down.values.values()), list(page.across.values.values())
        for down, across in [*((line, columns[0]) for line in lines), *((lines[-1], column) for column in columns)]:
            flags = [*page.flags, *down, *across]
            with pytest.raises(SystemExit) as stop:
                cli.main(["test", *flags, "--print_config"])
            assert stop.value.code == 0, flags
    capsys.readouterr()


PAGE = Page("grid", [], Axis.of("steps", "model.num_steps", "1", "2"), Axis.of("dim", "dim", "a", "b"))
CELLS = [
    {"grid": "grid", "dim": "a", "steps": "1", "ratio": "0.5", "verdict": "wins", "status": "ok"},
    {"grid": "grid", "dim": "a", "steps": "2", "ratio": "1e9", "verdict": "loses", "status": "ok"},
    {"grid": "grid", "dim": "b", "steps": "1", "ratio": "inf", "verdict": "diverges", "status": "ok"},
    {"grid": "another", "dim": "b", "steps": "2", "ratio": "1.0", "verdict": "ties", "status": "ok"},
]


def test_the_table_says_ratio_and_verdict_and_what_was_not_run():
    found = table(PAGE, CELLS)
    columns = [list(column.cells) for column in found.columns]
    assert columns == [["a", "b"], ["0.50 wins", "- diverges"], ["1e+09 loses", "- not run"]]


def test_the_picture_is_blue_where_it_wins_red_where_it_loses_and_crossed_out_where_it_diverges():
    figure = draw([PAGE], CELLS, "title")
    (axes,) = figure.axes
    strength = axes.images[0].get_array()
    assert strength.tolist() == [[-0.5, 1.0], [1.0, 0.0]]
    assert [text.get_text() for text in axes.texts] == ["0.50", "1e+09", "-", "-"]
    assert [text.get_fontweight() for text in axes.texts] == ["bold", "bold", "normal", "normal"]
    assert [list(line.get_xdata()) for line in axes.lines] == [[-0.5, 0.5]] * 2
    assert [label.get_text() for label in axes.get_xticklabels()] == ["1", "2"]


def read(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def test_the_command_runs_every_cell_and_goes_on_where_it_was_stopped(capsys):
    assert main(["quadratic", "--small", "--only", "Quadratics"]) == 0
    told = capsys.readouterr().out
    folder = Path("map/version_0")
    rows = read(folder / "map.csv")
    assert [(r["dimension"], r["inner steps"]) for r in rows] == [("2", "20"), ("2", "40"), ("10", "20"), ("10", "40")]
    for number, cell in enumerate(rows):
        (path,) = (folder / "runs" / str(number)).rglob("comparison.csv")
        learned, *others = read(path)
        assert cell["learned"] == learned["final_loss"]
        assert float(cell["ratio"]) == pytest.approx(
            float(learned["final_loss"]) / min(float(other["final_loss"]) for other in others)
        )
        assert learned["num_steps"] == cell["inner steps"]
    assert (folder / "map.png").stat().st_size > 10_000
    assert "of 4 cells" in told and "Quadratics: inner steps and dimension" in told

    lines = (folder / "map.csv").read_text().splitlines()
    (folder / "map.csv").write_text("\n".join(lines[:3]) + "\n")
    assert main(["quadratic", "--small", "--only", "Quadratics", "--resume", str(folder)]) == 0
    again = capsys.readouterr().out
    assert again.count("[Quadratics") == 2
    assert read(folder / "map.csv") == rows


@pytest.mark.parametrize(
    "args, message",
    [
        (["no_such_rule"], "no rule at 'no_such_rule'"),
        (["quadratic", "--only", "ImageNet"], "'ImageNet' is in the name of no grid"),
    ],
)
def test_mistakes_are_told_in_one_line(args, message, capsys):
    with pytest.raises(SystemExit) as stop:
        main(args)
    assert stop.value.code == 2 and message in capsys.readouterr().err
    assert not Path("map").exists()
