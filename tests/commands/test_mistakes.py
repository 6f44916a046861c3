"""What users do wrong, and what they are told: one line with the bad value and the remedy, and no traceback."""

import os
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

from commandline import ROOT, TINY, TINY_FIT, mnist
from lightning_l2l import (
    CoordinatewiseLSTM,
    LearnedOptimizer,
    MetaOptimizer,
    MNISTDataModule,
    NetworkTask,
    Quadratic,
    QuadraticDataModule,
    load_rule,
    main,
)
from lightning_l2l.commands import sweep
from lightning_l2l.commands.errors import PROG, find_foreseen, in_one_line
from lightning_l2l.evaluation.rollout import rollout
from lightning_l2l.rules.files import save_rule
from processes import start

pytestmark = pytest.mark.usefixtures("in_tmp_path")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    before = Path.cwd()
    os.chdir(folder)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["lightning-l2l"])
            main(["fit", *TINY_FIT])
    finally:
        os.chdir(before)
    return folder / "lightning_logs/version_0/checkpoints/best.ckpt"


# ---- on the command line ----

FILES = {
    "typo.yaml": "model:\n  num_stepz: 5\n",
    "class.yaml": "model:\n  rule:\n    class_path: lightning_l2l.CoordinatewiseGRU\n",
    "tab.yaml": "model:\n\tnum_steps: 5\n",
    "list.yaml": "- model\n",
    "text.yaml": "num_steps\n",
    "before.yaml": "model:\n  memory_budget: 1000\n",
    "empty.yaml": "",
    "unclosed.yaml": "model: {num_steps: [1\n",
    "text.ckpt": "no checkpoint",
    "empty.npz": "",
}


