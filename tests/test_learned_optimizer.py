"""What LearnedOptimizer promises beyond the contract of torch.optim, which is in test_optim.py."""

import copy
import math
import re
import warnings
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from torch import nn

from lightning_l2l import CoordinatewiseLSTM, LearnedOptimizer, NormalizedMLP, Quadratic, RNNprop, RuleGroups
from lightning_l2l.evaluation.rollout import rollout
from lightning_l2l.meta.first_order import FirstOrder
from lightning_l2l.meta.unroll import Unroll
from lightning_l2l.rules import UpdateRule
from lightning_l2l.rules.describe import describe
from lightning_l2l.rules.files import load_rule, save_rule
from lightning_l2l.rules.tensors import Moment
from lightning_l2l.tasks import MLP, NetworkTask
from optimizers import (
    SHAPES,
    LearnedMomentum,
    Momentum,
    assert_same,
    feed,
    gradients,
    normal,
    parameters,
    through_a_file,
    values,
)


class Sign(UpdateRule):
    """A rule with neither meta-parameters nor state."""

    state_size = 0

    def forward(self, gradient, state):
        return -0.25 * gradient.sign(), state


class Counting(CoordinatewiseLSTM):
    """Notes how many coordinates each of its calls has."""

    def step_(self, gradient, state):
        self.calls.append(len(gradient))
        return super().step_(gradient, state)


@pytest.fixture
def rule():
    torch.manual_seed(0)
    rule = CoordinatewiseLSTM(hidden_size=4, output_scale=0.5)
    for name, parameter in rule.named_parameters():
        if "bias" in name:
            nn.init.zeros_(parameter)  # so that updates have either sign
    return rule


def zeros(shapes=SHAPES):
    return [nn.Parameter(torch.zeros(shape)) for shape in shapes]


def states(optimizer):
    return [state["rule_state"].clone() for state in optimizer.state.values()]


# ---- the rule's updates ----


def network_batch(num_tasks):
    g = torch.Generator().manual_seed(2)
    inputs = torch.randn(num_tasks, 11, 8, 5, generator=g)
    targets = torch.randint(0, 3, (num_tasks, 11, 8), generator=g, dtype=torch.uint8)
    return {"inputs": inputs, "targets": targets, "seed": torch.arange(num_tasks)}


def quadratic_batch(num_tasks):
    g = torch.Generator().manual_seed(2)
    W, y = torch.randn(num_tasks, 4, 4, generator=g), torch.randn(num_tasks, 4, generator=g)
    return {"W": W, "y": y, "seed": torch.arange(num_tasks)}


@pytest.mark.parametrize("waits", [True, False])
@pytest.mark.parametrize("make", [CoordinatewiseLSTM, RNNprop, partial(RNNprop, time=True, warmup=3)])
def test_rows_of_an_embedding_that_never_appear_stay(make, waits):
    torch.manual_seed(0)
    rule = make(hidden_size=4, wait_for_gradient=waits)
    net = nn.Sequential(nn.Embedding(6, 3, padding_idx=0), nn.Linear(3, 2))
    inputs, targets = torch.randint(1, 4, (2, 9, 8)), torch.randint(0, 2, (2, 9, 8))
    unroll = Unroll(NetworkTask(net), rule)
    episode = unroll.start({"inputs": inputs, "targets": targets, "seed": torch.arange(2)})
    before = episode.params["0.weight"].clone()
    unroll.run(episode, 8)
    moved = [(episode.params["0.weight"] != before).any(2).any(0)]
    optimizer, before = LearnedOptimizer(net.parameters(), rule), net[0].weight.detach().clone()
    for x, y in zip(inputs[0], targets[0], strict=True):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        optimizer.step()
    moved.append((net[0].weight != before).any(1))
    for found in moved:
        assert found.tolist() == [not waits, True, True, True, not waits, not waits]


