"""The learned size of a tensor's update."""

import math

import pytest
import torch

from lightning_l2l import LearnedOptimizer, NormalizedMLP
from lightning_l2l.rules.sizes import TensorSize
from lightning_l2l.rules.tensors import Moment


def sizes(most=100.0, units=0, readout=None, mixing=False):
    torch.manual_seed(0)
    made = TensorSize(3, units, most, mixing)
    made.reset_parameters()
    made.requires_grad_(False)
    with torch.no_grad():
        if readout is not None:
            made.readout.bias.copy_(torch.tensor(readout))
    return made


def squares(num_tasks=2):
    return torch.rand(num_tasks, 5, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("mixing", [False, True])
@pytest.mark.parametrize("units", [0, 4])
def test_it_begins_with_1_and_no_mixture(units, mixing):
    made = sizes(units=units, mixing=mixing)
    factor, kept, mixed = made(squares(), torch.zeros(2, 1), (3, 4), Moment.of(5, 100, 2, torch.empty(0)))
    assert torch.equal(factor, torch.ones(2)) and torch.equal(kept, torch.zeros(2, 1))
    assert torch.equal(mixed, torch.zeros(2, 3 * mixing))


@pytest.mark.parametrize("compiled", [True, False])
def test_the_mixture_is_the_first_running_mean_and_shares_of_the_gradient_and_of_the_others(compiled):
    rule = NormalizedMLP(
        hidden_size=0, sizing=0, mixing=True, betas=[0.9, 0.5], orthogonalize=False, normalize=False, step_size=1.0,
        warmup=0, schedule="constant",
    )  # fmt: skip
    rule.sizes.readout.bias.data[2:] = torch.tensor([0.5, -0.3])
    state, means, square = rule.init_tensor((5,)), [torch.zeros(5), torch.zeros(5)], torch.zeros(5)
    step = rule.step_tensor_ if compiled else super(NormalizedMLP, rule).step_tensor_
    for t in range(4):
        gradient = torch.randn(5, generator=torch.Generator().manual_seed(t))
        means = [beta * mean + (1 - beta) * gradient for beta, mean in zip((0.9, 0.5), means, strict=True)]
        square = 0.99 * square + 0.01 * gradient**2
        unbiased = [mean / (1 - beta ** (t + 1)) for beta, mean in zip((0.9, 0.5), means, strict=True)]
        mixed = unbiased[0] + 2 * math.tanh(0.5) * gradient + 2 * math.tanh(-0.3) * unbiased[1]
        expected = -mixed / ((square / (1 - 0.99 ** (t + 1))).sqrt() + 1e-8)
        update = step(gradient[None], state, torch.ones(1, 5), Moment.of(t, 10, 1, gradient))
        torch.testing.assert_close(update[0], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("most", [3.0, 100.0])
@pytest.mark.parametrize("num_steps", [10, 1000])
def test_over_an_episode_it_reaches_its_bound_and_stays_there_whatever_the_length(most, num_steps):
    made, kept, found = sizes(most, readout=[9.0, 0.0]), torch.zeros(1, 1), []
    for step in range(num_steps):
        factor, kept, _ = made(squares(1), kept, (3, 4), Moment.of(step, num_steps, 1, torch.empty(0)))
        found.append(float(factor.detach()))
        kept = kept.detach()
    assert found == sorted(found) and found[-1] == pytest.approx(most)
    assert found[num_steps // 10] == pytest.approx(
        min(most, math.exp(10 * (num_steps // 10 + 1) / num_steps)), rel=1e-4
    )


def test_at_once_it_goes_half_the_way_to_the_bound():
    factor, _, _ = sizes(100.0, readout=[0.0, 9.0])(
        squares(1), torch.zeros(1, 1), (3,), Moment.of(0, 10, 1, torch.empty(0))
    )
    assert float(factor) == pytest.approx(10.0)
    factor, _, _ = sizes(100.0, readout=[0.0, 9.0])(
        squares(1), torch.full((1, 1), math.log(100)), (3,), Moment.of(0, 10, 1, torch.empty(0))
    )
    assert float(factor) == pytest.approx(100.0)  # both together have the bound, too


def test_what_is_larger_than_in_meta_training_is_not_told_apart():
    assert TensorSize.of_shape((5000, 4, 300)) == TensorSize.of_shape((1024, 1024))
    assert TensorSize.of_shape((10, 20)) != TensorSize.of_shape((20, 10))
    assert TensorSize.of_shape((7,))[0] == TensorSize.of_shape((7, 1))[0] == 0.0
    near, far = (TensorSize.of_moment(Moment.of(n // 2, n, 1, torch.empty(0))) for n in (6000, 60_000))
    assert torch.equal(near[:, :3], far[:, :3])


def test_where_nobody_knows_the_number_of_steps_it_is_about_that_of_as_many_as_were_made():
    known = TensorSize.of_moment(Moment.of(50, 250, 1, torch.empty(0)))
    unknown = TensorSize.of_moment(Moment.of(50, None, 1, torch.empty(0)))
    assert torch.equal(known[:, :2], unknown[:, :2]) and float(unknown[0, 2]) == 0.0
    assert torch.equal(known[:, 3], 2 * unknown[:, 3])


def test_mixing_without_what_mixes():
    with pytest.raises(ValueError, match="use sizing=0"):
        NormalizedMLP(mixing=True)


def test_a_model_goes_further_in_each_step_where_the_size_is_larger():
    moved = []
    for bias in (0.0, 1.0):
        rule = NormalizedMLP(hidden_size=0, sizing=0)
        rule.sizes.readout.bias.data[1] = bias
        p = torch.nn.Parameter(torch.ones(4, 3))
        optimizer = LearnedOptimizer([p], rule, num_steps=10)
        p.grad = torch.ones_like(p)
        optimizer.step()
        moved.append(float((p - 1).norm().detach()))
    assert moved[1] / moved[0] == pytest.approx(math.exp(math.log(100) / 2 * math.tanh(1.0)), rel=1e-4)


def test_nan_shows():
    rule = NormalizedMLP(hidden_size=0, sizing=2)
    for compiled in (True, False):
        state, gradient = rule.init_tensor((4, 3)), torch.ones(1, 4, 3)
        theta, moment = torch.full((1, 4, 3), math.nan), Moment.of(0, 10, 1, gradient)
        step = rule.step_tensor_ if compiled else super(NormalizedMLP, rule).step_tensor_
        assert step(gradient, state, theta, moment).isnan().all()