@pytest.fixture
def prepared(trained, mnist_root, tmp_path):
    """Files of the current folder that are not what they should be."""
    for name, content in FILES.items():
        Path(name).write_text(content)
    Path("folder").mkdir()
    Path("folder.npz").mkdir()
    Path("binary.yaml").write_bytes(bytes(range(128, 256)))
    Path("damaged.ckpt").write_bytes(trained.read_bytes()[:500])
    torch.save(nn.Linear(2, 2), "module.ckpt")
    torch.save(nn.Linear(2, 2).state_dict(), "weights.ckpt")
    Path("trained.ckpt").symlink_to(trained)
    for name, size in (("half", 2), ("empty", 10**9)):
        half = Path(name) / "MNIST/raw"
        half.mkdir(parents=True)
        for file in (Path(mnist_root) / "MNIST/raw").iterdir():
            content = file.read_bytes()
            (half / file.name).write_bytes(content[: len(content) // size] if "train-images" in file.name else content)
    return tmp_path


def fit(*flags):
    return ["fit", *TINY_FIT, "--curves.baselines=[]", *flags]


def test(*flags):
    return ["test", *TINY, *flags]


test.__test__ = False

PARSER = {
    "misspelt option": (fit("--model.num_stepz=5"), "--model.num_stepz=5; did you mean --model.num_steps?"),
    "argument of before": (fit("--model.memory=flat"), "did you mean --model.meta_gradient.memory?"),
    "second derivatives": (fit("--model.second_derivatives=true"), "did you mean --model.meta_gradient SecondOrder?"),
    "imitation as a number": (fit("--model.imitation=100"), "did you mean --model.imitation.weight?"),
    "teacher of before": (fit("--model.teacher.lr=1"), "did you mean --model.imitation.teacher?"),
    "configuration of before": (
        fit("--config=before.yaml"),
        "did you mean --model.meta_gradient.memory_budget? before.yaml is of an earlier version: mend it, or give a",
    ),
    "misspelt estimator": (fit("--model.meta_gradient=SecondOrdr"), "did you mean SecondOrder?"),
    "no such memory": (fit("--model.meta_gradient.memory=slow"), "'fast', 'flat'], got slow"),
    "hyphen": (fit("--model.unroll-length=5"), "did you mean --model.unroll_length?"),
    "option of a class": (
        fit("--model.rule.hiden_size=5"),
        "Option 'hiden_size' is not accepted; did you mean hidden_",
    ),
    "option of the data": (fit("--data.dmi=5"), "Option 'dmi' is not accepted; did you mean dim?"),
    "nothing like it": (fit("--frobnicate=5"), "unrecognized arguments: --frobnicate=5; see"),
    "a word too many": (fit("mnist"), "unrecognized arguments: mnist"),
    "text for a number": (fit("--model.num_steps=five"), "--model.num_steps: expected int, got five; see"),
    "float for a size": (fit("--model.num_steps=1e3"), "--model.num_steps: expected int, got 1000.0"),
    "truth for a size": (fit("--data.num_tasks=true"), "got True"),
    "nothing for a size": (fit("--model.num_steps=null"), "--model.num_steps: expected int, got None"),
    "list for a size": (fit("--model.num_steps=[1,2]"), "expected int, got [1, 2]"),
    "no value": (fit("--model.num_steps"), "--model.num_steps: expected one argument"),
    "unknown weights": (
        fit("--model.loss_weights=first"),
        "--model.loss_weights: expected Literal['all', 'linear', 'l",
    ),
    "unknown class": (
        fit("--model.rule=CoordinatewiseGRU"),
        "no class CoordinatewiseGRU; did you mean CoordinatewiseLSTM?",
    ),
    "unknown path": (fit("--model.rule=lightning_l2l.GRU"), "module 'lightning_l2l' has no attribute 'GRU'"),
    "unknown module": (fit("--model.rule=nowhere.LSTM"), "nowhere"),
    "no rule": (fit("--model.rule=torch.nn.Linear"), "torch.nn.Linear does not correspond to a subclass of UpdateRule"),
    "other case": (fit("--data=MnistDataModule"), "did you mean MNISTDataModule?"),
    "unknown optimizer": (fit("--model.optimizer=torch.optim.Adamm"), "'torch.optim' has no attribute 'Adamm'"),
    "schedule without steps": (fit("--model.lr_scheduler=StepLR"), "arguments are required: step_size"),
    "baselines, not a list": (fit("--curves.baselines=adam"), "--curves.baselines: expected Sequence, got adam"),
    "one quantile": (fit("--curves.quantiles=[0.9]"), "--curves.quantiles: expected tuple with 2 elements, got [0.9]"),
    "labels, not a list": (
        fit("--data=CIFAR10DataModule", "--data.classes=cat"),
        "expected Sequence, got cat",
    ),
    "unknown precision": (fit("--trainer.precision=12"), "got 12"),
    "seed": (fit("--seed_everything=abc"), "--seed_everything: expected bool; expected int, got abc"),
    "config with a typo": (["fit", "--config=typo.yaml"], "num_stepz"),
    "config with a class": (["fit", "--config=class.yaml"], "did you mean CoordinatewiseLSTM?"),
    "config absent": (["fit", "--config=absent.yaml"], "File does not exist"),
    "config is a folder": (["fit", "--config=folder"], "Path is not a file"),
    "config with tabs": (["fit", "--config", "tab.yaml"], "tab.yaml: Problems parsing config: "),
    "config unclosed": (["fit", "--config", "unclosed.yaml"], "unclosed.yaml: Problems parsing config: "),
    "config is a list": (["fit", "--config=list.yaml"], "list.yaml: Unexpected config: - model, where a YAML file of"),
    "config is a word": (["fit", "-c", "text.yaml"], "text.yaml: Unexpected config: num_steps, where a YAML file of"),
    "config is empty": (["fit", "--config=empty.yaml"], "empty.yaml: Unexpected config, where a YAML file of fields"),
    "misspelt command": (
        ["fitt"],
        "invalid choice: 'fitt' (choose from 'fit', 'validate', 'test', 'predict', 'export', 'sweep', 'map'); did you",
    ),
    "unknown command": (["train"], "invalid choice: 'train'"),
    "misspelt export": (["exprot", "--ckpt_path=mnist"], "did you mean export?"),
    "no command": ([], "subcommand"),
    "option before command": (
        ["--model.num_steps=5"],
        "begin with a command: fit, validate, test, predict, export, sweep, map; see",
    ),
    "no checkpoint's name": (test("--ckpt_path"), "--ckpt_path: expected one argument"),
    "export of nothing": (["export"], "the following arguments are required: ckpt_path, output"),
    "export to nowhere": (["export", "--ckpt_path=mnist"], "the following arguments are required: output"),
    "export by position": (["export", "mnist", "rule.npz"], "unrecognized arguments: mnist rule.npz"),
}

MNIST = "--data.download=false"
RAISED = {
    "unroll_length": (["fit", "--model.unroll_length=30"], "use 1, 2, 4, 5, 10, 20, 25, 50 or 100"),
    "unroll_length > num_steps": (
        fit("--model.unroll_length=60"),
        "unroll_length=60 does not divide num_steps=6; use 1, 2",
    ),
    "final_steps": (fit("--model.final_steps=7"), "final_steps=7 exceeds num_steps=6; use 1 to 6"),
    "no tasks": (fit("--data.num_tasks=0"), "num_tasks=0 is not an integer of 1 or more; set num_tasks=1"),
    "negative steps": (fit("--model.num_steps=-5"), "num_steps=-5"),
    "zero learning rate": (fit("--model.lr=0"), "lr=0.0 is out of range; use a finite number above 0"),
    "learning rate that is none": (fit("--model.lr=.nan"), "lr=nan is out of range"),
    "p": (fit("--model.rule.p=0"), "p=0"),
    "huge rule": (fit("--model.rule.hidden_size=1000000000"), "hidden_size=1000000000, num_layers=2 need 6.4e+10 GB"),
    "too huge rule": (fit("--model.rule.hidden_size=10000000000"), "hidden_size=10000000000 is too large; use at most"),
    "many workers": (fit("--data.num_workers=5000"), "num_workers=5000 is too large; use at most 256"),
    "two schedules": (
        fit("--model.anneal=true", "--model.lr_scheduler=ConstantLR"),
        "anneal=True and an lr_scheduler are two schedules",
    ),
    "dim of the data alone": (
        fit("--data.dim=4"),
        "W [4, 4, 4], y [4, 4] and theta [4, 10] do not fit Quadratic(dim=10)",
    ),
    "network on quadratics": (
        fit("--model.task=NetworkTask", "--model.task.module=MLP"),
        "the batch has no 'inputs', it",
    ),
    "task without drawn data": (
        fit("--model.task=NetworkTask", "--model.task.module=MLP", "--data=GeneratedDataModule"),
        "draws the data of the trained module's task, and data of NetworkTask is not drawn; give it a task such as Ros",
    ),
    "mixture of a task alone": (
        fit("--data=MixtureDataModule", "--data.members=[{class_path: QuadraticDataModule}]"),
        "MixtureDataModule is the data of a Mixture, and the task is 'Quadratic'; give the module the task Mixture",
    ),
    "mixture on one task's data": (
        fit("--model.task=Mixture", "--model.task.tasks=[{class_path: Quadratic}]"),
        "the batch has no 'member', which says of which of the mixture's tasks it is; use MixtureDataModule",
    ),
    "mixture in one batch": (
        fit(
            "--model.task=Mixture",
            "--model.task.tasks=[{class_path: Quadratic}, {class_path: Rosenbrock}]",
            "--data=MixtureDataModule",
            "--data.members=[{class_path: QuadraticDataModule}, {class_path: GeneratedDataModule}]",
        ),
        "num_val_tasks=4 in batches of eval_tasks=512 are 1, and each of the 2 members must have one; use eval_tasks=2",
    ),
    "no epochs": (
        fit("--trainer.max_epochs=0"),
        "anneal=True needs to know the end of the run; set max_epochs (now 0)",
    ),
    "negative epochs": (
        fit("--trainer.max_epochs=-5"),
        "`max_epochs` must be a non-negative integer or -1. You passed in -5",
    ),
    "no devices": (fit("--trainer.devices=0"), "the Trainer refuses its arguments (accelerator=cpu, devices=0, strat"),
    "no such device": (fit("--trainer.accelerator=tpu"), "the Trainer refuses its arguments (accelerator=tpu"),
    "no such accelerator": (
        fit("--trainer.accelerator=warp"),
        "accelerator=warp, devices=1, strategy=auto, num_nodes=1): You",
    ),
    "no such strategy": (fit("--trainer.strategy=dddp"), "strategy=dddp, num_nodes=1)"),
    "no nodes": (fit("--trainer.num_nodes=0"), "`num_nodes` must be a positive integer, but got 0; use others, see"),
    "clipping by the Trainer": (
        fit("--trainer.gradient_clip_val=1.5"),
        "gradient_clip_val 1.5 would not reach the meta-gradient",
    ),
    "accumulation": (fit("--trainer.accumulate_grad_batches=2"), "use a larger --data.num_tasks"),
    "negative seed": (
        fit("--seed_everything=-1"),
        "--seed_everything -1 is no seed; use an integer from 0 to 4294967295",
    ),
    "large seed": (fit("--seed_everything=4294967296"), "--seed_everything 4294967296 is no seed"),
    "negative seed of the data": (fit("--data.seed=-1"), "seed=-1 is not an integer of 0 or more"),
    "misspelt baseline": (
        fit("--curves.baselines=[adamm]"),
        "unknown baseline 'adamm'; use adam, rmsprop, sgd, nag, adamw",
    ),
    "baseline twice": (fit("--curves.baselines=[adam,adam]"), "the name 'adam' is taken"),
    "quantiles": (fit("--curves.quantiles=[0.9,0.1]"), "quantiles=(0.9, 0.1)"),
    "misspelt monitor": (
        fit("--checkpoint.monitor=val/finalloss"),
        "ModelCheckpoint(monitor='val/finalloss')` could not find",
    ),
    "LBFGS": (
        fit("--model.optimizer=torch.optim.LBFGS"),
        "optimizer=LBFGS evaluates an episode several times a step; use",
    ),
    "config is no text": (["fit", "--config=binary.yaml"], "is not text"),
    "checkpoint absent": (
        ["fit", "--ckpt_path=nowhere.ckpt"],
        "no rule at 'nowhere.ckpt'; give the path of a checkpoint",
    ),
    "checkpoint is a folder": (fit("--ckpt_path=folder"), "no rule at 'folder'"),
    "no last": (["fit", "--ckpt_path=last"], "no checkpoints/last.ckpt"),
    "shipped rule": (["fit", "--ckpt_path=mnist"], "a shipped rule is trained already"),
    "recipe of a test": (
        ["fit", f"--config={ROOT / 'configs' / 'mnist_relu.yaml'}"],
        "a shipped rule is trained already",
    ),
    "misspelt rule": (
        test("--ckpt_path=mnits"),
        "no rule at 'mnits'; give the path of a checkpoint that `fit` wrote, or ",
    ),
    "damaged": (test("--ckpt_path=damaged.ckpt"), "'damaged.ckpt' cannot be read as a checkpoint (damaged"),
    "text": (test("--ckpt_path=text.ckpt"), "'text.ckpt' cannot be read as a checkpoint"),
    "a pickled module": (test("--ckpt_path=module.ckpt"), "it holds more than weights and plain values"),
    "weights": (
        test("--ckpt_path=weights.ckpt"),
        "'weights.ckpt' is no checkpoint of a MetaOptimizer: it holds no rule",
    ),
    "empty rule file": (test("--ckpt_path=empty.npz"), "'empty.npz' cannot be read as a rule file"),
    "folder as rule file": (test("--ckpt_path=folder.npz"), "no rule at 'folder.npz'"),
    "another rule": (test("--model.rule.hidden_size=4", "--ckpt_path=trained.ckpt"), "use --model.rule.hidden_size 3"),
    "inference mode": (test("--trainer.inference_mode=true", "--ckpt_path=trained.ckpt"), "inference_mode=False"),
    "no validation tasks": (
        test("--trainer.limit_val_batches=0", "--ckpt_path=trained.ckpt"),
        "tuned on validation tasks",
    ),
    "suffix": (["export", "--ckpt_path=mnist", "--output=rule.bin"], "use 'rule.npz'"),
    "no folder": (["export", "--ckpt_path=mnist", "--output=absent/rule.npz"], "no folder 'absent'"),
    "folder in the way": (["export", "--ckpt_path=mnist", "--output=folder.npz"], "'folder.npz' is a folder"),
    "export damaged": (["export", "--ckpt_path=damaged.ckpt", "--output=rule.npz"], "damaged"),
    "export last": (["export", "--ckpt_path=last", "--output=rule.npz"], "no checkpoints/last.ckpt"),
    "export another size": (
        ["export", "--ckpt_path=mnist", "--output=rule.npz", "--init_args={hidden_size: 3}"],
        "the weights in 'mnist' with {'hidden_size': 3} do not fit the rule they are for",
    ),
    "export an argument that is none": (
        ["export", "--ckpt_path=mnist", "--output=rule.npz", "--init_args={decy: 3}"],
        "'mnist' with {'decy': 3} describes a rule that there is not",
    ),
    "no images": (
        ["fit", *mnist("absent", MNIST)],
        "has no train-images-idx3-ubyte(.gz); put it there, or set download=True",
    ),
    "half the images": (["fit", *mnist("half", MNIST)], "train-images-idx3-ubyte"),
    "empty images": (["fit", *mnist("empty", MNIST)], "train-images-idx3-ubyte has 0 bytes"),
    "no photographs": (
        ["fit", "--data=CIFAR10DataModule", "--data.root=absent", MNIST],
        "has neither cifar-10-batches-bin/data_batch_1.bin nor folders of images, such as train/airplane",
    ),
    "no label": (["fit", "--data=CIFAR10DataModule", "--data.classes=[cat,dgo]"], "has 'dgo', which is no label; use"),
    "batch_size": (["fit", *mnist("MNIST_ROOT", MNIST, "--data.batch_size=70000")], "use batch_size="),
    "num_unseen": (["fit", *mnist("MNIST_ROOT", MNIST, "--data.num_unseen=70000")], "use num_unseen="),
}


def arguments_of(case, mnist_root):
    return [argument.replace("MNIST_ROOT", str(mnist_root)) for argument in case]


def test_the_parser_tells_in_one_line(prepared, capsys):
    for name, (arguments, told) in PARSER.items():
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        error = capsys.readouterr().err
        assert stop.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1, (name, error)
        assert told in error and f"see {PROG}" in error and "--help" in error, (name, error)
        assert len(error) < 600, (name, error)


@pytest.mark.filterwarnings("ignore:.*without --ckpt_path")
def test_the_program_tells_in_one_line(prepared, mnist_root):
    for name, (arguments, told) in RAISED.items():
        try:
            main(arguments_of(arguments, mnist_root))
        except Exception as error:
            caught = error
        except SystemExit:
            pytest.fail(f"{name}: by the parser")
        else:
            pytest.fail(f"{name}: went through")
        line = in_one_line(caught)
        assert line is not None, (name, caught)
        assert told in line and "\n" not in line and len(line) < 600, (name, line)


ON_THE_SHELL = [PARSER["misspelt option"], RAISED["another rule"], RAISED["no such accelerator"]]


@pytest.mark.parametrize("case", ON_THE_SHELL)
def test_the_shell_sees_that_line_and_no_traceback(case, prepared):
    arguments, told = case
    command = start(Path.cwd(), *arguments)
    assert command.end() in (1, 2)
    error = command.told
    assert "Traceback" not in error
    assert told in error.split("error: ")[1] and error.splitlines()[-1].startswith("error: ")


@pytest.mark.parametrize("command", ["test", "validate", "predict"])
def test_an_untrained_rule_is_warned_of(command):
    with pytest.warns(
        UserWarning, match=f"{command} without --ckpt_path: the rule is not trained, .* give --ckpt_path last"
    ):
        main([command, *TINY, "--curves.baselines=[]", "--trainer.default_root_dir=a"])


# ---- sweeps ----

SWEEPS = {
    "nothing to sweep": (["fit"], "nothing to sweep; give --over FIELD=VALUE,... or --random FIELD=LOW:HIGH"),
    "no command": (["--over", "model.lr=1,2"], "'nothing' cannot be swept; end with fit or test and its arguments"),
    "not swept": (["--over", "model.lr=1,2", "predict"], "'predict' cannot be swept"),
    "no values": (["--over", "model.lr", "fit"], "'model.lr' lacks a value; give them as in model.num_steps=20,50,100"),
    "an empty value": (["--over", "model.lr=1,,2", "fit"], "'model.lr=1,,2' lacks a value"),
    "no range": (
        ["--random", "model.lr=0.1", "fit"],
        "'model.lr=0.1' lacks 0 < LOW < HIGH; give them as in model.lr=0.001",
    ),
    "range reversed": (["--random", "model.lr=1:0.1", "fit"], "lacks 0 < LOW < HIGH"),
    "range of words": (["--random", "model.lr=a:b", "fit"], "lacks 0 < LOW < HIGH"),
    "no draws": (["--random", "model.lr=0.1:1", "--trials", "0", "fit"], "--trials 0 is no number of draws"),
    "draws by word": (["--random", "model.lr=0.1:1", "--trials", "many", "fit"], "invalid int value: 'many'"),
    "twice": (["--over", "model.lr=1", "--over", "model.lr=2", "fit"], "a field is swept twice (model.lr, model.lr)"),
    "misspelt": (["--ovr", "model.lr=1", "fit"], "unrecognized arguments: --ovr"),
    "nothing to resume": (["--resume", "sweep/version_9"], "--resume sweep/version_9: no sweep there"),
    "resumed with a command": (["--resume", "sweep/version_9", "fit"], "--resume repeats the sweep's own command"),
    "one checkpoint for all": (["--over", "model.lr=1", "fit", "--ckpt_path=last"], "leave --ckpt_path out"),
    "no such field": (["--over", "model.num_stepz=3,6", "fit", *TINY], "--model.num_stepz=3"),
    "no such value": (["--over", "model.num_steps=3,x", "fit", *TINY_FIT], "expected int, got x"),
    "bad value": (["--over", "data.num_tasks=0,1", "fit", *TINY], "num_tasks=0 is not an integer"),
}


@pytest.mark.parametrize("name", ["misspelt", *SWEEPS])
def test_a_sweep_tells_too(name, capsys):
    arguments, told = SWEEPS[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if name == "no such value":  # the second setting's: the sweep goes on, and says so
            assert sweep.main(arguments) == 1
            out, err = capsys.readouterr()
            assert told in err and "failed: --model.num_steps: expected int, got x" in out
            return
        with pytest.raises(SystemExit) as stop:
            sweep.main(arguments)
    said = str(stop.value.code) if stop.value.code != 2 else capsys.readouterr().err
    assert stop.value.code == 2 or said.startswith("error: ")
    assert told in said.split("error: ")[1], said


# ---- in Python ----


def param():
    parameter = nn.Parameter(torch.zeros(2))
    parameter.grad = torch.ones(2)
    return parameter


def step(*arguments, options=None, **kwargs):
    LearnedOptimizer([param()], "mnist", **(options or {})).step(*arguments, **kwargs)


def sparse():
    parameter = param()
    parameter.grad = torch.ones(2).to_sparse()
    LearnedOptimizer([parameter], "mnist").step()


def state_of_another():
    optimizer, other = LearnedOptimizer([param()], "mnist"), LearnedOptimizer([param()], CoordinatewiseLSTM(3))
    other.step()
    optimizer.load_state_dict(other.state_dict())


def state_that_is_none():
    optimizer = LearnedOptimizer([param()], "mnist")
    optimizer.step()
    content = optimizer.state_dict()
    content["state"][0]["rule_state"] = "mnist"
    optimizer.load_state_dict(content)


def untrained(**options):
    return MetaOptimizer(
        **{"task": Quadratic(2), "rule": CoordinatewiseLSTM(2), "num_steps": 4, "unroll_length": 2, **options}
    )


class NoParameters(CoordinatewiseLSTM):
    def parameters(self, recurse=True):
        return iter(())


PYTHON = {
    "misspelt rule": (
        lambda: LearnedOptimizer([param()], "mnits"),
        "no rule at 'mnits'; .* shipped rule: cifar10, .* mnist, quadratic",
    ),
    "a learning rate, as for Adam": (lambda: LearnedOptimizer([param()], 0.001), "rule=0.001 is a float; give 'mnist'"),
    "the class of a rule": (
        lambda: LearnedOptimizer([param()], CoordinatewiseLSTM),
        "rule=.* is the class CoordinatewiseLSTM",
    ),
    "the model": (
        lambda: LearnedOptimizer(nn.Linear(1, 1), "mnist"),
        r"params is the module Linear; give .*module\.parameters",
    ),
    "a negative factor": (lambda: LearnedOptimizer([param()], "mnist", lr=-1), "lr=-1 is not 0 or more"),
    "a text for a factor": (lambda: LearnedOptimizer([param()], "mnist", lr="1"), "lr='1' is not 0 or more"),
    "the loss for a closure": (
        lambda: step(torch.tensor(1.0)),
        r"closure=tensor\(1.\) cannot be called; .* step\(loss=loss\)",
    ),
    "a loss for each example": (
        lambda: step(loss=torch.ones(3), options={"fallback_lr": 0.1}),
        r"a loss of shape \[3\] is not",
    ),
    "a loss that is none": (lambda: step(loss="x", options={"fallback_lr": 0.1}), "the loss 'x' is no number"),
    "a fallback without a loss": (lambda: step(options={"fallback_lr": 0.1}), "there is no loss to watch; use"),
    "a sparse gradient": (sparse, r"a gradient of shape \[2\] is sparse; .* give this parameter to another optimizer"),
    "the state of another rule": (
        state_of_another,
        "saved with another rule, .* Make the optimizer with the rule that",
    ),
    "a state that is none": (state_that_is_none, r"rule_state is 'mnist', no dense tensor of shape \[80, 2\]"),
    "a rule from a folder": (lambda: load_rule("."), "no rule at '.'"),
    "no rule's name": (
        lambda: load_rule(None),
        "source=None is a NoneType; give the name of a shipped rule, or a path",
    ),
    "weights alone": (
        lambda: load_rule(CoordinatewiseLSTM(2).state_dict()),
        "does not say of which rule; give load_rule",
    ),
    "a class for a form": (
        lambda: load_rule("mnist", CoordinatewiseLSTM),
        "rule=.* is the class CoordinatewiseLSTM; give a rule, such as CoordinatewiseLSTM",
    ),
    "export to a text": (
        lambda: save_rule(CoordinatewiseLSTM(2), Path("a.txt")),
        "'a.txt' has not the suffix of a rule file",
    ),
    "classes for a module": (
        lambda: untrained(task=Quadratic),
        "task=.* is the class Quadratic; give a Task, such as Quadrat",
    ),
    "a network for a task": (lambda: untrained(task=nn.Linear(1, 1)), "task=.* is a Linear; give a Task"),
    "a rule by its name": (lambda: untrained(rule="mnist"), "rule='mnist' is a str; give an UpdateRule"),
    "a rule without parameters": (
        lambda: untrained(rule=NoParameters(2)).configure_optimizers(),
        "has no parameters to meta-train",
    ),
    "an optimizer that is made": (
        lambda: untrained(optimizer=torch.optim.Adam([param()])),
        "optimizer=.* cannot be called",
    ),
    "a network without parameters": (lambda: NetworkTask(nn.ReLU()), "ReLU has no parameters to train"),
    "no network": (lambda: NetworkTask("mlp"), "module='mlp' cannot be called; give an nn.Module"),
    "a builder of nothing": (lambda: NetworkTask(lambda: None), "module=None is a NoneType; give an nn.Module"),
    "data before setup": (
        lambda: MNISTDataModule().sample("train", torch.Generator()),
        r"call prepare_data\(\) and setup\(\)",
    ),
    "num_steps unknown": (lambda: MNISTDataModule().setup(), "num_steps=None .* give num_steps"),
    "a negative seed": (lambda: QuadraticDataModule(seed=-1), "seed=-1 is not an integer of 0 or more"),
    "a batch of something else": (
        lambda: rollout(lambda params: torch.optim.SGD(params, 1), Quadratic(2), {"x": 1}, 1, torch.device("cpu")),
        "the batch has no 'seed', it has 'x'",
    ),
}


@pytest.mark.parametrize("name", PYTHON)
def test_python_tells_too(name):
    do, told = PYTHON[name]
    with pytest.raises((ValueError, TypeError, RuntimeError, FileNotFoundError), match=told) as caught:
        do()
    assert find_foreseen(caught.value) is caught.value and "\n" not in str(caught.value)


def test_a_closure_may_return_nothing():
    step(lambda: None)
