"""What PyTorch does with an optimizer: saves and copies it, hooks into it, schedules it, scales its gradients.

As in test_optim.py the same assertions hold for LearnedOptimizer, whatever its rule, and for Adam.
"""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.optim.swa_utils import SWALR

from optimizers import (
    SHAPES,
    adam,
    assert_same,
    brought_back,
    clones,
    feed,
    gradients,
    parameters,
    through_a_file,
    values,
)

# Values that are as good as any other for what is tested here, and would be odd in use.
pytestmark = pytest.mark.filterwarnings("ignore:weight_decay=.* off each parameter", "ignore:lr=.* is a factor")

# ---- saved, copied, pickled ----

OPTIONS = {"plain": {}, "tensor-lr": {"lr": torch.tensor(0.5), "weight_decay": 0.25}, "maximize": {"maximize": True}}


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("way", ["state-dict", "file", "distributed", "deepcopy", "pickle"])
def test_brought_back_in_the_middle_it_goes_on_exactly(make, dtype, options, way):
    if (make, dtype, way) == (adam, torch.float16, "distributed"):
        pytest.skip("PyTorch makes Adam's state by a step with zero gradients, 0 / 0 in float16")
    straight = parameters(dtype)
    given = gradients(straight, 6)
    feed(make(straight, **copy.deepcopy(OPTIONS[options])), straight, given)
    params = parameters(dtype)
    optimizer = make(params, **copy.deepcopy(OPTIONS[options]))
    feed(optimizer, params, given[:3])
    kept = values(params)
    twins, twin = brought_back(way, make, params, optimizer)
    feed(twin, twins, given[3:])
    assert_same(twins, straight)
    assert_same(params, kept)
    feed(optimizer, params, given[3:])  # the original is not disturbed by its copy
    assert_same(params, straight)


def test_a_state_from_before_the_first_step_brings_back_the_beginning(make):
    params, wanted = parameters(), parameters()
    given = gradients(params, 3)
    optimizer = make(params)
    first = copy.deepcopy(optimizer.state_dict())
    feed(optimizer, params, given)
    optimizer.load_state_dict(first)
    with torch.no_grad():
        for p, start in zip(params, parameters(), strict=True):
            p.copy_(start)
    feed(optimizer, params, given[1:])
    feed(make(wanted), wanted, given[1:])
    assert_same(params, wanted)


@pytest.mark.parametrize("other", [SHAPES[:-1], [*SHAPES, (2,)]])
def test_a_state_of_another_number_of_parameters_is_refused_and_nothing_changes(make, other):
    params, straight = parameters(), parameters()
    given = gradients(params, 4)
    feed(make(straight), straight, given)
    strangers = parameters(shapes=other)
    helper = make(strangers)
    feed(helper, strangers, gradients(strangers, 1))
    optimizer = make(params)
    feed(optimizer, params, given[:2])
    with pytest.raises(ValueError, match="doesn't match the size of optimizer's group"):
        optimizer.load_state_dict(helper.state_dict())
    feed(optimizer, params, given[2:])
    assert_same(params, straight)


# ---- hooks ----


def test_step_hooks_run_around_every_step_and_may_change_its_arguments(make):
    params, events = parameters(), []
    optimizer = make(params)

    def before(optimizer, args, kwargs):
        events.append("before")
        return (args[0], lambda: torch.tensor(5.0)), kwargs  # with self, as torch hands it over

    handles = [
        register_optimizer_step_pre_hook(lambda *_: events.append("before all")),
        register_optimizer_step_post_hook(lambda *_: events.append("after all")),
        optimizer.register_step_pre_hook(before),
        optimizer.register_step_post_hook(lambda *_: events.append("after")),
    ]
    try:
        assert optimizer.step() == 5.0
        assert events == ["before all", "before", "after", "after all"]
    finally:
        for handle in handles:
            handle.remove()
    assert optimizer.step() is None and len(events) == 4


def test_hooks_on_saving_may_change_what_is_saved(make):
    params, events = parameters(), []
    optimizer = make(params)
    optimizer.register_state_dict_pre_hook(lambda optimizer: events.append("before"))
    optimizer.register_state_dict_post_hook(lambda optimizer, state: {**state, "more": len(state["state"])})
    feed(optimizer, params, gradients(params, 1))
    assert optimizer.state_dict()["more"] == len(params) and events == ["before"]


