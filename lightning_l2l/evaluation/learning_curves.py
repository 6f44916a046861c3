"""What a run shows: learning curves in TensorBoard, tables on the console, CSV files and a plot."""

from __future__ import annotations

import shlex
import time
from collections.abc import Sequence
from types import NoneType
from typing import Any, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.seed import isolate_rng
from matplotlib.figure import Figure
from rich.table import Table
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from lightning_l2l.arguments import brief, check_at_least, check_type, is_number
from lightning_l2l.evaluation.baselines import Baseline, Tuned, find_baselines, tune
from lightning_l2l.evaluation.figures import learning_curves
from lightning_l2l.evaluation.results import Result, write_comparison, write_curves, write_predictions, write_tasks
from lightning_l2l.evaluation.rollout import Rollout, rollout
from lightning_l2l.evaluation.tables import Budget, comparison_tables, print_table, summary_table
from lightning_l2l.evaluation.tensorboard import (
    command_line,
    curve_folder,
    figure_tag,
    write_curve,
    write_table,
    write_test,
)
from lightning_l2l.runs.trainer import figure_due, gather, log_folder, shown, tensorboards, validation_batches, writes
from lightning_l2l.tasks import Task

#: Name of the rule in tables, log keys and files.
LEARNED = "learned"
MONITOR = "val/final_loss"
BEST = "val/best_final_loss"


