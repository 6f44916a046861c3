"""Minibatches that are cut out of a pool of examples when they are asked for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class Pool:
    """Examples that all tasks draw from; each device gets its copy once.

    Args:
        examples: `[num_examples, ...]`.
    """

    def __init__(self, examples: Tensor) -> None:
        self.examples = examples
        self._copies = {examples.device: examples}

    def on(self, device: torch.device) -> Tensor:
        """The examples there."""
        if device not in self._copies:
            self._copies[device] = self.examples.to(device)
        return self._copies[device]

    def __getstate__(self) -> dict[str, Any]:
        return {"examples": self.examples, "_copies": {self.examples.device: self.examples}}


class Minibatches:
    """Stands in for the tensor `pool[order]`, of which there is never more than one minibatch.

    So an episode takes a few bytes an example and step, however long it is: of MNIST's images a thousandth of what
    they would take. Like the tensor's, `select(1, t)` gives minibatch t of all tasks, and indices give parts.

    Args:
        pool: Examples.
        order: Which ones, int32 `[num_tasks, num_minibatches, batch_size]`; of one task, without the first dimension.

    Example:
        >>> batches = Minibatches(Pool(torch.arange(10) * 11), torch.tensor([[[1, 2], [3, 4]]], dtype=torch.int32))
        >>> batches.shape, batches.select(1, 1), batches[0, 0]
        (torch.Size([1, 2, 2]), tensor([[33, 44]]), tensor([11, 22]))
    """

    def __init__(self, pool: Pool, order: Tensor) -> None:
        self.pool, self.order = pool, order

    @staticmethod
    def stack(tasks: Sequence[Minibatches]) -> Minibatches:
        """Those of several tasks, which share their pool, as one with the tasks as its first dimension."""
        return Minibatches(tasks[0].pool, torch.stack([task.order for task in tasks]))

    @property
    def shape(self) -> torch.Size:
        """That of the tensor which it stands for."""
        return self.order.shape + self.pool.examples.shape[1:]

    @property
    def dtype(self) -> torch.dtype:
        """That of the examples."""
        return self.pool.examples.dtype

    @property
    def device(self) -> torch.device:
        """Where minibatches appear."""
        return self.order.device

    def dim(self) -> int:
        """Number of dimensions."""
        return len(self.shape)

    def __len__(self) -> int:
        return len(self.order)

    def select(self, dim: int, index: int) -> Tensor:
        """For dim 1 minibatch `index` of all tasks, `[num_tasks, batch_size, ...]`; another dim goes likewise."""
        return self._drawn(self.order.select(dim, index))

    def __getitem__(self, key: Any) -> Tensor:
        return self._drawn(self.order[key])

    def _drawn(self, order: Tensor) -> Tensor:
        # index_select copies whole examples: ten times as fast as `examples[order]`.
        examples = self.pool.on(order.device)
        return examples.index_select(0, order.flatten()).view(*order.shape, *examples.shape[1:])

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Minibatches:
        """The same on another device, where minibatches are drawn from then on."""
        return Minibatches(self.pool, self.order.to(device, non_blocking=non_blocking))
