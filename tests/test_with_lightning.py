"""`LearnedOptimizer` under Lightning's Trainer and LightningCLI: the same as in a plain loop."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging, LearningRateMonitor
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision
from torch import nn
from torch.nn.utils import clip_grad_norm_, clip_grad_value_, parameters_to_vector
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from lightning_l2l import LearnedOptimizer

ROOT = Path(__file__).parents[1]
STEPS = 6  # an epoch

# Lightning's advice on logging less than once an epoch
pytestmark = pytest.mark.filterwarnings("ignore:The number of training batches")


class Data(LightningDataModule):
    """In order, or in one that depends on the epoch alone."""

    def __init__(self, batch_size=8, shuffle=False):
        super().__init__()
        self.batch_size, self.shuffle = batch_size, shuffle

    def train_dataloader(self):
        inputs = torch.randn(STEPS * 8, 6, generator=torch.Generator().manual_seed(0))
        data = TensorDataset(inputs, inputs[:, :3].argmax(1))
        share = () if torch.distributed.is_initialized() else (1, 0)
        return DataLoader(data, self.batch_size, sampler=DistributedSampler(data, *share, shuffle=self.shuffle))


class Model(LightningModule):
    """As a user has it, but that it keeps its losses, and that these may drift for a reason gradients do not have."""

    def __init__(self, drift=0.0):
        super().__init__()
        self.drift = drift
        self.register_buffer("seen", torch.zeros(()))
        torch.manual_seed(1)
        self.net = nn.Sequential(nn.Linear(6, 5), nn.Sigmoid(), nn.Linear(5, 3))
        self.losses = []

    def training_step(self, batch, batch_idx):
        loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1]) + self.drift * self.seen
        self.seen += 1
        self.losses.append(loss.item())
        return loss


class Classifier(Model):
    def __init__(self, drift=0.0, **options):
        super().__init__(drift)
        self.options = options

    def configure_optimizers(self):
        return LearnedOptimizer(self.parameters(), "mnist", **self.options)


class Manual(Classifier):
    automatic_optimization = False

    def training_step(self, batch, batch_idx):
        loss, optimizer = super().training_step(batch, batch_idx), self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step(loss=loss)


def fit(model, folder, batch_size=8, shuffle=False, ckpt_path=None, **options):
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    defaults = {**quiet, "max_epochs": 3, "accelerator": "cpu", "devices": 1, "default_root_dir": folder}
    trainer = Trainer(**{**defaults, **options})
    trainer.fit(model, Data(batch_size, shuffle), ckpt_path=ckpt_path)
    return trainer


def plain(clip=lambda parameters: None, accumulate=1, after_step=lambda model, optimizer: None, epochs=3, **options):
    """The model after a loop without Lightning."""
    model = Classifier(**options)
    optimizer = model.configure_optimizers()
    for _ in range(epochs):
        for k, batch in enumerate(Data().train_dataloader()):
            loss = model.training_step(batch, k) / accumulate
            loss.backward()
            if (k + 1) % accumulate == 0:
                clip(model.parameters())
                optimizer.step(loss=loss)
                optimizer.zero_grad()
                after_step(model, optimizer)
    return model


def vector(model):
    return parameters_to_vector(model.parameters()).detach().clone()


def shell(*command, folder):
    """Starts a Python process in a folder; its temporary files are there too, so that Lightning's moves are atomic."""
    path = os.pathsep.join(map(str, (ROOT, ROOT / "tests")))
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "TMPDIR": str(folder)}
    return subprocess.Popen(
        [sys.executable, *command],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_the_script_of_the_readme_is_killed_goes_on_and_ends_with_the_same_weights(tmp_path):
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.DOTALL | re.MULTILINE)
    script = next(block for block in blocks if "# train.py\n" in block)
    assert len(script.splitlines()) <= 25
    folders = tmp_path / "straight", tmp_path / "killed"
    for folder in folders:
        folder.mkdir()
        (folder / "train.py").write_text(script)
    straight, killed = (shell("train.py", folder=folder) for folder in folders)

    deadline = time.monotonic() + 120
    while not list(folders[1].glob("checkpoints/epoch=2-*.ckpt")):
        assert time.monotonic() < deadline and killed.poll() is None, killed.communicate()[0]
        time.sleep(0.01)
    killed.kill()
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL
    stopped = torch.load(folders[1] / "checkpoints/last.ckpt", weights_only=True)
    assert 0 < stopped["global_step"] < 100
    states = stopped["optimizer_states"][0]["state"]
    assert len(states) == 4 and all(state["rule_state"].abs().sum() > 0 for state in states.values())

    resumed = shell("train.py", folder=folders[1])
    for process in (straight, resumed):
        told = process.communicate(timeout=120)[0]
        assert process.returncode == 0, told
    assert "Restored all states" in told
    ends = [torch.load(folder / "checkpoints/last.ckpt", weights_only=True) for folder in folders]
    assert ends[0]["global_step"] == ends[1]["global_step"] == 100
    for name, weight in ends[0]["state_dict"].items():
        assert torch.equal(weight, ends[1]["state_dict"][name])
        assert not torch.equal(weight, stopped["state_dict"][name])