def test_a_hook_before_loading_may_return_another_dict(make):
    params, strangers = parameters(), parameters()
    given = gradients(params, 4)
    optimizer, stranger = make(params), make(strangers)
    feed(optimizer, params, given[:2])
    feed(stranger, strangers, given[:1])
    good, twins = copy.deepcopy(optimizer.state_dict()), clones(params)
    good["param_groups"][0]["lr"] = optimizer.param_groups[0]["lr"] = 0.25
    twin = make(twins)
    twin.register_load_state_dict_pre_hook(lambda optimizer, state: good)
    twin.load_state_dict(stranger.state_dict())
    assert twin.param_groups[0]["lr"] == 0.25
    feed(optimizer, params, given[2:])
    feed(twin, twins, given[2:])
    assert_same(twins, params)


def test_hooks_after_loading_find_the_whole_state_and_none_is_left_behind(make):
    params, events = parameters(torch.bfloat16), []
    optimizer, twin = make(params), make(parameters(torch.bfloat16))
    feed(optimizer, params, gradients(params, 2))
    saved = copy.deepcopy(optimizer.state_dict())

    def after(name):
        def hook(optimizer):
            for k, p in enumerate(optimizer.param_groups[0]["params"]):
                found, wanted = optimizer.state[p], saved["state"][k]
                assert found.keys() == wanted.keys()
                assert_same(list(found.values()), list(wanted.values()))
            events.append(name)

        return hook

    twin.register_load_state_dict_pre_hook(lambda *_: events.append("before"))
    twin.register_load_state_dict_post_hook(after("first"))
    twin.register_load_state_dict_post_hook(after("prepended"), prepend=True)
    for _ in range(2):
        twin.load_state_dict(saved)
    assert events == ["before", "prepended", "first"] * 2
    hooks = twin._optimizer_load_state_dict_pre_hooks, twin._optimizer_load_state_dict_post_hooks
    assert [len(found) for found in hooks] == [1, 2]


# ---- learning-rate schedules ----

SCHEDULERS = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda t: 1 / (1 + t)),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda t: 0.75),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2, 0.5),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [1, 3], 0.5),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, 0.5, 3),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, 0.25, 1.0, 4),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.75),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 6, 2.0),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 6),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.125, 1.0, step_size_up=2, cycle_momentum=False),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 1.0, 6, cycle_momentum=False),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o, 0.5, 10), lr_scheduler.ExponentialLR(o, 0.5)], [3]
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.LinearLR(o, 0.25, 1.0, 4), lr_scheduler.ExponentialLR(o, 0.5)]
    ),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, factor=0.5, patience=0),
    "SWALR": lambda o: SWALR(o, 0.0625, anneal_epochs=4),
}


def test_every_scheduler_is_tried():
    assert set(SCHEDULERS) == {*lr_scheduler.__all__, "SWALR"} - {"LRScheduler"}


def scheduled(optimizer, name, each):
    """Six steps of a schedule: the learning rates that they have."""
    scheduler, found = SCHEDULERS[name](optimizer), []
    for t in range(6):
        found.append([float(group["lr"]) for group in optimizer.param_groups])
        each(t)
        scheduler.step(*([[3.0, 2.0, 2.0, 1.0, 1.0, 1.0][t]] if name == "ReduceLROnPlateau" else []))
    return found


