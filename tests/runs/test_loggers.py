"""Whatever a run logs to: it has a folder of its own, is found again, and overwrites nothing that is not its own."""

import csv
import os
import sys
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch.loggers import Logger

from commandline import TINY, TINY_FIT, mnist
from lightning_l2l import main
from lightning_l2l.commands import sweep
from lightning_l2l.runs.folder import FILES, held

FIT = ["fit", *TINY_FIT, "--curves.baselines=[]"]
TEST = ["test", *TINY, "--curves.baselines=[]", "--ckpt_path=quadratic"]
NONE = "--trainer.logger=false"
CSV = ["--trainer.logger=CSVLogger", "--trainer.logger.save_dir=logs"]
LAST = "--ckpt_path=last"
MORE = "--trainer.max_epochs=4"


pytestmark = pytest.mark.usefixtures("in_tmp_path")


def run(number, root="lightning_logs"):
    return Path(root) / f"version_{number}"


def steps_of(folder):
    return torch.load(folder / "checkpoints/last.ckpt", weights_only=True)["global_step"]


def contents(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_without_a_logger_somebodys_own_files_stay(in_tmp_path):
    Path("config.yaml").write_text("trainer:\n  logger: false\n")
    Path("checkpoints").mkdir()
    for name in ("checkpoints/best.ckpt", "checkpoints/last.ckpt", "comparison.csv", "curves.png"):
        Path(name).write_text("mine")
    before = contents(in_tmp_path)
    main(["fit", "--config=config.yaml", *FIT[1:]])
    main(["test", "--config=config.yaml", *TEST[1:], LAST])
    after = contents(in_tmp_path)
    assert {path: after[path] for path in before} == before
    assert (run(0) / "checkpoints/best.ckpt").is_file() and (run(0) / "config.yaml").is_file()
    assert (run(1) / "comparison.csv").is_file()
    assert not [path for path in after if "tfevents" in path.name]


def test_without_a_logger_a_run_goes_on_in_its_own_folder(capsys):
    main([*FIT, NONE])
    told = capsys.readouterr().out
    assert f"--config {run(0) / 'config.yaml'} --ckpt_path {run(0) / 'checkpoints/best.ckpt'}" in told
    main([*FIT, NONE])
    main([*FIT, NONE, MORE, f"--ckpt_path={run(0) / 'checkpoints/last.ckpt'}"])
    assert (steps_of(run(0)), steps_of(run(1))) == (16, 8) and not run(2).exists()


def test_a_run_of_csv_logger_is_found_and_loses_no_row(capsys):
    main(FIT)  # an older run, of TensorBoard
    main([*FIT, *CSV])
    folder = run(0, "logs/lightning_logs")
    told = capsys.readouterr().out
    assert f"--config {folder / 'config.yaml'} --ckpt_path {folder / 'checkpoints/best.ckpt'}" in told
    main([*FIT, *CSV, MORE, LAST])
    main([*FIT, *CSV, MORE])
    assert (steps_of(folder), steps_of(run(0))) == (16, 8)
    gone_on, at_once = (
        list(csv.DictReader((run(k, "logs/lightning_logs") / "metrics.csv").read_text().splitlines())) for k in (0, 1)
    )
    assert [row["step"] for row in gone_on] == [row["step"] for row in at_once]
    assert {row["train/num_steps"] for row in gone_on} == {"6.0", ""}
    main([*TEST, *CSV, LAST])
    assert (run(2, "logs/lightning_logs") / "comparison.csv").is_file()


def test_a_run_of_csv_logger_is_found_without_its_flags(in_tmp_path):
    main(FIT)
    main([*FIT, *CSV])
    os.utime(run(0, "logs/lightning_logs") / "checkpoints/last.ckpt")
    elsewhere = in_tmp_path / "other" / "lightning_logs"  # newer, but of another folder
    main([*FIT, f"--trainer.default_root_dir={elsewhere.parent}"])
    main([*FIT, MORE, LAST])
    found = steps_of(run(0, "logs/lightning_logs")), steps_of(run(0)), steps_of(run(0, elsewhere))
    assert found == (16, 8, 8) and not run(1).exists()


def test_a_tensorboard_logger_of_ones_own_goes_on_in_its_folder():
    own = ["--trainer.logger=TensorBoardLogger", "--trainer.logger.save_dir=logs", "--trainer.logger.name=mine"]
    main([*FIT, *own])
    main([*FIT, *own, MORE, LAST])
    assert steps_of(run(0, "logs/mine")) == 16 and not run(1, "logs/mine").exists()


def test_the_best_checkpoint_is_known_again_however_its_folder_is_spelt():
    main([*FIT, *CSV])
    folder = run(0, "logs/lightning_logs")
    last = torch.load(folder / "checkpoints/last.ckpt", weights_only=True)
    for state in last["callbacks"].values():
        if state.get("monitor"):
            state["best_model_score"] = torch.tensor(1e-3)
            state["best_k_models"] = {path: torch.tensor(1e-3) for path in state["best_k_models"]}
            state["kth_value"] = torch.tensor(1e-3)
    torch.save(last, folder / "checkpoints/last.ckpt")
    best = (folder / "checkpoints/best.ckpt").read_bytes()
    main([*FIT, CSV[0], "--trainer.logger.save_dir=./logs/../logs", MORE, LAST])
    assert steps_of(folder) == 16 and (folder / "checkpoints/best.ckpt").read_bytes() == best


def test_folders_of_a_run_are_absolute_in_its_configuration(in_tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(in_tmp_path / "home"))
    main([*FIT, CSV[0], "--trainer.logger.save_dir=~/logs", "--checkpoint.dirpath=kept"])
    folder = run(0, in_tmp_path / "home/logs/lightning_logs")
    assert {"metrics.csv", "config.yaml", "hparams.yaml"} <= {path.name for path in folder.iterdir()}
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert config["trainer"]["logger"]["init_args"]["save_dir"] == str(in_tmp_path / "home/logs")
    assert config["checkpoint"]["dirpath"] == str(in_tmp_path / "kept") and not Path("~").exists()


TWO = """
trainer:
  logger:
    - {class_path: lightning.pytorch.loggers.TensorBoardLogger, init_args: {save_dir: tb}}
    - {class_path: lightning.pytorch.loggers.CSVLogger, init_args: {save_dir: csv, name: x, version: fixed}}
"""


def test_loggers_beside_the_first_lose_nothing_either():
    Path("two.yaml").write_text(TWO)
    main(["fit", "--config=two.yaml", *FIT[1:]])
    metrics = Path("csv/x/fixed/metrics.csv")
    before = metrics.read_text()
    for command in (FIT, TEST):
        with pytest.raises(RuntimeError, match=r"csv/x/fixed/.* would be overwritten"):
            main([command[0], "--config=two.yaml", *command[1:]])
    assert metrics.read_text() == before
    main(["fit", "--config=two.yaml", *FIT[1:], MORE, LAST])
    assert metrics.read_text().startswith(before) and len(metrics.read_text()) > len(before)


def test_the_configuration_of_a_run_that_was_gone_on_with_begins_a_new_one():
    main(FIT)
    main([*FIT, MORE, LAST])
    config = f"--config={run(0) / 'config.yaml'}"
    assert yaml.safe_load((run(0) / "config.yaml").read_text())["ckpt_path"] is None
    before = contents(run(0))
    main(["fit", config, "--trainer.max_epochs=1"])
    (run(0) / "config.yaml").write_text(
        (run(0) / "config.yaml").read_text().replace("ckpt_path: null", "ckpt_path: last")
    )
    assert sweep.main(["--over", "model.lr=0.01,0.02", "fit", config, "--trainer.max_epochs=1"]) == 0
    after = contents(run(0))
    assert {p: c for p, c in after.items() if p.name != "config.yaml"} == {
        p: c for p, c in before.items() if p.name != "config.yaml"
    }
    assert steps_of(run(1)) == 4


def test_a_sweep_says_what_was_not_written(capsys):
    assert sweep.main(["--over", "model.lr=0.01,0.02", *FIT, "--trainer.fast_dev_run=true"]) == 1
    assert "no best.ckpt was written: fast_dev_run is on" in capsys.readouterr().out


def test_a_sweep_finds_what_another_logger_has(capsys):
    assert sweep.main(["--over", "model.lr=0.01,0.02", *FIT, *CSV]) == 0
    assert sweep.main(["--over", "data.seed=0,1", *TEST, *CSV]) == 0
    rows = list(csv.DictReader(Path("sweep/version_0/sweep.csv").read_text().splitlines()))
    assert all(Path(row["checkpoint"]).is_file() for row in rows) and len(rows) == 2
    (best,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("Best: "))
    assert Path(best.split(", ")[-1]).is_file()


@pytest.mark.parametrize("command", [FIT, TEST])
@pytest.mark.parametrize("logger", ["CSVLogger", "TensorBoardLogger"])
def test_a_folder_that_holds_another_runs_files_is_refused(command, logger, in_tmp_path):
    own = [f"--trainer.logger={logger}", "--trainer.logger.save_dir=logs", "--trainer.logger.version=3"]
    main([*FIT, *own])
    before = contents(in_tmp_path)
    told = "config.yaml and [0-9]+ more would be overwritten, and this run did not write it; .*--trainer.logger.version"
    with pytest.raises(RuntimeError, match=told):
        main([*command, *own])
    assert contents(in_tmp_path) == before


@pytest.mark.parametrize("name", FILES)
def test_each_file_that_a_run_writes_is_looked_for(name):
    folder = run(0)
    folder.mkdir(parents=True)
    (folder / name).write_text("mine")
    with pytest.raises(RuntimeError, match=f"{name} would be overwritten"):
        main([*FIT, "--trainer.logger=TensorBoardLogger", "--trainer.logger.save_dir=.", "--trainer.logger.version=0"])


def test_files_lists_all_that_commands_write():
    """What appears in run folders, but for checkpoints and TensorBoard's own, is in the list of what is looked for."""
    more = "--trainer.callbacks=lightning_l2l.UpdateProposals"
    main([*FIT, *CSV])
    main([*FIT])
    main([*TEST, more])
    main(["predict", *TINY, "--curves.baselines=[]", LAST])
    found = {path.name for path in Path().rglob("*") if path.is_file() and path.suffix != ".ckpt"}
    assert {name for name in found if "tfevents" not in name and name != ".lock"} == set(FILES)


def test_checkpoints_of_another_run_are_not_overwritten(in_tmp_path):
    main([*FIT, "--checkpoint.dirpath=kept"])
    before = contents(in_tmp_path / "kept")
    with pytest.raises(RuntimeError, match=r"kept/best\.ckpt would be overwritten.*--checkpoint.dirpath"):
        main([*FIT, "--checkpoint.dirpath=kept"])
    assert contents(in_tmp_path / "kept") == before
    main([*TEST, "--checkpoint.dirpath=kept", LAST])  # writes none
    main([*FIT, MORE, "--checkpoint.dirpath=kept", LAST])  # its own
    assert steps_of(run(0)) == 16


class Foreign(Logger):
    """One of those whose folder for all runs is one, and which have a name and a version beside."""

    def __init__(self, version: str = "a") -> None:
        super().__init__()
        self._version = version

    name = property(lambda self: "project")
    version = property(lambda self: self._version)
    save_dir = property(lambda self: "service")

    def log_metrics(self, *args, **kwargs):
        pass

    def log_hyperparams(self, *args, **kwargs):
        pass


def test_a_logger_of_others_has_a_folder_for_each_run(in_tmp_path):
    own = [f"--trainer.logger={__name__}.Foreign"]
    sys.modules.setdefault(__name__, sys.modules[Foreign.__module__])
    main([*FIT, *own])
    main([*FIT, *own, "--trainer.logger.version=b"])
    assert {path.parent.name for path in Path("service").rglob("config.yaml")} == {"a", "b"}
    assert (Path("service/project/b/checkpoints/best.ckpt")).is_file() and not Path("service/config.yaml").exists()
    before = contents(in_tmp_path)
    with pytest.raises(RuntimeError, match=r"service/project/a/config\.yaml would be overwritten"):
        main([*FIT, *own])
    assert contents(in_tmp_path).items() >= before.items()
    main([*FIT, *own, MORE, "--ckpt_path=service/project/a/checkpoints/last.ckpt"])
    assert steps_of(Path("service/project/a")) == 16


def test_two_runs_in_one_folder_are_told_how_to_part():
    with held([Path("f")], 0):
        pid = os.fork()
        if not pid:  # the lock is one between processes
            try:
                with held([Path("f")], 0):
                    os._exit(0)
            except RuntimeError as error:
                os._exit(7 if "another --trainer.default_root_dir" in str(error) else 8)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7


@pytest.mark.parametrize("command", ["fit", "validate", "test", "predict"])
def test_an_unwritable_folder_is_one_line(command, in_tmp_path):
    Path("file").write_text("mine")
    given = [] if command == "fit" else ["--ckpt_path=quadratic"]
    with pytest.raises(RuntimeError, match=r"cannot be written to \(Not a directory\); choose another --trainer"):
        main([command, *TINY, "--curves.baselines=[]", *given, "--trainer.default_root_dir=file"])
    with pytest.raises(RuntimeError, match=r"cannot be written to \(Not a directory\); choose another --trainer"):
        main([command, *TINY, "--curves.baselines=[]", *given, "--trainer.default_root_dir=file", NONE])
    assert Path("file").read_text() == "mine"


@pytest.mark.parametrize("command", ["fit", "test"])
def test_an_unwritable_folder_of_a_logger_is_one_line(command):
    Path("file").touch()
    given = [] if command == "fit" else ["--ckpt_path=quadratic"]
    own = [CSV[0], "--trainer.logger.save_dir=/proc/nowhere"]
    with pytest.raises(RuntimeError, match=r"/proc/nowhere.* \(No such file or directory\); "):
        main([command, *TINY, "--curves.baselines=[]", *given, *own])
    with pytest.raises(RuntimeError, match=r"--folder file/x cannot be written to \(Not a directory\); choose another"):
        main(["sweep", "--folder=file/x", "--over", "model.lr=1,2", *FIT])
    with pytest.raises(RuntimeError, match=r"cannot be written \(File name too long\)"):
        main(["export", "--ckpt_path=mnist", f"--output={'x' * 300}.npz"])


def test_a_file_that_test_cannot_write_is_one_line(monkeypatch):
    def refuse(path, results):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("lightning_l2l.evaluation.learning_curves.write_comparison", refuse)
    with pytest.raises(
        RuntimeError, match=r"comparison.csv could not be opened or written \(Permission denied\); give"
    ):
        main(TEST)


def test_data_is_found_from_another_folder(mnist_root, in_tmp_path, monkeypatch):
    near = Path("near")
    near.symlink_to(mnist_root)
    main(["fit", *mnist("near", "--data.episodes_per_epoch=1", "--trainer.max_epochs=1"), "--curves.baselines=[]"])
    config = (run(0) / "config.yaml").resolve()
    root = Path(yaml.safe_load(config.read_text())["data"]["init_args"]["root"])
    assert root.is_absolute() and root.samefile(near)
    elsewhere = in_tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    main(["test", f"--config={config}", f"--ckpt_path={config.parent / 'checkpoints/last.ckpt'}"])


def test_roots_of_the_members_of_a_mixture_are_absolute(mnist_root):
    Path("near").symlink_to(mnist_root)
    member = {"class_path": "lightning_l2l.MNISTDataModule", "init_args": {"root": "near", "batch_size": 8}}
    task = {"class_path": "lightning_l2l.NetworkTask", "init_args": {"module": {"class_path": "lightning_l2l.MLP"}}}
    data = {"class_path": "lightning_l2l.MixtureDataModule", "init_args": {"members": [member, member], "num_tasks": 1}}
    sizes = {"num_val_tasks": 2, "num_test_tasks": 2, "eval_tasks": 1, "episodes_per_epoch": 1}
    data["init_args"] |= sizes
    mixture = {"class_path": "lightning_l2l.Mixture", "init_args": {"tasks": [task, task]}}
    Path("mixed.yaml").write_text(yaml.safe_dump({"model": {"task": mixture}, "data": data}))
    flags = [flag for flag in TINY_FIT if "--data" not in flag]
    main(["fit", "--config=mixed.yaml", *flags, "--curves.baselines=[]", "--trainer.max_epochs=1"])
    found = yaml.safe_load((run(0) / "config.yaml").read_text())["data"]["init_args"]["members"]
    assert [Path(one["init_args"]["root"]).is_absolute() for one in found] == [True, True]
