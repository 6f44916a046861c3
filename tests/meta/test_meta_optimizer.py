import copy
import math
from functools import partial

import pytest
import torch
from lightning.pytorch import Callback, Trainer

from lightning_l2l import (
    CoordinatewiseLSTM,
    FirstOrder,
    Imitation,
    MetaOptimizer,
    Quadratic,
    QuadraticDataModule,
    RandomScaling,
    RNNprop,
    RuleGroups,
    SecondOrder,
)
from lightning_l2l.evaluation.rollout import Rollout
from lightning_l2l.meta.meta_optimizer import LOSS_WEIGHTS
from lightning_l2l.meta.unroll import Unroll
from lightning_l2l.rules.files import save_rule


def make(**arguments):
    torch.manual_seed(0)
    rule = CoordinatewiseLSTM(hidden_size=4)
    return MetaOptimizer(Quadratic(3), rule, **{"num_steps": 6, "unroll_length": 3, **arguments})


def data(**arguments):
    sizes = {"num_tasks": 4, "dim": 3, "episodes_per_epoch": 3, "num_val_tasks": 6, "num_test_tasks": 6}
    return QuadraticDataModule(**{**sizes, **arguments})


@pytest.fixture
def trainer(tmp_path):
    def build(**arguments):
        defaults = {
            "max_epochs": 2,
            "accelerator": "cpu",
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "inference_mode": False,
            "default_root_dir": tmp_path,
            "log_every_n_steps": 1,
        }
        return Trainer(**{**defaults, **arguments})

    return build


@pytest.mark.parametrize("train_task", [None, RandomScaling(Quadratic(3))], ids=["same", "another"])
def test_a_training_step_is_an_episode_with_an_outer_step_a_truncation(trainer, train_task):
    module, fit = make(lr=0.01, train_task=train_task), trainer(max_epochs=1, limit_val_batches=0)
    by_hand = copy.deepcopy(module.rule)
    fit.fit(module, data())
    assert fit.global_step == 3 * 2

    datamodule = data()
    datamodule.setup()
    adam, unroll = torch.optim.Adam(by_hand.parameters(), lr=0.01), Unroll(train_task or Quadratic(3), by_hand)
    for batch in datamodule.train_dataloader():
        episode, total = unroll.start(batch), 0.0
        for _ in range(2):
            adam.zero_grad()
            truncation = unroll.run(episode, 3)
            truncation.meta_loss.backward()
            adam.step()
            total += truncation.losses.mean(1).sum().item()
    for a, b in zip(module.rule.parameters(), by_hand.parameters(), strict=True):
        assert torch.equal(a, b)
    assert fit.callback_metrics["train/meta_loss"].item() == pytest.approx(total)


def test_validation_figures_are_means_over_all_tasks_and_of_the_task_itself(trainer):
    datamodule = data(eval_tasks=4)  # 6 tasks: a batch of 4 and one of 2
    module = make(train_task=RandomScaling(Quadratic(3)))
    (found,) = trainer().validate(module, datamodule, verbose=False)
    module = make()
    losses = torch.cat([module.evaluate(batch).losses for batch in datamodule.val_dataloader()], 1)
    assert losses.shape == (7, 6)
    assert found["val/final_loss"] == pytest.approx(losses[6].mean().item())
    assert found["val/meta_loss"] == pytest.approx(losses[1:].sum(0).mean().item())
    assert found["val/trajectory_loss"] == pytest.approx(losses[1:].mean().item())
    assert "val/unseen_loss" not in found


def test_weights_and_final_steps_in_the_validation_figures(trainer):
    module, datamodule = make(loss_weights="linear", final_steps=2), data()
    (found,) = trainer().validate(module, datamodule, verbose=False)
    losses = torch.cat([module.evaluate(batch).losses for batch in datamodule.val_dataloader()], 1)
    assert found["val/final_loss"] == pytest.approx(losses[5:].mean().item())
    weighted = sum(t / 3.5 * losses[t].mean().item() for t in range(1, 7))
    assert found["val/meta_loss"] == pytest.approx(weighted)


