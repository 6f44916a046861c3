"""Rosenbrock and Rastrigin."""

import math

import pytest
import torch

from lightning_l2l.data import GeneratedDataModule
from lightning_l2l.tasks import Rastrigin, Rosenbrock


def batch_of(task, num_tasks=400):
    return next(iter(GeneratedDataModule(task, num_tasks=num_tasks).train_dataloader()))


def loss(task, theta, **batch):
    batch = {name: torch.tensor([value], dtype=torch.float64) for name, value in batch.items()}
    return float(task.loss({"theta": torch.tensor([theta], dtype=torch.float64)}, batch, 0))


def test_rosenbrock_by_hand():
    shift = [0.5, -0.25, 2.0]
    z = [0.3, -1.1, 0.7]
    by_hand = 100 * (-1.1 - 0.3**2) ** 2 + (1 - 0.3) ** 2 + 100 * (0.7 - 1.1**2) ** 2 + (1 + 1.1) ** 2
    assert loss(Rosenbrock(3), [a + b for a, b in zip(z, shift, strict=True)], shift=shift) == pytest.approx(by_hand)
    assert loss(Rosenbrock(3), [1 + b for b in shift], shift=shift) == 0


def test_rastrigin_by_hand():
    shift, z, amplitude = [0.5, -0.25], [0.3, -1.1], 7.0
    by_hand = sum(x * x + amplitude * (1 - math.cos(2 * math.pi * x)) for x in z)
    theta = [a + b for a, b in zip(z, shift, strict=True)]
    assert loss(Rastrigin(2), theta, shift=shift, amplitude=[amplitude]) == pytest.approx(by_hand)
    assert loss(Rastrigin(2), shift, shift=shift, amplitude=[amplitude]) == 0


@pytest.mark.parametrize("task", [Rosenbrock(4), Rastrigin(4)])
def test_functions_differ_by_standard_gaussian_shifts(task):
    shift = batch_of(task)["shift"]
    assert shift.shape == (400, 4) and len(shift.unique()) > 1590
    assert abs(float(shift.mean())) < 0.1 and float(shift.std()) == pytest.approx(1, abs=0.08)


@pytest.mark.parametrize("task", [Rosenbrock(4), Rastrigin(4)])
def test_starts_are_standard_gaussian(task):
    theta = task.init_params(400, torch.Generator().manual_seed(0))["theta"]
    assert abs(float(theta.mean())) < 0.1 and float(theta.std()) == pytest.approx(1, abs=0.08)


def test_amplitudes():
    assert batch_of(Rastrigin(2, amplitude=3.0))["amplitude"].unique().tolist() == [3.0]
    drawn = batch_of(Rastrigin(2, amplitude=3.0, random_amplitude=True))["amplitude"]
    assert drawn.shape == (400, 1) and 0 <= drawn.min() < 0.1 and 2.9 < drawn.max() <= 3.0
    assert float(drawn.mean()) == pytest.approx(1.5, abs=0.15)


def test_rastrigin_has_a_local_minimum_in_every_cell():
    task, shift = Rastrigin(1), torch.zeros(5, 1)
    theta = torch.tensor([[-2.0], [-1.0], [0.0], [1.0], [2.0]])
    for _ in range(300):
        theta.requires_grad_()
        losses = task.loss({"theta": theta}, {"shift": shift, "amplitude": torch.full((5, 1), 10.0)}, 0)
        theta = (theta - 1e-3 * torch.autograd.grad(losses.sum(), theta)[0]).detach()
    torch.testing.assert_close(theta.flatten(), torch.tensor([-1.99, -0.995, 0.0, 0.995, 1.99]), atol=0.01, rtol=0)
    assert losses.argmin() == 2


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Rosenbrock(1), "dim=1 is not an integer of 2 or more; set dim=2"),
        (lambda: Rosenbrock(2.0), "dim=2.0"),
        (lambda: Rastrigin(0), "dim=0 is not an integer of 1 or more"),
        (lambda: Rastrigin(amplitude=0.0), "amplitude=0.0 is out of range"),
        (lambda: Rastrigin(random_amplitude=1), "random_amplitude=1 is neither True nor False"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("task", [Rosenbrock(3), Rastrigin(3)])
def test_data_that_does_not_fit(task):
    theta, batch = {"theta": torch.zeros(2, 3)}, batch_of(task, 2)
    with pytest.raises(ValueError, match="the batch has no 'shift', it has 'seed'"):
        task.loss(theta, {"seed": batch["seed"]}, 0)
    with pytest.raises(ValueError, match=r"'shift' of the batch is \[2, 4\] float32 .* takes \[2, 3\]; give"):
        task.loss(theta, {**batch, "shift": torch.zeros(2, 4)}, 0)
    with pytest.raises(ValueError, match=r"'shift' of the batch is \[2, 3\] float64 on cpu and .* float32 on cpu"):
        task.loss(theta, {**batch, "shift": torch.zeros(2, 3).double()}, 0)
