"""What the safeguards do to the shipped MNIST rule.

`MNIST_ROOT=data pytest -m slow tests/test_safeguards_measured.py` prints it.
"""

import os
from pathlib import Path

import pytest
import torch

from lightning_l2l import LearnedOptimizer, MNISTDataModule
from lightning_l2l.evaluation.results import final_losses
from lightning_l2l.evaluation.rollout import rollout
from lightning_l2l.rules.safeguards import new_record, runs_away
from lightning_l2l.tasks import MLP, NetworkTask

NETWORKS = {
    "20 sigmoid units": MLP(),
    "40 sigmoid units": MLP(hidden_size=40),
    "2 sigmoid layers": MLP(num_layers=2),
    "20 ReLU units": MLP(activation="relu"),
}
BOUNDS = (None, 0.3, 0.1, 0.05)


@pytest.fixture(scope="module")
def batches():
    root = Path(os.environ.get("MNIST_ROOT", Path(__file__).parents[2] / "data")).resolve()
    if not (root / "MNIST").is_dir():
        pytest.skip(f"no MNIST in {root}; set MNIST_ROOT")
    data = MNISTDataModule(root, num_steps=200, num_test_tasks=16, eval_tasks=16, download=False)
    data.prepare_data()
    data.setup("test")
    return list(data.test_dataloader())


def losses(network, batches, num_steps, **options):
    def make(params):
        return LearnedOptimizer(params, "mnist", skip_nonfinite=False, **options)

    found = [rollout(make, NetworkTask(network), batch, num_steps, torch.device("cpu")).losses for batch in batches]
    return torch.cat(found, 1)


@pytest.mark.slow
@pytest.mark.parametrize("network", NETWORKS)
def test_they_leave_a_good_run_alone(network, batches, capsys):
    final = {b: final_losses(losses(NETWORKS[network], batches, 100, max_update=b), 10).mean() for b in BOUNDS}
    long = losses(NETWORKS[network], batches, 200).T
    handed_over = 0
    for task in long.tolist():
        record = new_record()
        handed_over += any([runs_away(record, loss) for loss in task])
    with capsys.disabled():
        bounds = ", ".join(f"{bound}: {loss:.3f}" for bound, loss in final.items())
        print(
            f"\n{network}: final loss after 100 steps by max_update {bounds}; 200 steps, the fallback takes over in "
            f"{handed_over} of {len(long)}"
        )
    if "sigmoid" in network:
        assert handed_over == 0
        assert final[0.3] < 1.03 * final[None]