@pytest.mark.parametrize("memory", ["fast", "flat"])
@pytest.mark.parametrize("which", ["quadratic", "network", "batch-norm"])
def test_the_trajectory_is_that_of_meta_training(rule, which, memory):
    if which == "quadratic":
        task, batch = Quadratic(4), quadratic_batch(3)
    elif which == "network":
        task, batch = NetworkTask(MLP(5, 4, out_features=3)), network_batch(3)
    else:
        net = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 3))
        task, batch = NetworkTask(net), network_batch(2)
    unroll = Unroll(task, rule, FirstOrder(memory))
    episode = unroll.start(batch)
    trained = torch.cat([unroll.run(episode, 5).losses for _ in range(2)])
    deployed = rollout(lambda p: LearnedOptimizer(p, rule), task, batch, 10, torch.device("cpu"))
    torch.testing.assert_close(deployed.losses[1:], trained, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_updates_are_the_rules_own_in_float32_and_rounded_once(rule, dtype):
    params = parameters(dtype)
    optimizer = LearnedOptimizer(params, rule)
    wanted = [rule.init_state(p.numel()) for p in params]
    for t in range(4):
        before = values(params)
        feed(optimizer, params, gradients(params, 1, seed=t))
        for k, (p, start) in enumerate(zip(params, before, strict=True)):
            update = rule.step_(p.grad.float().flatten(), wanted[k]).view(p.shape)
            torch.testing.assert_close(p.detach(), (start + update).to(dtype), rtol=1e-6, atol=1e-7)
            torch.testing.assert_close(optimizer.state[p]["rule_state"], wanted[k], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_the_state_has_the_rules_dtype_and_is_there_from_the_first_gradient_on(rule, dtype):
    for wanted, rule_ in (
        (torch.float32, rule),
        (torch.float64, copy.deepcopy(rule).double()),
        (torch.float32, Sign()),
    ):
        params = parameters(dtype)
        optimizer = LearnedOptimizer(params, rule_)
        assert not optimizer.state
        params[0].grad = torch.ones_like(params[0])
        optimizer.step()
        assert list(optimizer.state) == params[:1]
        feed(optimizer, params, gradients(params, 1))
        twin = LearnedOptimizer(params, rule_)
        twin.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        for one in (optimizer, twin):
            for p in params:
                (state,) = one.state[p].values()
                assert state.dtype == wanted and state.shape == (rule_.state_size, p.numel())


def test_a_rule_without_state_or_meta_parameters_will_do():
    (p,) = params = zeros([(3,)])
    optimizer = LearnedOptimizer(params, Sign(), lr=0.5)
    p.grad = torch.tensor([2.0, 0.0, -3.0])
    optimizer.step()
    assert p.tolist() == [-0.125, 0.0, 0.125]


def test_all_parameters_go_through_the_rule_in_one_call():
    rule = Counting(hidden_size=2)
    rule.calls = []
    params = parameters()
    total = sum(p.numel() for p in params)
    optimizer = LearnedOptimizer([{"params": params[:2], "lr": 0.5}, {"params": params[2:]}], rule)
    feed(optimizer, params, gradients(params, 2))
    assert rule.calls == [total, total]
    late = nn.Parameter(torch.zeros(7))
    optimizer.add_param_group({"params": [late]})
    feed(optimizer, [*params, late], gradients([*params, late], 1))
    assert sorted(rule.calls[2:]) == [7, total]
    optimizer.load_state_dict(optimizer.state_dict())
    feed(optimizer, [*params, late], gradients([*params, late], 1))
    assert rule.calls[4:] == [total + 7]


def test_the_rule_is_not_trained_and_two_optimizers_may_share_it(rule):
    before = copy.deepcopy(rule.state_dict())
    first, second, wanted = parameters(), parameters(), parameters()
    optimizers = [LearnedOptimizer(first, rule), LearnedOptimizer(second, rule)]
    for t in range(3):
        for optimizer, params in zip(optimizers, (first, second), strict=True):
            feed(optimizer, params, gradients(params, 1, seed=t))
    alone = LearnedOptimizer(wanted, copy.deepcopy(rule))
    for t in range(3):
        feed(alone, wanted, gradients(wanted, 1, seed=t))
    assert_same(first, wanted)
    assert_same(second, wanted)
    assert_same(list(rule.state_dict().values()), list(before.values()))
    assert all(p.grad is None for p in rule.parameters())


def test_the_rule_may_be_a_name_or_a_file(rule, tmp_path):
    save_rule(rule, tmp_path / "own.npz")
    found, wanted = parameters(), parameters()
    feed(LearnedOptimizer(found, tmp_path / "own.npz"), found, gradients(found, 3))
    feed(LearnedOptimizer(wanted, rule), wanted, gradients(wanted, 3))
    assert_same(found, wanted)
    assert LearnedOptimizer(found, "mnist").rule.hidden_size == 20
    default, shipped = LearnedOptimizer(found).rule, load_rule("general")
    assert_same(list(default.state_dict().values()), list(shipped.state_dict().values()))
    assert describe(default) == describe(shipped)


@pytest.mark.parametrize("maximize", [False, True])
def test_a_shipped_rule_descends_and_when_told_to_climbs(maximize):
    (p,) = params = [nn.Parameter(normal(10, seed=0))]
    W, y = normal(10, 10, seed=1), normal(10, seed=2)
    optimizer, losses = LearnedOptimizer(params, "quadratic", maximize=maximize), []
    for _ in range(30):
        loss = (W @ p - y).square().sum()
        optimizer.zero_grad()
        (-loss if maximize else loss).backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]


# ---- options ----


@pytest.mark.parametrize("lr", [0.0, 0.1, 0.5, 3.0, torch.tensor(0.1), torch.tensor([0.5])])
def test_lr_multiplies_the_update_and_does_nothing_to_the_state(rule, lr):
    moved, found = [], []
    for factor in (1.0, lr):
        params = zeros()
        optimizer = LearnedOptimizer(params, rule, lr=factor)
        feed(optimizer, params, gradients(params, 1))
        moved.append(values(params))
        found.append(states(optimizer))
    assert_same(moved[1], [float(lr) * update for update in moved[0]])
    assert_same(*found)
    assert moved[0][0].abs().min() > 0


def test_one_cycle_has_no_momentum_to_cycle(rule):
    optimizer, lrs = LearnedOptimizer(parameters(), rule), []
    with pytest.raises(ValueError, match="must support momentum or beta1 with `cycle_momentum` option"):
        torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1.0, total_steps=10)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1.0, total_steps=10, cycle_momentum=False)
    for _ in range(9):
        optimizer.step()
        scheduler.step()
        lrs.append(optimizer.param_groups[0]["lr"])
    assert max(lrs) == 1.0 and lrs[-1] < 0.01  # a schedule may end where nobody may begin


