"""The real command line, in this process and in one of its own."""

import csv
import signal
import time
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch.cli import LightningCLI
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from commandline import ROOT, TINY, TINY_FIT, mnist, shell
from lightning_l2l import LearnedOptimizer, load_rule, main
from lightning_l2l.rules import CoordinatewiseLSTM, RNNprop, RuleGroups
from lightning_l2l.rules.describe import describe
from lightning_l2l.rules.files import save_rule, shipped_rules

CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))


pytestmark = pytest.mark.usefixtures("in_tmp_path")


def rows(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def run(name="version_0"):
    return Path("lightning_logs") / name


def test_fit_then_validate_test_predict(capsys):
    main(["fit", *TINY_FIT])
    assert {p.name for p in (run() / "checkpoints").iterdir()} == {"best.ckpt", "last.ckpt", "previous.ckpt"}
    assert (run() / "config.yaml").is_file()
    told = capsys.readouterr().out
    for name in ("adam", "rmsprop", "sgd", "nag"):
        assert name in told.lower()
    best = run() / "checkpoints" / "best.ckpt"
    assert f"--ckpt_path {best}" in told and "tensorboard --logdir" in told
    rule = load_rule(best)
    LearnedOptimizer(torch.nn.Linear(2, 1).parameters(), rule)

    main(["validate", *TINY, f"--ckpt_path={best}"])
    main(["test", *TINY, f"--ckpt_path={best}"])
    assert "nag" in capsys.readouterr().out.lower()
    (folder,) = [p.parent for p in Path().rglob("comparison.csv")]
    assert {"comparison.csv", "curves.csv", "curves.png"} <= {p.name for p in folder.iterdir()}

    main(["predict", *TINY, f"--ckpt_path={best}"])
    (table,) = Path().rglob("predictions.csv")
    assert len(rows(table)) == 6 * 7 and {"task", "step", "loss"} <= rows(table)[0].keys()


def test_the_printed_test_command_works(capsys):
    main(["fit", *TINY_FIT])
    (command,) = [line for line in capsys.readouterr().out.splitlines() if "lightning_l2l test" in line]
    main([*command.split("lightning_l2l ")[1].split(), "--trainer.enable_progress_bar=false"])
    assert list(Path().rglob("comparison.csv"))


def test_the_checkpoint_says_what_model_it_is():
    main(["fit", *TINY_FIT])
    data = [flag for flag in TINY if "--model" not in flag]
    main(["predict", *data, f"--ckpt_path={run() / 'checkpoints' / 'best.ckpt'}"])
    (table,) = Path().rglob("predictions.csv")
    assert len(rows(table)) == 6 * 7


def test_export_writes_a_small_file_that_is_the_trained_rule(capsys):
    main(["fit", *TINY_FIT, "--curves.baselines=[]"])
    capsys.readouterr()
    main(["export", "--ckpt_path=last", "--output=mine.npz"])
    assert "hidden_size=3" in capsys.readouterr().out
    assert Path("mine.npz").stat().st_size < 30_000
    last, mine = load_rule(run() / "checkpoints/last.ckpt"), load_rule("mine.npz")
    assert describe(mine) == describe(last)
    assert all(torch.equal(a, b) for a, b in zip(mine.parameters(), last.parameters(), strict=True))


def test_export_changes_arguments_that_leave_the_weights_as_they_are(capsys):
    main(["export", "--ckpt_path=rnnprop", "--output=mine.npz", "--init_args={warmup: 7, decay: null}"])
    assert "warmup=7" in capsys.readouterr().out
    given, mine = load_rule("rnnprop"), load_rule("mine.npz")
    assert (mine.warmup, mine.decay, mine.beta1) == (7, None, given.beta1)
    assert all(torch.equal(a, b) for a, b in zip(mine.parameters(), given.parameters(), strict=True))


def test_export_writes_the_mean_of_several_runs_of_one_rule():
    rules = [load_rule("mnist") for _ in range(3)]
    for k, rule in enumerate(rules):
        with torch.no_grad():
            for p in rule.parameters():
                p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(k)))
        save_rule(rule, Path(f"{k}.npz"))
    main(["export", "--ckpt_path=0.npz", "--average_with=[1.npz, 2.npz]", "--output=mean.npz"])
    mean = load_rule("mean.npz")
    assert describe(mean) == describe(rules[0])
    for found, *given in zip(*(rule.parameters() for rule in (mean, *rules)), strict=True):
        torch.testing.assert_close(found, sum(given) / 3)
    with pytest.raises(ValueError, match=r"'quadratic' is CoordinatewiseLSTM.* there is no mean of the two"):
        main(["export", "--ckpt_path=0.npz", "--average_with=[quadratic]", "--output=other.npz"])


