"""Logistic regression and the lasso."""

import pytest
import torch
from torch.nn import functional

from lightning_l2l.data import GeneratedDataModule
from lightning_l2l.tasks import Lasso, LogisticRegression


def batch_of(task, num_tasks=3):
    return next(iter(GeneratedDataModule(task, num_tasks=num_tasks).train_dataloader()))


def test_the_logistic_loss_is_that_of_torch_and_the_penalty():
    task = LogisticRegression(num_features=4, num_examples=7, l2=0.3)
    batch, params = batch_of(task), task.init_params(3, torch.Generator().manual_seed(0))
    losses = task.loss(params, batch, 0)
    for k in range(3):
        logits = batch["features"][k] @ params["weight"][k] + params["bias"][k]
        labels = (batch["signs"][k] > 0).float()
        penalty = 0.15 * params["weight"][k].square().sum()
        by_hand = functional.binary_cross_entropy_with_logits(logits, labels) + penalty
        torch.testing.assert_close(losses[k], by_hand)


@pytest.mark.parametrize("num_examples", [7, 100])
def test_half_of_the_examples_are_of_either_class(num_examples):
    batch = batch_of(LogisticRegression(3, num_examples))
    assert batch["features"].shape == (3, num_examples, 3)
    assert batch["signs"].unique().tolist() == [-1, 1]
    assert batch["signs"].sum(1).tolist() == [num_examples % 2] * 3


def test_the_clouds_are_gaussians_with_means_and_covariances_of_their_own():
    batch = batch_of(LogisticRegression(num_features=2, num_examples=4000), num_tasks=200)
    classes = batch["features"].view(400, 2000, 2)  # the first half of each task's examples is one class
    means = classes.mean(1)
    assert float(means.std()) == pytest.approx(1, abs=0.1) and abs(float(means.mean())) < 0.12
    traces = (classes - means[:, None]).square().mean(1).sum(1)  # E ||M||^2 = num_features
    assert float(traces.mean()) == pytest.approx(2, abs=0.25) and float(traces.std()) > 0.5
    correlated = (classes - means[:, None]).prod(2).mean(1)
    assert float(correlated.std()) > 0.3


def test_gradient_descent_separates_the_classes():
    task = LogisticRegression()
    batch, params = batch_of(task, 20), task.init_params(20, torch.Generator().manual_seed(0))
    params = {name: value.requires_grad_() for name, value in params.items()}
    optimizer, first = torch.optim.Adam(params.values(), lr=0.1), task.loss(params, batch, 0).mean()
    for step in range(200):
        optimizer.zero_grad()
        task.loss(params, batch, step).sum().backward()
        optimizer.step()
    assert task.loss(params, batch, 0).mean() < 0.2 < 1 < first


def test_the_lasso_by_hand():
    task = Lasso(num_features=6, num_measurements=4, l1=0.3)
    batch, params = batch_of(task), task.init_params(3, torch.Generator().manual_seed(0))
    for k in range(3):
        x = params["x"][k]
        by_hand = (batch["A"][k] @ x - batch["b"][k]).square().sum() / 2 + 0.3 * x.abs().sum()
        torch.testing.assert_close(task.loss(params, batch, 0)[k], by_hand)


def test_where_a_coordinate_is_zero_the_gradient_is_that_of_the_square():
    task = Lasso(num_features=6)
    batch, x = batch_of(task), torch.zeros(3, 6, requires_grad=True)
    (gradient,) = torch.autograd.grad(task.loss({"x": x}, batch, 0).sum(), x)
    torch.testing.assert_close(gradient, -(batch["A"].mT @ batch["b"][..., None]).squeeze(2))


@pytest.mark.parametrize("num_features, num_measurements, rows", [(5, None, 3), (6, None, 3), (6, 9, 9)])
def test_columns_have_norm_one_and_there_are_as_many_rows_as_measurements(num_features, num_measurements, rows):
    batch = batch_of(Lasso(num_features, num_measurements))
    assert batch["A"].shape == (3, rows, num_features) and batch["b"].shape == (3, rows)
    torch.testing.assert_close(batch["A"].norm(dim=1), torch.ones(3, num_features))


def test_the_vector_measured_is_sparse():
    """With more measurements than coordinates it can be computed back."""
    batch = batch_of(Lasso(num_features=20, num_measurements=40, density=0.25), num_tasks=100)
    found = torch.linalg.lstsq(batch["A"].double(), batch["b"].double()[..., None]).solution
    kept = found.abs() > 1e-5
    assert float(kept.double().mean()) == pytest.approx(0.25, abs=0.04)
    assert float(found[kept].std()) == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: LogisticRegression(0), "num_features=0"),
        (lambda: LogisticRegression(num_examples=1), "num_examples=1 is not an integer of 2 or more"),
        (lambda: LogisticRegression(l2=0.0), "l2=0.0 is out of range"),
        (lambda: LogisticRegression(10**9), "num_features=1000000000, num_examples=100 need"),
        (lambda: Lasso(0), "num_features=0"),
        (lambda: Lasso(num_measurements=0), "num_measurements=0"),
        (lambda: Lasso(l1=-1.0), "l1=-1.0 is out of range"),
        (lambda: Lasso(density=0.0), "density=0.0 is no probability above 0"),
        (lambda: Lasso(density=1.5), "density=1.5"),
        (lambda: Lasso(10**6, 10**6), "num_features=1000000, num_measurements=1000000 need"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_data_of_other_sizes():
    task, other = LogisticRegression(3), LogisticRegression(4)
    with pytest.raises(ValueError, match=r"'features' of the batch is \[2, 100, 4\] .* takes \[2, 100, 3\]"):
        task.loss(task.init_params(2, torch.Generator()), batch_of(other, 2), 0)
    task, other = Lasso(3), Lasso(3, 3)
    with pytest.raises(ValueError, match=r"'A' of the batch is \[2, 3, 3\] float32 and Lasso takes \[2, 2, 3\]"):
        task.loss(task.init_params(2, torch.Generator()), batch_of(other, 2), 0)