@pytest.mark.parametrize("lr", [1.0, 0.5, torch.tensor(0.5)])
def test_max_update_bounds_each_coordinate_before_lr_and_in_its_group_alone(rule, lr):
    free, bounded = zeros(), zeros()
    feed(LearnedOptimizer(free, rule), free, gradients(free, 1))
    bound = 0.5 * free[4].detach().abs().median().item()
    groups = [{"params": bounded[:3]}, {"params": bounded[3:], "max_update": bound}]
    feed(LearnedOptimizer(groups, rule, lr=lr), bounded, gradients(bounded, 1))
    wanted = [lr * (p if k < 3 else p.clamp(-bound, bound)) for k, p in enumerate(values(free))]
    assert_same(values(bounded), wanted)
    assert (bounded[4].min(), bounded[4].max()) == (-float(lr) * bound, float(lr) * bound)
    assert bounded[0].abs().max() > float(lr) * bound


@pytest.mark.parametrize(
    "options, message",
    [
        ({"lr": -1.0}, r"lr=-1\.0 is not 0 or more"),
        ({"lr": math.nan}, "lr=nan is not 0 or more"),
        ({"lr": torch.tensor(-0.5)}, "is not 0 or more"),
        ({"lr": torch.ones(2)}, r"lr of shape \[2\] is not one number"),
        ({"weight_decay": -0.5}, r"weight_decay=-0\.5 is not 0 or more"),
        ({"weight_decay": math.nan}, "weight_decay=nan is not 0 or more"),
        ({"max_update": 0.0}, r"max_update=0\.0 is not above 0"),
        ({"max_update": -1.0}, r"max_update=-1\.0 is not above 0"),
        ({"max_update": math.nan}, "max_update=nan is not above 0"),
    ],
)
def test_options_out_of_their_range_are_refused_wherever_they_are_given(rule, options, message):
    params = parameters()
    with pytest.raises(ValueError, match=message):
        LearnedOptimizer(params, rule, **options)
    with pytest.raises(ValueError, match=message):
        LearnedOptimizer([{"params": params, **options}], rule)
    optimizer = LearnedOptimizer(params[:2], rule)
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": params[2:], **options})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize(
    "options, message",
    [
        (
            {"betas": (0.9, 0.99)},
            r"betas=\(0\.9, 0\.99\) is no .* Remove betas, or use one of params, rule, lr, num_steps",
        ),
        ({"foreach": True}, r"foreach=True is no argument .* max_update, skip_nonfinite, fallback_lr$"),
        ({"learning_rate": 0.1}, r"learning_rate=0\.1 is no argument of LearnedOptimizer"),
    ],
)
def test_arguments_of_other_optimizers_are_refused_by_name(rule, options, message):
    with pytest.raises(TypeError, match=message):
        LearnedOptimizer(parameters(), rule, **options)