@pytest.mark.parametrize("kind", [Classifier, Manual])
def test_automatic_and_manual_optimization_do_what_a_plain_loop_does(kind, tmp_path):
    model, want = kind(lr=0.5, weight_decay=0.005), plain(lr=0.5, weight_decay=0.005)
    fit(model, tmp_path)
    assert torch.equal(vector(model), vector(want)) and model.losses == want.losses
    assert sum(model.losses[-STEPS:]) < 0.9 * sum(model.losses[:STEPS])


class Scheduled(Classifier):
    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        return [optimizer], [{"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 4, 0.5), "interval": "step"}]


def test_a_schedule_is_followed_and_its_lr_logged(tmp_path):
    model, monitor = Scheduled(), LearningRateMonitor("step")
    logger = CSVLogger(tmp_path, "logs", 0)
    trainer = fit(model, tmp_path, callbacks=monitor, logger=logger, log_every_n_steps=1)
    lrs, taken = [0.5 ** (k // 4) for k in range(3 * STEPS + 1)], iter(range(1, 3 * STEPS + 1))
    assert trainer.optimizers[0].param_groups[0]["lr"] == lrs[-1]
    want = plain(after_step=lambda _, optimizer: optimizer.param_groups[0].update(lr=lrs[next(taken)]))
    assert torch.equal(vector(model), vector(want))
    logged = (tmp_path / "logs/version_0/metrics.csv").read_text().splitlines()
    assert logged[0] == "lr-LearnedOptimizer,step" and [float(row.split(",")[0]) for row in logged[1:]] == lrs[:-1]


@pytest.mark.parametrize(
    "options, clip",
    [
        ({"gradient_clip_val": 0.1}, lambda parameters: clip_grad_norm_(parameters, 0.1)),
        (
            {"gradient_clip_val": 0.02, "gradient_clip_algorithm": "value"},
            lambda parameters: clip_grad_value_(parameters, 0.02),
        ),
        ({}, lambda parameters: None),
    ],
    ids=["norm", "value", "none"],
)
@pytest.mark.parametrize("accumulate", [1, 3])
def test_the_trainer_clips_and_accumulates(options, clip, accumulate, tmp_path):
    model = Classifier()
    fit(model, tmp_path, accumulate_grad_batches=accumulate, **options)
    assert torch.equal(vector(model), vector(plain(clip, accumulate)))
    assert torch.equal(vector(model), vector(plain())) == (accumulate == 1 and not options)


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_in_bf16_the_rule_keeps_to_float32(precision, compiled, tmp_path, monkeypatch):
    if not compiled:
        monkeypatch.setattr("lightning_l2l.rules.lstm.fused_for", lambda *like: None)  # as on an accelerator
    found = []
    for kind in (Classifier, Manual):
        model = kind()
        trainer = fit(model, tmp_path, precision=precision)
        assert all(state["rule_state"].dtype == torch.float32 for state in trainer.optimizers[0].state.values())
        assert sum(model.losses[-STEPS:]) < 0.8 * sum(model.losses[:STEPS])
        found.append(vector(model))
    assert found[0].dtype == (torch.bfloat16 if precision == "bf16-true" else torch.float32)
    assert torch.equal(*found)  # also where the step is made within the Trainer's autocast


def test_under_a_gradient_scaler_it_trains_and_has_no_fallback(tmp_path):
    model = Classifier()
    fit(model, tmp_path, plugins=MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu")))
    assert sum(model.losses[-STEPS:]) < 0.8 * sum(model.losses[:STEPS])
    scaler = torch.amp.GradScaler("cpu")
    with pytest.raises(RuntimeError, match="fallback_lr is set, but there is no loss"):
        fit(Classifier(fallback_lr=0.01), tmp_path, plugins=MixedPrecision("16-mixed", "cpu", scaler))


RUNS_AWAY = {"drift": 1.0, "fallback_lr": 0.01}


@pytest.mark.parametrize("kind", [Classifier, Manual])
def test_the_fallback_gets_its_loss(kind, tmp_path, caplog):
    model = kind(**RUNS_AWAY)
    trainer = fit(model, tmp_path, max_epochs=5)
    assert trainer.optimizers[0].handed_over and caplog.text.count("The loss ran away") == 1
    want = plain(epochs=5, **RUNS_AWAY)
    assert torch.equal(vector(model), vector(want)) and model.losses == want.losses


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
@pytest.mark.parametrize("options", [{}, RUNS_AWAY], ids=["rule", "fallback"])
def test_resumed_it_ends_as_an_uninterrupted_run(options, precision, tmp_path):
    common = {"precision": precision, "shuffle": True}
    straight = Classifier(**options)
    fit(straight, tmp_path, **common, max_epochs=6)

    stopped = fit(Classifier(**options), tmp_path, **common, max_epochs=4)
    assert stopped.optimizers[0].handed_over == bool(options)
    stopped.save_checkpoint(tmp_path / "stopped.ckpt")
    checkpoint = torch.load(tmp_path / "stopped.ckpt", weights_only=True)
    ends = []
    for scale in (1, 0):
        for state in checkpoint["optimizer_states"][0]["state"].values():
            for value in state.values():
                value *= scale
        torch.save(checkpoint, tmp_path / "stopped.ckpt")
        model = Classifier(**options)
        fit(model, tmp_path, **common, max_epochs=6, ckpt_path=tmp_path / "stopped.ckpt")
        assert len(model.losses) == 2 * STEPS
        ends.append(vector(model))
    assert torch.equal(ends[0], vector(straight))
    assert not torch.equal(ends[1], vector(straight))  # so it is the state that does it


def test_averages_of_weights_are_of_its_iterates(tmp_path):
    model, average = Classifier(), []
    fit(model, tmp_path, callbacks=EMAWeightAveraging(decay=0.9))

    def follow(model, _):
        average.append(vector(model) if not average else average[-1].lerp(vector(model), 0.1))

    plain(after_step=follow)
    torch.testing.assert_close(vector(model), average[-1])


FLAGS = ["fit", "--seed_everything=0", "--trainer.max_epochs=3", "--trainer.logger=false", "--trainer.accelerator=cpu"]
FLAGS += ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]
FLAGS += ["--trainer.enable_checkpointing=false"]
OPTIMIZER = ["--optimizer", "lightning_l2l.LearnedOptimizer", "--optimizer.rule", "mnist"]
SCHEDULER = ["--lr_scheduler", "torch.optim.lr_scheduler.ExponentialLR", "--lr_scheduler.gamma", "0.5"]


@pytest.fixture
def run_cli(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py"])  # LightningCLI minds arguments beside its own
    return lambda *args: LightningCLI(Model, Data, args=args).model


def test_lightning_cli_takes_it_from_flags_and_from_yaml(run_cli, tmp_path):
    want = vector(plain(weight_decay=0.005, max_update=0.1))
    flags = [*OPTIMIZER, "--optimizer.weight_decay=0.005", "--optimizer.max_update=0.1"]
    assert torch.equal(vector(run_cli(*FLAGS, *flags)), want)
    config = (tmp_path / "config.yaml").rename(tmp_path / "own.yaml")  # what Lightning wrote of that run
    assert yaml.safe_load(config.read_text())["optimizer"]["init_args"]["rule"] == "mnist"
    assert torch.equal(vector(run_cli("fit", f"--config={config}")), want)


def test_lightning_cli_gives_it_a_schedule(run_cli):
    step, lr = iter(range(1, 19)), lambda k: 0.5 ** (k // STEPS)
    want = plain(after_step=lambda _, optimizer: optimizer.param_groups[0].update(lr=lr(next(step))))
    assert torch.equal(vector(run_cli(*FLAGS, *OPTIMIZER, *SCHEDULER)), vector(want))


def test_lightning_cli_tells_a_wrong_name(run_cli):
    with pytest.raises(FileNotFoundError, match=r"no rule at 'mnits'; .* shipped rule: cifar10, .* mnist, quadratic"):
        run_cli(*FLAGS, *OPTIMIZER, "--optimizer.rule=mnits")


TWO_PROCESSES = """
import sys, torch
from test_with_lightning import Classifier, fit, vector

class Apart(Classifier):  # one rank's loss runs away
    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) + self.global_rank * self.global_step

found = {}
for name, model in [("rule", Classifier()), ("fallback", Apart(fallback_lr=0.01))]:
    trainer = fit(model, ".", strategy="ddp", devices=2, max_epochs=8)
    found[name] = vector(model), trainer.optimizers[0].handed_over, trainer.world_size
torch.save(found, f"rank_{trainer.global_rank}.pt")
"""


def test_two_processes_have_the_same_weights_and_decide_alike(tmp_path):
    (tmp_path / "two.py").write_text(TWO_PROCESSES)
    process = shell("two.py", folder=tmp_path)
    told = process.communicate(timeout=120)[0]
    assert process.returncode == 0, told
    ranks = [torch.load(tmp_path / f"rank_{k}.pt", weights_only=True) for k in (0, 1)]
    for name, handed_over in [("rule", False), ("fallback", True)]:
        assert [rank[name][1:] for rank in ranks] == [(handed_over, 2)] * 2
        assert torch.equal(ranks[0][name][0], ranks[1][name][0])
    single = Classifier()
    fit(single, tmp_path, batch_size=16, max_epochs=8)
    torch.testing.assert_close(ranks[0]["rule"][0], vector(single), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(ranks[0]["fallback"][0], vector(single), atol=1e-2)