def scalars(folder):
    events = EventAccumulator(str(folder))
    events.Reload()
    return events


def test_tensorboard_holds_the_run_against_outer_steps():
    main(["fit", *TINY_FIT])
    events = scalars(run())
    tags = events.Tags()["scalars"]
    assert {"train/meta_loss", "train/meta_gradient_norm", "train/skipped", "val/final_loss", "val/meta_loss"} <= set(
        tags
    )
    # 2 epochs of 2 episodes of 2 truncations: an episode ends at outer step 2, 4, 6, 8, an epoch at 4 and 8
    assert [e.step for e in events.Scalars("train/meta_loss")] == [2, 4, 6, 8]
    assert [e.step for e in events.Scalars("val/final_loss")] == [4, 8]
    assert events.Tags()["images"]


def test_last_continues_in_the_same_folder_bit_for_bit():
    steady = [*TINY_FIT, "--model.anneal=false"]  # else the learning rate depends on where the run ends
    main(["fit", *steady, "--trainer.max_epochs=4"])
    main(["fit", *steady, "--trainer.default_root_dir=other"])
    main(["fit", *steady, "--trainer.default_root_dir=other", "--trainer.max_epochs=4", "--ckpt_path=last"])
    assert [p.name for p in Path("other/lightning_logs").iterdir()] == ["version_0"]
    ends = [
        torch.load(folder / "version_0/checkpoints/last.ckpt", weights_only=True)
        for folder in (Path("lightning_logs"), Path("other/lightning_logs"))
    ]
    assert ends[0]["global_step"] == ends[1]["global_step"] == 16
    for name, weight in ends[0]["state_dict"].items():
        assert torch.equal(weight, ends[1]["state_dict"][name])
    steps = [e.step for e in scalars("other/lightning_logs/version_0").Scalars("val/final_loss")]
    assert steps == [4, 8, 12, 16]


def test_mnist_recipe(mnist_root):
    main(["fit", *mnist(mnist_root, "--data.episodes_per_epoch=2", "--trainer.max_epochs=1")])
    main(["test", *mnist(mnist_root, f"--ckpt_path={run() / 'checkpoints' / 'best.ckpt'}")])
    (table,) = Path().rglob("comparison.csv")
    assert len(rows(table)) >= 5


def test_a_shipped_rule_is_tested_by_its_name(monkeypatch):
    main(["test", "--ckpt_path=quadratic", *(f for f in TINY if "rule" not in f), "--trainer.default_root_dir=a"])
    save_rule(load_rule("quadratic"), Path("own.npz"))
    found = []
    monkeypatch.setattr(LightningCLI, "_run_subcommand", lambda self, command: found.append(self))
    main(["test", "--config", str(Path("a") / run() / "config.yaml"), "--trainer.accelerator=cpu"])
    main(["test", "--ckpt_path=own.npz", "--trainer.accelerator=cpu"])
    rule = load_rule("quadratic")
    for cli in found:
        assert describe(cli.model.rule) == describe(rule)
        for a, b in zip(cli.model.rule.parameters(), rule.parameters(), strict=True):
            assert torch.equal(a, b)