def mixed(one, other):
    return RuleGroups({"a": one, "b": other})


@pytest.mark.parametrize(
    "options, groups, message",
    [
        ({"lr": 0.001}, [{}, {}], r"lr=0\.001 is a factor .* Leave lr out; where the loss jumps, use 0\.1$"),
        ({"lr": torch.tensor(0.001)}, [{}, {}], r"lr=0\.001 is a factor"),
        ({"lr": 0.001, "weight_decay": 0.1}, [{"lr": 0}, {}], r"lr=0\.001 is a factor"),  # the first thing alone
        ({}, [{"lr": 0.001}, {"lr": 0.005}], r"lr=0\.005 is a factor"),
        ({"lr": 0.001}, [{"lr": 1.0}, {}], None),
        ({"lr": 0.0}, [{}, {}], None),
        ({"lr": 0.01}, [{}, {}], None),
        ({"weight_decay": 0.1}, [{}, {}], r"weight_decay=0\.1 takes 10 % off each .* AdamW's, such as 0\.0001$"),
        ({"lr": 0.1}, [{}, {"weight_decay": 0.01}], r"weight_decay=0\.01 takes 0\.1 % off each parameter"),
        ({"lr": torch.tensor(1.0), "weight_decay": 0.1}, [{}, {}], r"weight_decay=0\.1 takes 10 %"),
        ({"weight_decay": 0.005}, [{}, {}], None),
        ({"weight_decay": 0.1}, [{"lr": 0.0}, {"weight_decay": 0.0}], None),
        ({}, [{"betas": (0.9, 0.999)}, {"eps": 1e-8}], r"a group of parameters has betas, eps: .* Remove it$"),
        ({}, [{"momentum": 0}, {"name": "head", "initial_lr": 1.0}], None),
    ],
)
def test_values_that_are_meant_for_adam_are_warned_of_once(rule, options, groups, message):
    groups = [{"params": [p], **group} for p, group in zip(zeros([(2,), (3,)]), groups, strict=True)]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer = LearnedOptimizer(groups, rule, **options)
        told = [one for one in caught]
        optimizer.add_param_group({"params": zeros([(4,)]), "lr": 0.001})
        optimizer.load_state_dict(optimizer.state_dict())
        copy.deepcopy(optimizer).step()
    assert len(caught) == len(told) == (message is not None)
    for one in told:
        assert one.category is UserWarning and one.filename == __file__
        assert re.search(message, str(one.message)), one.message


