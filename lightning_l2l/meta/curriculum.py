"""A curriculum over the length of episodes."""

from __future__ import annotations

from collections.abc import Sequence

from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_l2l.arguments import MOST, check_at_least, check_type
from lightning_l2l.meta.meta_optimizer import MetaOptimizer


class Curriculum(Callback):
    """Lets meta-training begin with short episodes and go on to longer ones.

    A rule that has not learned to descend yet wastes long episodes, and its meta-gradients there are the noisiest. The
    length depends on the epoch alone, so a run that is resumed goes on as it would have. Validation and test have
    the module's `num_steps` all the time. The length is logged as `train/num_steps`.

    Args:
        num_steps: *Inner steps* of an episode, stage by stage; each a multiple of the module's `unroll_length` and at
            most its `num_steps`. The last stage lasts to the end.
        every_n_epochs: *Epochs* a stage.

    Raises:
        ValueError: A number is below 1 or there is none, or, when training starts, one that the module cannot have.

    References:
        Chen et al., Training stronger baselines for learning to optimize, https://arxiv.org/abs/2010.09089, 2020.
    """

    def __init__(self, num_steps: Sequence[int], every_n_epochs: int = 1) -> None:
        check_type((list, tuple), "a list, such as [100, 200, 500]", num_steps=num_steps)
        if not num_steps:
            raise ValueError("num_steps=[] has no stage; give the inner steps of each, such as [100, 200, 500]")
        for steps in num_steps:
            check_at_least(1, MOST, num_steps=steps)
        check_at_least(1, every_n_epochs=every_n_epochs)
        self.num_steps, self.every_n_epochs = list(num_steps), every_n_epochs

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse a stage that the module cannot have."""
        module = _checked(pl_module)
        for steps in self.num_steps:
            if steps % module.unroll_length or steps > module.num_steps:
                raise ValueError(
                    f"a curriculum with num_steps={steps} does not fit unroll_length={module.unroll_length} and "
                    f"num_steps={module.num_steps} of the module; use multiples of the former up to the latter"
                )

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Set the length of this epoch's episodes."""
        stage = min(trainer.current_epoch // self.every_n_epochs, len(self.num_steps) - 1)
        _checked(pl_module).train_steps = self.num_steps[stage]


def _checked(module: LightningModule) -> MetaOptimizer:
    check_type(MetaOptimizer, "a MetaOptimizer", pl_module=module)
    assert isinstance(module, MetaOptimizer)
    return module
