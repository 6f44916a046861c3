"""The contract of torch.optim: the same assertions hold for LearnedOptimizer, whatever its rule, and for Adam.

What is saved, and what PyTorch attaches to an optimizer, is in test_optim_tools.py; LearnedOptimizer's own in
test_learned_optimizer.py.
"""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

from lightning_l2l.rules.kernels.fused import fused_for
from optimizers import assert_same, clones, feed, gradients, learned, normal, parameters, values

# Decays that are odd in use make for clear tests.
pytestmark = pytest.mark.filterwarnings("ignore:weight_decay=.* off each parameter")

BOTH_WAYS = pytest.mark.parametrize("maximize", [False, True])


def alone(make, params, given, **options):
    """Where each parameter goes by itself."""
    found = clones(params)
    for k, p in enumerate(found):
        feed(make([p], **options), [p], [[step[k]] for step in given])
    return found


def exact(make):
    """Products of another size are rounded otherwise, but not by the compiled step, nor where there are none."""
    return make is not learned or fused_for(torch.empty(0)) is not None


def model_and_loss():
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2))
    x = normal(7, 3, seed=2)
    return model, lambda: model(x).square().mean()


# ---- step ----


def test_a_closure_is_called_once_with_gradients_enabled_and_its_loss_is_returned(make):
    runs = []
    for with_closure in (True, False):
        model, loss = model_and_loss()
        optimizer, given = make(model.parameters()), []

        def closure(optimizer=optimizer, loss=loss, given=given):
            assert torch.is_grad_enabled()
            optimizer.zero_grad()
            given.append(loss())
            given[-1].backward()
            return given[-1]

        for count in range(1, 4):
            if with_closure:
                with torch.no_grad():
                    assert optimizer.step(closure) is given[-1] and len(given) == count
                    assert not torch.is_grad_enabled()
            else:
                closure()
                assert optimizer.step() is None
        runs.append(values(model.parameters()))
    assert_same(*runs)


def test_without_any_gradient_nothing_happens(make):
    params = parameters()
    before = values(params)
    optimizer = make(params)
    optimizer.step()
    assert_same(values(params), before)
    assert not optimizer.state_dict()["state"]


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad_clears_the_gradients(make, set_to_none):
    model, loss = model_and_loss()
    optimizer = make(model.parameters())
    loss().backward()
    optimizer.zero_grad(set_to_none=set_to_none)
    assert all(p.grad is None if set_to_none else not p.grad.any() for p in model.parameters())


@BOTH_WAYS
def test_a_step_leaves_gradients_alone_and_marks_parameters_as_changed(make, maximize):
    params = parameters()
    optimizer = make(params, maximize=maximize)
    given = gradients(params, 2)
    feed(optimizer, params, given)
    assert_same([p.grad for p in params], given[-1])
    assert all(p.is_leaf and p.requires_grad for p in params)
    graph = params[0].square().sum()
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        graph.backward()


@pytest.mark.parametrize("seed", range(8))
def test_any_parameters_may_be_without_gradient_in_any_step(make, seed):
    params = parameters()
    given = gradients(params, 8, seed)
    present = torch.rand(8, len(params), generator=torch.Generator().manual_seed(seed)) < 0.6
    given = [[g if p else None for g, p in zip(*pair, strict=True)] for pair in zip(given, present, strict=True)]
    wanted = alone(make, params, given)
    feed(make(params), params, given)
    assert_same(params, wanted, exact(make))


def test_frozen_parameters_do_not_move_and_go_on_from_where_they_were_when_unfrozen(make):
    model, loss = model_and_loss()
    frozen, optimizer = list(model[0].parameters()), make(model.parameters())

    def train():
        before = values(model.parameters())
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
        return [not torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True)]

    model[0].requires_grad_(False)
    assert train() == [False, False, True, True] and not any(p in optimizer.state for p in frozen)
    model[0].requires_grad_(True)
    assert train() == [True] * 4
    states = copy.deepcopy([optimizer.state[p] for p in frozen])
    model[0].requires_grad_(False)
    assert train() == [False, False, True, True]
    for p, state in zip(frozen, states, strict=True):
        assert_same(optimizer.state[p].values(), state.values())


