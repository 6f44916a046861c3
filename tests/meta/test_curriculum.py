"""Episodes that grow longer in meta-training."""

import sys

import pytest
import torch
from lightning.pytorch import Callback, Trainer

from lightning_l2l import CoordinatewiseLSTM, MetaOptimizer, Quadratic, QuadraticDataModule, main
from lightning_l2l.meta.curriculum import Curriculum


def module(num_steps=8, **options):
    torch.manual_seed(0)
    return MetaOptimizer(Quadratic(3), CoordinatewiseLSTM(4), num_steps=num_steps, unroll_length=2, **options)


def data():
    return QuadraticDataModule(num_tasks=4, dim=3, episodes_per_epoch=2, num_val_tasks=4, eval_tasks=4)


class Watch(Callback):
    """Writes down the outer steps after each epoch, and how many terms a validation has."""

    def __init__(self):
        self.outer_steps, self.validated = [], []

    def on_train_epoch_end(self, trainer, pl_module):
        self.outer_steps.append(trainer.global_step)

    def on_validation_batch_end(self, trainer, pl_module, outputs, *_):
        self.validated.append(len(outputs["losses"]))


def fit(tmp_path, model, callbacks, max_epochs, ckpt_path=None):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    trainer = Trainer(
        max_epochs=max_epochs,
        callbacks=callbacks,
        inference_mode=False,
        default_root_dir=tmp_path,
        enable_checkpointing=False,
        num_sanity_val_steps=0,
        **quiet,
    )
    trainer.fit(model, data(), ckpt_path=ckpt_path, weights_only=True if ckpt_path else None)
    return trainer


def test_each_stage_has_its_length_and_validation_has_the_whole(tmp_path):
    watch, model = Watch(), module()
    trainer = fit(tmp_path, model, [Curriculum([2, 6], every_n_epochs=2), watch], 5)
    assert watch.outer_steps == [2, 4, 10, 16, 22]  # 2 episodes an epoch, of 1 and then of 3 truncations
    assert watch.validated == [9] * 5
    assert trainer.callback_metrics["train/num_steps"] == 6


@pytest.mark.parametrize("loss_weights", ["all", "linear", "last"])
def test_a_stage_is_meta_training_with_that_length(tmp_path, loss_weights):
    short, staged = module(4, loss_weights=loss_weights), module(8, loss_weights=loss_weights)
    fit(tmp_path, short, [], 2)
    fit(tmp_path, staged, [Curriculum([4])], 2)
    for a, b in zip(short.rule.parameters(), staged.rule.parameters(), strict=True):
        assert torch.equal(a, b)
    whole = module(8, loss_weights=loss_weights)
    fit(tmp_path, whole, [], 2)
    assert not torch.equal(whole.rule.readout.weight, short.rule.readout.weight)


def test_a_resumed_run_goes_on_with_the_stage_it_had(tmp_path):
    whole, first, second = module(), module(), module()
    fit(tmp_path, whole, [Curriculum([2, 4, 8])], 3)
    fit(tmp_path, first, [Curriculum([2, 4, 8])], 2).save_checkpoint(tmp_path / "x.ckpt")
    fit(tmp_path, second, [Curriculum([2, 4, 8])], 3, tmp_path / "x.ckpt")
    for a, b in zip(whole.rule.parameters(), second.rule.parameters(), strict=True):
        assert torch.equal(a, b)


def test_it_is_configured_from_the_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lightning-l2l"])
    sizes = ["--data.num_tasks=2", "--data.episodes_per_epoch=2", "--data.num_val_tasks=2", "--data.eval_tasks=2"]
    run = [
        "--trainer.max_epochs=2",
        "--trainer.log_every_n_steps=1",
        "--trainer.accelerator=cpu",
        "--curves.baselines=[]",
        "--model.num_steps=20",
    ]
    stages = ["--trainer.callbacks=lightning_l2l.Curriculum", "--trainer.callbacks.num_steps=[5, 20]"]
    main(["fit", *sizes, *run, *stages])
    steps = torch.load("lightning_logs/version_0/checkpoints/last.ckpt", weights_only=True)["global_step"]
    assert steps == 2 * 1 + 2 * 4


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"num_steps": []}, r"num_steps=\[\] has no stage"),
        ({"num_steps": [0]}, "num_steps=0"),
        ({"num_steps": [2], "every_n_epochs": 0}, "every_n_epochs=0"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        Curriculum(**arguments)


@pytest.mark.parametrize("steps", [3, 10])
def test_a_stage_that_the_module_cannot_have_is_refused_before_training(tmp_path, steps):
    with pytest.raises(ValueError, match=f"num_steps={steps} does not fit unroll_length=2 and num_steps=8"):
        fit(tmp_path, module(), [Curriculum([2, steps])], 1)
