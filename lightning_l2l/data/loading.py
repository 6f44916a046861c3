"""How the tasks of an epoch come to the process that trains on them: which are its own, and in which batches."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any, cast

from torch import Tensor, distributed
from torch.utils.data import DataLoader, DistributedSampler, default_collate, get_worker_info

from lightning_l2l.tasks.minibatches import Minibatches

Sample = dict[str, Tensor | Minibatches]


class EpisodeSampler(DistributedSampler[tuple[int, int]]):
    """Hands out the pairs (epoch, index) of this process, in order.

    Process r of R takes the indices r, r + R, r + 2R, ...: the j-th batches of size b of all processes
    together are exactly the indices from j*b*R to (j+1)*b*R, those of the j-th batch of one process with b*R
    tasks. It is a `DistributedSampler` because Lightning leaves such a sampler alone and tells it the epoch.

    Args:
        num_tasks: Number of tasks in an epoch, over all processes.
        fixed: Whether every epoch has the tasks of epoch 0, as validation and test want it.
        num_done: Says, at the start of an iteration, how many of this process' tasks are to be left out.
        num_replicas: Number of processes. Default: asks `torch.distributed`; 1 if it is not initialised.
        rank: Number of this process, from 0. Default: asks `torch.distributed`; 0 if it is not initialised.

    Raises:
        ValueError: If the tasks cannot be shared out evenly; padding would count some of them twice.
    """

    def __init__(
        self,
        num_tasks: int,
        fixed: bool = False,
        num_done: Callable[[], int] = lambda: 0,
        num_replicas: int | None = None,
        rank: int | None = None,
    ) -> None:
        num_replicas = num_processes() if num_replicas is None else num_replicas
        rank = (distributed.get_rank() if _is_distributed() else 0) if rank is None else rank
        if num_tasks % num_replicas:
            lower = num_tasks - num_tasks % num_replicas
            allowed = f"{lower} or {lower + num_replicas}" if lower else f"{num_replicas}"
            raise ValueError(
                f"{num_tasks} tasks cannot be shared out evenly over {num_replicas} processes; "
                f"use {allowed} tasks, or another number of devices"
            )
        # The parent only takes the length of what it is given.
        super().__init__(range(num_tasks), num_replicas, rank, shuffle=False)  # type: ignore[arg-type]
        self.fixed, self.num_done = fixed, num_done

    def __iter__(self) -> Iterator[tuple[int, int]]:
        epoch = 0 if self.fixed else self.epoch
        return ((epoch, index) for index in self.mine[self.num_done() :])

    @property
    def mine(self) -> range:
        """The indices of this process."""
        return range(self.rank, self.total_size, self.num_replicas)


class EpisodeLoader(DataLoader[Sample]):
    """A DataLoader with which a run that stopped within an epoch goes on at the episode it had not finished.

    An ordinary DataLoader draws the first indices when the iterator is made, and Lightning makes that before it
    sets the epoch: here nothing happens until the first batch is asked for. And Lightning counts the batches but
    does not skip them: the sampler's `num_done` does. The position is the Trainer's own, saved with the loops;
    that `state_dict` exists says "resumable" to Lightning.
    """

    def __iter__(self) -> Iterator[Sample]:  # type: ignore[override]  # a generator, so that it starts late
        yield from super().__iter__()

    def batch_of(self, epoch: int, number: int) -> Sample:
        """The batch of this number, from 0, that this process had in an epoch."""
        sampler, size, episodes = cast(EpisodeSampler, self.sampler), self.batch_size or 1, cast(Any, self.dataset)
        return side_by_side(episodes.__getitems__([(epoch, k) for k in sampler.mine[number * size :][:size]]))

    def state_dict(self) -> dict[str, Any]:
        """Nothing: the Trainer's progress is the state."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing to restore."""


def side_by_side(samples: list[Sample]) -> Sample:
    """The samples of several tasks as those of a batch; a worker hands over no pool, but what was drawn from it."""
    drawn = get_worker_info() is not None
    batch: Sample = {}
    for name, first in samples[0].items():
        values: list[Any] = [sample[name] for sample in samples]
        if isinstance(first, Minibatches):
            batch[name] = Minibatches.stack(values)[:] if drawn else Minibatches.stack(values)
        else:
            batch[name] = default_collate(values)
    return batch


def leave_stopping_to_the_run(worker: int) -> None:
    """Let a worker stay when Ctrl-C or a cluster's SIGTERM reaches all processes: the run finishes its episode."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    run = multiprocessing.parent_process()  # not os.getppid(), which may be a server that has forked the worker
    if run is None or not hasattr(signal, "sigwaitinfo"):  # without it nobody knows who sends a signal
        return
    boss = run.pid

    def wait() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != boss:
            pass
        os._exit(128 + signal.SIGTERM)  # the run ends a worker that hangs

    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=wait, daemon=True).start()


def _is_distributed() -> bool:
    return distributed.is_available() and distributed.is_initialized()


def num_processes() -> int:
    """How many there are, this one among them."""
    return distributed.get_world_size() if _is_distributed() else 1
