"""The program as a whole: its commands, its help, and modules of one's own."""

import csv
import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from commandline import ROOT, TINY, TINY_FIT
from lightning_l2l import __version__, load_rule, main
from lightning_l2l.commands.errors import COMMANDS
from lightning_l2l.rules.files import save_rule
from processes import start

MINE = '''
import torch
from lightning_l2l import EpisodeDataModule, Task, UpdateRule


class Momentum(UpdateRule):
    """A rule of somebody's own."""

    def __init__(self, decay: float = 0.9):
        super().__init__()
        self.decay = decay
        self.log_lr = torch.nn.Parameter(torch.tensor(-5.0))

    @property
    def state_size(self):
        return 1

    def forward(self, gradient, state):
        velocity = self.decay * state[0] + gradient
        return -self.log_lr.exp() * velocity, velocity[None]


class Bowl(Task):
    """f(theta) = |theta - c|^2."""

    def init_params(self, num_tasks, generator):
        return {"theta": torch.zeros(num_tasks, 3)}

    def loss(self, params, batch, step):
        return (params["theta"] - batch["c"]).square().sum(1)


class Bowls(EpisodeDataModule):
    """Data of bowls."""

    needs_num_steps = False

    def sample(self, stage, generator):
        return {"c": torch.randn(3, generator=generator)}
'''
OWN = [
    "--model.rule=mine.Momentum",
    "--model.task=mine.Bowl",
    "--data=mine.Bowls",
    *(flag for flag in TINY_FIT if "hidden_size" not in flag),
    "--curves.baselines=[adam]",
]


pytestmark = pytest.mark.usefixtures("in_tmp_path")


def program(*arguments, module=("-m", "lightning_l2l")):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    return subprocess.run([sys.executable, *module, *arguments], env=environment, capture_output=True, text=True)


def test_help_has_every_command_with_a_line_of_its_own(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    told = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0
    for name, line in COMMANDS.items():
        assert f"{name} {line}" in told
    for generic in ("full optimization routine", "Perform one evaluation", "Run inference"):
        assert generic not in told


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_its_own_help(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    told = capsys.readouterr().out
    assert stop.value.code == 0 and f"python -m lightning_l2l {command}" in told.replace("[options] ", "")
    assert "--import MODULE,..." in told


def test_version(capsys):
    main(["--version"])
    assert capsys.readouterr().out == f"lightning_l2l {__version__}\n"


@pytest.mark.parametrize(
    "arguments, told",
    [
        (["fit", "--model.num_step", "20"], "unrecognized arguments: --model.num_step 20; did you mean --model.num_st"),
        (["fit", "--trainer.max_epoch=2"], "unrecognized arguments: --trainer.max_epoch=2; did you mean --trainer.max"),
        (["fit", "--data.num_task", "20"], "did you mean num_tasks?"),
        (["export", "--ckpt", "mnist", "--output", "a.npz"], "--ckpt"),
        (["map", "mnist", "--smal"], "unrecognized arguments: --smal"),
        (["sweep", "--ov", "model.lr=1,2", "fit"], "unrecognized arguments: --ov"),
        (["exprot"], "invalid choice: 'exprot'"),
    ],
)
def test_what_is_cut_short_is_refused(arguments, told, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2 and told in capsys.readouterr().err


def test_a_command_that_is_not_lightnings_comes_first():
    Path("some.yaml").write_text("{}")
    with pytest.raises(ValueError, match=r"export takes its own options alone; begin with it: python -m lightning_l2l"):
        main(["--config", "some.yaml", "export"])


def test_a_module_that_there_is_not():
    for name in ("nowhere", "no.where", "mine.py", "../mine", "7up"):
        told = re.escape(f"--import {name}: there is no module of this name in ")
        with pytest.raises(ValueError, match=told):
            main(["export", "--import", name, "--ckpt_path", "mnist", "--output", "a.npz"])


def test_a_module_that_lacks_another_says_which():
    Path("lacking_one.py").write_text("import nothing_of_this_name\n")
    with pytest.raises(ModuleNotFoundError, match="nothing_of_this_name"):
        main(["test", "--import=lacking_one", "--ckpt_path=mnist"])


def test_classes_of_ones_own_work_with_every_command(in_tmp_path):
    """Each command in a process of its own, where nothing but the command line can have imported them."""
    Path("mine.py").write_text(MINE)
    config, best = "lightning_logs/version_0/config.yaml", "lightning_logs/version_0/checkpoints/best.ckpt"
    for arguments in (
        ["fit", *OWN],
        ["test", "--config", config, "--ckpt_path", best],
        ["test", "--import", "mine", *OWN[2:3], "--ckpt_path=last", *(f for f in TINY if "model" not in f)],
        ["export", "--import", "mine", "--ckpt_path", "last", "--output", "momentum.npz"],
        ["sweep", "--over", "model.lr=0.01,0.1", "fit", *OWN, "--curves.baselines=[]"],
    ):
        command = start(Path.cwd(), *arguments)
        assert command.end() == 0, command.told
    assert "mine" not in sys.modules
    for refused in (["export", "--ckpt_path", "last", "--output", "other.npz"], ["test", "--ckpt_path", "last"]):
        with pytest.raises(ValueError, match=r"'mine\.Momentum' is not known; import its module first \(--import mine"):
            main(refused)
    with pytest.raises(ValueError, match=r"'mine\.Momentum' is not known"):
        load_rule("momentum.npz")


def test_a_map_of_a_rule_of_ones_own_in_several_processes(in_tmp_path, monkeypatch, capsys):
    """Those beside the command's own have to import the rule as well, and do what it does alone."""
    Path("mine_for_maps.py").write_text(MINE)
    monkeypatch.syspath_prepend(str(Path.cwd()))
    monkeypatch.setenv("PYTHONPATH", str(Path.cwd()), prepend=os.pathsep)
    save_rule(importlib.import_module("mine_for_maps").Momentum(), Path("momentum.npz"))
    page = ["map", "momentum.npz", "--import", "mine_for_maps", "--small", "--only", "Quadratics"]
    main(page)
    main([*page, "--jobs", "2"])
    assert capsys.readouterr().out.count("momentum: wins") == 2 and Path("map/version_0/momentum.png").is_file()
    one, other = (list(csv.DictReader(Path(f"map/version_{k}/map.csv").read_text().splitlines())) for k in (0, 1))
    for row in (*one, *other):
        assert float(row.pop("share_of_seconds")) > 0  # depends on the clock
    assert one == other and len(one) == 4


def test_a_console_script_finds_modules_of_its_folder(in_tmp_path):
    """It has not the working directory on its path, as `python -m` has."""
    Path("mine.py").write_text(MINE)
    code = (
        "import sys; sys.path = [p for p in sys.path if p]; from lightning_l2l import main; "
        "main(['fit', *sys.argv[1:], '--trainer.fast_dev_run=true'])"
    )
    done = program(*OWN, module=("-c", code))
    assert done.returncode == 0, done.stderr


def test_a_module_in_the_configuration_is_imported(in_tmp_path, monkeypatch):
    Path("of_a_configuration.py").write_text(MINE)
    Path("own.yaml").write_text("import: of_a_configuration\n")
    monkeypatch.setattr(sys, "path", [*sys.path])
    main(["fit", "--config=own.yaml", *TINY_FIT, "--trainer.fast_dev_run=true", "--curves.baselines=[]"])
    assert "of_a_configuration" in sys.modules
