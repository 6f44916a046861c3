import io
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from matplotlib.colors import to_hex
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from commandline import TINY_FIT
from lightning_l2l import CoordinatewiseLSTM, LearnedOptimizer, MetaOptimizer, Quadratic, QuadraticDataModule, main
from lightning_l2l.evaluation import proposals as module_under_test
from lightning_l2l.evaluation.baselines import BASELINES, Baseline, Tuned
from lightning_l2l.evaluation.figures import COLOURS
from lightning_l2l.evaluation.learning_curves import LearningCurves
from lightning_l2l.evaluation.proposals import (
    HALF,
    UpdateProposals,
    proposals_figure,
    propose,
    record_gradients,
    typical_coordinate,
)
from lightning_l2l.tasks.base import mix_seed

CPU = torch.device("cpu")
NUM_STEPS = 6
ADAM, SGD = (next(b for b in BASELINES if b.name == name) for name in ("adam", "sgd"))
HISTORY = torch.tensor([0.5, -2.0, 0.01, 3.0])
CANDIDATES = torch.tensor([-3.0, -1e-6, 0.0, 0.2, 5.0])


def make_rule():
    torch.manual_seed(0)
    return CoordinatewiseLSTM(hidden_size=4)


def images(folder, tag):
    return EventAccumulator(str(folder), size_guidance={"images": 0}).Reload().Images(tag)


# propose


@pytest.mark.parametrize("steps", [0, 1, 4])
def test_sgd_proposes_the_gradient(steps):
    assert torch.equal(propose(SGD.at(0.3), HISTORY[:steps], CANDIDATES), -0.3 * CANDIDATES)


@pytest.mark.parametrize("steps", [0, 1, 4])
def test_momentum_proposes_the_decayed_sum(steps):
    past = sum(0.9 ** (steps - k) * float(g) for k, g in enumerate(HISTORY[:steps]))
    found = propose(lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), HISTORY[:steps], CANDIDATES)
    torch.testing.assert_close(found, -0.1 * (past + CANDIDATES))


@pytest.mark.parametrize("steps", [0, 1, 4])
def test_adam_proposes_its_formula(steps):
    m = v = torch.zeros(len(CANDIDATES), dtype=torch.float64)
    for g in (*HISTORY[:steps].double(), CANDIDATES.double()):
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
    corrected = m / (1 - 0.9 ** (steps + 1)), v / (1 - 0.999 ** (steps + 1))
    want = -0.02 * corrected[0] / (corrected[1].sqrt() + 1e-8)
    torch.testing.assert_close(propose(ADAM.at(0.02), HISTORY[:steps], CANDIDATES).double(), want, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("steps", [0, 4])
def test_the_rule_proposes_what_it_does_when_stepped_by_hand(steps):
    rule, before = make_rule(), HISTORY.clone()
    found = propose(lambda p: LearnedOptimizer(p, rule), HISTORY[:steps], CANDIDATES)
    for candidate, proposal in zip(CANDIDATES, found, strict=True):
        p = torch.zeros(1)
        optimizer = LearnedOptimizer([p], rule)
        for gradient in (*HISTORY[:steps], candidate):
            last, p.grad = p.clone(), gradient.reshape(1)
            optimizer.step()
        torch.testing.assert_close(proposal[None], p - last)
    assert torch.equal(HISTORY, before) and found.dtype == torch.float32 and not found.requires_grad


def test_weight_decay_is_no_part_of_a_proposal():
    found = propose(lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=0.5), HISTORY, CANDIDATES)
    torch.testing.assert_close(found, -0.1 * CANDIDATES)


# Gradients along the trajectory


def test_gradients_are_those_of_the_rules_own_trajectory():
    rule, data = make_rule(), QuadraticDataModule(num_tasks=3, dim=4)
    batch = next(iter(data.val_dataloader()))
    found = record_gradients(rule, Quadratic(4), batch, NUM_STEPS, CPU)

    W, y = batch["W"][0], batch["y"][0]
    start = torch.Generator().manual_seed(mix_seed(int(batch["seed"][0]), 0))
    theta, state, want = Quadratic(4).init_params(1, start)["theta"][0], rule.init_state(4), []
    for _ in range(NUM_STEPS):
        want.append(2 * W.T @ (W @ theta - y))
        with torch.no_grad():
            update, state = rule(want[-1], state)
        theta = theta + update
    torch.testing.assert_close(found, torch.stack(want), rtol=1e-4, atol=1e-4)
    assert all(p.grad is None for p in rule.parameters())


