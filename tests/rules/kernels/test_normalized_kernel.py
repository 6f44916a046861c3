"""The compiled step of NormalizedMLP does what torch's operators do, as accurately, whatever the number of threads."""

import copy

import pytest
import torch

from lightning_l2l import NormalizedMLP, TensorRule
from lightning_l2l.rules.kernels.fused import MOST_MEANS, fused_for
from lightning_l2l.rules.tensors import Moment, TensorState
from optimizers import normal

RULES = {
    "unlearned": {"hidden_size": 0},
    "mlp": {},
    "no-norms": {"orthogonalize": False, "normalize": False, "step_size": 0.02},
    "sizes": {"orthogonalize": False, "sizing": 4, "max_scale": 10.0, "hidden_size": 5, "schedule": "linear"},
    "sizes-alone": {"hidden_size": 0, "sizing": 0, "betas": [0.5, 0.9, 0.99]},
    "mixing": {"hidden_size": 0, "sizing": 3, "betas": [0.9, 0.6, 0.99], "mixing": True},
    "some-inputs": {"inputs": ["theta", "inverse_columns", "factored", "time"], "hidden_size": 17},
    "untimed": {"inputs": ["gradient", "mean_ratios", "square"], "betas": [0.5, 0.95], "orthogonalize": False},
}
#: Scalars, vectors, matrices with rows shorter and longer than a vector register, convolutions, more than one block.
SHAPES = [(), (7,), (1, 50), (50, 1), (7, 5), (3, 40), (33, 40), (10, 3, 3, 3), (2, 9000), (300, 60)]


@pytest.fixture(params=RULES)
def rule(request):
    torch.manual_seed(0)
    rule = NormalizedMLP(**RULES[request.param])
    with torch.no_grad():
        for parameter in rule.parameters():  # an MLP whose output is far from zero
            parameter.normal_(0, 0.4)
    return rule


@pytest.fixture(autouse=True)
def compiled():
    if fused_for(torch.empty(0)) is None:
        pytest.skip("no C compiler here")


def gradients(shape, num_steps):
    """Of three tasks: one in other units, one in which a row or a coordinate never has any."""
    found = [normal(3, *shape, seed=step).float() for step in range(num_steps)]
    for gradient in found:
        gradient[1] *= 1e-3
        if len(shape) and shape[0] > 1:
            gradient[2, 1] = 0
    return found


def run(rule, step, shape, num_steps=6, dtype=torch.float32):
    state = rule.init_tensor(shape, 3, dtype=dtype)
    updates = []
    for t, gradient in enumerate(gradients(shape, num_steps)):
        theta = normal(3, *shape, seed=100 + t).to(dtype)
        gradient = gradient.to(dtype)
        updates.append(step(rule, gradient, state, theta, Moment.of(t, 40, 3, gradient)).clone())
    return torch.stack(updates), state


def compiled_step(rule, *given):
    return rule.step_tensor_(*given)


def plain_step(rule, *given):
    return TensorRule.step_tensor_(rule, *given)


def error(found, wanted):
    return float((found.double() - wanted).abs().max() / wanted.abs().max().clamp(min=1e-30))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_as_accurate_as_torch(rule, shape):
    exact, exact_state = run(copy.deepcopy(rule).double(), plain_step, shape, dtype=torch.float64)
    plain, plain_state = run(rule, plain_step, shape)
    found, state = run(rule, compiled_step, shape)
    assert error(found, exact) < 4 * error(plain, exact) + 1e-6
    for one, other, wanted in zip(state, plain_state, exact_state, strict=True):
        if wanted.numel():
            assert error(one, wanted) < 4 * error(other, wanted) + 1e-6


def test_it_is_compiled_where_it_can_be(monkeypatch):
    rule = NormalizedMLP(orthogonalize=False)
    monkeypatch.setattr(TensorRule, "step_tensor_", None)
    found, _ = run(rule, compiled_step, (7, 5))
    assert found.isfinite().all()


@pytest.mark.parametrize(
    "rule", [NormalizedMLP(betas=tuple(k / 10 for k in range(MOST_MEANS + 1))), NormalizedMLP().double()], ids=str
)
def test_what_it_cannot_do_torch_does(rule):
    found, _ = run(rule, compiled_step, (7, 5), dtype=rule.like.dtype)
    wanted, _ = run(rule, plain_step, (7, 5), dtype=rule.like.dtype)
    assert torch.equal(found, wanted)


def test_the_number_of_threads_changes_nothing(rule):
    threads = torch.get_num_threads()
    try:
        found = []
        for number in (1, 3):
            torch.set_num_threads(number)
            rule.orthogonalize = False  # whose products are torch's
            found.append(run(rule, compiled_step, (300, 60), num_steps=3))
    finally:
        torch.set_num_threads(threads)
    (one, state), (other, other_state) = found
    assert torch.equal(one, other)
    assert all(torch.equal(a, b) for a, b in zip(state, other_state, strict=True))


def test_it_stays_with_torch_over_two_thousand_steps():
    torch.manual_seed(0)
    rule = NormalizedMLP(hidden_size=4)
    with torch.no_grad():
        rule.readout.weight.normal_(0, 0.3)
    start, target = normal(1, 12, 9, seed=1).float(), normal(1, 12, 9, seed=2).float()

    def losses(step):
        theta, state, found = start.clone(), rule.init_tensor((12, 9)), []
        for t in range(2000):
            gradient = theta - target + 0.1 * normal(1, 12, 9, seed=1000 + t).float()
            found.append((theta - target).square().mean())
            theta += step(rule, gradient, state, theta, Moment.of(t, 2000, 1, theta))
        return torch.stack(found)

    found, wanted = losses(compiled_step), losses(plain_step)
    assert wanted[-1] < 0.01 * wanted[0]
    torch.testing.assert_close(found, wanted, rtol=0.02, atol=1e-5)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_no_number_comes_through_or_is_bounded(value):
    rule = NormalizedMLP(orthogonalize=False)
    gradient = torch.ones(1, 4, 4)
    gradient[0, 1, 2] = value
    for step in (compiled_step, plain_step):
        state = rule.init_tensor((4, 4))
        update = step(rule, gradient, state, torch.zeros(1, 4, 4), Moment.of(0, 10, 1, gradient))
        assert bool(update.isfinite().all()) == (value == float("inf"))


def test_states_that_are_not_contiguous_are_left_to_torch():
    rule = NormalizedMLP(orthogonalize=False)
    gradient = torch.ones(1, 4, 4)
    whole = rule.init_tensor((4, 4))
    apart = TensorState(torch.zeros(8, 1, 4, 4)[::2], whole.vector.clone())
    moment = Moment.of(0, 10, 1, gradient)
    found = rule.step_tensor_(gradient, apart, torch.zeros(1, 4, 4), moment)
    torch.testing.assert_close(found, rule.step_tensor_(gradient, whole, torch.zeros(1, 4, 4), moment))
    torch.testing.assert_close(apart.coordinates, whole.coordinates)
