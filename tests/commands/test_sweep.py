"""Sweeps of the real command line over tiny quadratics."""

import csv
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_l2l.commands import cli
from lightning_l2l.commands.sweep import draw, main, make_settings

TINY = [
    "--model.num_steps=4",
    "--model.unroll_length=2",
    "--model.rule.hidden_size=3",
    "--data.num_tasks=2",
    "--data.num_val_tasks=2",
    "--data.num_test_tasks=3",
    "--trainer.accelerator=cpu",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
]
FIT = ["fit", *TINY, "--data.episodes_per_epoch=1", "--trainer.max_epochs=2", "--trainer.log_every_n_steps=1"]
FIT += ["--curves.baselines=[]"]
QUICK = ["--trainer.max_epochs=1", "--trainer.logger=false"]
SWEEP = Path("sweep/version_0")


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["lightning-l2l"])
        cli.run([*FIT, f"--trainer.default_root_dir={folder}"])
    return folder / "lightning_logs/version_0/checkpoints/best.ckpt"


def read(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def test_a_grid_of_tests_gathers_the_comparisons(trained, capsys):
    over = ["--over", "data.num_test_tasks=2,3", "--over", "model.num_steps=2,4"]
    assert main([*over, "test", *TINY, '--curves.baselines=["adam"]', "--ckpt_path", str(trained)]) == 0
    told = capsys.readouterr().out
    assert "[1/4] num_test_tasks=2 num_steps=2\n" in told and "[4/4] num_test_tasks=3 num_steps=4" in told
    rows = read(SWEEP / "sweep.csv")
    expected = []
    for number, (tasks, steps) in enumerate([("2", "2"), ("2", "4"), ("3", "2"), ("3", "4")], 1):
        compared = read(SWEEP / str(number) / "lightning_logs/version_0/comparison.csv")
        assert [row["num_tasks"] for row in compared] == [tasks, tasks]
        assert [row["num_steps"] for row in compared] == [steps, steps]
        fields = {"data.num_test_tasks": tasks, "model.num_steps": steps}
        expected += [{**fields, **row, "status": "ok"} for row in compared]
    assert rows == expected and [row["optimizer"] for row in rows] == ["learned", "adam"] * 4
    assert list(rows[0])[:3] == ["data.num_test_tasks", "model.num_steps", "optimizer"]
    table = told[told.index("test at 4 settings") :]
    for name in ("num_test_tasks", "learned", "adam", "ratio", f"{float(rows[-1]['final_loss']):.3g}"):
        assert name in table
    assert (SWEEP / "sweep.png").stat().st_size > 10_000


def test_a_random_search_of_fits_names_the_best(capsys):
    assert main(["--random", "model.lr=0.001:0.1", "--trials", "2", "--seed", "5", *FIT]) == 0
    rows = read(SWEEP / "sweep.csv")
    settings = make_settings({}, {"model.lr": (0.001, 0.1)}, 2, 5)
    assert [row["model.lr"] for row in rows] == [setting["model.lr"] for setting in settings]
    for number, row in enumerate(rows, 1):
        run = SWEEP / str(number) / "lightning_logs/version_0"
        events = EventAccumulator(str(run)).Reload()
        assert float(row["final_loss"]) == pytest.approx(min(e.value for e in events.Scalars("val/final_loss")))
        assert SWEEP / row["checkpoint"] == run / "checkpoints/best.ckpt"
        saved = torch.load(SWEEP / row["checkpoint"], weights_only=True)
        assert saved["hyper_parameters"]["rule"]["init_args"]["hidden_size"] == 3
    best = min(rows, key=lambda row: float(row["final_loss"]))
    assert f"Best: lr={best['model.lr']}, val/final_loss" in capsys.readouterr().out
    assert rows[0]["final_loss"] != rows[1]["final_loss"]


def test_draws_are_seeded_log_uniform_and_the_same_at_every_grid_point():
    bounds = {"a": (0.001, 10.0), "b": (2.0, 3.0)}
    settings = make_settings({"c": ["x", "y"]}, bounds, 400, 0)
    assert settings == make_settings({"c": ["x", "y"]}, bounds, 400, 0)
    assert settings[:400] == [{**setting, "c": "x"} for setting in settings[400:]]
    assert settings[:50] == make_settings({"c": ["x"]}, bounds, 50, 0)
    assert settings[0] != make_settings({"c": ["x"]}, bounds, 1, 1)[0]
    for field, (low, high) in bounds.items():
        places = sorted(math.log(float(s[field]) / low) / math.log(high / low) for s in settings[:400])
        # Kolmogorov and Smirnov: 0.1 for 400 uniform draws is exceeded with probability 0.0007
        assert max(abs(place - k / 400) for k, place in enumerate(places)) < 0.1


def test_failures_fill_a_row_and_the_others_go_on(capsys):
    assert main(["--over", "model.unroll_length=4,3,x,2", *FIT, *QUICK]) == 1
    rows = read(SWEEP / "sweep.csv")
    assert [row["status"][:7] for row in rows] == ["ok", "failed:", "failed:", "ok"]
    assert rows[1]["status"] == "failed: unroll_length=3 does not divide num_steps=4; use 1, 2 or 4"
    assert "unroll_length" in rows[2]["status"] and "\n" not in rows[2]["status"]
    assert rows[1]["final_loss"] == "" and float(rows[3]["final_loss"]) > 0
    assert "status" in capsys.readouterr().out


def test_divergence_is_a_failure_that_never_stops_a_sweep():
    assert main(["--over", "model.max_skipped=1,20", *FIT, *QUICK, "--model.rule.output_scale=1e30"]) == 1
    rows = read(SWEEP / "sweep.csv")
    assert "not finite 1 outer steps in a row" in rows[0]["status"]
    assert "the rule diverged before its first outer step" in rows[1]["status"]
    assert not (SWEEP / "sweep.png").exists()


@pytest.mark.parametrize(
    ("over", "told"),
    [("model.unroll_length=3,2", "error: unroll_length=3 does not divide"), ("model.num_stepz=1,2", "num_stepz")],
)
def test_a_mistake_in_the_first_setting_stops_at_once(over, told, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--over", over, *FIT])
    captured = capsys.readouterr()
    assert told in f"{stop.value}{captured.err}"
    assert "[2/2]" not in captured.out and not (SWEEP / "sweep.csv").exists()


@pytest.fixture
def ran(monkeypatch):
    """Where a stand-in for the command line ran: it diverges at 2, and is interrupted the first time at 3."""
    ran = []

    def run(args):
        ran.append(args[-1])
        if args[-1] == "--a=3" and ran.count("--a=3") == 1:
            raise KeyboardInterrupt
        folder = Path(next(arg for arg in args if "default_root_dir" in arg).split("=")[1])
        folder.mkdir(exist_ok=True)
        loss = "inf" if args[-1] == "--a=2" else "0.5"
        (folder / "comparison.csv").write_text(f"optimizer,final_loss,ratio\nlearned,{loss},nan\nadam,0.4,1.0\n")
        trainer = SimpleNamespace(logger=None, log_dir=str(folder), default_root_dir=str(folder))
        return SimpleNamespace(trainer=trainer)

    monkeypatch.setattr(cli, "run", run)
    return ran


def test_resume_runs_what_is_not_finished(ran):
    with pytest.raises(KeyboardInterrupt):
        main(["--over", "a=1,2,3", "test", "--some=thing"])
    before = read(SWEEP / "sweep.csv")
    diverged = ["failed: the rule diverged, final_loss=inf"] * 2
    assert [row["status"] for row in before] == ["ok", "ok", *diverged]
    assert main(["--resume", str(SWEEP)]) == 1
    assert ran == ["--a=1", "--a=2", "--a=3", "--a=2", "--a=3"]
    after = read(SWEEP / "sweep.csv")
    assert after[:4] == before and [row["status"] for row in after[2:]] == [*diverged, "ok", "ok"]
    assert [p.name for p in Path("sweep").iterdir()] == ["version_0"]
    assert main(["--over", "a=1", "test"]) == 0
    assert {p.name for p in Path("sweep/version_1").iterdir()} == {"1", "command.txt", "sweep.csv", "sweep.png"}


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (["--over", "model.lr", "fit"], "'model.lr' lacks a value"),
        (["--over", "model.lr=1,,2", "fit"], "lacks a value"),
        (["--random", "model.lr=0:1", "fit"], "0 < LOW < HIGH"),
        (["--random", "model.lr=1", "fit"], "model.lr=0.001:0.03"),
        (["--random", "model.lr=1:2", "--trials=0", "fit"], "--trials 0"),
        (["--over", "a=1", "--random", "a=1:2", "fit"], "swept twice"),
        (["fit"], "nothing to sweep"),
        (["--over", "a=1"], "end with fit or test"),
        (["--over", "a=1", "predict"], "'predict' cannot be swept"),
        (["--over", "a=1", "fit", "--trainer.default_root_dir=x"], "use --folder"),
        (["--over", "a=1", "fit", "--ckpt_path", "last"], "leave --ckpt_path out"),
        (["--resume", "nowhere"], "nowhere: no sweep there"),
        (["--resume", "nowhere", "fit"], "give nothing beside it"),
    ],
)
def test_mistakes_in_its_own_options_are_told(args, told, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(args)
    assert told in capsys.readouterr().err
    assert not Path("sweep").exists()


def results(**fields):
    losses = {"learned": "0.2", "adam": "0.3", "sgd": "inf"}
    return [{**fields, "optimizer": k, "final_loss": v, "standard_error": "0.01"} for k, v in losses.items()]


def test_the_plot_has_a_panel_per_value_of_the_second_field():
    rows = [row for h in ("10", "20") for n in ("1", "2", "3") for row in results(**{"m.h": h, "m.n": n, "s": "a"})]
    figure = draw(rows, ["s", "m.h", "m.n"], [], "title")
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["s = a"]
    figure = draw(rows, ["m.h", "m.n"], [], "title")
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["n = 1", "n = 2", "n = 3"]
    assert figure.axes[0].get_xlabel() == "h" and figure.axes[0].get_yscale() == "log"
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["learned", "adam"]  # sgd has diverged
    line = figure.axes[2].containers[0].lines[0]
    assert line.get_xdata().tolist() == [10, 20] and line.get_ydata().tolist() == [0.2, 0.2]


def test_the_plot_of_a_random_search_has_a_log_axis():
    rows = [row for a in ("x", "y") for lr in ("0.3", "0.01") for row in results(lr=lr, a=a)]
    figure = draw(rows, ["a"], ["lr"], "title")
    assert len(figure.axes) == 2 and {axes.get_xscale() for axes in figure.axes} == {"log"}
    assert figure.axes[0].containers[0].lines[0].get_xdata().tolist() == [0.01, 0.3]
    by_name = draw(rows, ["a"], [], "title")  # no field is a number: values side by side, two settings at each
    assert [tick.get_text() for tick in by_name.axes[0].get_xticklabels()] == ["x", "y"]
