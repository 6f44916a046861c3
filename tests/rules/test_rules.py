"""What holds for every rule: `forward`, the unroll that knows nothing of speed, and the hand-written one agree."""

import copy
import math

import pytest
import torch
from torch import nn

from lightning_l2l.rules import CoordinatewiseLSTM, RNNprop
from lightning_l2l.rules.base import AutogradUnroll, blocks
from optimizers import LSTMS, LearnedMomentum, possible

RULES = {**LSTMS, "own": LearnedMomentum}
N, T = 37, 6


@pytest.fixture(params=RULES)
def rule(request):
    torch.manual_seed(0)
    return RULES[request.param]().double()


@pytest.fixture
def fed(rule):
    g = torch.Generator().manual_seed(1)
    sizes = torch.logspace(-6, 0, T + 1, dtype=torch.float64)[:, None]
    gradients = torch.randn(T + 1, N, dtype=torch.float64, generator=g) * sizes
    weights = [0.5, -1.0, 0.0, 2.0, 30.0, 0.25]
    state = possible(rule, torch.randn(rule.state_size, N, dtype=torch.float64, generator=g))
    return gradients, weights, state


def by_autograd(rule, gradients, weights, state, beside=None):
    updates = []
    for gradient in gradients[:-1]:
        update, state = rule(gradient, state)
        updates.append(update)
    updates = torch.stack(updates)
    total = sum(w * g @ moved for w, g, moved in zip(weights, gradients[1:], updates.cumsum(0), strict=True))
    if beside is not None:
        total = total + (beside * updates).sum()
    return updates.detach(), state.detach(), torch.autograd.grad(total, list(rule.parameters()))


def unrolled(unroller, gradients, weights, state, beside=None):
    after = state.clone()
    unroller.begin(after)
    updates = torch.stack([unroller.step(g, after).clone() for g in gradients[:-1]])
    return updates, after, unroller.gradients(gradients, weights, beside)


