"""The real command line in processes of their own, which tests may signal and kill.

They are forked from a process that has imported the package: starting one takes no time.
"""

import math
import multiprocessing
import os
import resource
import socket
import sys
import time
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch
from lightning.pytorch import Callback

from lightning_l2l import Quadratic, main

_CONTEXT = multiprocessing.get_context("forkserver")
# The package alone imports nothing of what takes its time, which is Lightning.
_CONTEXT.set_forkserver_preload(["lightning_l2l.commands.main", "matplotlib.pyplot", "torch._dynamo"])

TINY = [
    "--model.num_steps=6",
    "--model.unroll_length=3",
    "--model.rule.hidden_size=3",
    "--data.num_val_tasks=4",
    "--data.num_test_tasks=6",
    "--data.episodes_per_epoch=3",
    "--trainer.log_every_n_steps=1",
    "--trainer.accelerator=cpu",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
]
ENDLESS = "--trainer.max_epochs=100000"


@dataclass
class Command:
    """A process, its rank, and the file with all that it says."""

    process: BaseProcess
    output: Path

    @property
    def told(self):
        return self.output.read_text() if self.output.exists() else ""

    def wait_for(self, what, seconds=100):
        """Wait until `what()` is true, which the process must live to see."""
        deadline = time.monotonic() + seconds
        while not what():
            assert self.process.is_alive(), (self.process.exitcode, self.told)
            assert time.monotonic() < deadline, self.told
            time.sleep(0.005)

    def signal(self, signum, group=False):
        """Send it a signal, and to the processes that it has started if all the group gets it."""
        (os.killpg if group else os.kill)(self.process.pid, signum)

    def end(self, seconds=60):
        """Wait for its end; gives the exit status."""
        self.process.join(seconds)
        if self.process.exitcode is None:
            self.process.kill()
            self.process.join()
            raise AssertionError(f"it hung; it had said:\n{self.told}")
        return self.process.exitcode


def start(folder, *arguments, largest_file=None, environment=None):
    """`python -m lightning_l2l` with these arguments in a folder.

    Args:
        folder: Where it runs; made if need be.
        arguments: Of the command line.
        largest_file: Bytes that no file of it may exceed, as on a disk that is full.
        environment: What its environment has beside this one's.
    """
    folder.mkdir(parents=True, exist_ok=True)
    output = folder.parent / f"{folder.name}-{time.monotonic_ns()}.txt"
    arguments = (str(folder), list(map(str, arguments)), str(output), largest_file, environment or {})
    process = _CONTEXT.Process(target=_run, args=arguments)
    process.start()
    return Command(process, output)


def start_ranks(folder, *arguments, number=2):
    """The same as several processes, which find each other as under torchrun."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": number, "LOCAL_WORLD_SIZE": number, "GROUP_RANK": 0, "MASTER_ADDR": "127.0.0.1"}
    common |= {"MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "test"}
    flags = [f"--trainer.devices={number}", "--trainer.strategy=ddp"]
    return [
        start(folder, *arguments, *flags, environment={**common, "RANK": rank, "LOCAL_RANK": rank})
        for rank in range(number)
    ]


def _run(folder, arguments, output, largest_file, environment):
    said = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(said, 1)
    os.dup2(said, 2)
    os.setpgrp()
    os.chdir(folder)
    os.environ.update({name: str(value) for name, value in environment.items()})
    sys.argv = ["lightning-l2l", *arguments]
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # not this process' own way, but that of a command
    if largest_file is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    main()


class Poisoned(Quadratic):
    """Quadratics, of which those with one seed have a loss that is no number from some step on.

    Args:
        dim: As there.
        seed: Of the starting point; -1: none.
        step: The inner step.
    """

    def __init__(self, dim: int = 10, seed: int = -1, step: int = 0):
        super().__init__(dim)
        self.seed, self.step = seed, step

    def loss(self, params, batch, step):
        losses = super().loss(params, batch, step)
        return losses * torch.where((batch["seed"] == self.seed) & (step >= self.step), math.nan, 1.0)


class WriteDown(Callback):
    """Writes, in every process, what it has come to."""

    def on_train_end(self, trainer, pl_module):
        found = {"weights": pl_module.rule.state_dict(), "skipped": pl_module.skipped}
        torch.save(found, f"rank_{trainer.global_rank}.pt")