def test_a_large_weight_decay_is_no_habit_where_a_rule_sees_its_tensor(rule):
    sees = NormalizedMLP(hidden_size=0)
    for which, warns in ((sees, False), (mixed(sees, sees), False), (mixed(sees, rule), True)):
        named = [("a", nn.Parameter(torch.zeros(2))), ("b", nn.Parameter(torch.zeros(3)))]
        with pytest.warns(UserWarning, match=r"weight_decay=0\.1 takes") if warns else nullcontext():
            LearnedOptimizer(named, which, weight_decay=0.1)


@pytest.mark.parametrize("lr", [1.0, 0.25])
@pytest.mark.parametrize("decay", [0.01, 0.1])
def test_where_a_rule_sees_its_tensor_lr_is_a_factor_and_weight_decay_that_of_adamw(decay, lr):
    rule, at_rest, wanted = NormalizedMLP(hidden_size=0), zeros([(2, 3)]), zeros([(2, 3)])
    feed(LearnedOptimizer(at_rest, rule, lr=lr, num_steps=50), at_rest, gradients(at_rest, 50))
    feed(LearnedOptimizer(wanted, rule, num_steps=50), wanted, gradients(wanted, 50))
    assert_same(values(at_rest), [lr * p for p in values(wanted)], exact=False)

    params, wanted = ([nn.Parameter(torch.ones(2, 3))] for _ in range(2))
    optimizer = LearnedOptimizer(params, rule, lr=lr, num_steps=50, weight_decay=decay)
    adamw = torch.optim.AdamW(wanted, weight_decay=decay)
    for step in range(50):
        adamw.param_groups[0]["lr"] = lr * float(rule.rate(Moment(torch.tensor([step]), torch.tensor([50]))))
        feed(optimizer, params, [[torch.zeros(2, 3)]])
        feed(adamw, wanted, [[torch.zeros(2, 3)]])
    assert_same(params, wanted, exact=False)
    assert 0.2 * lr * decay < 1 - params[0].detach().min() < lr * decay


def sparse(p):
    p.grad = torch.ones(p.shape).to_sparse()


def of_embedding(p):
    nn.functional.embedding(torch.tensor([1]), p, sparse=True).sum().backward()


@pytest.mark.parametrize("give", [sparse, of_embedding])
def test_sparse_gradients_are_refused_before_anything_changes(rule, give):
    params = parameters(shapes=[(3,), (4, 2)])
    optimizer = LearnedOptimizer(params, rule)
    feed(optimizer, params, gradients(params, 1))
    before, found = values(params), states(optimizer)
    params[1].grad = None
    give(params[1])
    with pytest.raises(RuntimeError, match=r"gradient of shape \[4, 2\] is sparse; .* another optimizer"):
        optimizer.step()
    assert_same(values(params), before)
    assert_same(states(optimizer), found)


def test_complex_parameters_are_refused_once_they_have_a_gradient(rule):
    p = nn.Parameter(torch.ones(3, dtype=torch.complex64))
    optimizer = LearnedOptimizer([p], rule)
    optimizer.step()
    p.abs().sum().backward()
    with pytest.raises(RuntimeError, match=r"gradient of shape \[3\] is complex; .* another optimizer"):
        optimizer.step()


# ---- loading ----