class LearningCurves(Callback):
    """Compares the rule with hand-designed optimizers whose learning rates are tuned on the validation tasks.

    All run on the same tasks, starting points and minibatches, and by the same function. Learning rates are
    tuned once, at the first validation (as a rule the sanity check, before training), by the mean final loss
    over all validation tasks; a task's final loss is the mean over the module's last `final_steps` steps. Then:

    * validation, in TensorBoard, ahead of all else: a run per optimizer under `curves/`, whose scalar
      `curves/val_loss_by_inner_step` overlays in one chart, that of the rule from the newest validation; beside
      it the figure `curves/val_loss_with_quantiles` against the number of *outer steps*. In the tab TEXT the
      table of final losses, and the command that made the run if it was one of `lightning_l2l`. Logs
      `val/<name>/final_loss` of the baselines.
    * end of `fit`: a table with the best checkpoint's final loss, and the commands to type next, on the console
      and in the tab TEXT. The run's hyperparameters with that loss, `val/best_final_loss`, in HParams.
    * `test`: tables, `comparison.csv`, `tasks.csv`, `curves.csv` and `curves.png` in the log folder; logs
      `test/<name>/final_loss`. The same in TensorBoard: curves and figure as above, with `test` for `val`, the
      tables in the tab TEXT, and the figures of each optimizer as HParams.
    * `predict`: `predictions.csv` in the log folder.

    It works with modules that have `task` and `num_steps` (and `final_steps`, else 1) and whose validation, test
    and predict steps return the fields of a `Rollout` as a dictionary: at least `"losses"`. Under `fast_dev_run`
    no file is written.

    Args:
        baselines: Names of built-in ones, or `Baseline`s, in YAML
            `{name: adagrad, optimizer: torch.optim.Adagrad, options: {eps: 1.0e-8}}`.
        quantiles: Over the tasks, lower and upper end of the band around a curve.
        every_n_epochs: Number of *epochs* between figures; the last epoch always has one.
        test_command: Command to which the table at the end of `fit` appends the checkpoint.

    Raises:
        ValueError: An unknown or repeated baseline, or an argument out of range.
    """

    def __init__(
        self,
        baselines: Sequence[str | Baseline] = ("adam", "rmsprop", "sgd", "nag", "adamw"),
        quantiles: tuple[float, float] = (0.1, 0.9),
        every_n_epochs: int = 5,
        test_command: str | None = None,
    ) -> None:
        self.baselines = find_baselines(baselines, reserved=(LEARNED,))
        pair = isinstance(quantiles, tuple | list) and len(quantiles) == 2 and all(map(is_number, quantiles))
        if not pair or not 0 <= quantiles[0] < quantiles[1] <= 1:
            raise ValueError(f"quantiles={brief(quantiles)} are no lower and upper one in [0, 1]; use (0.1, 0.9)")
        check_at_least(1, every_n_epochs=every_n_epochs)
        check_type((str, NoneType), "a text, or None", test_command=test_command)
        self.quantiles = (quantiles[0], quantiles[1])
        self.every_n_epochs = every_n_epochs
        self.test_command_prefix = test_command or "python -m lightning_l2l test"
        self._loaders: Any = []  # of the last validation
        self._reset()

    def _reset(self) -> None:
        self.tuned: list[Tuned] = []
        self.results: list[Result] = []  # of the last validation or test, the rule's first
        self._num_tuning_tasks = 0
        self._runs: dict[str, list[Rollout]] = {}  # of the batches since the loop started
        self._baseline_results: list[Result] = []
        self._learned_writers: dict[str, SummaryWriter] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget an earlier run, whose tasks may have been others."""
        self._reset()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Close the event files."""
        for writer in self._learned_writers.values():
            writer.close()
        self._learned_writers = {}

    # Validation

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Tune the baselines, the first time."""
        self._runs = {LEARNED: []}
        self._loaders = trainer.val_dataloaders
        if self.baselines and not self.tuned:
            self._tune(trainer, pl_module, self._loaders)
            for tuned in self.tuned:
                result = self._result(trainer, pl_module, tuned.baseline.name, tuned.rollouts, tuned.lr)
                self._baseline_results.append(result)
                for logger in tensorboards(trainer):
                    with SummaryWriter(curve_folder(logger, result.name), purge_step=0) as writer:
                        write_curve(writer, result, "val")

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Collect the rule's losses."""
        if not trainer.sanity_checking:  # that one sees a few batches only
            self._runs[LEARNED].append(Rollout(**outputs))

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show the curves."""
        if not self._runs[LEARNED]:
            return
        learned = self._result(trainer, pl_module, LEARNED, self._runs[LEARNED])
        self.results = [learned, *self._baseline_results]
        for result in self._baseline_results:
            pl_module.log(f"val/{result.name}/final_loss", result.final_loss, sync_dist=True)
        loggers = tensorboards(trainer)
        figure = self._draw("validation") if loggers and figure_due(trainer, self.every_n_epochs) else None
        for logger in loggers:
            self._show(logger, summary_table(self.results, None))
            if figure is not None:
                logger.experiment.add_figure(figure_tag("val"), figure, trainer.global_step)

    def _show(self, logger: TensorBoardLogger, table: Table, test_command: str | None = None) -> None:
        """The rule's curve and the text card; both take the place of the last ones."""
        folder = curve_folder(logger, LEARNED)
        if folder not in self._learned_writers:
            self._learned_writers[folder] = SummaryWriter(folder, purge_step=0)
        write_curve(self._learned_writers[folder], self.results[0], "val")
        commands = {"Compare on test tasks:": test_command, "Made by:": command_line()}
        write_table(self._learned_writers[folder], "val_final_loss", table, commands)

    def _draw(self, stage: str) -> Figure:
        low, high = (f"{100 * q:g}" for q in self.quantiles)
        tasks = _count(self.results[0].losses.shape[1], f"{stage} task")
        title = f"{tasks}: mean, and band from the {low} % to the {high} % quantile"
        return learning_curves(self.results, title, self.quantiles)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print how the rule compares, and what to type next."""
        if not self.results or not trainer.is_global_zero:
            return
        if trainer.progress_bar_callback is not None:  # else rich's bar would stay below what follows
            trainer.progress_bar_callback.teardown(trainer, pl_module, "fit")
        checkpoint = _best_checkpoint(trainer)
        best = None if checkpoint is None else checkpoint.best_model_score
        table, test_command = summary_table(self.results, None if best is None else float(best)), None
        print_table(table)
        if checkpoint is not None:
            test_command = f"{self.test_command_prefix} --ckpt_path {shlex.quote(shown(checkpoint.best_model_path))}"
            print(f"Compare on test tasks:  {test_command}")
        for logger in tensorboards(trainer):
            self._show(logger, table, test_command)
            if best is not None:
                logger.log_hyperparams(pl_module.hparams_initial, {BEST: best}, trainer.global_step)
        for logger in tensorboards(trainer)[:1]:
            print(f"Look at the curves:     tensorboard --logdir {shlex.quote(shown(logger.log_dir))}")

    # Test

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Tune the baselines on the validation tasks."""
        if self.baselines and not self.tuned:
            # Without a datamodule Lightning knows of none here: then those of the last validation.
            given = trainer.datamodule, pl_module  # type: ignore[attr-defined]
            sources = [s for s in given if s and is_overridden("val_dataloader", s)]
            self._tune(trainer, pl_module, sources[0].val_dataloader() if sources else self._loaders)
        self._runs = {name: [] for name in (LEARNED, *(b.name for b in self.baselines))}

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Run the baselines on the batch that the rule has been run on."""
        self._runs[LEARNED].append(Rollout(**outputs))
        task, num_steps = _setting(pl_module)
        with trainer.precision_plugin.test_step_context():  # the rule's own run was in it
            for tuned in self.tuned:
                run = rollout(tuned.baseline.at(tuned.lr, num_steps), task, batch, num_steps, pl_module.device)
                self._runs[tuned.baseline.name].append(run)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the table and write the files."""
        if not self._runs[LEARNED]:
            return
        rates = {LEARNED: None, **{t.baseline.name: t.lr for t in self.tuned}}
        self.results = [self._result(trainer, pl_module, name, runs, rates[name]) for name, runs in self._runs.items()]
        for result in self.results:
            pl_module.log(f"test/{result.name}/final_loss", result.final_loss, sync_dist=True)
        folder = log_folder(trainer)
        if trainer.is_global_zero:
            tables = comparison_tables(self.results, self._budget())
            for table in tables:
                print_table(table)
            figure = self._draw("test")
            for logger in tensorboards(trainer):
                logger.experiment.add_figure(figure_tag("test"), figure, trainer.global_step)
                write_test(logger, self.results, tables)
            if writes(trainer):
                write_comparison(folder / "comparison.csv", self.results)
                write_tasks(folder / "tasks.csv", self.results)
                write_curves(folder / "curves.csv", self.results, self.quantiles)
                figure.savefig(folder / "curves.png")
                print(f"Written to {shown(folder)}: comparison.csv, tasks.csv, curves.csv, curves.png")

    # Predict

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start collecting."""
        self._runs = {LEARNED: []}

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Collect the rule's losses."""
        self._runs[LEARNED].append(Rollout(**outputs))

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write them."""
        if not self._runs[LEARNED]:
            return
        losses = self._result(trainer, pl_module, LEARNED, self._runs[LEARNED]).losses
        path = log_folder(trainer) / "predictions.csv"
        if writes(trainer):
            write_predictions(path, losses)
            print(f"Written: {shown(path)}, {_count(losses.shape[1], 'task')} x {len(losses)} losses")

    # Tuning

    def _tune(self, trainer: Trainer, pl_module: LightningModule, loaders: Any) -> None:
        task, num_steps = _setting(pl_module)
        with isolate_rng():  # training goes on as if nothing had been tuned
            batches = list(validation_batches(trainer, loaders))
            if not batches:
                raise ValueError(
                    "the hand-designed optimizers are tuned on validation tasks, and there are none; give "
                    "the Trainer a datamodule with val_dataloader and limit_val_batches above 0, or use "
                    "LearningCurves(baselines=[])"
                )
            counted = torch.tensor(sum(len(batch["seed"]) for batch in batches), device=pl_module.device)
            self._num_tuning_tasks = int(trainer.strategy.reduce(counted, reduce_op="sum"))
            tasks = _count(self._num_tuning_tasks, "validation task")
            names = ", ".join(b.name for b in self.baselines)
            pl_module.print(f"Tuning the learning rates of {names} on {tasks}, {num_steps} steps each ...")
            start = time.monotonic()
            with trainer.precision_plugin.val_step_context():  # as the rule's own run
                self.tuned = [
                    tune(
                        baseline,
                        task,
                        batches,
                        num_steps,
                        pl_module.device,
                        final_steps=_final_steps(pl_module),
                        mean_over_ranks=lambda x: cast(Tensor, trainer.strategy.reduce(x, reduce_op="mean")),
                    )
                    for baseline in self.baselines
                ]
        found = ", ".join(f"{t.baseline.name} {t.lr:g}" for t in self.tuned)
        pl_module.print(f"Tuned in {time.monotonic() - start:.1f} s: {found}")

    def _budget(self) -> Budget | None:
        if not self.tuned:
            return None
        return Budget({t.baseline.name: len(t.tried) for t in self.tuned}, self._num_tuning_tasks)

    def _result(
        self, trainer: Trainer, pl_module: LightningModule, name: str, runs: Sequence[Rollout], lr: float | None = None
    ) -> Result:
        """The runs of all processes together."""
        losses = gather(trainer, torch.cat([run.losses for run in runs], 1))
        losses = losses.masked_fill(~losses.isfinite(), torch.inf)
        known = [key for key in runs[0].unseen if all(key in run.unseen for run in runs)]  # not all tasks of a Mixture
        unseen = {key: gather(trainer, torch.cat([run.unseen[key] for run in runs])[None])[0] for key in known}
        seconds = sum(run.seconds for run in runs) / len(runs) / (len(losses) - 1)
        return Result(name, losses, lr, _final_steps(pl_module), unseen, seconds)


def _setting(pl_module: LightningModule) -> tuple[Task, int]:
    return cast(Task, pl_module.task), cast(int, pl_module.num_steps)


def _final_steps(pl_module: LightningModule) -> int:
    return cast(int, getattr(pl_module, "final_steps", 1))


def _best_checkpoint(trainer: Trainer) -> ModelCheckpoint | None:
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint) and callback.monitor == MONITOR and callback.best_model_path:
            return callback
    return None


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