def test_a_rule_file_with_groups_is_tested_by_its_name(monkeypatch):
    rule = RuleGroups({"the.*": CoordinatewiseLSTM(2), "!the*": RNNprop(3, beta2=0.9), "the??": RNNprop(4)})
    save_rule(rule, Path("own.npz"))
    main(["test", "--ckpt_path=own.npz", *(f for f in TINY if "rule" not in f), "--trainer.default_root_dir=a"])
    found = []
    monkeypatch.setattr(LightningCLI, "_run_subcommand", lambda self, command: found.append(self))
    main(["test", "--config", str(Path("a") / run() / "config.yaml"), "--trainer.accelerator=cpu"])
    assert describe(found[0].model.rule) == describe(rule)
    for a, b in zip(found[0].model.rule.parameters(), rule.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda p: p.stem)
def test_transfer_recipes_load_the_rule_and_differ_in_the_optimizee_alone(config):
    recipe = yaml.safe_load(config.read_text())
    if "ckpt_path" not in recipe:
        assert recipe["trainer"]["max_epochs"] > 0
        return
    assert recipe["ckpt_path"] in shipped_rules() and "trainer" not in recipe and "lr" not in recipe["model"]
    trained = yaml.safe_load((ROOT / "configs" / f"{recipe['ckpt_path']}.yaml").read_text())
    assert recipe["data"]["init_args"].items() <= trained["data"]["init_args"].items()
    assert recipe["model"]["final_steps"] == trained["model"]["final_steps"]


@pytest.mark.filterwarnings("ignore:test without --ckpt_path")
@pytest.mark.parametrize("config", CONFIGS, ids=lambda p: p.stem)
def test_every_recipe_fits_the_signatures(config, monkeypatch):
    monkeypatch.setattr(LightningCLI, "_run_subcommand", lambda self, command: None)
    main(["test", "--config", str(config), "--trainer.accelerator=cpu"])
    own = [] if "ckpt_path" not in yaml.safe_load(config.read_text()) else ["--ckpt_path=null"]
    main(["fit", "--config", str(config), "--trainer.accelerator=cpu", *own])


def test_the_recipe_of_the_quadratics_is_the_default():
    from lightning_l2l.commands.cli import DEFAULTS, TRAINER_DEFAULTS

    def at(path):
        found = recipe
        for key in path.split("."):
            found = found[key]
        return found

    recipe = yaml.safe_load((ROOT / "configs" / "quadratic.yaml").read_text())
    for path, default in DEFAULTS.items():
        if path.startswith("checkpoint."):
            continue
        if isinstance(default, dict):
            assert at(path)["class_path"] == default["class_path"]
            assert at(path).get("init_args", {}).items() >= default.get("init_args", {}).items()
        else:
            assert at(path) == default
    assert recipe["trainer"].pop("max_epochs") > TRAINER_DEFAULTS["max_epochs"]
    assert recipe["trainer"].items() <= TRAINER_DEFAULTS.items()


def test_ctrl_c_ends_cleanly_and_last_goes_on():
    flags = [*TINY, "--data.episodes_per_epoch=5", "--trainer.log_every_n_steps=5", "--trainer.max_epochs=100000"]
    process = shell("fit", *flags)
    deadline = time.monotonic() + 100
    while not (run() / "checkpoints" / "last.ckpt").is_file():
        assert time.monotonic() < deadline and process.poll() is None, process.communicate()
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert "Traceback" not in err, err
    assert "go on with" in out + err
    stopped = torch.load(run() / "checkpoints" / "last.ckpt", weights_only=True)
    assert stopped["global_step"] > 0 and stopped["global_step"] % 2 == 0
    epochs = stopped["epoch"] + 2
    main(["fit", *flags, f"--trainer.max_epochs={epochs}", "--ckpt_path=last"])
    resumed = torch.load(run() / "checkpoints" / "last.ckpt", weights_only=True)
    assert resumed["global_step"] == epochs * 5 * 2
