"""Meta-training as a LightningModule."""

from __future__ import annotations

import math
from pathlib import Path
from types import NoneType
from typing import Any, cast

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau
from torchmetrics import MeanMetric

from lightning_l2l.arguments import (
    MOST,
    brief,
    check_at_least,
    check_callable,
    check_choice,
    check_flag,
    check_positive,
    check_type,
)
from lightning_l2l.evaluation.results import final_losses
from lightning_l2l.evaluation.rollout import Rollout, SideBySide, rollout
from lightning_l2l.meta.first_order import FirstOrder
from lightning_l2l.meta.hyperparameters import as_of_now, hyperparameters_of
from lightning_l2l.meta.imitation import Imitation
from lightning_l2l.meta.meta_gradient import MetaGradient
from lightning_l2l.meta.underway import (
    LOSS_WEIGHTS,
    LossWeights,
    Underway,
    check_episodes,
    drawn_length,
    kept_of_all,
    taken_up,
)
from lightning_l2l.meta.unroll import Unroll
from lightning_l2l.rules import UpdateRule
from lightning_l2l.rules.describe import describe
from lightning_l2l.rules.files import read_checkpoint, start_from
from lightning_l2l.tasks import Task
from lightning_l2l.tasks.base import Batch


class MetaOptimizer(LightningModule):
    """Trains an update rule on how well it trains.

    A training step is one episode: `num_steps` inner steps of the batch's tasks, truncated every `unroll_length`
    of them, and an outer step of the meta-optimizer after each truncation. Validation, test and prediction hand
    the rule to the same function that runs any `torch.optim.Optimizer`.

    Logged, against the number of outer steps:

    * `train/meta_loss`: sum over the episode's `num_steps` terms w_t f_t(theta_t), t = 1 .. num_steps, mean over
      the tasks of all ranks; `train/meta_gradient_norm`: the largest of the episode, before clipping;
      `train/skipped`: outer steps skipped so far because the meta-gradient was not finite; `train/num_steps`: inner
      steps of the episode.
    * `val/final_loss`: f_t(theta_t), mean over the last `final_steps` inner steps and the validation tasks;
      `val/trajectory_loss`: mean over all inner steps t = 1 .. num_steps; `val/meta_loss`: as in training. A
      diverged task makes them infinite. `val/unseen_loss`, `val/unseen_accuracy`: of the final optimizees on
      data that they were not trained on, where the task has any.

    Args:
        task: What is optimised.
        rule: By what; its parameters are the meta-parameters.
        num_steps: *Inner steps* of an episode.
        unroll_length: *Inner steps* between truncations; divides `num_steps`.
        loss_weights: The w_t of the meta-loss, mean 1: "all" weighs every step alike (the paper), "linear" in
            proportion to t, "tail" the last tenth alone, "last" the last step.
        final_steps: Number of last *inner steps* whose mean loss is the final loss; 1 where a loss has no noise.
        lr: Meta-learning rate, above 0.
        optimizer: The meta-optimizer; `lr` is set on it.
        lr_scheduler: Learning-rate schedule of the meta-optimizer, in *epochs*; one that waits for a plateau
            watches `val/final_loss`.
        anneal: Let the meta-learning rate fall along a cosine, *epoch* by epoch, to 0 at the Trainer's `max_epochs`;
            in place of `lr_scheduler`.
        gradient_clip: Largest norm of a meta-gradient; None leaves it as it is.
        max_skipped: *Outer steps* in a row with a meta-gradient that is not finite before the run is stopped.
        meta_gradient: How the meta-gradient is had: `FirstOrder` (the paper, and the default), `SecondOrder` or
            `EvolutionStrategies`.
        train_task: What is optimised in meta-training, where that differs from what the rule is evaluated on, such as
            `RandomScaling(task)`; it takes the same data.
        imitation: Of another optimizer, in meta-training: an `Imitation`, whose loss is logged as
            `train/imitation_loss`. None: of none.
        start: From whose weights meta-training starts: name of a shipped rule, or path of a rule file or checkpoint;
            a rule of groups takes them in each group. The rule's other arguments may differ from those of that rule.
            None: from those that the rule has.
        log_loss: Meta-train on logarithms: `train/meta_loss` sums w_t log(mean over a process' tasks of f_t), so that
            episodes of a `Mixture`, and early and late steps, count alike, whatever the scale of their losses. For
            tasks whose loss is not negative. Validation figures stay as they are.
        min_steps: *Inner steps* of the shortest episodes of meta-training, a multiple of `unroll_length`: lengths are
            drawn, log-uniformly, between it and `num_steps`, and the w_t are such that all count alike. None: all have
            `num_steps`.
        num_episodes: Episodes of meta-training under way at once, each of another batch: an outer step is that of the
            mean of their meta-gradients, over a truncation of each. With `min_steps` they are at different steps.

    Raises:
        FileNotFoundError: There is no rule at `start`.
        ValueError: That rule's weights do not fit, a size is below 1, `unroll_length` does not divide `num_steps`,
            `final_steps` exceeds it, or another argument is out of range.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning_l2l import CoordinatewiseLSTM, LearnedOptimizer, Quadratic, QuadraticDataModule
        >>> model = MetaOptimizer(Quadratic(dim=2), CoordinatewiseLSTM(hidden_size=4), num_steps=20, unroll_length=5)
        >>> quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
        >>> trainer = Trainer(max_epochs=1, inference_mode=False, enable_model_summary=False, **quiet)
        >>> trainer.fit(model, QuadraticDataModule(num_tasks=8, dim=2, episodes_per_epoch=2, num_val_tasks=8))
        >>> trainer.global_step  # outer steps: one a truncation
        8
        >>> optimizer = LearnedOptimizer(torch.nn.Linear(3, 2).parameters(), model.rule)
    """

    def __init__(
        self,
        task: Task,
        rule: UpdateRule,
        num_steps: int = 100,
        unroll_length: int = 20,
        loss_weights: LossWeights = "all",
        final_steps: int = 1,
        lr: float = 0.003,
        optimizer: OptimizerCallable = torch.optim.Adam,
        lr_scheduler: LRSchedulerCallable | None = None,
        anneal: bool = False,
        gradient_clip: float | None = None,
        max_skipped: int = 20,
        meta_gradient: MetaGradient | None = None,
        train_task: Task | None = None,
        imitation: Imitation | None = None,
        start: str | None = None,
        log_loss: bool = False,
        min_steps: int | None = None,
        num_episodes: int = 1,
    ) -> None:
        super().__init__()
        check_type(Task, "a Task, such as Quadratic()", task=task)
        check_type((Task, NoneType), "a Task, such as RandomScaling(task), or None", train_task=train_task)
        check_type(UpdateRule, "an UpdateRule, such as CoordinatewiseLSTM()", rule=rule)
        check_at_least(1, MOST, num_steps=num_steps, unroll_length=unroll_length, final_steps=final_steps)
        check_at_least(1, max_skipped=max_skipped)
        check_flag(anneal=anneal, log_loss=log_loss)
        check_type((MetaGradient, NoneType), "one, such as FirstOrder(), or None", meta_gradient=meta_gradient)
        check_type((Imitation, NoneType), "Imitation(weight=100.0), or None", imitation=imitation)
        if final_steps > num_steps:
            raise ValueError(f"final_steps={final_steps} exceeds num_steps={num_steps}; use 1 to {num_steps}")
        if anneal and lr_scheduler is not None:
            raise ValueError("anneal=True and an lr_scheduler are two schedules for one learning rate; leave one out")
        check_choice(LOSS_WEIGHTS, loss_weights=loss_weights)
        check_positive(lr=lr)
        check_positive(optional=True, gradient_clip=gradient_clip)
        check_callable("a class, such as torch.optim.Adam", optimizer=optimizer)
        if lr_scheduler is not None:
            check_callable("a function of the optimizer that makes a schedule", lr_scheduler=lr_scheduler)
        if start is not None:
            start_from(start, rule)
        check_episodes(num_steps, unroll_length, min_steps, num_episodes)
        self.automatic_optimization = False
        self.task, self.rule = task, rule
        self.num_steps, self.unroll_length, self.lr = num_steps, unroll_length, lr
        self.loss_weights, self.final_steps = loss_weights, final_steps
        self.train_steps = num_steps  # of episodes in meta-training; a Curriculum may set it lower
        self.min_steps, self.num_episodes = min_steps, num_episodes
        self.weights = self.weights_of(num_steps)
        self.underway: list[Underway] = []
        self._kept: list[Any] = []  # of a checkpoint's, until training starts
        self.optimizer, self.lr_scheduler, self.anneal = optimizer, lr_scheduler, anneal
        self.gradient_clip, self.max_skipped, self.log_loss = gradient_clip, max_skipped, log_loss
        self.train_task = train_task
        self.meta_gradient, self.imitation = meta_gradient or FirstOrder(), imitation
        self.unroll = Unroll(train_task or task, rule, self.meta_gradient, imitation, log_loss)
        self.skipped = self.skipped_in_a_row = 0
        # "disable": a loss that is no number must show, not drop out of the mean.
        names = ("final_loss", "trajectory_loss", "meta_loss", "unseen_loss", "unseen_accuracy")
        self.val_metrics = nn.ModuleDict({name: MeanMetric(nan_strategy="disable") for name in names})
        self.save_hyperparameters(hyperparameters_of(self))

    def configure_optimizers(self) -> Any:
        """The meta-optimizer at the meta-learning rate, with its schedule.

        Raises:
            ValueError: The rule has nothing to learn, `anneal` is on and the Trainer has no `max_epochs`, or the
                meta-optimizer is LBFGS.
        """
        if not any(True for _ in self.rule.parameters()):
            raise ValueError(f"rule={brief(self.rule)} has no parameters to meta-train; give one that has some")
        optimizer = self.optimizer(self.rule.parameters())
        if isinstance(optimizer, LBFGS):
            raise ValueError("optimizer=LBFGS evaluates an episode several times a step; use torch.optim.Adam")
        for group in optimizer.param_groups:
            group["lr"] = self.lr
        if self.anneal:
            epochs = self.trainer.max_epochs
            if epochs is None or epochs < 1:
                raise ValueError(f"anneal=True needs to know the end of the run; set max_epochs (now {epochs})")
            # Not CosineAnnealingLR: resumed with another max_epochs, it would keep to the old one and rise again.
            cosine = LambdaLR(optimizer, lambda epoch: (1 + math.cos(math.pi * min(epoch / epochs, 1))) / 2)
            return {"optimizer": optimizer, "lr_scheduler": cosine}
        if self.lr_scheduler is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": self.lr_scheduler(optimizer)}

    def weights_of(self, num_steps: int) -> list[float]:
        """w_1 .. w_T of an episode of T = `num_steps` inner steps."""
        scale = 1.0 if self.min_steps is None else self.num_steps / num_steps
        return [scale * weight for weight in LOSS_WEIGHTS[self.loss_weights](num_steps)]

    def on_train_start(self) -> None:
        """Take up the episodes that were under way in the checkpoint, if there was one."""
        self.underway = taken_up(self._kept, self) if self._kept else []
        self._kept = []

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        """Begin an episode, and make outer steps, one a truncation of all under way, until one of them ends."""
        optimizer, origin = self.optimizers(), (self.current_epoch, batch_idx)
        steps = self.train_steps
        if self.min_steps is not None:
            seed = getattr(getattr(self.trainer, "datamodule", None), "seed", 0)
            steps = drawn_length(min(self.min_steps, steps), steps, self.unroll_length, seed, origin)
        self.underway.append(Underway.start(self.unroll, batch, origin, self.weights_of(steps)))
        while len(self.underway) == self.num_episodes:
            optimizer.zero_grad()  # type: ignore[union-attr]
            found = [one.run(self.unroll, self.unroll_length) for one in self.underway]
            losses = [meta_loss for meta_loss in found if meta_loss is not None]
            if losses:
                self.manual_backward(torch.stack(losses).sum() / self.num_episodes)
                norm = torch.nn.utils.get_total_norm([p.grad for p in self.rule.parameters() if p.grad is not None])
                for one in self.underway:
                    one.largest = torch.maximum(one.largest, norm)
                self._outer_step(optimizer, float(norm))
            if ended := [one for one in self.underway if one.ended]:
                self.underway = [one for one in self.underway if not one.ended]
                self._log_episodes(ended)

    def _log_episodes(self, ended: list[Underway]) -> None:
        mean = self.trainer.strategy.reduce  # over ranks
        total = cast(Tensor, mean(torch.stack([one.meta_loss for one in ended]).mean(), reduce_op="mean"))
        values: dict[str, Any] = {
            "train/meta_loss": total,
            "train/meta_gradient_norm": max(float(one.largest) for one in ended),
            "train/skipped": self.skipped,
            "train/num_steps": sum(float(len(one.weights)) for one in ended) / len(ended),
        }
        if self.imitation is not None and self.imitation.weight:
            imitated = torch.stack([one.imitation_loss for one in ended]).mean()
            values["train/imitation_loss"] = cast(Tensor, mean(imitated, reduce_op="mean"))
        self.log_dict({**values, "step": float(self.global_step)}, batch_size=1)
        self.log("meta_loss", total, prog_bar=True, logger=False, batch_size=1)

    def _outer_step(self, optimizer: Any, norm: float) -> None:
        # The gradient has been averaged over ranks by now: one rank's bad number makes all of them skip together.
        if math.isfinite(norm):
            self.skipped_in_a_row = 0
            if self.gradient_clip is not None and norm > self.gradient_clip:
                self.clip_gradients(optimizer, self.gradient_clip, "norm")
            optimizer.step()
            return
        self.skipped += 1
        self.skipped_in_a_row += 1
        if self.skipped_in_a_row >= self.max_skipped:
            raise RuntimeError(
                f"the meta-gradient was not finite {self.skipped_in_a_row} outer steps in a row: the optimizees "
                f"diverge under this rule; resume from an earlier checkpoint with a smaller --model.lr (now {self.lr}) "
                "or with --model.gradient_clip 1.0, or start anew with a smaller output_scale of the rule"
            )

    def on_train_epoch_end(self) -> None:
        """Step the learning-rate schedule: manual optimization leaves that to the module."""
        scheduler = self.lr_schedulers()
        if isinstance(scheduler, ReduceLROnPlateau):
            if "val/final_loss" in self.trainer.callback_metrics:
                scheduler.step(self.trainer.callback_metrics["val/final_loss"])
        elif scheduler is not None and self.global_step:  # torch wants a schedule to follow the first outer step
            scheduler.step()  # type: ignore[union-attr]

    def evaluate(self, batch: Batch) -> Rollout:
        """An episode of the batch's tasks under the rule."""

        def learned(params: list[tuple[str, Tensor]]) -> Optimizer:
            # Tasks lie side by side in one tensor: one that fails must not hold up the others.
            return SideBySide(params, self.rule, num_steps=self.num_steps, skip_nonfinite=False)

        return rollout(learned, self.task, batch, self.num_steps, self.device)

    def validation_step(self, batch: Batch, batch_idx: int) -> dict[str, Any]:
        """An episode of the validation tasks, and the metrics of it."""
        run = self.evaluate(batch)
        figures = {
            "final_loss": final_losses(run.losses, self.final_steps),
            "trajectory_loss": run.losses[1:].mean(0),
            "meta_loss": (run.losses[1:] * run.losses.new_tensor(self.weights)[:, None]).nan_to_num(math.inf).sum(0),
            **{f"unseen_{name}": values for name, values in run.unseen.items()},
        }
        options: dict[str, Any] = {"on_step": False, "on_epoch": True, "batch_size": run.losses.shape[1]}
        for name, values in figures.items():
            self.val_metrics[name](values)
            self.log(f"val/{name}", cast(MeanMetric, self.val_metrics[name]), prog_bar=name == "final_loss", **options)
        self.log("step", float(self.global_step), sync_dist=True, **options)
        return vars(run)

    def test_step(self, batch: Batch, batch_idx: int) -> dict[str, Any]:
        """An episode of the test tasks; what is made of it is the callbacks' affair."""
        return vars(self.evaluate(batch))

    def predict_step(self, batch: Batch, batch_idx: int) -> dict[str, Any]:
        """An episode of the test tasks."""
        return self.test_step(batch, batch_idx)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the count of skipped outer steps, and the episodes that are under way."""
        checkpoint["skipped"] = [self.skipped, self.skipped_in_a_row]
        checkpoint["underway"] = kept_of_all(self.underway)

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, *args: Any, **kwargs: Any) -> MetaOptimizer:
        """As that of LightningModule, also for the checkpoints of earlier versions."""
        if isinstance(checkpoint_path, str | Path) and Path(checkpoint_path).is_file():
            given = read_checkpoint(Path(checkpoint_path))["hyper_parameters"]
            changed = {name: value for name, value in as_of_now(given).items() if given.get(name) != value}
            kwargs = {**changed, **kwargs}
        return super().load_from_checkpoint(checkpoint_path, *args, **kwargs)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse the checkpoint of another rule.

        Raises:
            ValueError: The rule in the checkpoint is not the one that this run asks for.
        """
        saved, own = checkpoint.get("hyper_parameters", {}).get("rule"), describe(self.rule)
        if saved is None:
            raise ValueError("the checkpoint is not one of a MetaOptimizer: it describes no rule")
        if saved["class_path"] != own["class_path"]:
            raise ValueError(
                f"the checkpoint holds a {saved['class_path']}, this run asks for {own['class_path']}; "
                f"use --model.rule {saved['class_path']}"
            )
        changed = {k: v for k, v in saved["init_args"].items() if own["init_args"].get(k) != v and k != "forget_bias"}
        if changed:
            here = ", ".join(f"{k}={own['init_args'].get(k)}" for k in changed)
            flags = " ".join(f"--model.rule.{k} {v}" for k, v in changed.items())
            raise ValueError(f"the checkpoint's rule is not the one asked for ({here}); use {flags}")
        self.skipped, self.skipped_in_a_row = checkpoint.get("skipped", (0, 0))
        self._kept = checkpoint.get("underway", [])
