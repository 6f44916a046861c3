"""The commands that Lightning runs: `python -m lightning_l2l fit | validate | test | predict`."""

from __future__ import annotations

import os
import shlex
import sys
import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.plugins import CheckpointIO
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch.nn import Module
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

import lightning_l2l
from lightning_l2l.commands.errors import COMMANDS, DESCRIPTION, PROG, OneLineParser, find_foreseen
from lightning_l2l.commands.imports import import_modules
from lightning_l2l.evaluation.learning_curves import LearningCurves
from lightning_l2l.meta.hyperparameters import as_of_now
from lightning_l2l.meta.meta_gradient import MetaGradient
from lightning_l2l.meta.meta_optimizer import MetaOptimizer
from lightning_l2l.rules import UpdateRule
from lightning_l2l.rules.describe import check_names, describe
from lightning_l2l.rules.files import SUFFIX, load_rule, shipped_rules
from lightning_l2l.runs.checkpoints import AtomicCheckpointIO, read_to_resume
from lightning_l2l.runs.folder import folders_of, held, refuse_to_overwrite, room_for, told, would_overwrite
from lightning_l2l.runs.interrupt import ResumeCheckpoint, terminable
from lightning_l2l.runs.loggers import RUNS, NoLogger, RunLogger, folders_of_loggers, go_on_in
from lightning_l2l.runs.resume import NEWEST, check_resumable, folders_in, newest_last, requeued, run_of
from lightning_l2l.runs.trainer import has_folder, log_folder, run_folder, shown, writes
from lightning_l2l.tasks import Task

#: What `fit` does without arguments; configs/quadratic.yaml is the same with comments, and trains for longer.
DEFAULTS: dict[str, Any] = {
    "model.task": {"class_path": "lightning_l2l.Quadratic", "init_args": {"dim": 10}},
    "model.rule": {
        "class_path": "lightning_l2l.CoordinatewiseLSTM",
        "init_args": {"preprocessing": "identity", "output_scale": 0.1},
    },
    "model.unroll_length": 5,
    "model.loss_weights": "linear",
    "model.lr": 0.01,
    "model.anneal": True,
    "model.gradient_clip": 5.0,
    "data": {
        "class_path": "lightning_l2l.QuadraticDataModule",
        "init_args": {
            "num_tasks": 128,
            "dim": 10,
            "episodes_per_epoch": 50,
            "num_val_tasks": 512,
            "eval_tasks": 512,
            "num_test_tasks": 512,
        },
    },
    "model.meta_gradient": {"class_path": "lightning_l2l.FirstOrder"},
    "checkpoint.monitor": "val/final_loss",
    "checkpoint.filename": "best",
    "checkpoint.enable_version_counter": False,
}

TRAINER_DEFAULTS: dict[str, Any] = {
    "max_epochs": 30,
    "log_every_n_steps": 10,
    "inference_mode": False,  # evaluation trains optimizees, which needs gradients
    "accelerator": "auto",
    "devices": 1,
}


