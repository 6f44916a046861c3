"""What update an optimizer would propose for a coordinate, if its next gradient were x: the paper's figure 10.

Reference: Andrychowicz et al., Learning to learn by gradient descent by gradient descent, appendix,
https://arxiv.org/abs/1606.04474, 2016.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.seed import isolate_rng
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from torch import Tensor
from torch.optim import Optimizer

from lightning_l2l.evaluation.baselines import BASELINES, Baseline
from lightning_l2l.evaluation.figures import look
from lightning_l2l.evaluation.learning_curves import LEARNED, LearningCurves
from lightning_l2l.evaluation.rollout import MakeOptimizer, SideBySide, rollout
from lightning_l2l.optim import LearnedOptimizer
from lightning_l2l.rules import TensorRule, UpdateRule
from lightning_l2l.runs.trainer import figure_due, log_folder, shown, tensorboards, writes
from lightning_l2l.tasks import Task
from lightning_l2l.tasks.base import Batch

STEPS = (2, 5, 10, 20, 50, 100)
#: Gradients before the current one that a panel marks, and that its range covers.
NUM_RECENT = 10
#: Points of a line on either side of the gradient 0, which is one too.
HALF = 200
#: The largest proposal that a panel has room for, in multiples of the rule's own largest.
HEADROOM = 3.0
#: Where `LearningCurves` has them by default, so that an optimizer looks the same in both figures.
_ORDER = (LEARNED, *(baseline.name for baseline in BASELINES))


@torch.no_grad()
def propose(make_optimizer: MakeOptimizer, history: Tensor, candidates: Tensor) -> Tensor:
    r"""The update of a coordinate as a function of its next gradient, what came before being held.

    .. math:: x \mapsto \theta_{T+1} - \theta_T \quad \text{where} \quad \nabla_1, \dots, \nabla_T, x

    are the gradients that the optimizer sees. All candidates go through it side by side. The coordinate is put
    back to 0 before each step, so that the update is free of rounding, and weight decay has nothing to decay.

    Args:
        make_optimizer: From a list of parameters with their names to a coordinatewise optimizer for them.
        history: `[T]`, T >= 0: the gradients so far. The optimizer runs on its device.
        candidates: `[n]`: values of x.

    Returns:
        Updates `[n]`, float32.

    Example:
        >>> sgd = lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.5)
        >>> propose(sgd, torch.tensor([1.0]), torch.tensor([-1.0, 0.0, 1.0]))
        tensor([ 0.0500, -0.0500, -0.1500])
    """
    coordinate = torch.zeros(len(candidates), device=history.device, requires_grad=True)
    optimizer = make_optimizer([("coordinate", coordinate)])
    for gradient in (*history, candidates):
        coordinate.zero_()
        coordinate.grad = gradient.to(coordinate).expand_as(coordinate).clone()
        optimizer.step()
    return coordinate.detach()


def record_gradients(rule: UpdateRule, task: Task, batch: Batch, num_steps: int, device: torch.device) -> Tensor:
    """The gradients that a rule meets while it optimises the first task of a batch.

    Args:
        rule: The rule.
        task: What is optimised.
        batch: Data of one episode, `[num_tasks, ...]` each.
        num_steps: Inner steps.
        device: Where the optimizee lives.

    Returns:
        `[num_steps, num_coordinates]`; row t - 1 is the gradient that inner step t starts from.
    """
    gradients: list[Tensor] = []

    def learned(params: list[tuple[str, Tensor]]) -> Optimizer:
        def record(*_: Any) -> None:
            found = [torch.zeros_like(p) if p.grad is None else p.grad for _, p in params]
            gradients.append(torch.cat([gradient.flatten() for gradient in found]).float())

        optimizer = SideBySide(params, rule)
        optimizer.register_step_pre_hook(record)
        return optimizer

    rollout(learned, task, _first_task(batch), num_steps, device)
    return torch.stack(gradients)


def _parameter_of(task: Task, coordinate: int) -> str | None:
    """Name of the parameter that a coordinate belongs to, counted over all parameters."""
    for name, values in task.init_params(1, torch.Generator()).items():
        if coordinate < values.numel():
            return name
        coordinate -= values.numel()
    return None


def typical_coordinate(gradients: Tensor) -> int:
    """The coordinate with the median mean magnitude, among those whose gradient is not always zero.

    Args:
        gradients: `[num_steps, num_coordinates]`.

    Returns:
        Its number, from 0; the lower median of an even number, the first of equals, 0 where all are zero.
    """
    size = gradients.abs().mean(0)
    alive = ((size > 0) & size.isfinite()).nonzero().flatten()
    order = size[alive].argsort(stable=True)
    return int(alive[order[(len(order) - 1) // 2]]) if len(order) else 0


def proposals_figure(
    rule: UpdateRule,
    baselines: Sequence[tuple[Baseline, float]],
    gradients: Tensor,
    steps: Sequence[int],
    title: str,
) -> Figure:
    """Draw, a panel an inner step, the updates that optimizers propose for one coordinate by its gradient.

    All are given the same history, that of the rule. A panel's gradients reach to twice the largest of the last
    ones, marked by ticks that fade with age. Both axes are linear: shapes are what they are. The vertical one
    has room for all proposals, or for `HEADROOM` times the rule's largest: a line that leaves it goes on outside.

    Args:
        rule: The rule.
        baselines: Other coordinatewise optimizers, with their learning rates.
        gradients: `[num_steps]`: of the coordinate, along the rule's trajectory. Rule and optimizers run on its device.
        steps: Inner steps from 1 to `num_steps`; step t is the one from theta_{t-1} to theta_t.
        title: Title.

    Returns:
        A figure that no window system knows of.
    """
    makers: dict[str, MakeOptimizer] = {LEARNED: lambda params: LearnedOptimizer(params, rule, skip_nonfinite=False)}
    makers |= {baseline.name: baseline.at(lr) for baseline, lr in baselines}
    looks = {name: _look((*_ORDER, *makers).index(name)) for name in makers}
    columns = min(3, len(steps))
    rows = math.ceil(len(steps) / columns)
    width, height = max(3.2 * columns, 6.4), 2.5 * rows + 0.8  # inches
    figure = Figure(figsize=(width, height), dpi=150)
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    figure.subplots_adjust(0.78 / width, 0.52 / height, 1 - 0.15 / width, 1 - 0.95 / height, 0.27, 0.4)
    for axes, step in zip(panels, steps, strict=False):
        _draw_panel(axes, makers, looks, gradients[:step])
        axes.set_title(f"inner step {step}", fontsize="small")
    for axes in panels[len(steps) :]:
        axes.remove()
    for k in range(len(steps)):
        if k + columns >= len(steps):
            panels[k].set_xlabel("gradient")
        if k % columns == 0:
            panels[k].set_ylabel("proposed update")
    figure.align_ylabels()
    labels = [LEARNED, *(f"{baseline.name}, lr {lr:g}" for baseline, lr in baselines)]
    handles = [Line2D([], [], **looks[name], label=label) for name, label in zip(makers, labels, strict=True)]
    handles.append(Line2D([], [], color="0.3", linestyle="--", linewidth=0.9, label="gradient at this step"))
    tick = {"marker": "|", "markersize": 7, "markeredgewidth": 1.2, "linestyle": ""}
    handles.append(Line2D([], [], color="0.3", **tick, label=f"the {NUM_RECENT} before it"))  # type: ignore[arg-type]
    top = 1 - 0.3 / height
    figure.text(0.12 / width, 1 - 0.22 / height, title, fontsize="medium")
    figure.legend(
        handles=handles, loc="upper left", bbox_to_anchor=(0, top), ncols=len(handles), frameon=False, fontsize="small"
    )
    return figure


def _look(k: int) -> dict[str, Any]:
    return {**look(k), "zorder": 3 - k / 100}


def _draw_panel(
    axes: Axes, makers: Mapping[str, MakeOptimizer], looks: Mapping[str, dict[str, Any]], gradients: Tensor
) -> None:
    """Draw proposals for the last of the gradients `[step]`."""
    history, shown = gradients[:-1], gradients[-1 - NUM_RECENT :].cpu()
    span = min(2 * _largest(shown), 1e38) or 1.0  # the next float32 numbers are no numbers
    x = torch.arange(-HALF, HALF + 1) / HALF * span
    proposals = {name: propose(make, history, x.to(history.device)).cpu() for name, make in makers.items()}
    largest = [_largest(proposal) for proposal in proposals.values()]  # the rule's first
    room = min(max(largest), HEADROOM * largest[0] or math.inf) or 1.0
    for name, proposal in proposals.items():
        axes.plot(x.numpy(), proposal.masked_fill(~proposal.isfinite(), math.nan).numpy(), **looks[name])
    for line in (axes.axhline, axes.axvline):
        line(0, color="0.85", linewidth=0.8, zorder=1)
    if shown[-1].isfinite():
        axes.axvline(float(shown[-1]), color="0.3", linestyle="--", linewidth=0.9, zorder=2)
    for age, gradient in enumerate(shown[:-1].flip(0).tolist()):
        if math.isfinite(gradient):
            fading = 1 - 0.9 * age / NUM_RECENT
            axes.axvline(gradient, 0, 0.08, color="black", alpha=fading, linewidth=1.2, zorder=4)
    axes.set_xlim(-span, span)
    axes.set_ylim(-1.08 * room, 1.08 * room)
    axes.ticklabel_format(scilimits=(-2, 3))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(5, symmetric=True))
        axis.get_offset_text().set_fontsize("small")
    axes.tick_params(labelsize="small")
    axes.spines[["top", "right"]].set_visible(False)


def _largest(values: Tensor) -> float:
    """The largest finite magnitude; 0 if there is none."""
    found = values[values.isfinite()].abs()
    return float(found.max()) if len(found) else 0.0


def _first_task(batch: Batch) -> dict[str, Tensor]:
    return {name: values[:1] for name, values in batch.items()}


class UpdateProposals(Callback):
    """Shows what updates the rule proposes, beside Adam and SGD, along its way through one task.

    See `proposals_figure`. The task is the first of the validation or test tasks; figures go to TensorBoard, as
    `val/update_proposals` and `test/update_proposals` against the number of *outer steps*, and `test` also writes
    `proposals.png` in the log folder. Learning rates are those that a `LearningCurves` of the same trainer has
    tuned, or else arguments.

    It works with modules that have `task`, `num_steps` and `rule`. Training is not affected. Under
    `fast_dev_run` no file is written.

    Args:
        steps: *Inner steps* that have a panel, from 1; those beyond `num_steps` fall on the last.
        coordinate: Which of the optimizee's coordinates, from 0 in the order of its parameters; None: that of
            `typical_coordinate`.
        every_n_epochs: Number of *epochs* between figures; the last epoch always has one.
        adam_lr: Adam's learning rate, if it is not tuned.
        sgd_lr: SGD's learning rate, if it is not tuned.

    Raises:
        ValueError: An argument is out of range; in a run, `coordinate` is none of the task's.
    """

    def __init__(
        self,
        steps: Sequence[int] = STEPS,
        coordinate: int | None = None,
        every_n_epochs: int = 1,
        adam_lr: float = 0.03,
        sgd_lr: float = 0.03,
    ) -> None:
        if not steps or min(steps) < 1:
            raise ValueError(f"steps={list(steps)} are no inner steps, which count from 1; use {list(STEPS)}")
        if coordinate is not None and coordinate < 0:
            raise ValueError(f"coordinate={coordinate} is negative; use 0 or more, or None for a typical one")
        if every_n_epochs < 1:
            raise ValueError(f"every_n_epochs={every_n_epochs} is no number of epochs; use 1 or more")
        for name, lr in (("adam_lr", adam_lr), ("sgd_lr", sgd_lr)):
            if not 0 < lr < math.inf:
                raise ValueError(f"{name}={lr} is out of range; use a finite number above 0")
        self.steps, self.coordinate, self.every_n_epochs = tuple(steps), coordinate, every_n_epochs
        self.rates = {"adam": adam_lr, "sgd": sgd_lr}
        self._batch: dict[str, Tensor] | None = None  # of one task

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Remember the first task."""
        if batch_idx == dataloader_idx == 0 and trainer.is_global_zero:
            # A copy: a slice would keep the whole batch.
            self._batch = {name: values.clone() for name, values in _first_task(batch).items()}

    on_test_batch_end = on_validation_batch_end

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show the figure."""
        loggers = tensorboards(trainer)
        due = figure_due(trainer, self.every_n_epochs) and not trainer.sanity_checking
        if due and loggers and self._batch is not None:
            figure = self._draw(trainer, pl_module, self._batch, "validation")
            for logger in loggers:
                logger.experiment.add_figure("val/update_proposals", figure, trainer.global_step)
        self._batch = None

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show the figure and write it."""
        path = log_folder(trainer) / "proposals.png"  # all processes must ask
        if self._batch is not None and writes(trainer):
            figure = self._draw(trainer, pl_module, self._batch, "test")
            figure.savefig(path)
            print(f"Written: {shown(path)}")
            for logger in tensorboards(trainer):
                logger.experiment.add_figure("test/update_proposals", figure, trainer.global_step)
        self._batch = None

    def _draw(self, trainer: Trainer, pl_module: LightningModule, batch: Batch, stage: str) -> Figure:
        task, rule = cast(Task, pl_module.task), cast(UpdateRule, pl_module.rule)
        num_steps = cast(int, pl_module.num_steps)
        with isolate_rng(), trainer.precision_plugin.forward_context():
            gradients = record_gradients(rule, task, batch, num_steps, pl_module.device)
            count = gradients.shape[1]
            coordinate = typical_coordinate(gradients) if self.coordinate is None else self.coordinate
            if coordinate >= count:
                raise ValueError(f"coordinate={coordinate} is none of the task's {count}; use 0 to {count - 1}")
            steps = sorted({min(step, num_steps) for step in self.steps})
            title = f"Updates proposed for {stage} task 0, coordinate {coordinate} of {count}, {num_steps} inner steps"
            ((rule, _),) = rule.by_name([_parameter_of(task, coordinate)])
            if isinstance(rule, TensorRule):
                told = f"{type(rule).__name__} sees whole tensors, and has no proposal for a coordinate"
                raise ValueError(f"{told}; leave UpdateProposals out")
            return proposals_figure(rule, self._baselines(trainer), gradients[:, coordinate], steps, title)

    def _baselines(self, trainer: Trainer) -> list[tuple[Baseline, float]]:
        found = {b.name: (b, self.rates[b.name]) for b in BASELINES if b.name in self.rates}
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, LearningCurves):
                found |= {t.baseline.name: (t.baseline, t.lr) for t in callback.tuned if t.baseline.name in found}
        return list(found.values())
