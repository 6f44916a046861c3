"""Where a rule wins and where it breaks: the grids, the verdicts and the command."""

import csv
import math
from pathlib import Path

import pytest
import torch

from lightning_l2l import RNNprop
from lightning_l2l.commands import cli, map
from lightning_l2l.commands.grids import Axis, Page, pages
from lightning_l2l.commands.heat_maps import draw, draw_steps, summary, table
from lightning_l2l.commands.map import chance, main, verdict
from lightning_l2l.rules.files import save_rule

pytestmark = pytest.mark.usefixtures("in_tmp_path")


TASKS = torch.tensor([0.5, 0.8, 1.2, 1.5] * 2)  # mean 1
NOISE = torch.tensor([-1.0, 1.0, 1.0, -1.0] * 2)
FEW = torch.tensor([0.1] * 7 + [1e6])


@pytest.mark.parametrize(
    "learned, wanted",
    [
        (TASKS - 0.1, "wins"),  # on every task, though tasks differ by more
        (TASKS + 0.1, "loses"),
        (TASKS - 0.1 + 0.17 * NOISE, "ties"),
        (TASKS - 0.1 + 0.08 * NOISE, "wins"),
        (TASKS + FEW, "loses"),  # on every task, and by one that makes the standard error as large as the mean
        (TASKS + FEW * NOISE, "ties"),
        (torch.tensor([0.1] * 7 + [math.inf]), "diverges"),
    ],
)
def test_a_difference_counts_where_it_is_not_chance_and_a_diverged_run_always(learned, wanted):
    baselines = {"sgd": [3.0] * 8, "adam": TASKS.tolist(), "nag": [2.0] * 8}
    found = verdict(learned.tolist(), baselines)
    assert found["verdict"] == wanted and found["optimizer"] == "adam"
    assert float(found["ratio"]) == pytest.approx(float(learned.mean()))