class HalfUsed(Quadratic):
    """Has a second parameter, which the loss does not depend on."""

    def init_params(self, num_tasks, generator):
        return {**super().init_params(num_tasks, generator), "unused": torch.zeros(num_tasks, 2)}


def test_a_parameter_without_gradient_counts_as_zero():
    batch = next(iter(QuadraticDataModule(num_tasks=1, dim=3).val_dataloader()))
    rule = make_rule()
    found = record_gradients(rule, HalfUsed(3), batch, NUM_STEPS, CPU)
    assert found.shape == (NUM_STEPS, 5) and not found[:, 3:].any()
    assert torch.equal(found[:, :3], record_gradients(rule, Quadratic(3), batch, NUM_STEPS, CPU))


@pytest.mark.parametrize(
    "means, want",
    [
        ([3.0, 1.0, 2.0], 2),
        ([0.0, 0.0, 5.0, 1.0, 0.0, 3.0, 2.0], 6),  # the lower median of 1, 2, 3, 5
        ([4.0, 4.0, 4.0], 1),
        ([0.0, 0.0], 0),
        ([math.nan, math.inf, 7.0], 2),
    ],
)
def test_typical_coordinate(means, want):
    signs = torch.tensor([[1.0], [-1.0], [1.0], [-1.0]])  # a mean of the gradients themselves would be 0
    assert typical_coordinate(signs * torch.tensor(means)) == want


# Figure


def draw(gradients, steps, baselines=((ADAM, 0.1), (SGD, 0.01))):
    figure = proposals_figure(make_rule(), baselines, gradients, steps, "A title")
    figure.canvas.draw()
    return figure


def curves(axes):
    return [line for line in axes.lines if len(line.get_xdata()) == 2 * HALF + 1]


def test_figure_shows_proposals_of_all_optimizers():
    gradients = torch.linspace(1, -0.5, 30)
    figure, steps = draw(gradients, [1, 2, 13, 30]), [1, 2, 13, 30]
    assert [axes.get_title() for axes in figure.axes] == [f"inner step {step}" for step in steps]
    (legend,) = figure.legends
    labels = [text.get_text() for text in legend.get_texts()]
    assert labels == ["learned", "adam, lr 0.1", "sgd, lr 0.01", "gradient at this step", "the 10 before it"]
    assert "A title" in [text.get_text() for text in figure.texts]
    assert [axes.get_xlabel() for axes in figure.axes] == ["", "gradient", "gradient", "gradient"]
    assert [axes.get_ylabel() for axes in figure.axes] == ["proposed update", "", "", "proposed update"]
    makers = [lambda p: LearnedOptimizer(p, make_rule()), ADAM.at(0.1), SGD.at(0.01)]
    for axes, step in zip(figure.axes, steps, strict=True):
        recent = gradients[:step][-11:]
        low, high = axes.get_xlim()
        assert high == -low == pytest.approx(2 * float(recent.abs().max()))
        assert len(curves(axes)) == len(makers)
        for line, make, colour in zip(curves(axes), makers, (COLOURS[0], COLOURS[1], COLOURS[3]), strict=True):
            x = torch.as_tensor(line.get_xdata())
            assert (x[0], x[-1], x[HALF]) == (pytest.approx(low), pytest.approx(high), 0)
            assert torch.equal(torch.as_tensor(line.get_ydata()), propose(make, gradients[: step - 1], x))
            assert to_hex(line.get_color()).upper() == colour
        ticks = [line for line in axes.lines if list(line.get_ydata()) == [0, 0.08]]
        assert sorted(float(line.get_xdata()[0]) for line in ticks) == pytest.approx(sorted(recent[:-1].tolist()))
        fading = [line.get_alpha() for line in ticks]  # the newest first
        assert fading == sorted(fading, reverse=True) and len(set(fading)) == len(ticks) <= 10
        (dashed,) = [line for line in axes.lines if line.get_linestyle() == "--" and len(line.get_xdata()) == 2]
        assert dashed.get_xdata()[0] == pytest.approx(float(gradients[step - 1]))


def test_a_large_proposal_leaves_the_panel_to_the_rule():
    small, large = (draw(HISTORY, [4], [(SGD, lr)]).axes[0] for lr in (1e-6, 1e6))
    rule = float(np.abs(curves(small)[0].get_ydata()).max())
    assert small.get_ylim()[1] == pytest.approx(1.08 * rule)
    assert large.get_ylim()[1] == pytest.approx(1.08 * 3 * rule)
    assert len(draw(HISTORY, [2], []).axes) == 1  # the rule alone


