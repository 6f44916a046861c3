import pytest
import torch

from lightning_l2l.data import QuadraticDataModule


def test_batch():
    batch = next(iter(QuadraticDataModule(num_tasks=5, dim=3).train_dataloader()))
    assert {name: (values.dtype, tuple(values.shape)) for name, values in batch.items()} == {
        "W": (torch.float32, (5, 3, 3)),
        "y": (torch.float32, (5, 3)),
        "seed": (torch.int64, (5,)),
    }


def test_entries_are_standard_gaussians():
    batch = next(iter(QuadraticDataModule(num_tasks=500).train_dataloader()))
    for values in (batch["W"], batch["y"]):
        spread = values.numel() ** -0.5
        assert abs(values.mean()) < 4 * spread
        assert abs(values.var() - 1) < 4 * 2**0.5 * spread
    # W and y of a task must be independent: their own streams would not be, were they seeded alike.
    first_row = batch["W"][:, 0]
    assert abs((first_row * batch["y"]).mean()) < 4 * batch["y"].numel() ** -0.5


def test_num_steps_is_not_needed():
    data = QuadraticDataModule()
    data.setup()
    assert data.num_steps is None
    assert len(next(iter(data.val_dataloader()))["seed"]) == 128


def test_bad_dim():
    with pytest.raises(ValueError, match="dim=0 is not an integer of 1 or more; set dim=1"):
        QuadraticDataModule(dim=0)


@pytest.mark.benchmark
def test_batch_of_128_tasks(benchmark):
    loader = QuadraticDataModule().train_dataloader()
    benchmark(lambda: next(iter(loader)))
