import csv
import io
import math
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from PIL import Image
from tensorboard.backend.event_processing import plugin_event_accumulator
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_multiplexer import EventMultiplexer
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from commandline import TINY, TINY_FIT
from lightning_l2l import CoordinatewiseLSTM, LearnedOptimizer, MetaOptimizer, Quadratic, QuadraticDataModule, main
from lightning_l2l.evaluation.baselines import BASELINES, Baseline, tune
from lightning_l2l.evaluation.figures import learning_curves
from lightning_l2l.evaluation.learning_curves import LearningCurves
from lightning_l2l.evaluation.results import Result
from lightning_l2l.evaluation.rollout import rollout

CPU = torch.device("cpu")
NUM_STEPS, NUM_VAL, NUM_TEST = 6, 4, 5
NAMES = ["adam", "rmsprop", "sgd", "nag", "adamw"]


class Diverging(Optimizer):
    """Makes a coordinate of the first task infinite."""

    def __init__(self, params, lr):
        super().__init__(params, {})

    @torch.no_grad()
    def step(self, closure=None):
        for p in self.param_groups[0]["params"]:
            p[0, 0] = math.inf


DIVERGING = Baseline("bad", Diverging, apart=False)


def make_module():
    torch.manual_seed(0)
    rule = CoordinatewiseLSTM(hidden_size=4, output_scale=0.1)
    return MetaOptimizer(Quadratic(3), rule, num_steps=NUM_STEPS, unroll_length=3, lr=0.01)


def make_data(**options):
    sizes = dict(num_tasks=4, dim=3, episodes_per_epoch=2, num_val_tasks=NUM_VAL, num_test_tasks=NUM_TEST)
    return QuadraticDataModule(**{**sizes, "eval_tasks": 3, **options})


def make_trainer(tmp_path, curves, *, logger=None, callbacks=(), **options):
    defaults = dict(accelerator="cpu", devices=1, max_epochs=3, log_every_n_steps=1, inference_mode=False)
    quiet = dict(enable_progress_bar=False, enable_model_summary=False)
    if logger is None:
        logger = TensorBoardLogger(tmp_path, name="logs")
    callbacks = [curves, *callbacks]
    options = {**defaults, **quiet, "default_root_dir": tmp_path, "logger": logger, **options}
    options.setdefault("enable_checkpointing", any(isinstance(c, ModelCheckpoint) for c in callbacks))
    return Trainer(callbacks=callbacks, **options)


def learned_losses(module, loader):
    def make(params):
        return LearnedOptimizer(params, module.rule)

    return torch.cat([rollout(make, module.task, b, NUM_STEPS, CPU).losses for b in loader], 1)


def tuned_on_validation(name):
    baseline = next(b for b in BASELINES if b.name == name)
    return tune(baseline, Quadratic(3), list(make_data().val_dataloader()), NUM_STEPS, CPU)


def events(folder):
    return EventAccumulator(str(folder), size_guidance={"images": 0, "scalars": 0}).Reload()


def text(folder, name):
    """The only card of a name, as TensorBoard itself reads it: unlike `events`, that voids texts as well."""
    (event,) = plugin_event_accumulator.EventAccumulator(str(folder)).Reload().Tensors(f"{name}/text_summary")
    return event.tensor_proto.string_val[0].decode()


def cells(card):
    """The rows of a table in Markdown by their first cell."""
    found = [[cell.strip() for cell in line.strip("|").split("|")] for line in card.splitlines() if line[:1] == "|"]
    return {row[0]: row for row in found[2:]}


def typed(card, title):
    """The words of the command below a title."""
    return shlex.split(card.split(f"{title}\n\n")[1].split("\n\n")[0].replace("\\\n", ""))


