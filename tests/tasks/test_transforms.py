"""Tasks made of other tasks."""

import math

import pytest
import torch

from lightning_l2l.rules.describe import describe
from lightning_l2l.tasks import (
    MLP,
    ConvexTerm,
    Mixture,
    NetworkTask,
    Quadratic,
    RandomScaling,
    Rosenbrock,
    init_from_seeds,
)

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


@pytest.mark.parametrize("unit, different", [("tensor", 4 * 50), ("task", 50)])
def test_a_tensor_or_a_task_may_have_one_factor(unit, different):
    inner = NetworkTask(MLP(5, 4, 1, 3), init_scale=1.0)
    factors = factors_of(RandomScaling(inner, 1.0, unit), inner)
    logs = torch.cat([f.log().flatten(1) for f in factors.values()], 1)
    assert logs.abs().max() < 1.001 and float(logs.std()) == pytest.approx(1 / math.sqrt(3), rel=0.2)
    assert len(logs.mul(1e4).round().unique()) == pytest.approx(different, rel=0.1)
    for k in range(50):
        for f in factors.values():
            torch.testing.assert_close(f[k], f[k].flatten()[0].expand_as(f[k]), rtol=1e-4, atol=0.0)


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
        (lambda: RandomScaling(Quadratic(), unit="row"), "unit='row'"),
        (lambda: RandomScaling(torch.nn.Linear(1, 1)), "task=.*give a Task"),
        (lambda: ConvexTerm(Quadratic(), dim=0), "dim=0"),
        (lambda: ConvexTerm("quadratic"), "task='quadratic'"),
        (lambda: ConvexTerm(ConvexTerm(Quadratic())), "has a ConvexTerm already; give it one, not two"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make()


# ---- mixtures ----

SMALL_MIXTURE = [Quadratic(4), NetworkTask(torch.nn.BatchNorm1d(3)), ConvexTerm(Rosenbrock(3), dim=2)]


def in_member(member, num_tasks=3):
    """A batch of one member: of its own data, the seed, and its number."""
    batch = {"seed": SEEDS[:num_tasks], "member": torch.full((num_tasks,), member)}
    shift = torch.randn(num_tasks, 3, generator=torch.Generator().manual_seed(0))
    inputs = torch.randn(num_tasks, 2, 5, 3, generator=torch.Generator().manual_seed(0))
    networks = {"inputs": inputs, "targets": torch.zeros(num_tasks, 2, 5).byte()}
    return batch | [quadratics(num_tasks), networks, {"shift": shift}][member]


@pytest.mark.parametrize("member", range(3))
def test_in_an_episode_a_mixture_is_the_member_that_the_batch_says(member):
    mixture, own, batch = Mixture(SMALL_MIXTURE), SMALL_MIXTURE[member], in_member(member)
    bound = mixture.of_episode(batch)
    params, buffers = init_from_seeds(bound, batch["seed"])
    wanted, wanted_buffers = init_from_seeds(own, batch["seed"])
    assert params.keys() == wanted.keys() and buffers.keys() == wanted_buffers.keys()
    assert all(torch.equal(params[name], wanted[name]) for name in params)
    losses = own.loss(wanted, batch, 1)
    assert torch.equal(bound.loss(params, batch, 1), losses) and torch.equal(mixture.loss(params, batch, 1), losses)
    assert mixture.unseen(params, batch) == own.unseen(params, batch)


@pytest.mark.parametrize("member", range(3))
@pytest.mark.parametrize("make", [RandomScaling, lambda task: RandomScaling(ConvexTerm(task, dim=5), bound=1.0)])
def test_a_mixture_may_be_transformed_as_its_members_may(member, make):
    if member == 2 and make is not RandomScaling:
        with pytest.raises(ValueError, match="a parameter 'convex' already; call it otherwise"):
            init_from_seeds(make(Mixture(SMALL_MIXTURE)).of_episode(in_member(member)), SEEDS[:3])
        return
    batch = in_member(member)
    of_mixture, of_member = make(Mixture(SMALL_MIXTURE)).of_episode(batch), make(SMALL_MIXTURE[member])
    params, wanted = (init_from_seeds(task, batch["seed"])[0] for task in (of_mixture, of_member))
    assert params.keys() == wanted.keys() and all(torch.equal(params[name], wanted[name]) for name in params)
    assert torch.equal(of_mixture.loss(params, batch, 0), of_member.loss(params, batch, 0))


@pytest.mark.parametrize(
    "member, told",
    [
        (None, "the batch has no 'member', which says of which of the mixture's tasks it is; use MixtureDataModule"),
        (torch.tensor([0, 1, 0]), r"'member' of the batch is \[3\] int64 with \[0, 1\]; give .* from 0 to 2 for all"),
        (torch.tensor([3, 3]), r"with \[3\]"),
        (torch.tensor([-1]), r"with \[-1\]"),
        (torch.tensor([0.0]), "float32"),
        (torch.tensor([], dtype=torch.int64), r"with \[\]"),
        ("0", "no tensor but a str"),
    ],
)
def test_a_batch_that_does_not_say_of_which_member_it_is(member, told):
    batch = quadratics(3) if member is None else {**quadratics(3), "member": member}
    with pytest.raises(ValueError, match=told):
        Mixture(SMALL_MIXTURE).of_episode(batch)


def test_outside_of_an_episode_a_mixture_has_no_parameters():
    for method in ("init_params", "init_buffers"):
        arguments = [2, torch.Generator()][: 2 if method == "init_params" else 1]
        with pytest.raises(ValueError, match=r"known within an episode only; use mixture\.of_episode\(batch\)"):
            getattr(Mixture(SMALL_MIXTURE), method)(*arguments)


def test_a_mixture_is_described_by_its_members():
    found = describe(Mixture([Quadratic(4), RandomScaling(Rosenbrock(3))]))["init_args"]["tasks"]
    assert [one["class_path"].split(".")[-1] for one in found] == ["Quadratic", "RandomScaling"]
    assert found[1]["init_args"]["task"]["init_args"] == {"dim": 3}


@pytest.mark.parametrize(
    "make, told",
    [
        (lambda: Mixture([]), r"tasks=\[\] are none"),
        (lambda: Mixture(Quadratic()), "give a list of tasks"),
        (lambda: Mixture([Quadratic(), "rosenbrock"]), "tasks='rosenbrock' is a str; give a list of tasks"),
        (lambda: Mixture([RandomScaling(Mixture([Quadratic()]))]), "has a Mixture as a member; list its members"),
    ],
)
def test_bad_mixtures(make, told):
    with pytest.raises((ValueError, TypeError), match=told):
        make()