@pytest.mark.parametrize("memory", ["fast", "flat"])
@pytest.mark.parametrize("block", [1, 8, 36, None])
def test_unroll_equals_autograd(rule, fed, memory, block):
    want = by_autograd(rule, *fed)
    unroller = rule.unroller(N, T, memory=memory, block=block)
    for _ in range(2):  # its buffers serve again
        got = unrolled(unroller, *fed)
        torch.testing.assert_close(got[0], want[0], rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(got[1], want[1], rtol=1e-12, atol=1e-13)
        for a, b, (name, p) in zip(got[2], want[2], rule.named_parameters(), strict=True):
            assert a.shape == p.shape, name
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("unroll", [lambda rule: rule.unroller(N, T, block=8), lambda rule: AutogradUnroll(rule, N)])
def test_what_is_beside_the_losses_adds_to_the_cotangents(rule, fed, unroll):
    beside = torch.randn(T, N, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    want, without = by_autograd(rule, *fed, beside), by_autograd(rule, *fed)
    got = unrolled(unroll(rule), *fed, beside)
    for a, b, other in zip(got[2], want[2], without[2], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
        assert not torch.allclose(a, other)


def test_generic_unroll_equals_autograd(rule, fed):
    want = by_autograd(rule, *fed)
    got = unrolled(AutogradUnroll(rule, N, block=10), *fed)
    for a, b in zip((*got[:2], *got[2]), (*want[:2], *want[2]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def as_if_joined(rule, gradients, weights, first):
    """By autograd, coordinates n of their own from step first[n] on: updates, states, gradients of the rule."""
    rule = copy.deepcopy(rule)
    rule.wait_for_gradient = False
    updates, after = torch.zeros_like(gradients[:-1]), rule.init_state(N, dtype=gradients.dtype)
    totals = [torch.zeros_like(p) for p in rule.parameters()]
    has_clock = isinstance(rule, RNNprop) and rule.state_size % 2
    if has_clock:  # it goes on from the start
        after[-1] = T
    for s in range(T):
        one = first == s
        state = rule.init_state(int(one.sum()), dtype=gradients.dtype)
        if has_clock:
            state[-1] = s
        updates[s:, one], after[:, one], found = by_autograd(rule, gradients[s:, one], weights[s:], state)
        totals = [total + part for total, part in zip(totals, found, strict=True)]
    return updates, after, totals


@pytest.mark.parametrize("waits", [True, False])
def test_a_coordinate_waits_for_its_first_gradient(rule, fed, waits):
    gradients, weights, _ = fed
    first = torch.arange(N) % (T + 2)  # T: there is no update after the last gradient; T + 1: never
    late = gradients.where(torch.arange(T + 1)[:, None] >= first, 0.0)
    late[3, first < 3] = 0.0  # a zero that comes later is a gradient as any other
    rule.wait_for_gradient = waits
    state, low = rule.init_state(N, dtype=torch.float64), copy.deepcopy(rule).float()
    found = [(1e-12, by_autograd(rule, late, weights, state))]
    want = as_if_joined(rule, late, weights, first) if waits else found[0][1]
    for memory, one, bound in (("fast", rule, 1e-12), ("flat", rule, 1e-12), ("auto", low, 1e-5)):
        dtype, unroller = one.like.dtype, one.unroller(N, T, memory=memory, block=16)
        unrolled(unroller, gradients.to(dtype), weights, state.to(dtype))  # its buffers serve again
        found.append((bound, unrolled(unroller, late.to(dtype), weights, state.to(dtype))))
    for bound, got in found:
        for a, b in zip((*got[:2], *got[2]), (*want[:2], *want[2]), strict=True):
            assert (a - b).norm() <= bound * b.norm()
        assert not waits or (got[0][torch.arange(T)[:, None] < first] == 0).all()


def test_gradients_are_not_changed(rule, fed):
    before = fed[0].clone()
    for memory in ("fast", "flat"):
        unrolled(rule.unroller(N, T, memory=memory), *fed)
    assert torch.equal(fed[0], before)


def test_coordinates_are_independent(rule, fed):
    gradients, _, state = fed
    order = torch.randperm(N, generator=torch.Generator().manual_seed(2))
    update, after = rule(gradients[0], state)
    permuted, after_permuted = rule(gradients[0][order], state[:, order])
    torch.testing.assert_close(permuted, update[order])
    torch.testing.assert_close(after_permuted, after[:, order])


def test_forward_matches_torch_lstm():
    torch.manual_seed(0)
    rule = CoordinatewiseLSTM(hidden_size=6, num_layers=2, preprocessing="identity", output_scale=0.5)
    lstm = nn.LSTM(1, 6, 2)
    with torch.no_grad():
        for name, parameter in lstm.named_parameters():
            kind, _, layer = name.partition("_l")
            if kind == "bias_hh":
                parameter.zero_()
            else:
                parameter.copy_(getattr(rule, f"{'bias' if kind == 'bias_ih' else kind}_l{layer}"))
    g = torch.randn(T, N)
    want = 0.5 * rule.readout(lstm(g[..., None])[0])[..., 0]
    state = rule.init_state(N)
    for t in range(T):
        update, state = rule(g[t], state)
        torch.testing.assert_close(update, want[t])


def test_float32_stays_close_to_float64():
    torch.manual_seed(0)
    rule = CoordinatewiseLSTM()
    g, w = torch.randn(21, 500) * 0.1, [1.0] * 20
    low = unrolled(rule.unroller(500, 20), g, w, rule.init_state(500))
    exact = copy.deepcopy(rule).double()
    high = unrolled(exact.unroller(500, 20), g.double(), w, exact.init_state(500, dtype=torch.float64))
    torch.testing.assert_close(low[0].double(), high[0], rtol=1e-4, atol=1e-7)
    for a, b in zip(low[2], high[2], strict=True):
        assert (a.double() - b).norm() < 1e-5 * b.norm()


def tensors(block):
    return [block.x[0], block.cells[0][0], block.steps[0][0].gates]


def test_auto_memory_goes_by_its_budget():
    rule = CoordinatewiseLSTM().double()  # compiled, activations are never kept
    kept = 1000 * rule.shape.floats_kept(20) * 8
    unroller = rule.unroller(1000, 20, budget=kept)
    held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for b in unroller.kept for t in tensors(b)}
    assert not unroller.flat and sum(held.values()) == kept
    assert rule.unroller(1000, 20, budget=kept - 1).flat


def test_forget_bias_starts_the_forget_gates():
    rule = CoordinatewiseLSTM(hidden_size=4, forget_bias=2.5)
    for _, _, bias in rule.layers():
        assert (bias[4:8] == 2.5).all() and (bias[:4] != 2.5).all()


def test_gradients_before_the_last_step_are_refused():
    unroller = CoordinatewiseLSTM().unroller(3, 2)
    unroller.begin(torch.zeros(80, 3))
    with pytest.raises(RuntimeError, match="0 of 2"):
        unroller.gradients(torch.zeros(3, 3), [1.0, 1.0])


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"hidden_size": 0}, "hidden_size=0"),
        ({"num_layers": -1}, "num_layers=-1"),
        ({"p": 0}, "p=0"),
        ({"p": -3.0}, "p=-3.0"),
        ({"p": math.inf}, "p=inf"),
        ({"p": math.nan}, "p=nan"),
        ({"output_scale": 0.0}, "output_scale=0.0"),
        ({"preprocessing": "log"}, "log_and_sign, identity"),
        ({"wait_for_gradient": 0}, "wait_for_gradient=0 is neither True nor False"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        CoordinatewiseLSTM(**arguments)


@pytest.mark.parametrize("total, largest", [(1, 4), (15910, 4096), (4096, 4096), (4097, 4096), (7, 3)])
def test_blocks_cover_everything_once(total, largest):
    parts = list(blocks(total, largest))
    assert [i for part in parts for i in range(part.start, part.stop)] == list(range(total))
    assert all(part.stop - part.start <= largest for part in parts)


def test_the_bound_of_rnnprop_rises_and_falls_as_asked_for_and_the_time_is_an_input():
    torch.manual_seed(0)
    plain, gradients = RNNprop(hidden_size=3, num_layers=1), torch.randn(9, 5)
    timed, factors = (
        RNNprop(3, 1, time=True),
        {
            "decay": (4, [(1 + t / 4) ** -0.5 for t in range(1, 10)]),
            "horizon": (5, [1, 0.81, 0.62, 0.43, 0.24, 0.05, 0.05, 0.05, 0.05]),
            "warmup": (4, [0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 1]),
        },
    )
    changing = [RNNprop(3, 1, **{name: given}) for name, (given, _) in factors.items()]
    for rule in changing:
        rule.load_state_dict(plain.state_dict())
    states = [rule.init_state(5) for rule in (plain, *changing, timed)]
    for t, gradient in enumerate(gradients, 1):
        want, states[0] = plain(gradient, states[0])
        for k, (rule, (_, wanted)) in enumerate(zip(changing, factors.values(), strict=True), 1):
            found, states[k] = rule(gradient, states[k])
            torch.testing.assert_close(found, want * wanted[t - 1])
        _, states[-1] = timed(gradient, states[-1])
        assert all(state[-1].tolist() == [t] * 5 for state in states[1:])
    with torch.no_grad():
        timed.input.weight[:, :2] = timed.input.bias[:] = 0
        timed.input.weight[:, 2] = 1
    seen = []
    timed.input.register_forward_hook(lambda layer, given, made: seen.append(made))
    timed(gradients[0], states[-1])
    torch.testing.assert_close(seen[0], torch.full((5, 3), math.log(11) / 4 - 1))