class Unseen(Quadratic):
    """Has a figure on data that it was not trained on."""

    def unseen(self, params, batch):
        return {"loss": batch["y"][:, 0], "accuracy": batch["y"][:, 1]}


def test_unseen_figures_are_logged(trainer):
    module, datamodule = make(), data(eval_tasks=4)
    module.task = Unseen(3)
    (found,) = trainer().validate(module, datamodule, verbose=False)
    y = torch.cat([batch["y"] for batch in datamodule.val_dataloader()]).mean(0)
    assert found["val/unseen_loss"] == pytest.approx(y[0].item())
    assert found["val/unseen_accuracy"] == pytest.approx(y[1].item())


@pytest.mark.parametrize("loss_weights", ["all", "linear", "last"])
def test_a_diverged_task_makes_the_figures_infinite(trainer, monkeypatch, loss_weights):
    module = make(loss_weights=loss_weights, num_steps=2, unroll_length=1)
    diverged = Rollout(torch.tensor([[1.0, 1.0], [1.0, torch.inf], [1.0, torch.inf]]))
    monkeypatch.setattr(module, "evaluate", lambda batch: diverged)
    (found,) = trainer().validate(module, data(), verbose=False)
    assert {found[f"val/{name}"] for name in ("final_loss", "meta_loss", "trajectory_loss")} == {float("inf")}


@pytest.mark.parametrize(
    "kind, want", [("all", [1, 1, 1, 1, 1]), ("linear", [1 / 3, 2 / 3, 1, 4 / 3, 5 / 3]), ("last", [0, 0, 0, 0, 5])]
)
def test_loss_weights(kind, want):
    assert LOSS_WEIGHTS[kind](5) == pytest.approx(want)


@pytest.mark.parametrize("kind, steps, log", [("linear", 2, False), ("last", 1, False), ("linear", 2, True)])
def test_training_weighs_every_truncation_and_leaves_out_those_without_weight(trainer, kind, steps, log):
    module = make(lr=0.01, loss_weights=kind, log_loss=log)
    fit = trainer(max_epochs=1, limit_train_batches=1, limit_val_batches=0)
    rule = copy.deepcopy(module.rule)
    datamodule = data()
    fit.fit(module, datamodule)
    assert fit.global_step == steps

    adam, unroll = torch.optim.Adam(rule.parameters(), lr=0.01), Unroll(Quadratic(3), rule, log_loss=log)
    datamodule = data()
    datamodule.setup()
    episode, total = unroll.start(next(iter(datamodule.train_dataloader()))), 0.0
    for weights in ([2 / 7, 4 / 7, 6 / 7], [8 / 7, 10 / 7, 12 / 7]) if kind == "linear" else ([0, 0, 0], [0, 0, 6]):
        adam.zero_grad()
        meta_loss = unroll.run(episode, 3, weights).meta_loss
        total += meta_loss.item()
        if any(weights):
            meta_loss.backward()
            adam.step()
    for a, b in zip(module.rule.parameters(), rule.parameters(), strict=True):
        torch.testing.assert_close(a, b)
    assert fit.callback_metrics["train/meta_loss"].item() == pytest.approx(total)


def test_optimizees_are_not_registered():
    from lightning_l2l.tasks import MLP, NetworkTask

    module = MetaOptimizer(NetworkTask(MLP(5, 4)), CoordinatewiseLSTM(hidden_size=4))
    assert all(name.startswith("rule.") for name in module.state_dict())
    assert all(name.startswith("rule.") for name, _ in module.named_parameters())


def test_scheduler_and_optimizer_are_configurable(trainer):
    module = make(
        lr=0.5,
        optimizer=torch.optim.SGD,
        lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.1),
        gradient_clip=1e-12,
    )
    before = [p.detach().clone() for p in module.rule.parameters()]
    fit = trainer()
    fit.fit(module, data())
    (optimizer,) = fit.optimizers
    assert isinstance(optimizer, torch.optim.SGD)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.5 * 0.1**2)
    for a, b in zip(before, module.rule.parameters(), strict=True):  # the clip left nothing to move by
        torch.testing.assert_close(a, b.detach(), atol=1e-10, rtol=0)