class CLI(LightningCLI):
    """LightningCLI with the product's defaults and callbacks, and `--ckpt_path last` or a shipped rule's name."""

    _rule: UpdateRule | None = None  # whose weights the configured one gets
    _checkpoint: dict[str, Any] | None = None  # where they are from, if not from a rule file
    _resume_into: Path | None = None  # the folder of the run that goes on
    _own_checkpoints: Sequence[Path] = ()  # folders of its checkpoints
    _steps_done = 0  # outer steps of that run

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._words = sys.argv[1:] if kwargs.get("args") is None else kwargs["args"]
        super().__init__(*args, **kwargs)

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        """Where a command comes first, no other's arguments are looked up: that is most of the time before it runs."""
        first = self._words[0] if isinstance(self._words, list) and self._words else subcommand
        other = first in self.subcommands() and first != subcommand
        return self.init_parser(**kwargs) if other else super()._prepare_subcommand_parser(klass, subcommand, **kwargs)

    def _add_subcommands(self, parser: LightningArgumentParser, **kwargs: Any) -> None:
        """All commands, each with a line of ours; those that Lightning does not run are here for `--help` alone."""
        lines = {name: {"description": COMMANDS[name]} for name in self.subcommands()}
        super()._add_subcommands(parser, **lines)
        parser.add_argument("--version", action="version", version=f"lightning_l2l {lightning_l2l.__version__}")
        commands: Any = parser._subcommands_action
        for name, line in COMMANDS.items():
            if name not in lines:
                commands.add_subcommand(name, OneLineParser(description=line), help=line)
        for listed in commands._choices_actions:
            listed.help = COMMANDS[listed.dest]  # not the first line of Trainer's docstring

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """The callbacks that every run has, configurable as `--checkpoint.*` and `--curves.*`."""
        parser.add_lightning_class_args(ModelCheckpoint, "checkpoint")
        parser.add_lightning_class_args(LearningCurves, "curves")
        parser.add_import()  # type: ignore[attr-defined]
        parser.set_defaults(DEFAULTS)

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Refuse what the parser lets through and Lightning would stumble over."""
        try:
            super().parse_arguments(parser, args)
        except UnicodeDecodeError as error:
            raise ValueError(
                f"a file that the command line names is not text ({error}); give --config a YAML file, and "
                "--ckpt_path a checkpoint"
            ) from error
        except RecursionError as error:
            raise ValueError("the configuration refers to itself, or is nested too deeply; write it out") from error
        command = self.config["subcommand"]
        if command not in self.subcommands():
            raise ValueError(f"{command} takes its own options alone; begin with it: {PROG} {command} ...")
        config = self.config[command]
        import_modules((config["import"] or "").split(","))
        _make_absolute(config["data"], "root")
        _make_absolute(config["trainer"]["logger"], "save_dir")
        _make_absolute(config["checkpoint"], "dirpath")
        seed, trainer = config["seed_everything"], config["trainer"]
        if trainer["gradient_clip_val"]:
            raise ValueError(
                f"--trainer.gradient_clip_val {trainer['gradient_clip_val']} would not reach the meta-gradient; use "
                "--model.gradient_clip"
            )
        if trainer["accumulate_grad_batches"] != 1:
            raise ValueError(
                f"--trainer.accumulate_grad_batches {trainer['accumulate_grad_batches']} would not reach the "
                "meta-gradient; use a larger --data.num_tasks, whose mean it is"
            )
        if not isinstance(seed, bool) and not 0 <= seed < 2**32:
            raise ValueError(f"--seed_everything {seed} is no seed; use an integer from 0 to {2**32 - 1}")

    def _parse_ckpt_path(self) -> None:
        """Find "last", and take the model from the checkpoint where the command line says nothing of it."""
        command = self.config.get("subcommand")
        config = self.config[command] if command else {}
        if command == "fit" and not config.get("ckpt_path"):
            config["ckpt_path"] = requeued(Path(config["trainer"]["default_root_dir"] or "."))
        if not config.get("ckpt_path"):
            if command != "fit":
                rank_zero_warn(
                    f"{command} without --ckpt_path: the rule is not trained, its weights are random; give "
                    "--ckpt_path last, or the path of a checkpoint, or the name of a shipped rule"
                )
            return
        if config["ckpt_path"] in shipped_rules() or Path(config["ckpt_path"]).suffix == SUFFIX:
            self._use_rule(config, command)
            return
        if config["ckpt_path"] == NEWEST:
            trainer = config["trainer"]
            beside = folders_of_loggers(trainer["logger"])
            config["ckpt_path"] = str(newest_last(Path(trainer["default_root_dir"] or "."), beside))
        path = Path(config["ckpt_path"])
        checkpoint = read_to_resume(path)  # refuses what it cannot read, in one line
        rule = load_rule(path)  # and rules that do not fit their description
        if command == "fit":
            check_resumable(path, checkpoint)
            self._resume_into, self._own_checkpoints = run_of(path, checkpoint), folders_in(checkpoint)
            self._steps_done = checkpoint["global_step"]
        else:  # the rule is all there is to restore, so nothing else in the file is looked at
            self._rule, self._checkpoint = rule, checkpoint
        defaults = self._subcommand_parsers[command].get_defaults()
        if config["model"] == defaults["model"]:
            try:
                given = {k: v for k, v in dict(checkpoint["hyper_parameters"]).items() if k != "_instantiator"}
                given = as_of_now({**given, **({} if command == "fit" else {"imitation": None})})
                check_names(given, (Task, Module, MetaGradient, Optimizer, LRScheduler))
            except (TypeError, ValueError, RecursionError) as error:
                raise ValueError(
                    f"{config['ckpt_path']!r} describes a model that cannot be made from it alone ({error}); give the "
                    "--config of its run beside it, lightning_logs/version_N/config.yaml, or --import the module"
                ) from error
            self.config = self.parser.parse_object({command: {"model": given}}, self.config)

    def _use_rule(self, config: Any, command: str | None) -> None:
        """Put a shipped rule, or a rule file, into the place of the rule that the configuration describes."""
        name = config["ckpt_path"]
        if command == "fit":
            raise ValueError(
                f"--ckpt_path {name}: a shipped rule is trained already, and `fit` goes on with checkpoints of its own "
                "only; use `test`, or --ckpt_path null to start anew"
            )
        self._rule = load_rule(name)
        config["model"]["rule"] = _as_configured(describe(self._rule))

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        kwargs: dict[str, Any] = super()._prepare_subcommand_kwargs(subcommand)
        return kwargs if self._rule is None else {**kwargs, "ckpt_path": None}  # it is in the model already

    def before_instantiate_classes(self) -> None:
        """Checkpoints are read without executing anything in them, and know their folder by its whole path."""
        if self.subcommand != "fit":  # where checkpoints would go now is of no interest
            warnings.filterwarnings("ignore", "The dirpath has changed from")
        if self.subcommand == "test":
            self.config["test"]["verbose"] = False  # LearningCurves prints the table
        trainer = self.config[self.subcommand]["trainer"]
        trainer["default_root_dir"] = str(Path(trainer["default_root_dir"] or ".").resolve())
        if "weights_only" in self._subcommand_method_arguments[str(self.subcommand)]:
            self.config[self.subcommand]["weights_only"] = True

    def after_instantiate_classes(self) -> None:
        """Fill in the rule's weights; let the run end with a `test` command that repeats its settings."""
        if self._checkpoint is not None:
            self.model.on_load_checkpoint(self._checkpoint)  # refuses that of another rule
        if self._rule is not None:
            self.model.rule.load_state_dict(self._rule.state_dict())
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, LearningCurves) and has_folder(self.trainer):
                config = Path(os.path.relpath(run_folder(self.trainer))) / "config.yaml"
                callback.test_command_prefix = f"python -m lightning_l2l test --config {shlex.quote(str(config))}"

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Log to TensorBoard where nothing else is asked for; a resumed run goes on in the folder of the first."""
        config = self.config_init[self.subcommand]["trainer"]
        plugins = config["plugins"] or []
        plugins = plugins if isinstance(plugins, list) else [plugins]
        if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
            kwargs["plugins"] = [*plugins, AtomicCheckpointIO()]
        self.save_config_kwargs = {"own_checkpoints": self._own_checkpoints}
        kwargs["logger"] = self._logger(config["logger"], config["default_root_dir"])
        try:
            return super().instantiate_trainer(**kwargs)
        except (ImportError, MisconfigurationException, ValueError) as error:
            if not isinstance(error, MisconfigurationException) and find_foreseen(error) is not None:
                raise
            given = ", ".join(f"{name}={config[name]}" for name in ("accelerator", "devices", "strategy", "num_nodes"))
            told = " ".join(str(error).split()).rstrip(".")
            raise ValueError(
                f"the Trainer refuses its arguments ({given}): {told}; use others, see {PROG} {self.subcommand} --help"
            ) from error

    def _logger(self, given: Any, root: str) -> Any:
        """TensorBoard where nothing else is asked for; a resumed run goes on in the folder of the first."""
        folder = self._resume_into
        if given is False:
            return NoLogger(root, folder)
        if given in (None, True):
            runs = Path(root) / RUNS if folder is None else folder.parent
            given = RunLogger(runs.parent, runs.name, default_hp_metric=False)
        if folder is not None:
            go_on_in(folder, given if isinstance(given, list) else [given], self._steps_done)
        return given

    def _run_subcommand(self, subcommand: str) -> None:
        with ExitStack() as stack:
            stack.enter_context(terminable())
            remedy = "give another --trainer.default_root_dir, or see to permissions and space"
            stack.enter_context(told(remedy))
            if writes(self.trainer):
                refuse_to_overwrite(self.trainer, subcommand == "fit", self._resume_into, self._own_checkpoints)
            # Lightning's word for what has been looked at by now.
            warnings.filterwarnings("ignore", "(Checkpoint|Experiment logs) directory .* exists and is not empty")
            if subcommand == "fit" and writes(self.trainer):
                stack.enter_context(held(folders_of(self.trainer), room_for(self.model.parameters())))
                if self._steps_done:
                    path = shown(self.config["fit"]["ckpt_path"])
                    rank_zero_info(f"Resuming from {path} after {self._steps_done} outer steps")
            super()._run_subcommand(subcommand)


def _as_configured(described: Any) -> Any:
    """A description as the parser holds it: objects, also those in a dictionary, as namespaces."""
    make: Any = Namespace  # which has no type hints
    if not isinstance(described, dict):
        return described
    content = {name: _as_configured(value) for name, value in described.items()}
    if content.keys() == {"class_path", "init_args"}:
        return make(class_path=content["class_path"], init_args=make(**content["init_args"]))
    return content


def _make_absolute(given: Any, field: str) -> None:
    """Let folders in a part of the configuration be found from other folders, for it is kept beside a run.

    Args:
        given: The part; changed in place.
        field: What a folder is called, at whatever depth.
    """
    if isinstance(given, list):
        for one in given:
            _make_absolute(one, field)
    content = vars(given) if isinstance(given, Namespace) else given if isinstance(given, dict) else {}
    for name, value in content.items():
        if name == field and isinstance(value, str | Path) and "://" not in str(value):
            content[name] = type(value)(Path(value).expanduser().resolve())
        _make_absolute(value, field)


class _SaveConfig(SaveConfigCallback):
    """Puts config.yaml into the folder of the run, as other files, and in the place of none that is not its own."""

    def __init__(self, *args: Any, own_checkpoints: Sequence[Path] = (), **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.own_checkpoints = own_checkpoints

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write it."""
        folder = log_folder(trainer)
        if self.already_saved or not writes(trainer):
            return
        path = folder / self.config_filename
        own = has_folder(trainer) or (folder / "checkpoints").resolve() in self.own_checkpoints
        if path.exists() and not own:  # where the folder is known, that was looked at before
            raise would_overwrite([path])
        config = self.config.clone()
        if trainer.state.fn == TrainerFn.FITTING:
            config["ckpt_path"] = None  # a run that starts from this configuration is a new one
        self.parser.save(config, path, skip_none=False, overwrite=True)
        self.already_saved = True


def run(args: ArgsType) -> CLI:
    """Run one of Lightning's commands, and give what it was run with."""
    for name in lightning_l2l.__all__:  # so that YAML can name classes without a path
        getattr(lightning_l2l, name)
    # That the command line is there as well is no mistake: other commands of ours call this one.
    warnings.filterwarnings("ignore", "LightningCLI's args parameter")
    return CLI(
        MetaOptimizer,
        LightningDataModule,
        subclass_mode_data=True,
        auto_configure_optimizers=False,  # a meta-optimizer is an argument of MetaOptimizer
        seed_everything_default=0,
        trainer_defaults={**TRAINER_DEFAULTS, "callbacks": [ResumeCheckpoint()]},
        save_config_callback=_SaveConfig,
        parser_class=OneLineParser,
        parser_kwargs={"default_env": False, "description": DESCRIPTION, "prog": PROG},
        args=args,
    )