def read(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def rows(output):
    """The rows of the first table in an output by their first word, each as its words."""
    return tables(output)[0]


def tables(output):
    found = [{}]
    for words in [line.split() for line in output.splitlines()]:
        caption = "rates" in words or any(word.endswith(",") for word in words)  # "adam 8, rmsprop 8 rates x ..."
        if words and words[0] in (*NAMES, "learned", "bad") and not caption:
            if words[0] in found[-1]:
                found.append({})
            found[-1][words[0]] = words
    return found


def command(output, program):
    (line,) = [line for line in output.splitlines() if f"{program} " in line]
    return line[line.index(program) :].split()


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    """A run with everything on."""
    tmp_path = tmp_path_factory.mktemp("fit")
    curves, module = LearningCurves(every_n_epochs=1), make_module()
    checkpoint = ModelCheckpoint(monitor="val/final_loss", filename="best")
    trainer = make_trainer(tmp_path, curves, callbacks=[checkpoint])
    trainer.fit(module, make_data())
    return trainer, module, curves, checkpoint


def test_baselines_are_tuned_on_all_validation_tasks(fitted):
    _, _, curves, _ = fitted
    assert [t.baseline.name for t in curves.tuned] == NAMES
    for found in curves.tuned:
        want = tuned_on_validation(found.baseline.name)
        assert (found.lr, found.final_loss, found.tried) == (want.lr, want.final_loss, want.tried)


def test_figure_is_logged_against_outer_steps(fitted):
    trainer, _, _, _ = fitted
    accumulator = events(trainer.log_dir)
    images = accumulator.Images("curves/val_loss_with_quantiles")
    assert [image.step for image in images] == [4, 8, 12]  # 2 episodes of 2 truncations an epoch
    assert trainer.global_step == 12
    pixels = np.asarray(Image.open(io.BytesIO(images[-1].encoded_image_string)).convert("RGB"))
    assert pixels.shape[0] >= 500 and pixels.shape[1] >= 800
    assert pixels.reshape(-1, 3).std() > 20  # something is drawn


def test_curves_overlay_and_the_rules_is_the_newest(fitted):
    trainer, module, curves, _ = fitted
    for result in curves.results:
        found = events(f"{trainer.log_dir}/curves/{result.name}")
        assert found.Tags()["scalars"] == ["curves/val_loss_by_inner_step"]
        curve = found.Scalars("curves/val_loss_by_inner_step")
        assert [event.step for event in curve] == list(range(NUM_STEPS + 1))
        assert [event.value for event in curve] == pytest.approx(result.mean.tolist())
    want = learned_losses(module, make_data().val_dataloader()).double()
    assert curves.results[0].name == "learned"
    torch.testing.assert_close(curves.results[0].losses, want)


def test_curves_and_figure_are_the_first_two_cards(fitted):
    trainer, _, _, _ = fitted
    runs = EventMultiplexer().AddRunsFromDirectory(trainer.log_dir).Reload().Runs().values()
    tags = {tag for run in runs for kind in ("scalars", "images") for tag in run[kind]}
    assert {tag.split("/")[0] for tag in tags} >= {"curves", "train", "val"}
    assert sorted(tags)[:2] == ["curves/val_loss_by_inner_step", "curves/val_loss_with_quantiles"]
    assert not sorted(tags)[2].startswith("curves/")


def test_table_is_there_while_training(tmp_path):
    class Stopped(Exception):
        """Ends a run where `on_fit_end` is not reached."""

    class Stop(Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 2:
                raise Stopped

    curves = LearningCurves(["sgd"])
    trainer = make_trainer(tmp_path, curves, callbacks=[Stop()])
    with pytest.raises(Stopped):
        trainer.fit(make_module(), make_data())
    card = text(f"{trainer.log_dir}/curves/learned", "results/val_final_loss")
    newest = [f"{result.final_loss:.4g}" for result in curves.results]
    assert [row[2] for row in cells(card).values()] == newest and list(cells(card)) == ["learned", "sgd"]
    assert "Compare" not in card  # which checkpoint is the best one is not known yet


def test_a_run_of_the_command_line_in_tensorboard(tmp_path, monkeypatch):
    def run(words):
        assert words[:3] == ["python", "-m", "lightning_l2l"]
        monkeypatch.setattr(sys, "argv", [str(tmp_path / "lightning_l2l" / "__main__.py"), *words[3:]])
        main()

    monkeypatch.chdir(tmp_path)
    command = ["python", "-m", "lightning_l2l", "fit", *TINY_FIT, "--curves.baselines=[sgd]"]
    run(command)
    runs = EventMultiplexer().AddRunsFromDirectory("lightning_logs/version_0").Reload().Runs().values()
    groups = sorted({tag.split("/")[0] for found in runs for tag in found["scalars"]})
    assert groups[:2] == ["curves", "train"]  # those that TensorBoard unfolds
    card = text("lightning_logs/version_0/curves/learned", "results/val_final_loss")
    assert typed(card, "Made by:") == command
    again = [*typed(card, "Compare on test tasks:"), TINY[-1]]
    assert "lightning_logs/version_0/checkpoints/best.ckpt" in again
    run(again)
    card = text("lightning_logs/version_1/curves/learned", "results/test_final_loss")
    assert typed(card, "Made by:") == again
    assert list(cells(card)) == ["learned", "sgd"]


def test_final_losses_are_logged(fitted):
    trainer, _, curves, _ = fitted
    accumulator = events(trainer.log_dir)
    for result in curves.results[1:]:
        logged = accumulator.Scalars(f"val/{result.name}/final_loss")
        assert [event.step for event in logged] == [4, 8, 12]
        assert logged[0].value == pytest.approx(result.final_loss)


def test_tuning_leaves_the_random_numbers_alone(tmp_path, fitted):
    _, with_curves, _, _ = fitted
    module = make_module()
    trainer = make_trainer(tmp_path, LearningCurves(baselines=[]), logger=False)
    trainer.fit(module, make_data())
    for p, q in zip(module.rule.parameters(), with_curves.rule.parameters(), strict=True):
        assert torch.equal(p, q)


def test_fit_ends_with_table_and_commands(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "60")  # commands must not be wrapped
    curves, data = LearningCurves(test_command="go test --config a.yaml"), make_data()
    checkpoint = ModelCheckpoint(tmp_path / "a b" / ("long" * 20), "best", monitor="val/final_loss")
    trainer = make_trainer(tmp_path, curves, callbacks=[checkpoint])
    trainer.fit(make_module(), data)
    output = capsys.readouterr().out
    assert "on 4 validation tasks, 6 steps each" in output
    table = rows(output)
    reference = min(t.final_loss for t in curves.tuned)
    for t in curves.tuned:
        want = [t.baseline.name, f"{t.lr:g}", f"{t.final_loss:.4g}", f"{t.final_loss / reference:.3f}"]
        assert table[t.baseline.name] == want
    best = float(checkpoint.best_model_score)
    assert table["learned"][-3:] == ["-", f"{best:.4g}", f"{best / reference:.3f}"]
    assert "diverged" not in output
    path = f"'a b/{'long' * 20}/best.ckpt'"
    assert f"go test --config a.yaml --ckpt_path {path}\n" in output
    card = text("logs/version_0/curves/learned", "results/val_final_loss")
    shown = cells(card)
    assert "**Final loss (after 6 steps), mean over 4 validation tasks**" in card
    assert list(shown) == ["learned (best checkpoint)", *NAMES]
    assert [row[1:] for row in shown.values()] == [table[name][-3:] for name in ("learned", *NAMES)]
    assert f"    go test --config a.yaml --ckpt_path {path}" in card.splitlines()
    assert "Made by" not in card  # not by a command of this package
    assert "tensorboard --logdir logs/version_0\n" in output


def test_table_is_of_the_best_checkpoint(fitted, capsys, monkeypatch):
    trainer, module, curves, checkpoint = fitted
    monkeypatch.setattr(checkpoint, "best_model_score", torch.tensor(0.0625))  # of an earlier epoch
    curves.on_fit_end(trainer, module)
    assert "0.0625" in rows(capsys.readouterr().out)["learned"]


def test_default_test_command(fitted, capsys):
    trainer, module, curves, checkpoint = fitted
    curves.on_fit_end(trainer, module)
    words = command(capsys.readouterr().out, "python")
    assert words[:-1] == ["python", "-m", "lightning_l2l", "test", "--ckpt_path"]
    assert words[-1] == checkpoint.best_model_path


@pytest.mark.parametrize("sanity", [0, 1, -1])
def test_with_and_without_sanity_check(tmp_path, capsys, sanity):
    curves = LearningCurves(baselines=["sgd"], every_n_epochs=1)
    trainer = make_trainer(tmp_path, curves, max_epochs=2, num_sanity_val_steps=sanity)
    trainer.fit(make_module(), make_data())
    output = capsys.readouterr().out
    assert output.count("Tuning the learning rates of sgd") == 1
    assert "--ckpt_path" not in output  # there is no checkpoint
    assert len(events(trainer.log_dir).Images("curves/val_loss_with_quantiles")) == 2


def test_figures_every_n_epochs_and_at_the_end(tmp_path):
    curves = LearningCurves(baselines=["sgd"], every_n_epochs=2)
    trainer = make_trainer(tmp_path, curves, max_epochs=5)
    trainer.fit(make_module(), make_data())
    images = events(trainer.log_dir).Images("curves/val_loss_with_quantiles")
    assert [image.step for image in images] == [8, 16, 20]


def test_nothing_is_printed_without_validation(tmp_path, capsys):
    trainer = make_trainer(tmp_path, LearningCurves(), limit_val_batches=0)
    trainer.fit(make_module(), make_data())
    assert "learned" not in capsys.readouterr().out


def test_other_ranks_print_and_write_nothing(fitted, capsys, monkeypatch):
    trainer, module, curves, _ = fitted
    monkeypatch.setattr(type(trainer), "is_global_zero", False)
    before = {path: path.stat().st_size for path in Path(trainer.log_dir).rglob("*")}
    curves.on_fit_end(trainer, module)
    assert capsys.readouterr().out == ""
    assert {path: path.stat().st_size for path in Path(trainer.log_dir).rglob("*")} == before


@pytest.mark.parametrize("loggers", [0, 1, 2])
def test_other_loggers_or_none(tmp_path, capsys, loggers):
    logger = [CSVLogger(tmp_path, name=f"csv{k}") for k in range(loggers)] or False
    trainer = make_trainer(tmp_path, LearningCurves(baselines=["sgd"]), logger=logger)
    trainer.fit(make_module(), make_data())
    output = capsys.readouterr().out
    assert "learned" in rows(output) and "tensorboard" not in output
    trainer.test(trainer.lightning_module, make_data(), verbose=False)
    folder = tmp_path / "csv0" / "version_0" if loggers else tmp_path
    assert {"comparison.csv", "curves.csv", "curves.png"} <= {p.name for p in folder.iterdir()}


def test_validate_alone(tmp_path):
    curves, module = LearningCurves(), make_module()
    trainer = make_trainer(tmp_path, curves)
    (metrics,) = trainer.validate(module, make_data(), verbose=False)
    assert set(metrics) >= {f"val/{name}/final_loss" for name in NAMES}
    assert metrics["val/final_loss"] == pytest.approx(curves.results[0].final_loss)
    assert [i.step for i in events(trainer.log_dir).Images("curves/val_loss_with_quantiles")] == [0]
    assert len(events(f"{trainer.log_dir}/curves/adam").Scalars("curves/val_loss_by_inner_step")) == NUM_STEPS + 1


def test_limited_validation_compares_the_same_tasks(tmp_path):
    curves = LearningCurves(baselines=["sgd"])
    trainer = make_trainer(tmp_path, curves, limit_val_batches=1)
    trainer.validate(make_module(), make_data(), verbose=False)
    assert [result.losses.shape for result in curves.results] == [(NUM_STEPS + 1, 3)] * 2
    trainer = make_trainer(tmp_path, curves, limit_val_batches=0.5)
    trainer.validate(make_module(), make_data(), verbose=False)
    assert [result.losses.shape for result in curves.results] == [(NUM_STEPS + 1, 3)] * 2


def test_plain_dataloaders_with_persistent_workers(tmp_path):
    data = make_data(eval_tasks=1)
    tasks = [{key: values[0] for key, values in batch.items()} for batch in data.val_dataloader()]
    loader = DataLoader(tasks, batch_size=2, num_workers=1, persistent_workers=True)
    curves = LearningCurves(baselines=["sgd"])
    trainer = make_trainer(tmp_path, curves, logger=False, max_epochs=1, num_sanity_val_steps=0)
    trainer.fit(make_module(), data.train_dataloader(), loader)
    assert [result.losses.shape for result in curves.results] == [(NUM_STEPS + 1, NUM_VAL)] * 2
    assert curves.tuned[0].final_loss == pytest.approx(tuned_on_validation("sgd").final_loss)
    # tunes on the validation tasks of before
    trainer.test(trainer.lightning_module, data.test_dataloader(), verbose=False)
    assert curves.tuned[0].final_loss == pytest.approx(tuned_on_validation("sgd").final_loss)


def test_diverging_baseline(tmp_path, capsys):
    trainer = make_trainer(tmp_path, LearningCurves(baselines=["sgd", DIVERGING]))
    trainer.fit(make_module(), make_data())
    table = rows(capsys.readouterr().out)
    assert table["bad"][-3:] == ["inf", "inf", "50%"]  # the first task of both batches
    assert table["sgd"][-1] == table["learned"][-1] == "0%"
    curve = events(f"{trainer.log_dir}/curves/bad").Scalars("curves/val_loss_by_inner_step")
    assert [math.isfinite(event.value) for event in curve] == [True] + NUM_STEPS * [False]
    trainer.test(trainer.lightning_module, make_data(), verbose=False)
    assert read(Path(trainer.log_dir) / "comparison.csv")[2]["final_loss"] == "inf"
    final, course = tables(capsys.readouterr().out)
    assert final["bad"][2:4] == ["inf", "-"] and final["bad"][-1] == "inf"
    assert course["bad"][1:3] == ["inf", "40%"]


def test_test_prints_and_writes_the_comparison(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    module, curves = make_module(), LearningCurves(quantiles=(0.25, 0.75))
    trainer = make_trainer(tmp_path, curves)
    (metrics,) = trainer.test(module, make_data(), verbose=False)
    output = capsys.readouterr().out
    tests = list(make_data().test_dataloader())
    want = {"learned": (None, learned_losses(module, tests))}
    for name in NAMES:
        lr = (tuned := tuned_on_validation(name)).lr
        make = tuned.baseline.at(lr)
        want[name] = lr, torch.cat([rollout(make, module.task, b, NUM_STEPS, CPU).losses for b in tests], 1)
    reference = min(float(losses[-1].mean()) for lr, losses in want.values() if lr)

    (table, course), folder = tables(output), tmp_path / "logs" / "version_0"
    comparison, curve = read(folder / "comparison.csv"), read(folder / "curves.csv")
    assert [row["optimizer"] for row in comparison] == list(want) == list(table)
    assert len(curve) == len(want) * (NUM_STEPS + 1)
    of_tasks = read(folder / "tasks.csv")
    assert [row.pop("task") for row in of_tasks] == [str(k) for k in range(NUM_TEST)]
    for name, (_, losses) in want.items():
        assert [float(row[name]) for row in of_tasks] == pytest.approx(losses[-1].tolist(), rel=1e-6)
    for row, (name, (lr, losses)) in zip(comparison, want.items(), strict=True):
        final = losses[-1].double()
        numbers = dict(
            final_loss=float(final.mean()),
            median=float(final.quantile(0.5)),
            standard_error=float(final.std()) / math.sqrt(NUM_TEST),
            diverged=0,
            ratio=float(final.mean()) / reference,
            trajectory_loss=float(losses[1:].double().mean()),
            num_tasks=NUM_TEST,
            num_steps=NUM_STEPS,
            final_steps=1,
        )
        numbers |= {f"quantile_{q}": float(final.quantile(q)) for q in (0.1, 0.9)}
        assert row["lr"] == ("" if lr is None else str(lr))
        assert {k: float(row[k]) for k in numbers} == pytest.approx(numbers)
        assert metrics[f"test/{name}/final_loss"] == pytest.approx(numbers["final_loss"])
        shown = ["-" if lr is None else f"{lr:g}"]
        keys = ("final_loss", "standard_error", "median", "quantile_0.1", "quantile_0.9")
        shown += [f"{numbers[k]:.4g}" for k in keys]
        assert table[name][1:] == [*shown, f"{numbers['ratio']:.3f}"]
        assert course[name][1:3] == [f"{numbers['trajectory_loss']:.4g}", "0%"]
        assert float(row["seconds_per_step"]) * 1000 == pytest.approx(float(course[name][3]), rel=1e-3)
        assert course[name][4] == (row["steps_to_adam"] or "-")
        own = [row for row in curve if row["optimizer"] == name]
        for key, values in {
            "step": torch.arange(NUM_STEPS + 1),
            "mean": losses.mean(1),
            "quantile_0.25": losses.quantile(0.25, 1),
            "quantile_0.75": losses.quantile(0.75, 1),
        }.items():
            assert [float(row[key]) for row in own] == pytest.approx(values.tolist(), rel=1e-5)

    text = " ".join(output.split())
    assert "Final loss (after 6 steps) on 5 test tasks" in text
    tried = ", ".join(f"{name} {len(tuned_on_validation(name).tried)}" for name in NAMES)
    assert f"budget: {tried} rates x 4 tasks x 6 steps" in text
    assert "Written to logs/version_0: comparison.csv, tasks.csv, curves.csv, curves.png" in output
    with Image.open(folder / "curves.png") as image:
        assert image.size == (960, 630)


def test_tensorboard_shows_the_comparison_with_hparams(tmp_path, capsys):
    curves = LearningCurves(["adam", DIVERGING])
    trainer = make_trainer(tmp_path, curves)
    trainer.test(make_module(), make_data(), verbose=False)
    runs = EventMultiplexer().AddRunsFromDirectory(trainer.log_dir).Reload().Runs().values()
    tags = sorted({tag for run in runs for kind in ("scalars", "images") for tag in run[kind]})
    assert tags[:2] == ["curves/test_loss_by_inner_step", "curves/test_loss_with_quantiles"]
    assert "test/final_loss" in tags
    cards = [text(f"{trainer.log_dir}/curves/learned", f"results/{name}") for name in ("test_final_loss", "test_steps")]
    assert "**Final loss (after 6 steps) on 5 test tasks**" in cards[0] and "budget: adam" in cards[0]
    assert "**Course of the 6 steps, means over 5 test tasks**" in cards[1] and "Made by" not in "".join(cards)
    assert [list(cells(card).values()) for card in cards] == [list(t.values()) for t in tables(capsys.readouterr().out)]
    assert len(events(trainer.log_dir).Images("curves/test_loss_with_quantiles")) == 1
    for result in curves.results:
        assert len(list(Path(trainer.log_dir, "curves", result.name).iterdir())) == 1  # a second could void the first
        found = events(f"{trainer.log_dir}/curves/{result.name}")
        curve = found.Scalars("curves/test_loss_by_inner_step")
        assert [event.value for event in curve] == pytest.approx(result.mean.tolist())
        assert found.Scalars("test/final_loss")[0].value == pytest.approx(result.final_loss)
        content = found.summary_metadata["_hparams_/session_start_info"].plugin_data.content
        hparams = HParamsPluginData.FromString(content).session_start_info.hparams
        lr = "-" if result.lr is None else str(result.lr)
        assert {k: v.string_value for k, v in hparams.items()} == {"optimizer": result.name, "lr": lr}


def test_fit_ends_with_hparams(fitted):
    trainer, module, _, checkpoint = fitted
    found = events(trainer.log_dir)
    assert found.Scalars("val/best_final_loss")[0].value == pytest.approx(float(checkpoint.best_model_score))
    content = found.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    assert HParamsPluginData.FromString(content).session_start_info.hparams["lr"].number_value == module.lr


class Unseen(Quadratic):
    """Has figures on data that it was not trained on."""

    def unseen(self, params, batch):
        return {"loss": batch["W"][:, 0, 0], "accuracy": batch["y"][:, 0].sigmoid()}


def test_final_steps_and_unseen_figures_reach_tables_and_files(tmp_path, capsys):
    module = MetaOptimizer(Unseen(3), CoordinatewiseLSTM(4), num_steps=NUM_STEPS, unroll_length=3, final_steps=4)
    trainer = make_trainer(tmp_path, LearningCurves(["sgd"]))
    trainer.test(module, make_data(), verbose=False)
    output = capsys.readouterr().out
    losses = learned_losses(module, make_data().test_dataloader())
    (row, _), (_, course) = read(Path(trainer.log_dir) / "comparison.csv"), tables(output)
    assert float(row["final_loss"]) == pytest.approx(float(losses[3:].mean()))
    assert row["final_steps"] == "4" and "mean of steps 3 to 6" in output
    tests = list(make_data().test_dataloader())
    unseen = torch.cat([b["W"][:, 0, 0] for b in tests]), torch.cat([b["y"][:, 0].sigmoid() for b in tests])
    assert float(row["unseen_loss"]) == pytest.approx(float(unseen[0].mean()))
    assert float(row["unseen_accuracy"]) == pytest.approx(float(unseen[1].mean()))
    assert course["learned"][-2:] == [f"{unseen[0].mean():.4g}", f"{unseen[1].mean():.1%}"]
    assert row["steps_to_adam"] == "" and "Adam" not in output


def test_test_without_validation_tasks_says_so(tmp_path):
    trainer = make_trainer(tmp_path, LearningCurves())
    with pytest.raises(ValueError, match=r"tuned on validation tasks, and there are none; .*baselines=\[\]"):
        trainer.test(make_module(), make_data().test_dataloader())


def test_test_without_baselines_needs_no_validation_tasks(tmp_path, capsys):
    trainer = make_trainer(tmp_path, LearningCurves(baselines=[]))
    trainer.test(make_module(), make_data().test_dataloader(), verbose=False)
    assert list(rows(capsys.readouterr().out)) == ["learned"]
    assert len(read(Path(trainer.log_dir) / "comparison.csv")) == 1


def test_predict_writes_every_loss(tmp_path, capsys):
    module = make_module()
    trainer = make_trainer(tmp_path, LearningCurves())
    trainer.predict(module, make_data())
    path = Path(trainer.log_dir) / "predictions.csv"
    losses = learned_losses(module, make_data().test_dataloader())
    want = [(k, t, float(losses[t, k])) for k in range(NUM_TEST) for t in range(NUM_STEPS + 1)]
    assert [(int(r["task"]), int(r["step"]), float(r["loss"])) for r in read(path)] == want
    assert f"{path}, 5 tasks x 7 losses" in capsys.readouterr().out


def test_fast_dev_run_writes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    trainer = make_trainer(tmp_path, LearningCurves(), fast_dev_run=True)
    module = make_module()
    trainer.fit(module, make_data())
    trainer.test(module, make_data())
    trainer.predict(module, make_data())
    assert "learned" in rows(capsys.readouterr().out)
    assert not list(tmp_path.iterdir())


@pytest.mark.filterwarnings("ignore:It is recommended to use .*'step'", "ignore:.*fork:DeprecationWarning")
def test_two_processes_do_what_one_does(tmp_path):
    """Rank 0 writes what a single process would: same learning rates, same tasks in the same order."""
    found = []
    for devices in (1, 2):
        folder = tmp_path / str(devices)
        options = {} if devices == 1 else {"strategy": "ddp_fork"}
        data = make_data(num_tasks=4 // devices, eval_tasks=6 // devices, num_test_tasks=6)
        logger = TensorBoardLogger(folder, name="logs", version=0)
        trainer = make_trainer(folder, LearningCurves(), logger=logger, devices=devices, **options)
        module = make_module()
        trainer.validate(module, data, verbose=False)
        trainer.test(module, data, verbose=False)
        trainer.predict(module, data, return_predictions=False)
        logs = folder / "logs" / "version_0"
        files = {name: read(logs / name) for name in ("comparison.csv", "curves.csv", "predictions.csv")}
        curves = {}
        for name in ("adam", "learned"):
            scalars = events(logs / "curves" / name).Scalars("curves/test_loss_by_inner_step")
            curves[name] = [(event.step, event.value) for event in scalars]
            assert len(curves[name]) == NUM_STEPS + 1
        cards = [text(logs / "curves" / "learned", f"results/{name}") for name in ("test_final_loss", "test_steps")]
        assert [card.count("| adam |") for card in cards] == [1, 1]
        found.append((files, curves))
    (files, curves), (other_files, other_curves) = found
    assert {n: len(f) for n, f in other_files.items()} == {n: len(f) for n, f in files.items()}
    for name, table in files.items():
        for row, other in zip(table, other_files[name], strict=True):
            for key in row:
                if key == "seconds_per_step":
                    continue
                if key in ("optimizer", "lr", "steps_to_adam"):
                    assert row[key] == other[key]
                else:
                    assert float(row[key]) == pytest.approx(float(other[key]), rel=1e-5)
    for name in curves:
        assert np.array(curves[name]) == pytest.approx(np.array(other_curves[name]), rel=1e-5)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"baselines": ["adamm"]}, "unknown baseline 'adamm'"),
        ({"baselines": [Baseline("learned", torch.optim.SGD)]}, "'learned' is taken"),
        ({"quantiles": (0.9, 0.1)}, r"quantiles=\(0.9, 0.1\)"),
        ({"every_n_epochs": 0}, "every_n_epochs=0"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        LearningCurves(**options)


@pytest.mark.parametrize("worst", [0.0, -1.0, 1e300, math.inf])
def test_figure_copes_with_any_loss(worst):
    steps = torch.arange(5.0).double()[:, None]
    odd = torch.full((5, 3), worst, dtype=torch.float64)
    half = torch.where(steps < 2, steps + 1, odd)
    for results in ([Result("a", steps.exp() + torch.zeros(3)), Result("b", half)], [Result("b", odd, 0.1)]):
        figure = learning_curves(results, "A title", (0.1, 0.9))
        figure.canvas.draw()
        (axes,) = figure.axes
        assert axes.get_yscale() == "log" and axes.get_title(loc="left") == "A title"
        assert axes.get_xlabel() == "Inner step" and axes.get_ylabel() == "Loss"
        low, high = axes.get_ylim()
        assert 0 < low < high < (1e4 if len(results) == 2 else math.inf)
        labels = [text.get_text() for text in axes.get_legend().get_texts()]
        assert len(labels) == len(results) and labels[-1].startswith("b")
    assert ("diverged" in labels[-1]) == (worst == math.inf)


def test_long_curves_are_running_means():
    losses = 1 + torch.arange(601.0)[:, None] % 2 + torch.zeros(2)  # 1, 2, 1, 2, ...
    (axes,) = learning_curves([Result("a", losses)], "A title", (0.1, 0.9)).axes
    steps, mean = axes.lines[-1].get_data()
    assert list(steps) == list(range(5, 601)) and mean == pytest.approx([1.5] * 596)
    assert axes.get_ylabel() == "Loss, mean of 6 steps" and axes.get_xlim() == (0, 600)
    short = Result("a", losses[:301])
    (axes,) = learning_curves([short], "A title", (0.1, 0.9)).axes
    assert axes.lines[-1].get_ydata() == pytest.approx(short.mean.numpy())