def test_a_loaded_state_is_a_copy_of_its_own(rule):
    params, straight, twins = parameters(), parameters(), parameters()
    feed(LearnedOptimizer(straight, rule), straight, gradients(straight, 3))
    optimizer = LearnedOptimizer(params, rule)
    feed(optimizer, params, gradients(params, 3))
    twin = LearnedOptimizer(twins, rule)
    twin.load_state_dict(optimizer.state_dict())  # of the living optimizer
    kept = states(optimizer)
    feed(twin, twins, gradients(twins, 2, seed=7))
    assert_same(states(optimizer), kept)
    assert not any(torch.equal(a, b) for a, b in zip(states(twin), kept, strict=True) if a.numel())
    assert_same(params, straight)
    own = optimizer.state_dict()
    optimizer.load_state_dict(own)
    feed(optimizer, params, gradients(params, 1))
    assert_same([own["state"][k]["rule_state"] for k in range(len(params))], kept)


@pytest.mark.parametrize("what", ["rule", "model"])
def test_the_state_of_another_rule_or_model_is_refused_and_nothing_changes(rule, what):
    params = parameters()
    optimizer = LearnedOptimizer(params, rule)
    feed(optimizer, params, gradients(params, 1))
    before, found = values(params), states(optimizer)
    strangers = parameters() if what == "rule" else parameters(shapes=[(6,), *SHAPES[1:]])
    stranger = LearnedOptimizer(strangers, CoordinatewiseLSTM(hidden_size=3) if what == "rule" else rule, lr=0.5)
    feed(stranger, strangers, gradients(strangers, 1))
    saved = stranger.state_dict()
    del saved["param_groups"][0]["made_by"]  # as of a version that did not say which rule it was
    message = {"rule": r"shape \[12, 12\] .* shape \[3, 4\], which takes \[16, 12\]", "model": r"\[16, 6\] .* \[3, 4\]"}
    with pytest.raises(ValueError, match=rf"{message[what]}.* saved with another rule or another model"):
        optimizer.load_state_dict(saved)
    assert_same(values(params), before)
    assert_same(states(optimizer), found)
    assert optimizer.param_groups[0]["lr"] == 1.0


def test_the_state_of_another_rule_is_refused_even_where_it_would_fit():
    named = lambda: zip("ab", zeros([(2,), (3,)]), strict=True)  # noqa: E731
    lstms = [CoordinatewiseLSTM(hidden_size=4) for _ in range(2)]
    rules = [*lstms, RNNprop(hidden_size=4), Momentum(), LearnedMomentum(), mixed(*lstms), mixed(*lstms[::-1])]
    saved = [LearnedOptimizer(named(), one).state_dict() for one in rules]
    for k, one in enumerate(rules):
        for state in saved[:k] + saved[k + 1 :]:
            optimizer = LearnedOptimizer(named(), copy.deepcopy(one), lr=0.5)
            with pytest.raises(ValueError, match=r"another rule, '.*', and the optimizer has '.*remove 'made_by' from"):
                optimizer.load_state_dict(state)
            assert optimizer.param_groups[0]["lr"] == 0.5
        optimizer = LearnedOptimizer(named(), copy.deepcopy(one).double().float(), lr=0.5)
        optimizer.load_state_dict(through_a_file(saved[k]))
        assert optimizer.param_groups[0]["lr"] == 1.0 and "made_by" not in optimizer.param_groups[0]


@pytest.mark.parametrize("make", [torch.optim.Adam, torch.optim.SGD])
@pytest.mark.parametrize("steps", [0, 2])
def test_the_state_of_adam_is_refused(rule, make, steps):
    params, strangers = parameters(), parameters()
    optimizer, stranger = LearnedOptimizer(params, rule), make(strangers, lr=0.001)
    feed(stranger, strangers, gradients(strangers, steps))
    name = {(torch.optim.Adam, 2): "step, exp_avg, exp_avg_sq", (torch.optim.SGD, 0): "dampening"}.get(
        (make, steps), ""
    )
    with pytest.raises(
        ValueError, match=rf"this state_dict has {name}.*another optimizer saved it, such as Adam.* anew"
    ):
        optimizer.load_state_dict(stranger.state_dict())
    assert optimizer.param_groups[0]["lr"] == 1.0 and not optimizer.state