def test_chance_is_the_share_of_permutations_with_so_large_a_mean():
    assert chance([0.0] * 5) == 1
    assert chance([-3.0] + [1.0] * 3) == 1  # a mean of 0 is never large
    assert chance([2.0, 1.0, -1.0]) == 6 / 8  # sums of 4, 2, 2, 0 and their negatives
    noise = torch.randn(40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    noise = (noise - noise.mean()) / noise.std()
    for number in (0.0, 1.0, 2.0):  # of standard errors: with many tasks, as the normal distribution has it
        wanted = math.erfc(number / math.sqrt(2))
        assert chance((noise + number / math.sqrt(40)).tolist()) == pytest.approx(wanted, rel=0.2)


def test_a_single_task_tells_nothing_and_diverged_baselines_are_beaten():
    assert verdict([1.0], {"adam": [2.0]})["verdict"] == "ties"
    assert verdict([1.0, 1.0], {"adam": [2.0, math.inf]})["verdict"] == "wins"


def test_a_rule_without_a_comparison_has_diverged():
    assert verdict([math.inf], {})["verdict"] == "diverges"


def test_adam_at_its_default_rate_is_none_of_the_tuned_optimizers_and_is_kept_beside_them():
    found = verdict([0.9] * 6, {"sgd": [3.0] * 6, "adam": [2.0] * 6, "adam_default": [1.0] * 6})
    assert found["optimizer"] == "adam" and float(found["ratio"]) == pytest.approx(0.45)
    assert (found["verdict"], found["adam"], found["adam_default"]) == ("wins", "2.0", "1.0")


def test_the_summary_counts_verdicts_and_compares_with_adam():
    cells = [
        {"verdict": "wins", "learned": "0.5", "adam": "1.0", "adam_default": "2.0"},
        {"verdict": "ties", "learned": "1.0", "adam": "1.0", "adam_default": "1.0"},
        {"verdict": "diverges", "learned": "inf", "adam": "1.0", "adam_default": "2.0"},
        {"verdict": "loses", "learned": "3.0"},
    ]
    assert summary(cells) == (
        "wins 1, ties 1, loses 1, diverges 1 of 4 cells; median of learned / tuned Adam 1.000; "
        "no worse than Adam at its default learning rate in 2 of 3"
    )
    shares = [("0.2", "0.5"), ("0.4", "nan"), ("inf", "inf"), ("0.6", "3.0")]
    told = summary([{"share_of_steps": steps, "share_of_seconds": seconds} for steps, seconds in shares])
    below = "stays below the best tuned optimizer's final loss in"
    assert told.endswith(f"{below} 3 of 4, median share of the steps: 0.50, of the seconds: 3.00")
    told = summary([{"share_of_steps": "inf", "share_of_seconds": "nan"}])
    assert told.endswith(f"{below} 0 of 1, median share of the steps: never")


def test_every_cell_is_a_command_that_the_parser_takes(tmp_path, capsys):
    assert len(pages(tmp_path)) == 6
    for page in pages(tmp_path):
        lines, columns = list(page.down.values.values()), list(page.across.values.values())
        for down, across in [*((line, columns[0]) for line in lines), *((lines[-1], column) for column in columns)]:
            flags = [*page.flags, *down, *across]
            with pytest.raises(SystemExit) as stop:
                cli.run(["test", *flags, "--print_config"])
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


def test_the_second_picture_is_dark_where_it_is_soon_and_says_never_where_it_ends_above():
    shares = ["0.25", "inf", "inf", "0.5"]  # the last is of another grid
    figure = draw_steps([PAGE], [{**cell, "share_of_steps": s} for cell, s in zip(CELLS, shares, strict=True)], "own")
    (axes,) = figure.axes
    assert [text.get_text() for text in axes.texts] == ["0.25", "never", "never", "-"]
    assert [patch.get_xy() for patch in axes.patches] == [(0.5, -0.5), (-0.5, 0.5)]  # hatched
    assert [list(line.get_xdata()) for line in axes.lines] == [[-0.5, 0.5]] * 2  # crossed out: diverged
    (image,) = axes.images
    light = [sum(image.cmap(image.norm(share))[:3]) for share in (0.0, 0.25, 0.5, 1.0)]
    assert light == sorted(set(light)) and light[-1] < sum((0.93,) * 3)  # also 1 is no white
    (label,) = figure.legends[0].get_texts()
    assert label.get_text() == "never: its loss ends above, in 2 of 3 cells; -: not known"
    of_before = draw_steps([PAGE], CELLS, "own").axes[0]  # a map without the measure
    assert {text.get_text() for text in of_before.texts} == {"-"} and not of_before.patches


def read(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def read_map(folder):
    """Its rows, without what depends on the clock."""
    rows = read(folder / "map.csv")
    assert all(float(row.pop("share_of_seconds")) > 0 for row in rows)
    return rows


def test_the_command_runs_every_cell_and_goes_on_where_it_was_stopped(capsys):
    save_rule(RNNprop(hidden_size=3), Path("own.npz"))
    command = ["quadratic", "own.npz", "--small", "--only", "Quad", "--only", "dimension"]
    assert main(command) == 0
    told = capsys.readouterr().out
    folder = Path("map/version_0")
    rows = read_map(folder)
    wanted = [(dim, steps, rule) for dim in ("2", "10") for steps in ("20", "40") for rule in ("quadratic", "own")]
    assert [(r["dimension"], r["inner steps"], r["rule"]) for r in rows] == wanted
    for cell in rows:
        place = f"Quadratics_inner_steps_and_dimension-{cell['dimension']}-{cell['inner steps']}"
        (path,) = (folder / "runs" / place / "quadratic").rglob("comparison.csv")
        learned, *others = read(path)
        assert [other["optimizer"] for other in others] == ["adam", "rmsprop", "sgd", "nag", "adamw", "adam_default"]
        assert float(others[-1]["lr"]) == 0.001
        (path,) = (folder / "runs" / place / cell["rule"]).rglob("comparison.csv")
        learned = read(path)[0]
        assert cell["learned"] == learned["final_loss"] and learned["num_steps"] == cell["inner steps"]
        best = min(float(other["final_loss"]) for other in others[:-1])  # tuned once, for both
        assert float(cell["ratio"]) == pytest.approx(float(learned["final_loss"]) / best)
        curve = [
            float(point["mean"]) for point in read(path.with_name("curves.csv")) if point["optimizer"] == "learned"
        ]
        last = max((step for step, loss in enumerate(curve) if step and loss > best), default=0)  # one that is above
        share = (last + 1) / (len(curve) - 1)
        assert float(cell["share_of_steps"]) == pytest.approx(share if share <= 1 else math.inf)
    assert len({row["share_of_steps"] for row in rows}) > 1 and {row["baselines"] for row in rows} == {
        "adam,rmsprop,sgd,nag,adamw"
    }
    for name in ("quadratic", "own"):
        assert (folder / f"{name}.png").stat().st_size > 10_000 and f"{name}: wins" in told
        assert (folder / f"{name}_steps.png").stat().st_size > 10_000
    assert told.count("of 4 cells") == 2 and "Quadratics: inner steps and dimension" in told

    lines = (folder / "map.csv").read_text().splitlines()
    (folder / "map.csv").write_text("\n".join(lines[:5]) + "\n")
    assert main([*command, "--resume", str(folder)]) == 0
    again = capsys.readouterr().out
    assert again.count("] Quadratics") == 2 and "[2/2] Quadratics: inner steps and dimension: 10, 40: qua" in again
    assert "Tuned in" not in again and "Tuned in" in next((folder / "runs").glob("*-10-40/log")).read_text()
    assert read_map(folder) == rows

    (folder / "map.csv").write_text("\n".join(lines[:8]) + "\n")  # one rule of the last cell is missing
    logs = [path.read_text().count("Tuned in") for path in sorted((folder / "runs").glob("*/log"))]
    assert main([*command, "--resume", str(folder)]) == 0
    assert capsys.readouterr().out.count("] Quadratics") == 1
    assert read_map(folder) == rows

    save_rule(RNNprop(hidden_size=2), Path("more.npz"))  # a further rule joins
    assert main(["more.npz", *command, "--resume", str(folder)]) == 0
    found = read_map(folder)
    assert found[:8] == rows and [row["rule"] for row in found[8:]] == ["more"] * 4
    for own, row in zip(rows[1::2], found[8:], strict=True):
        assert row["best"] == own["best"] and row["learned"] != own["learned"]
    save_rule(RNNprop(hidden_size=1), Path("own.npz"))  # and one is another by now
    assert main([*command, "--resume", str(folder)]) == 0
    again = [row for row in read(folder / "map.csv") if row["rule"] == "own"]
    assert [row["learned"] == before["learned"] for row, before in zip(again, rows[1::2], strict=True)] == [False] * 4
    assert [path.read_text().count("Tuned in") for path in sorted((folder / "runs").glob("*/log"))] == logs


def test_baselines_are_given_by_name_and_are_the_same_when_the_map_goes_on(monkeypatch, capsys):
    def one_cell(*args, **options):
        page = next(page for page in pages(*args, **options) if page.name.startswith("Quadratics"))
        first = [Axis(axis.name, dict(list(axis.values.items())[:1])) for axis in (page.across, page.down)]
        return [Page(page.name, page.flags, *first)]

    monkeypatch.setattr(map, "pages", one_cell)
    folder = Path("map/version_0")
    begun, again = ["quadratic", "--small"], ["quadratic", "--small", "--resume", str(folder)]
    assert main([*begun, "--baselines", "[adamw_cosine, nag]"]) == 0
    rows = read_map(folder)
    (row,) = rows
    assert row["baselines"] == "adamw_cosine,nag" and row["optimizer"] in ("adamw_cosine", "nag")
    assert float(row["adam_default"]) and "adam" not in row
    assert main([*again, "--baselines", "nag,adamw_cosine"]) == 0 and read_map(folder) == rows

    def refused(*other):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main([*again, *other])
        assert stop.value.code == 2
        return capsys.readouterr().err

    assert "compared with adamw_cosine,nag; go on" in refused()
    assert "compared with adamw_cosine,nag; go on" in refused("--baselines", "nag")
    (folder / "map.csv").unlink()  # as if stopped in its first cell: what is tuned there is another comparison
    assert main([*again, "--baselines", "nag"]) == 0
    assert [(row["baselines"], row["optimizer"]) for row in read_map(folder)] == [("nag", "nag")]
    text = (folder / "map.csv").read_text().replace("baselines", "forgotten")  # a map of before has no such column
    (folder / "map.csv").write_text(text)
    assert main(again) == 0 and "compared with the baselines of its own; go on" in refused("--baselines", "adam")


@pytest.mark.parametrize(
    "args, message",
    [
        (["no_such_rule"], "no rule at 'no_such_rule'"),
        (["quadratic", "--only", "ImageNet"], "'ImageNet' is in the name of no grid"),
        (["--jobs", "0", "quadratic"], "--jobs 0 is no number of processes"),
        (["quadratic", "a/quadratic.npz"], "two pictures would have one name (quadratic.png, quadratic_steps.png"),
        (["mnist", "mnist_steps"], "two pictures would have one name (mnist.png, mnist_steps.png, mnist_steps.png"),
        (["quadratic", "--baselines", "adam,adamw-cosine"], "unknown baseline 'adamw-cosine'; use adam, rmsprop"),
    ],
)
def test_mistakes_are_told_in_one_line(args, message, capsys):
    with pytest.raises(SystemExit) as stop:
        main(args)
    assert stop.value.code == 2 and message in capsys.readouterr().err
    assert not Path("map").exists()