def test_annealing_ends_at_zero_with_the_run(trainer):
    rates = []

    class Watch(Callback):
        def on_train_epoch_start(self, trainer, module):
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    fit = trainer(max_epochs=4, callbacks=[Watch()])
    fit.fit(make(lr=0.1, anneal=True), data())
    assert rates == pytest.approx([0.05 * (1 + math.cos(math.pi * epoch / 4)) for epoch in range(4)])
    assert fit.optimizers[0].param_groups[0]["lr"] == pytest.approx(0)


def test_annealing_needs_an_end_and_no_other_schedule(trainer):
    with pytest.raises(ValueError, match=r"anneal=True .* set max_epochs \(now -1\)"):
        trainer(max_epochs=-1).fit(make(anneal=True), data())
    with pytest.raises(ValueError, match="two schedules for one learning rate"):
        make(anneal=True, lr_scheduler=torch.optim.lr_scheduler.ConstantLR)


def test_plateau_scheduler_watches_the_validation(trainer):
    module = make(
        lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=1e9)
    )
    fit = trainer(max_epochs=3)
    fit.fit(module, data())
    assert fit.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.003 * 0.1**3)


class Diverging(Quadratic):
    """Finite at the start, no number afterwards."""

    def loss(self, params, batch, step):
        return super().loss(params, batch, step) * (1.0 if step == 0 else float("nan"))


def test_nonfinite_meta_gradients_are_skipped_counted_and_stop_the_run(trainer):
    module = make(max_skipped=6)
    module.task = module.unroll.task = Diverging(3)
    before = [p.detach().clone() for p in module.rule.parameters()]
    fit = trainer(limit_val_batches=0)
    with pytest.raises(RuntimeError, match=r"6 outer steps in a row.*--model.lr"):
        fit.fit(module, data())
    assert fit.global_step == 0 and module.skipped == 6
    for a, b in zip(before, module.rule.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_finite_meta_gradient_ends_the_row():
    module = make(max_skipped=2)
    optimizer = torch.optim.SGD(module.rule.parameters(), lr=0.0)
    for norm in (math.inf, 1.0, math.nan, 1.0, math.inf):
        module._outer_step(optimizer, norm)
    assert module.skipped == 3
    with pytest.raises(RuntimeError):
        module._outer_step(optimizer, math.nan)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            {"num_steps": 100, "unroll_length": 30},
            "unroll_length=30 does not divide num_steps=100; use 1, 2, .*50 or 100",
        ),
        ({"num_steps": 7, "unroll_length": 3}, "use 1 or 7"),
        ({"num_steps": 0}, "num_steps=0"),
        ({"unroll_length": -2}, "unroll_length=-2"),
        ({"lr": 0.0}, "lr=0.0"),
        ({"lr": float("nan")}, "lr=nan"),
        ({"gradient_clip": -1.0}, "gradient_clip=-1.0"),
        ({"max_skipped": 0}, "max_skipped=0"),
        ({"final_steps": 0}, "final_steps=0"),
        ({"final_steps": 7}, "final_steps=7 exceeds num_steps=6; use 1 to 6"),
        ({"loss_weights": "first"}, "loss_weights='first' is unknown; use one of all, linear, tail, last"),
        ({"imitation": Imitation(1.0), "meta_gradient": SecondOrder()}, "do not go together"),
        ({"start": "rnnprop"}, r"start='rnnprop' has RNNprop\(.*do not fit CoordinatewiseLSTM\(hidden_size=4"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        make(**arguments)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"meta_gradient": "fast"}, r"meta_gradient='fast' is a str; give one, such as FirstOrder\(\), or None"),
        ({"imitation": 1.0}, r"imitation=1.0 is a float; give Imitation\(weight=100.0\), or None"),
    ],
)
def test_arguments_of_another_type(arguments, message):
    with pytest.raises(TypeError, match=message):
        make(**arguments)


