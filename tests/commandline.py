"""What tests of the command line share: small runs, and a program of its own."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]

TINY = [
    "--model.num_steps=6",
    "--model.unroll_length=3",
    "--model.rule.hidden_size=3",
    "--data.num_tasks=4",
    "--data.num_val_tasks=4",
    "--data.num_test_tasks=6",
    "--trainer.accelerator=cpu",
    "--trainer.enable_progress_bar=false",
]
TINY_FIT = [*TINY, "--data.episodes_per_epoch=2", "--trainer.max_epochs=2", "--trainer.log_every_n_steps=1"]


def mnist(root, *flags):
    return [
        "--config",
        str(ROOT / "configs" / "mnist.yaml"),
        f"--data.root={root}",
        "--data.batch_size=16",
        "--data.eval_tasks=2",
        "--data.num_val_tasks=2",
        "--data.num_test_tasks=2",
        "--model.num_steps=4",
        "--model.final_steps=2",
        "--model.unroll_length=2",
        "--model.rule.hidden_size=3",
        "--trainer.accelerator=cpu",
        "--trainer.enable_progress_bar=false",
        "--trainer.log_every_n_steps=1",
        *flags,
    ]


def shell(*arguments, **options):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "lightning_l2l", *map(str, arguments)]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
    )