def test_gradients_accumulate_over_backward_passes(make):
    runs = []
    for parts in (1, 2):
        params = parameters(shapes=[(6, 2)])
        optimizer, x = make(params), torch.tensor([[1.0, -2.0], [0.5, 4.0]])
        for _ in range(3):
            optimizer.zero_grad()
            for rows in x.chunk(parts):
                (rows @ params[0].T).sum().backward()
            optimizer.step()
        runs.append(params)
    assert_same(*runs)


@BOTH_WAYS
def test_to_maximize_a_loss_is_to_minimize_minus_it(make, maximize):
    params = parameters()
    given = gradients(params, 4)
    wanted = alone(make, params, [[-g for g in step] for step in given], maximize=not maximize)
    feed(make(params, maximize=maximize), params, given)
    assert_same(params, wanted, exact(make))
    assert not torch.equal(params[0], parameters()[0])


# ---- groups ----


def test_each_group_has_its_own_options(make):
    options = [{"lr": 0.0}, {"lr": 0.25}, {"maximize": True, "lr": 0.5}, {"weight_decay": 0.125}, {}]
    params = parameters()
    given, before, wanted = gradients(params, 4), values(params), []
    for k, p in enumerate(params):
        wanted += alone(make, [p], [[step[k]] for step in given], **options[k])
    feed(make([{"params": [p], **options[k]} for k, p in enumerate(params)]), params, given)
    assert_same(params, wanted, exact(make))
    assert torch.equal(params[0], before[0])


def test_a_group_may_be_added_in_the_middle_and_another_may_be_empty(make):
    params = parameters()
    given = gradients(params, 6)
    wanted = alone(make, params[:3], given[:6]) + alone(make, params[3:], [step[3:] for step in given[3:]], lr=0.5)
    optimizer = make([{"params": []}, {"params": params[:3]}])
    feed(optimizer, params[:3], [step[:3] for step in given[:3]])
    optimizer.add_param_group({"params": params[3:], "lr": 0.5})
    feed(optimizer, params, given[3:])
    assert [len(group["params"]) for group in optimizer.param_groups] == [0, 3, 2]
    assert_same(params, wanted, exact(make))


def test_a_group_that_is_no_dict_or_has_a_parameter_twice_is_refused(make):
    params = parameters()
    optimizer = make(params)
    with pytest.raises(TypeError, match="param_group must be a dict"):
        optimizer.add_param_group(params)
    with pytest.raises(ValueError, match="more than one parameter group"):
        optimizer.add_param_group({"params": params[0]})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("reset", ["clear", "replace"])
def test_without_its_state_an_optimizer_is_as_new(make, reset):
    params = parameters()
    given = gradients(params, 4)
    optimizer = make(params)
    feed(optimizer, params, given)
    if reset == "clear":
        optimizer.state.clear()
    else:
        optimizer.state = type(optimizer.state)(dict)
    wanted = alone(make, params, given)
    feed(optimizer, params, given)
    assert_same(params, wanted, exact(make))


def test_a_parameter_may_be_replaced_and_its_state_be_moved_to_the_new_one(make):
    params = parameters()
    given = gradients(params, 6)
    wanted = alone(make, params, given)
    optimizer = make(params)
    feed(optimizer, params, given[:3])
    new = nn.Parameter(params[0].detach().clone())
    optimizer.state[new] = optimizer.state.pop(params[0])
    optimizer.param_groups[0]["params"][0] = params[0] = new
    feed(optimizer, params, given[3:])
    assert_same(params, wanted, exact(make))
    assert set(optimizer.state) == set(params)
    assert set(optimizer.state_dict()["state"]) == set(range(len(params)))


def test_a_parameter_that_is_taken_out_rests_and_is_not_in_the_state_dict(make):
    params = parameters()
    given = gradients(params, 6)
    wanted = [*alone(make, params[:1], given[:3]), *alone(make, params[1:], [step[1:] for step in given])]
    optimizer = make(params)
    feed(optimizer, params, given[:3])
    del optimizer.param_groups[0]["params"][0], optimizer.state[params[0]]
    feed(optimizer, params, given[3:])
    assert_same(params, wanted, exact(make))
    assert len(optimizer.state_dict()["state"]) == len(params) - 1