def test_a_state_given_by_hand_is_used(rule):
    params, wanted = zeros([(3,), (2,)]), zeros([(3,), (2,)])
    optimizer, helper = LearnedOptimizer(params, rule), LearnedOptimizer(wanted, rule)
    feed(optimizer, params, gradients(params, 3))
    feed(helper, wanted, gradients(wanted, 3))
    optimizer.state[params[0]]["rule_state"] = torch.full((16, 3), 0.5)  # another tensor
    optimizer.state[params[1]]["rule_state"].fill_(0.25)  # in place
    helper.load_state_dict(
        {**helper.state_dict(), "state": {k: {"rule_state": torch.full((16, 3 - k), 0.5 / (1 + k))} for k in (0, 1)}}
    )
    feed(optimizer, params, gradients(params, 2, seed=7))
    feed(helper, wanted, gradients(wanted, 2, seed=7))
    assert_same(params, wanted)


# ---- devices ----


def test_each_parameter_has_its_state_on_its_own_device(rule):
    # "meta" has no values, so there is nothing to be finite; but it is a device wherever the tests run.
    params, wanted = parameters(), parameters()
    others = [nn.Parameter(torch.empty(shape, device="meta")) for shape in SHAPES]
    mixed = [p for pair in zip(others, params, strict=True) for p in pair]
    optimizer = LearnedOptimizer(mixed, rule, skip_nonfinite=False)
    for t in range(3):
        for p in others:
            p.grad = torch.ones_like(p)
        feed(optimizer, params, gradients(params, 1, seed=t))
    helper = LearnedOptimizer(wanted, rule)
    for t in range(3):
        feed(helper, wanted, gradients(wanted, 1, seed=t))
    assert_same(params, wanted)
    assert all(optimizer.state[p]["rule_state"].device == p.device for p in mixed)
    assert all(p.device.type == "cpu" for p in optimizer.rule.parameters())


@pytest.mark.cuda
@pytest.mark.parametrize("devices", [["cuda"] * 3, ["cuda", "cpu", "cuda"]])
def test_on_a_gpu_it_goes_where_it_goes_on_the_cpu(rule, devices):
    wanted = parameters(shapes=[(3, 4), (), (5000,)])
    params = [nn.Parameter(p.detach().to(device)) for p, device in zip(wanted, devices, strict=True)]
    for run in (params, wanted):
        optimizer = LearnedOptimizer(run, rule, lr=0.5, weight_decay=2**-8)
        feed(optimizer, run, gradients(run, 5))
        assert all(optimizer.state[p]["rule_state"].device == p.device for p in run)
    torch.testing.assert_close([p.cpu() for p in params], wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.cuda
@pytest.mark.parametrize("way", ["moved", "loaded"])
def test_in_the_middle_it_may_change_to_a_gpu(rule, way):
    params, wanted = parameters(), parameters()
    optimizer, helper = LearnedOptimizer(params, rule), LearnedOptimizer(wanted, rule)
    feed(optimizer, params, gradients(params, 3))
    feed(helper, wanted, gradients(wanted, 3))
    if way == "moved":
        for p in params:
            p.data = p.data.cuda()
    else:
        params, state = [nn.Parameter(p.detach().cuda()) for p in params], optimizer.state_dict()
        optimizer = LearnedOptimizer(params, rule)
        optimizer.load_state_dict(state)
    feed(optimizer, params, gradients(params, 3, seed=7))
    feed(helper, wanted, gradients(wanted, 3, seed=7))
    assert all(state.is_cuda for state in states(optimizer))
    torch.testing.assert_close([p.cpu() for p in params], wanted, rtol=1e-4, atol=1e-5)