@pytest.mark.parametrize("tensor", [False, True], ids=["number", "tensor"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_schedule_is_a_learning_rate_set_by_hand(make, name, tensor):
    def grouped(build, params):
        lrs = [torch.tensor(lr) if tensor else lr for lr in (0.5, 0.25)]
        return build([{"params": params[:2], "lr": lrs[0]}, {"params": params[2:], "lr": lrs[1]}])

    params, by_hand, bystanders = parameters(), parameters(), parameters()
    given = gradients(params, 6)
    plain, optimizer, helper = grouped(torch.optim.SGD, bystanders), grouped(make, params), grouped(make, by_hand)
    wanted = scheduled(plain, name, lambda t: plain.step())
    found = scheduled(optimizer, name, lambda t: feed(optimizer, params, given[t : t + 1]))
    assert found == wanted and len({lr for lr, _ in found}) > 1
    for t, lrs in enumerate(wanted):
        for group, lr in zip(helper.param_groups, lrs, strict=True):
            group["lr"] = torch.tensor(lr) if tensor else lr
        feed(helper, by_hand, given[t : t + 1])
    assert_same(params, by_hand)


def test_a_schedule_goes_on_after_a_checkpoint(make):
    runs = []
    for saves in (False, True):
        params = parameters()
        optimizer = make(params, lr=0.5)
        scheduler = lr_scheduler.OneCycleLR(optimizer, 1.0, 6, cycle_momentum=False)
        for t, step in enumerate(gradients(params, 6)):
            if saves and t == 3:
                state = through_a_file([optimizer.state_dict(), scheduler.state_dict()])
                params = clones(params)
                optimizer = make(params)
                scheduler = lr_scheduler.OneCycleLR(optimizer, 1.0, 6, cycle_momentum=False)
                optimizer.load_state_dict(state[0])
                scheduler.load_state_dict(state[1])
            feed(optimizer, params, [step])
            scheduler.step()
        runs.append(params)
    assert_same(*runs)


# ---- torch.amp.GradScaler ----


def test_a_grad_scaler_scales_back_and_leaves_out_steps_with_infinite_gradients(make):
    params, wanted = parameters(), parameters()
    given = gradients(params, 4)
    optimizer, helper = make(params), make(wanted)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for t, step in enumerate(given):
        optimizer.zero_grad()
        scale = scaler.get_scale()
        terms = [(p * g).sum() for p, g in zip(params, step, strict=True)]
        scaler.scale(sum(terms)).backward()
        if t == 2:
            params[1].grad.fill_(torch.inf)
        scaler.step(optimizer)
        scaler.update()
        if t != 2:
            feed(helper, wanted, [step])
        assert scaler.get_scale() == (scale / 2 if t == 2 else scale)
        assert_same(params, wanted)


def test_gradients_may_be_clipped_between_unscaling_and_the_step(make):
    params, wanted = parameters(), parameters()
    optimizer, helper = make(params), make(wanted)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for step in gradients(params, 3):
        for p, w, gradient in zip(params, wanted, step, strict=True):
            p.grad, w.grad = 8 * gradient, gradient.clone()
        scaler.scale(torch.zeros(()))  # only now does it know its device
        scaler.unscale_(optimizer)
        norms = [nn.utils.clip_grad_norm_(found, 0.5) for found in (params, wanted)]
        assert norms[0] == norms[1] > 0.5
        scaler.step(optimizer)
        scaler.update()
        helper.step()
    assert_same(params, wanted)


# ---- what PyTorch tests its own optimizers with ----


@pytest.fixture(scope="module")
def database():
    """torch.testing._internal.common_optimizers, or a skip: it needs a package that torch does not bring."""
    pytest.importorskip("expecttest")
    with warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch:
        warnings.simplefilter("ignore")
        # Importing it would otherwise forbid all later tests to set torch.backends' flags, as Lightning does.
        patch.setattr(torch.backends, "disable_global_flags", lambda: None)
        return pytest.importorskip("torch.testing._internal.common_optimizers")


def test_with_the_options_of_pytorchs_own_tests_it_is_saved_copied_and_printed(make, database):
    kinds = [info.optim_inputs_func("cpu") for info in database.optim_db]
    options = [one.kwargs for kind in kinds for one in kind if one.kwargs.keys() <= {"lr", "weight_decay", "maximize"}]
    assert len(options) > 30
    for kwargs in {repr(kwargs): kwargs for kwargs in options}.values():
        straight, params = parameters(), parameters()
        given = gradients(params, 4)
        feed(make(straight, **copy.deepcopy(kwargs)), straight, given)
        optimizer = make(params, **copy.deepcopy(kwargs))
        assert all(f"{key}: {value}" in repr(optimizer) for key, value in kwargs.items())
        feed(optimizer, params, given[:2])
        for way in ("file", "deepcopy"):
            twins, twin = brought_back(way, make, params, optimizer)
            public = [{k for k in vars(o) if not k.startswith("_")} for o in (optimizer, twin)]
            assert public[0] == public[1] and repr(twin) == repr(optimizer)
            feed(twin, twins, given[2:])
            assert_same(twins, straight)


def test_what_pytorchs_own_tests_expect_to_be_refused_is_refused(make, database):
    found = database.get_error_inputs_for_all_optims("cpu", torch.float32)
    assert len(found) >= 5
    for one in found:
        given = one.optimizer_error_input
        params = parameters() if given.params is None else given.params
        message = "one number|1-element" if "1-element" in one.error_regex else one.error_regex
        expects = pytest.warns if issubclass(one.error_type, Warning) else pytest.raises
        with expects(one.error_type, match=message):
            make(params, **given.kwargs)