@pytest.mark.parametrize("odd", [0.0, math.nan, math.inf, 3e38, 1e-42])
def test_figure_copes_with_any_gradient(odd):
    for gradients in (torch.full((12,), odd), torch.tensor([1.0, -1.0, odd]), torch.tensor([odd, 1.0, -1.0])):
        for axes in draw(gradients, [1, 3], [(ADAM, 0.1), (SGD, 1e6)]).axes:
            assert np.isfinite([*axes.get_xlim(), *axes.get_ylim()]).all()
            assert axes.get_xlim()[0] < 0 < axes.get_xlim()[1] and axes.get_ylim()[0] < 0 < axes.get_ylim()[1]


# Callback


def make_module():
    return MetaOptimizer(Quadratic(3), make_rule(), num_steps=NUM_STEPS, unroll_length=3, lr=0.01)


def make_data(**options):
    sizes = dict(num_tasks=4, dim=3, episodes_per_epoch=2, num_val_tasks=4, num_test_tasks=5, eval_tasks=3)
    return QuadraticDataModule(**{**sizes, **options})


def make_trainer(folder, *callbacks, **options):
    options = dict(max_epochs=3, logger=TensorBoardLogger(folder, name="logs"), default_root_dir=folder) | options
    quiet = dict(enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False)
    plain = dict(accelerator="cpu", devices=1, log_every_n_steps=1, inference_mode=False)
    return Trainer(callbacks=list(callbacks), **quiet, **plain, **options)


@pytest.fixture
def drawn(monkeypatch):
    """The arguments of every figure that is drawn."""
    calls = []

    def spy(*args):
        calls.append(args)
        return proposals_figure(*args)

    monkeypatch.setattr(module_under_test, "proposals_figure", spy)
    return calls


def test_figures_against_outer_steps_of_the_first_validation_task(tmp_path, drawn):
    callback, module = UpdateProposals(every_n_epochs=2), make_module()
    trainer = make_trainer(tmp_path, callback, max_epochs=5)
    trainer.fit(module, make_data())
    found = images(trainer.log_dir, "val/update_proposals")
    assert [image.step for image in found] == [8, 16, 20]
    pixels = np.asarray(Image.open(io.BytesIO(found[-1].encoded_image_string)).convert("RGB"))
    assert pixels.shape[1] >= 900 and pixels.reshape(-1, 3).std() > 20
    assert not list(Path(trainer.log_dir).glob("*.png"))

    rule, baselines, gradients, steps, title = drawn[-1]
    batch = next(iter(make_data().val_dataloader()))
    want = record_gradients(module.rule, module.task, batch, NUM_STEPS, CPU)
    coordinate = typical_coordinate(want)
    assert rule is module.rule and torch.equal(gradients, want[:, coordinate]) and steps == [2, 5, 6]
    assert title == f"Updates proposed for validation task 0, coordinate {coordinate} of 3, 6 inner steps"
    assert [(b.name, lr) for b, lr in baselines] == [("adam", 0.03), ("sgd", 0.03)]


def test_training_is_not_disturbed(tmp_path):
    ends = []
    for callbacks in ([], [UpdateProposals()]):
        torch.manual_seed(1)
        module = make_module()
        trainer = make_trainer(tmp_path, *callbacks)
        trainer.fit(module, make_data())
        weights = {**module.state_dict(), "random": torch.rand(3)}
        ends.append((weights, trainer.callback_metrics["val/final_loss"]))
    assert torch.equal(ends[0][1], ends[1][1])
    for name, weight in ends[0][0].items():
        assert torch.equal(weight, ends[1][0][name])


def test_given_coordinate_steps_and_rates(tmp_path, drawn):
    callback = UpdateProposals(steps=[4, 1, 100], coordinate=2, adam_lr=0.5, sgd_lr=0.25)
    trainer = make_trainer(tmp_path, callback)
    trainer.validate(make_module(), make_data(), verbose=False)
    assert [image.step for image in images(trainer.log_dir, "val/update_proposals")] == [0]
    ((_, baselines, _, steps, title),) = drawn
    assert steps == [1, 4, 6] and "coordinate 2 of 3" in title
    assert [(b.name, lr) for b, lr in baselines] == [("adam", 0.5), ("sgd", 0.25)]


