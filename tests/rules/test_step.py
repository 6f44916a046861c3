"""`UpdateRule.step_`: an inner step in place, compiled or not, is `forward`."""

import copy
import math

import pytest
import torch

from lightning_l2l.rules import UpdateRule
from lightning_l2l.rules.base import CPU_BLOCK
from lightning_l2l.rules.kernels import fused
from optimizers import LSTMS, LearnedMomentum, possible

compiler = pytest.mark.skipif(fused.fused_for(torch.empty(0)) is None, reason="no C compiler here")


class Swap(UpdateRule):
    """No meta-parameters, and what it returns are its arguments: the last gradient is the update."""

    state_size = 2

    def forward(self, gradient, state):
        return state[0], torch.stack([gradient, state[0]])


class Plain(UpdateRule):
    """Neither meta-parameters nor state, and the update is the gradient itself."""

    state_size = 0

    def forward(self, gradient, state):
        return gradient, state


RULES = {
    **LSTMS,
    "momentum": LearnedMomentum,
    "swap": Swap,
    "plain": Plain,
}
SIZES = [0, 1, 7, 8, 15, 16, 17, 31, 32, 33, 300, CPU_BLOCK, CPU_BLOCK + 1, 3 * CPU_BLOCK + 5]


def make(name, dtype=torch.float32):
    torch.manual_seed(0)
    return RULES[name]().to(dtype)


@pytest.fixture(params=["compiled", "plain"])
def way(request, monkeypatch):
    """Both ways of an LSTM's step."""
    if request.param == "plain":
        monkeypatch.setattr(fused, "_library", lambda: None)
    elif fused.fused_for(torch.empty(0)) is None:
        pytest.skip("no C compiler here")


