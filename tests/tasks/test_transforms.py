"""Tasks made of other tasks."""

import math

import pytest
import torch

from lightning_l2l.tasks import MLP, ConvexTerm, NetworkTask, Quadratic, RandomScaling, init_from_seeds

SEEDS = torch.arange(50) + 7


def quadratics(num_tasks, dim=4):
    g = torch.Generator().manual_seed(0)
    W, y = torch.randn(num_tasks, dim, dim, generator=g), torch.randn(num_tasks, dim, generator=g)
    return {"W": W, "y": y, "seed": SEEDS[:num_tasks]}


def factors_of(task, inner, seeds=SEEDS):
    """By which the task divides the start of the one that it is made of."""
    start, scaled = init_from_seeds(inner, seeds)[0], init_from_seeds(task, seeds)[0]
    return {name: start[name] / scaled[name] for name in start}


def test_scaling_starts_where_the_task_does_and_has_its_losses_there():
    inner, batch = Quadratic(4), quadratics(50)
    start, _ = init_from_seeds(inner, SEEDS)
    scaled, _ = init_from_seeds(RandomScaling(inner), SEEDS)
    found = RandomScaling(inner).loss(scaled, batch, 0)
    torch.testing.assert_close(found, inner.loss(start, batch, 0), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(start["theta"], scaled["theta"])


@pytest.mark.parametrize("bound", [0.5, 3.0])
def test_the_logarithms_of_the_factors_fill_their_range_evenly_and_differ_between_coordinates(bound):
    inner = NetworkTask(MLP(5, 4, 1, 3), init_scale=1.0)
    logs = torch.cat([f.log().flatten() for f in factors_of(RandomScaling(inner, bound), inner).values()])
    assert logs.abs().max() < bound * 1.001
    assert abs(float(logs.mean())) < 0.1 * bound
    assert float(logs.std()) == pytest.approx(bound / math.sqrt(3), rel=0.05)
    assert len(logs.unique()) > 0.99 * len(logs)


def test_a_gradient_is_scaled_where_its_coordinate_is():
    inner, batch = Quadratic(4), quadratics(3)
    factors = factors_of(RandomScaling(inner), inner, SEEDS[:3])["theta"]
    theta = init_from_seeds(RandomScaling(inner), SEEDS[:3])[0]["theta"].requires_grad_()
    at = (theta * factors).detach().requires_grad_()
    (scaled,) = torch.autograd.grad(RandomScaling(inner).loss({"theta": theta}, batch, 0).sum(), theta)
    (plain,) = torch.autograd.grad(inner.loss({"theta": at}, batch, 0).sum(), at)
    torch.testing.assert_close(scaled, factors * plain, rtol=1e-4, atol=1e-4)


def test_the_convex_term_is_the_mean_square_distance_from_a_target_of_each_seed():
    inner, batch = Quadratic(4), quadratics(50)
    task = ConvexTerm(inner, dim=6)
    params, _ = init_from_seeds(task, SEEDS)
    assert params["convex"].shape == (50, 6) and params["convex"].abs().max() <= 1
    x = params["convex"].clone().requires_grad_()
    losses = task.loss({**params, "convex": x}, batch, 0)
    (gradient,) = torch.autograd.grad(losses.sum(), x)
    target = (x - gradient * 6 / 2).detach()  # where the gradient is zero
    assert target.abs().max() <= 1 + 1e-5 and target.std() == pytest.approx(1 / math.sqrt(3), rel=0.1)
    assert not torch.allclose(target, params["convex"])
    at_target = task.loss({**params, "convex": target}, batch, 0)
    torch.testing.assert_close(at_target, inner.loss(params, batch, 0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(losses.detach(), at_target + (x.detach() - target).square().mean(1))


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: RandomScaling(Quadratic(), bound=0.0), "bound=0.0 is out of range"),
        (lambda: RandomScaling(Quadratic(), bound=True), "bound=True"),
        (lambda: RandomScaling(Quadratic(), bound=21), "bound=21"),
        (lambda: RandomScaling(torch.nn.Linear(1, 1)), "task=.*give a Task"),
        (lambda: ConvexTerm(Quadratic(), dim=0), "dim=0"),
        (lambda: ConvexTerm("quadratic"), "task='quadratic'"),
        (lambda: ConvexTerm(ConvexTerm(Quadratic())), "has a ConvexTerm already; give it one, not two"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make()