def test_meta_training_starts_from_the_weights_of_another_rule(trainer, tmp_path):
    other = RNNprop(hidden_size=3)
    save_rule(other, tmp_path / "other.npz")
    own, first, second = RNNprop(hidden_size=3, beta1=0.5, decay=7), RNNprop(hidden_size=3), RNNprop(hidden_size=3)
    groups = RuleGroups({"a*": first, "!a*": second})
    module = MetaOptimizer(Quadratic(3), own, 6, 3, start=str(tmp_path / "other.npz"))
    MetaOptimizer(Quadratic(3), groups, 6, 3, start=str(tmp_path / "other.npz"))
    wanted = other.state_dict()
    for rule in (own, first, second):
        assert all(torch.equal(value, wanted[name]) for name, value in rule.state_dict().items())
    assert (own.beta1, own.decay) == (0.5, 7)

    (tmp_path / "other.npz").unlink()  # what is begun needs it no more
    fit = trainer(max_epochs=1)
    fit.fit(module, data())
    fit.save_checkpoint(tmp_path / "own.ckpt")
    again = MetaOptimizer.load_from_checkpoint(tmp_path / "own.ckpt")
    assert all(torch.equal(a, b) for a, b in zip(again.rule.parameters(), own.parameters(), strict=True))
    assert not torch.equal(own.readout.weight, other.readout.weight)
    with pytest.raises(FileNotFoundError, match=r"other\.npz"):
        make(start=str(tmp_path / "other.npz"))


def test_inference_mode_is_explained(trainer):
    with pytest.raises(RuntimeError, match=r"Trainer\(inference_mode=False\)"):
        trainer(inference_mode=True).validate(make(), data())


def test_checkpoint_is_plain_and_loads_by_itself(trainer, tmp_path):
    module, fit = make(lr=0.02, train_task=RandomScaling(Quadratic(3), bound=2.0)), trainer()
    fit.fit(module, data())
    fit.save_checkpoint(tmp_path / "x.ckpt")
    content = torch.load(tmp_path / "x.ckpt", weights_only=True)
    assert content["hyper_parameters"]["rule"]["init_args"]["hidden_size"] == 4
    loaded = MetaOptimizer.load_from_checkpoint(tmp_path / "x.ckpt", weights_only=True)
    assert isinstance(loaded.task, Quadratic) and loaded.task.dim == 3
    assert isinstance(loaded.train_task, RandomScaling) and loaded.train_task.bound == 2.0
    assert (loaded.num_steps, loaded.unroll_length, loaded.lr) == (6, 3, 0.02)
    for a, b in zip(module.rule.parameters(), loaded.rule.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    "other, remedy",
    [
        (lambda: CoordinatewiseLSTM(hidden_size=5), "--model.rule.hidden_size 4"),
        (lambda: CoordinatewiseLSTM(hidden_size=4, output_scale=1.0), "--model.rule.output_scale 0.1"),
    ],
)
def test_the_checkpoint_of_another_rule_is_refused(trainer, tmp_path, other, remedy):
    module, fit = make(), trainer(max_epochs=1)
    fit.fit(module, data())
    fit.save_checkpoint(tmp_path / "x.ckpt")
    changed = MetaOptimizer(Quadratic(3), other(), num_steps=6, unroll_length=3)
    with pytest.raises(ValueError, match=remedy):
        trainer().test(changed, data(), ckpt_path=tmp_path / "x.ckpt", weights_only=True)