def drawn(rule, size, dtype=torch.float32, seed=1):
    g = torch.Generator().manual_seed(seed)
    gradient = torch.randn(size, generator=g) * torch.logspace(-8, 2, max(size, 1))[:size]
    return gradient.to(dtype), possible(rule, torch.rand(rule.state_size, size, generator=g).mul_(2).sub_(1).to(dtype))


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", RULES)
def test_a_step_is_forward_with_the_state_changed_in_place(name, size):
    rule, exact = make(name), make(name, torch.float64)
    gradient, state = drawn(rule, size)
    want, after = exact(gradient.double(), state.double())
    address, kept = state.data_ptr(), gradient.clone()
    update = rule.step_(gradient, state)
    assert update.shape == (size,) and update.dtype == torch.float32
    assert state.data_ptr() == address and torch.equal(gradient, kept)
    torch.testing.assert_close(update.double(), want.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(state.double(), after.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", RULES)
def test_in_float64_it_is_forward_to_the_last_digits(name):
    rule = make(name, torch.float64)
    gradient, state = drawn(rule, CPU_BLOCK + 9, torch.float64)
    want, after = rule(gradient, state.clone())
    torch.testing.assert_close(rule.step_(gradient, state), want.detach(), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(state, after.detach(), rtol=1e-12, atol=1e-14)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("start, size", [(0, 33), (3, 17), (5, 1), (16, 4200), (4, 0)])
@pytest.mark.parametrize("name", RULES)
def test_the_state_may_be_some_columns_of_a_wider_one_and_the_others_stay(name, start, size):
    rule = make(name)
    gradient, state = drawn(rule, size)
    wide = torch.full((rule.state_size, start + size + 6), 0.25)
    part = wide[:, start : start + size]
    part.copy_(state)
    want = rule.step_(gradient, state)
    assert torch.equal(rule.step_(gradient, part), want)
    assert torch.equal(part, state)
    part.fill_(0.25)
    assert (wide == 0.25).all()


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("name", RULES)
def test_gradients_may_be_strided_and_columns_may_lie_apart(name):
    rule = make(name)
    gradient, state = drawn(rule, 50)
    want_state = state.clone()
    want = rule.step_(gradient, want_state)
    strided = torch.stack([gradient, gradient + 1], 1)[:, 0]
    by_columns = torch.stack([state, state + 1], 2)[..., 0]
    assert strided.stride() == (2,) and by_columns.stride(1) == 2
    for given, found in ((strided, state), (gradient, by_columns)):
        torch.testing.assert_close(rule.step_(given, found), want, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found, want_state, rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("name", RULES)
def test_a_coordinate_does_not_see_its_neighbours(name):
    rule = make(name)
    gradient, state = drawn(rule, 200)
    order = torch.randperm(200, generator=torch.Generator().manual_seed(2))
    shuffled = state[:, order].contiguous()
    update, permuted = rule.step_(gradient, state), rule.step_(gradient[order], shuffled)
    torch.testing.assert_close(permuted, update[order], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(shuffled, state[:, order], rtol=1e-5, atol=1e-7)


@compiler
def test_it_is_compiled_where_it_can_be(monkeypatch):
    calls, step = [], fused.FusedLSTM.step_
    monkeypatch.setattr(fused.FusedLSTM, "step_", lambda *given: calls.append(given) or step(*given))
    for dtype, wanted in ((torch.float64, 0), (torch.float32, 1)):
        rule = make("paper", dtype)
        rule.step_(*drawn(rule, 5, dtype))
        assert len(calls) == wanted


@compiler
@pytest.mark.parametrize("name", LSTMS)
def test_compiled_a_coordinate_has_the_same_bits_wherever_it_stands(name):
    rule = make(name)
    gradient, state = drawn(rule, 100)
    parts = [state[:, :37].clone(), state[:, 37:].clone()]
    updates = [rule.step_(gradient[:37], parts[0]), rule.step_(gradient[37:], parts[1])]
    assert torch.equal(rule.step_(gradient, state), torch.cat(updates))
    assert torch.equal(state, torch.cat(parts, 1))


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("name", RULES)
def test_nothing_is_recorded_for_a_backward_pass(name):
    rule = make(name)
    gradient, state = drawn(rule, 5)
    update = rule.step_(gradient.requires_grad_(), state)
    assert not update.requires_grad and not state.requires_grad and torch.is_grad_enabled()
    assert all(p.grad is None and p.requires_grad for p in rule.parameters())


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("name", LSTMS)
def test_the_weights_are_those_of_the_moment_wherever_they_lie(name):
    rule, other = make(name), make(name)
    with torch.no_grad():
        for k, (p, q) in enumerate(zip(rule.parameters(), other.parameters(), strict=True)):
            p.mul_(0.5 + 0.1 * k)
            q.data = p.t().contiguous().t() if p.dim() == 2 else p.clone()
    gradient, state = drawn(rule, 40)
    want, after = rule(gradient, state)
    for one in (rule, other):
        found = state.clone()
        torch.testing.assert_close(one.step_(gradient, found), want.detach(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found, after.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("name", ["paper", "three-layers", "rnnprop"])
def test_over_hundreds_of_steps_it_stays_with_float64(name):
    rule, exact = make(name), make(name, torch.float64)
    state = rule.init_state(20)
    reference = exact.init_state(20, dtype=torch.float64)
    g = torch.Generator().manual_seed(3)
    for _ in range(300):
        gradient = torch.randn(20, generator=g) * 0.1
        update, want = rule.step_(gradient, state), exact.step_(gradient.double(), reference)
    torch.testing.assert_close(update.double(), want, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(state.double(), reference, rtol=1e-4, atol=1e-5)


EXTREMES = [0.0, -0.0, 1e-45, -1e-38, 1e-30, -1e30, 3e38, -3e38]


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("name", LSTMS)
@pytest.mark.parametrize("cell", [0.0, -100.0, 1e4])
def test_gradients_and_cells_at_the_ends_of_float32_saturate(name, cell):
    rule, exact = make(name), make(name, torch.float64)
    gradient = torch.tensor(EXTREMES * 5)
    state = possible(rule, torch.full((rule.state_size, len(gradient)), cell).clamp_(-1.0, 1.0))
    of_layers = state[: 2 * rule.num_layers * rule.hidden_size].unflatten(0, (rule.num_layers, 2, rule.hidden_size))
    of_layers[:, 1] = cell
    want, after = exact(gradient.double(), state.double())
    update = rule.step_(gradient, state)
    assert of_layers[:, 0].abs().max() <= 1 and state.isfinite().all()
    torch.testing.assert_close(update.double(), want.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(state.double(), after.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("where", [0, 16, 40])
@pytest.mark.parametrize("name", RULES)
def test_nan_comes_through_to_its_own_coordinate_alone(name, where):
    rule = make(name)
    gradient, state = drawn(rule, 41)
    clean, clean_state = gradient.clone(), state.clone()
    gradient[where] = math.nan
    found = [rule.step_(gradient, state), rule.step_(gradient, state)][-1]  # Swap has it in its second step
    want = [rule.step_(clean, clean_state), rule.step_(clean, clean_state)][-1]
    others = torch.arange(41) != where
    assert found[where].isnan() and torch.equal(found[others], want[others])
    assert torch.equal(state[:, others], clean_state[:, others])


@compiler
def test_the_number_of_threads_makes_no_difference():
    rule, runs, threads = make("paper"), [], torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            gradient, state = drawn(rule, 5000)
            runs.append((rule.step_(gradient, state), state))
    finally:
        torch.set_num_threads(threads)
    for update, state in runs[1:]:
        assert torch.equal(update, runs[0][0]) and torch.equal(state, runs[0][1])


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("of_rule, of_gradient", [(torch.float64, torch.float32), (torch.float32, torch.float64)])
def test_a_gradient_of_another_dtype_than_the_rules_is_refused(of_rule, of_gradient):
    rule = make("paper", of_rule)
    gradient, state = drawn(rule, 5, of_gradient)
    kept = copy.deepcopy(state)
    with pytest.raises(RuntimeError, match="dtype"):
        rule.step_(gradient, state)
    assert torch.equal(state, kept)