def test_named_parameters_move_as_unnamed_ones_and_their_names_are_saved(make):
    runs = []
    for named in (True, False):
        model, loss = model_and_loss()
        optimizer = make(model.named_parameters() if named else model.parameters())
        optimizer.step(lambda loss=loss: loss().backward())
        runs.append(values(model.parameters()))
        names = optimizer.state_dict()["param_groups"][0].get("param_names")
        assert names == (["0.weight", "0.bias", "2.weight", "2.bias"] if named else None)
    assert_same(*runs)


# ---- lr and weight decay ----


@pytest.mark.parametrize("shape", [(), (1,)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_lr_may_be_a_tensor(make, shape, dtype):
    runs = []
    for lr in (0.25, torch.full(shape, 0.25, dtype=dtype)):
        params = parameters()
        feed(make(params, lr=lr, weight_decay=0.5), params, gradients(params, 3))
        runs.append(params)
    torch.testing.assert_close(*runs, rtol=1e-6, atol=1e-7)


def test_with_an_lr_of_zero_parameters_stand_still_while_the_state_goes_on(make):
    params = parameters()
    given, before = gradients(params, 3), values(params)
    optimizer = make(params, lr=0.0, weight_decay=0.5)
    feed(optimizer, params, given)
    assert_same(values(params), before)
    for group in optimizer.param_groups:
        group.update(lr=0.5, weight_decay=0.0)
    feed(optimizer, params, given[:1])
    late = alone(make, before, given[:1], lr=0.5)
    assert not torch.equal(params[0], before[0]) and not torch.equal(params[0], late[0])


def test_weight_decay_shrinks_the_parameters_before_the_update(make):
    params = parameters()
    given = gradients(params, 3)
    wanted = clones(params)
    helper = make(wanted, lr=0.5)
    for step in given:
        with torch.no_grad():
            for p in wanted:
                p.mul_(1 - 0.5 * 0.25)
        feed(helper, wanted, [step])
    feed(make(params, lr=0.5, weight_decay=0.25), params, given)
    assert_same(params, wanted)


# ---- tensors of every kind ----


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_parameters_of_every_dtype_move_and_keep_it(make, dtype):
    params, mixed = parameters(dtype), [*parameters(dtype), *parameters()]
    given = gradients(params, 4)
    wanted = alone(make, params, given)
    both = [[*low, *high] for low, high in zip(given, gradients(parameters(), 4), strict=True)]
    feed(make(mixed), mixed, both)
    assert_same(mixed[: len(params)], wanted, exact(make))
    assert not torch.equal(params[0], mixed[0])


LAYOUTS = {
    "contiguous": lambda x: x.clone(),
    "channels-last": lambda x: x.clone(memory_format=torch.channels_last),
    "permuted": lambda x: x.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0),
    "every-other": lambda x: x.repeat_interleave(2, -1)[..., ::2],
}


@pytest.mark.parametrize("of_gradient", [*LAYOUTS, "expanded"])
@pytest.mark.parametrize("of_parameter", LAYOUTS)
def test_the_layout_in_memory_makes_no_difference(make, of_parameter, of_gradient):
    x = normal(2, 3, 4, 5, seed=0)
    lay = LAYOUTS.get(of_gradient, lambda x: x[:1, :1, :, :1].expand(2, 3, 4, 5))
    given = [lay(normal(2, 3, 4, 5, seed=t)) for t in range(3)]
    wanted, found = nn.Parameter(x.clone()), nn.Parameter(LAYOUTS[of_parameter](x))
    strides, helper, optimizer = found.stride(), make([wanted]), make([found])
    for gradient in given:
        wanted.grad, found.grad = gradient.contiguous(), gradient
        helper.step()
        optimizer.step()
    assert_same([found], [wanted])
    assert found.stride() == strides and not torch.equal(found, x)


def test_tied_parameters_count_once(make):
    tied = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    tied[1].weight = tied[0].weight
    weight, x = nn.Parameter(tied[0].weight.detach().clone()), normal(4, 3, seed=0)
    optimizer, helper = make(tied.parameters()), make([weight])
    for _ in range(3):
        optimizer.zero_grad()
        helper.zero_grad()
        tied(x).square().sum().backward()
        functional.linear(functional.linear(x, weight), weight).square().sum().backward()
        optimizer.step()
        helper.step()
    assert tied[1].weight is tied[0].weight and len(optimizer.state_dict()["state"]) == 1
    assert_same([tied[1].weight], [weight])