@pytest.mark.parametrize("stop_after", [1, 3, 4])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(trainer, tmp_path, stop_after):
    class Stop(Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            if trainer.global_step == 2 * stop_after:
                trainer.save_checkpoint(tmp_path / "x.ckpt")
                raise InterruptedError

    straight = make()
    trainer(max_epochs=3).fit(straight, data())
    with pytest.raises(InterruptedError):
        trainer(max_epochs=3, callbacks=[Stop()]).fit(make(), data())
    resumed, fit = make(), trainer(max_epochs=3)
    fit.fit(resumed, data(), ckpt_path=tmp_path / "x.ckpt", weights_only=True)
    assert fit.global_step == 18
    for a, b in zip(straight.rule.parameters(), resumed.rule.parameters(), strict=True):
        assert torch.equal(a, b)


class ImitationLosses(Callback):
    def __init__(self):
        self.found = []

    def on_train_epoch_end(self, trainer, pl_module):
        self.found.append(float(trainer.callback_metrics["train/imitation_loss"]))


def test_a_rule_learns_to_imitate_its_teacher(trainer):
    losses = ImitationLosses()
    teacher = partial(torch.optim.SGD, lr=0.01)
    module = make(lr=0.02, imitation=Imitation(1000.0, teacher))
    trainer(max_epochs=40, limit_val_batches=0, callbacks=[losses]).fit(module, data(episodes_per_epoch=5))
    assert losses.found[0] > 3  # about 6, one for each inner step, where updates are far too small
    assert losses.found[-1] < 0.3 * losses.found[0]


def test_imitation_falls_to_nothing_over_its_epochs(trainer):
    seen = []
    module = make(imitation=Imitation(4.0, epochs=2))
    run = module.unroll.run
    module.unroll.run = lambda *given: (
        seen.append([part.lessons and part.lessons.weight for part in given[0].parts]) or run(*given)
    )
    trainer(max_epochs=3, limit_val_batches=0).fit(module, data(episodes_per_epoch=1))
    assert seen == [[4.0], [4.0], [2.0], [2.0], [None], [None]]


def test_a_checkpoint_of_before_is_read(trainer, tmp_path):
    """Arguments that were `second_derivatives` and `memory` then, and an imitation of whom it did not say."""
    fit = trainer(max_epochs=1, limit_val_batches=0)
    fit.fit(make(), data(episodes_per_epoch=1))
    path = tmp_path / "of_before.ckpt"
    fit.save_checkpoint(path)
    now = torch.load(path, weights_only=True)
    kept = {k: v for k, v in now["hyper_parameters"].items() if k not in ("meta_gradient", "imitation")}
    for of_before, is_now in (
        ({"second_derivatives": True, "imitation": 0.0, "imitation_epochs": None}, SecondOrder),
        ({"second_derivatives": False, "memory": "flat", "memory_budget": 9, "imitation": 0.0}, FirstOrder),
    ):
        torch.save({**now, "hyper_parameters": {**kept, **of_before}}, path)
        found = MetaOptimizer.load_from_checkpoint(path)
        assert type(found.meta_gradient) is is_now and found.imitation is None
    assert (found.meta_gradient.memory, found.meta_gradient.memory_budget) == ("flat", 9)
    torch.save({**now, "hyper_parameters": {**kept, "second_derivatives": False, "imitation": 2.0}}, path)
    with pytest.raises(ValueError, match=r"imitates a teacher \(imitation=2.0\), but does not say whom"):
        MetaOptimizer.load_from_checkpoint(path)


def test_a_checkpoint_says_what_is_imitated(trainer, tmp_path):
    falling = partial(torch.optim.lr_scheduler.LinearLR, total_iters=9)
    module = make(
        imitation=Imitation(4.0, partial(torch.optim.SGD, lr=0.3), falling, 2), meta_gradient=FirstOrder("flat")
    )
    fit = trainer(max_epochs=1, limit_val_batches=0)
    fit.fit(module, data(episodes_per_epoch=1))
    fit.save_checkpoint(tmp_path / "own.ckpt")
    found = MetaOptimizer.load_from_checkpoint(tmp_path / "own.ckpt")
    assert found.meta_gradient.memory == "flat" and (found.imitation.weight, found.imitation.epochs) == (4.0, 2)
    teacher = found.imitation.teacher([torch.zeros(1, requires_grad=True)])
    assert isinstance(teacher, torch.optim.SGD) and teacher.param_groups[0]["lr"] == 0.3
    assert found.imitation.schedule(teacher).total_iters == 9