@pytest.mark.parametrize("first", [True, False])
def test_tuned_rates_whatever_the_order_of_the_callbacks(tmp_path, drawn, first):
    mine = Baseline("adam", torch.optim.Adam, {"betas": (0.5, 0.9)})
    callbacks = [UpdateProposals(sgd_lr=0.25), LearningCurves(baselines=["nag", mine])]
    trainer = make_trainer(tmp_path, *(callbacks if first else callbacks[::-1]))
    trainer.test(make_module(), make_data(), verbose=False)
    (tuned,) = (t for t in callbacks[1].tuned if t.baseline.name == "adam")
    assert isinstance(tuned, Tuned)
    assert drawn[0][1] == [(mine, tuned.lr), (SGD, 0.25)]


@pytest.mark.parametrize("loggers", [0, 1])
def test_without_tensorboard(tmp_path, loggers):
    logger = CSVLogger(tmp_path, name="csv") if loggers else False
    trainer = make_trainer(tmp_path, UpdateProposals(), logger=logger)
    trainer.fit(make_module(), make_data())
    trainer.test(trainer.lightning_module, make_data(), verbose=False)
    assert (tmp_path / "csv" / "version_0" / "proposals.png" if loggers else tmp_path / "proposals.png").is_file()


def test_fast_dev_run_and_other_ranks_write_nothing(tmp_path, monkeypatch, drawn):
    monkeypatch.chdir(tmp_path)
    trainer = make_trainer(tmp_path, UpdateProposals(), fast_dev_run=True)
    trainer.fit(make_module(), make_data())
    trainer.test(trainer.lightning_module, make_data(), verbose=False)
    trainer = make_trainer(tmp_path, UpdateProposals(), logger=False)
    monkeypatch.setattr(type(trainer), "is_global_zero", False)
    trainer.test(make_module(), make_data(), verbose=False)
    assert not drawn and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "options, message",
    [
        ({"steps": []}, r"steps=\[\]"),
        ({"steps": [5, 0]}, r"steps=\[5, 0\]"),
        ({"coordinate": -1}, "coordinate=-1"),
        ({"every_n_epochs": 0}, "every_n_epochs=0"),
        ({"adam_lr": 0}, "adam_lr=0"),
        ({"sgd_lr": math.inf}, "sgd_lr=inf"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        UpdateProposals(**options)


def test_a_coordinate_that_the_task_lacks(tmp_path):
    trainer = make_trainer(tmp_path, UpdateProposals(coordinate=3))
    with pytest.raises(ValueError, match="coordinate=3 is none of the task's 3; use 0 to 2"):
        trainer.test(make_module(), make_data(), verbose=False)


# Command line


@pytest.mark.parametrize("by_yaml", [False, True])
def test_on_the_command_line(tmp_path, monkeypatch, capsys, drawn, by_yaml):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lightning-l2l"])
    name = "lightning_l2l.UpdateProposals"
    flags = [f"--trainer.callbacks={name}", "--trainer.callbacks.every_n_epochs=2"]
    if by_yaml:
        callback = {"class_path": name, "init_args": {"every_n_epochs": 2}}
        Path("extra.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks": [callback]}}))
        flags = ["--config=extra.yaml"]
    main(["fit", *flags, *TINY_FIT])
    folder = Path("lightning_logs/version_0")
    assert [image.step for image in images(folder, "val/update_proposals")] == [8]
    rates = [(b.name, lr) for b, lr in drawn[-1][1]]

    (command,) = [line for line in capsys.readouterr().out.splitlines() if "lightning_l2l test" in line]
    main([*command.split("lightning_l2l ")[1].split(), "--trainer.enable_progress_bar=false"])
    path = Path("lightning_logs/version_1/proposals.png")
    assert f"Written: {path}" in capsys.readouterr().out
    with Image.open(path) as image:
        assert image.size[0] == 1440
    assert len(images(path.parent, "test/update_proposals")) == 1
    # tuned on the validation tasks by fit and test alike
    assert [(b.name, lr) for b, lr in drawn[-1][1]] == rates and {lr for _, lr in rates} != {0.03}
    assert "test task 0" in drawn[-1][4]


def test_a_rule_that_sees_whole_tensors_is_told_that_it_has_none(in_tmp_path):
    flags = ["--model.rule=lightning_l2l.NormalizedMLP", *(f for f in TINY_FIT if "hidden_size" not in f)]
    with pytest.raises(ValueError, match=r"NormalizedMLP sees whole tensors.*; leave UpdateProposals out"):
        main(["fit", *flags, "--trainer.callbacks=lightning_l2l.UpdateProposals", "--curves.baselines=[]"])
