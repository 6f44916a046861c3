"""The command line: `python -m lightning_l2l fit | validate | test | predict | export`."""

from __future__ import annotations

import os
import shlex
import sys
import warnings
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from jsonargparse import Namespace, auto_cli
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.plugins import CheckpointIO
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch.nn import Module

from lightning_l2l import data, rules, tasks  # noqa: F401  # so that YAML can name their classes without a path
from lightning_l2l.commands.errors import PROG, OneLineParser, find_foreseen, in_one_line
from lightning_l2l.evaluation.learning_curves import LearningCurves
from lightning_l2l.meta.meta_optimizer import MetaOptimizer
from lightning_l2l.rules import UpdateRule
from lightning_l2l.rules.describe import check_names, describe, signature_of
from lightning_l2l.rules.files import SUFFIX, fill_rule, load_rule, save_rule, shipped_rules
from lightning_l2l.runs.checkpoints import LAST, PREVIOUS, AtomicCheckpointIO, read_to_resume
from lightning_l2l.runs.folder import RunLogger, folders_of, held, room_for
from lightning_l2l.runs.interrupt import ResumeCheckpoint, terminable
from lightning_l2l.runs.trainer import shown, writes
from lightning_l2l.tasks import Task

NEWEST = "last"

DESCRIPTION = """Learning to learn by gradient descent by gradient descent.

Beside the commands below there is `export --ckpt_path P --output F`, which writes a trained rule to a small file."""

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
    _steps_done = 0  # outer steps of that run

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """The callbacks that every run has, configurable as `--checkpoint.*` and `--curves.*`."""
        parser.add_lightning_class_args(ModelCheckpoint, "checkpoint")
        parser.add_lightning_class_args(LearningCurves, "curves")
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
        config = self.config[self.config["subcommand"]]
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
            config["ckpt_path"] = _requeued(Path(config["trainer"]["default_root_dir"] or "."))
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
            config["ckpt_path"] = str(_newest_last(Path(config["trainer"]["default_root_dir"] or ".")))
        path = Path(config["ckpt_path"])
        checkpoint = read_to_resume(path)  # refuses what it cannot read, in one line
        rule = load_rule(path)  # and rules that do not fit their description
        if command == "fit":
            _check_resumable(path, checkpoint)
            self._resume_into = _run_of(path, checkpoint)
            self._steps_done = checkpoint["global_step"]
        else:  # the rule is all there is to restore, so nothing else in the file is looked at
            self._rule, self._checkpoint = rule, checkpoint
        defaults = self._subcommand_parsers[command].get_defaults()
        if config["model"] == defaults["model"]:
            try:
                given = {k: v for k, v in dict(checkpoint["hyper_parameters"]).items() if k != "_instantiator"}
                check_names(given, (Task, Module))
            except (TypeError, ValueError, RecursionError) as error:
                raise ValueError(
                    f"{config['ckpt_path']!r} describes a model that cannot be made from it alone ({error}); give the "
                    "--config of its run beside it, lightning_logs/version_N/config.yaml"
                ) from error
            super()._parse_ckpt_path()

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
            if isinstance(callback, LearningCurves) and self.trainer.log_dir:
                config = Path(os.path.relpath(self.trainer.log_dir)) / "config.yaml"
                callback.test_command_prefix = f"python -m lightning_l2l test --config {shlex.quote(str(config))}"

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Log to TensorBoard where nothing else is asked for; a resumed run goes on in the folder of the first."""
        config = self.config_init[self.subcommand]["trainer"]
        plugins = config["plugins"] or []
        plugins = plugins if isinstance(plugins, list) else [plugins]
        if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
            kwargs["plugins"] = [*plugins, AtomicCheckpointIO()]
        if config["logger"] in (None, True):
            root, name, version = config["default_root_dir"], "lightning_logs", None
            folder = self._resume_into
            options: dict[str, Any] = {}
            if folder is not None and folder.name.startswith("version_"):
                warnings.filterwarnings("ignore", "Checkpoint directory .* exists and is not empty")  # as it should
                root, name, version = folder.parent.parent, folder.parent.name, int(folder.name[len("version_") :])
                options["purge_step"] = self._steps_done + 1  # curves of what is going to be done again
            kwargs["logger"] = RunLogger(root, name, version, default_hp_metric=False, **options)
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

    def _run_subcommand(self, subcommand: str) -> None:
        with ExitStack() as stack:
            stack.enter_context(terminable())
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


def _check_resumable(path: Path, checkpoint: dict[str, Any]) -> None:
    """Refuse a checkpoint that has a rule and lacks what Lightning goes on with."""
    kinds = {"epoch": int, "global_step": int, "loops": dict, "callbacks": dict, "optimizer_states": list}
    kinds |= {"lr_schedulers": list, "pytorch-lightning_version": str}
    wrong = [name for name, kind in kinds.items() if not isinstance(checkpoint.get(name), kind)]
    if wrong:
        raise ValueError(
            f"{str(path)!r} holds a rule, but nothing that `fit` could go on with ({', '.join(wrong)}); use `test`, "
            "or give a checkpoint that `fit` wrote"
        )


def _requeued(root: Path) -> str | None:
    """The checkpoint that Lightning wrote when Slurm announced the end of a job, which then starts anew."""
    found = {int(p.stem.split("_")[-1]): p for p in root.glob("hpc_ckpt_*.ckpt") if p.stem.split("_")[-1].isdecimal()}
    return str(found[max(found)]) if found and SLURMEnvironment.detect() else None


def _run_of(path: Path, checkpoint: dict[str, Any]) -> Path | None:
    """The folder of the run that a checkpoint is to be gone on with in; None: a new one."""
    if path.name in (LAST, PREVIOUS) and path.parent.name == "checkpoints":
        return path.resolve().parent.parent
    if path.name.startswith("hpc_ckpt_"):
        for key, state in checkpoint.get("callbacks", {}).items():
            if key.startswith(ResumeCheckpoint.__qualname__) and state.get("dirpath"):
                return Path(state["dirpath"]).parent
    return None


def _newest_last(root: Path) -> Path:
    """The last.ckpt written most recently under the folder that runs log to."""
    found = sorted(root.glob("*/version_*/checkpoints/last.ckpt"), key=lambda p: p.stat().st_mtime)
    if not found:
        raise FileNotFoundError(
            f"--ckpt_path last: no checkpoints/last.ckpt in any run under {str(root.resolve())!r}; give the path of "
            "the checkpoint, or the --trainer.default_root_dir of the run that wrote it"
        )
    return found[-1]


def export(ckpt_path: str, output: Path, init_args: dict[str, Any] | None = None) -> None:
    """Write the rule of a checkpoint to a file of some 20 kB that `load_rule` reads.

    Args:
        ckpt_path: A checkpoint, the name of a shipped rule, or "last" for the newest run under this folder.
        output: Where to, with the suffix .npz; an existing file is replaced.
        init_args: Arguments of the rule that are to be others, such as {decay: 1000}; its weights have to fit them.
    """
    rule = load_rule(_newest_last(Path()) if ckpt_path == NEWEST else ckpt_path)
    if init_args:
        described = describe(rule)
        described["init_args"] |= init_args
        rule = fill_rule(described, rule.state_dict(), f"{ckpt_path!r} with {init_args}")
    save_rule(rule, output)
    print(f"{output}: {signature_of(rule)}, {output.stat().st_size / 1000:.0f} kB")
    print(f'Use it: LearnedOptimizer(model.parameters(), "{output}")')


def main(args: ArgsType = None) -> None:
    """Run a command.

    Args:
        args: As on the command line, such as `["fit", "--model.num_steps", "50"]`; None takes them from there. From
            Python, mistakes raise; on the command line they are one line on stderr and exit status 1.
    """
    # Lightning 2.6 with a recent torch: https://github.com/Lightning-AI/pytorch-lightning/issues/21326
    warnings.filterwarnings("ignore", ".*LeafSpec.*is deprecated")
    given = sys.argv[1:] if args is None else args
    try:
        if isinstance(given, list) and given[:1] == ["export"]:
            parser: Any = OneLineParser
            auto_cli(export, args=given[1:], as_positional=False, prog=f"{PROG} export", parser_class=parser)
            return
        CLI(
            MetaOptimizer,
            LightningDataModule,
            subclass_mode_data=True,
            auto_configure_optimizers=False,  # a meta-optimizer is an argument of MetaOptimizer
            seed_everything_default=0,
            trainer_defaults={**TRAINER_DEFAULTS, "callbacks": [ResumeCheckpoint()]},
            save_config_kwargs={"overwrite": True},  # a resumed run writes into its own folder again
            parser_class=OneLineParser,
            parser_kwargs={"default_env": False, "description": DESCRIPTION, "prog": PROG},
            args=args,
        )
    except Exception as error:
        told = in_one_line(error)
        if args is not None or told is None:
            raise
        sys.exit(f"error: {told}")
