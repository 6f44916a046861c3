"""When a run goes wrong: what counts as that, and what LearnedOptimizer does about it."""

import copy
import json
import logging
import math
import subprocess
import sys
import textwrap
import warnings

import pytest
import torch
from torch import nn
from torch.optim import AdamW

from lightning_l2l import CoordinatewiseLSTM, LearnedOptimizer
from lightning_l2l.rules import safeguards
from lightning_l2l.rules.safeguards import new_record, over_ranks, runs_away
from optimizers import assert_same, brought_back, clones, normal, parameters, through_a_file, values

# Decays that are odd in use make for clear tests.
pytestmark = pytest.mark.filterwarnings("ignore:weight_decay=.* off each parameter")

FALLBACK, DECAY = 2.0**-7, 2.0**-5  # powers of two: lr * decay is then the same number whichever way it is computed
LOSSES = [1 / (1 + t) for t in range(25)] + [1.0] * 35


def judged(losses):
    """The first step at which the losses run away, or None."""
    record = new_record()
    return next((t for t, loss in enumerate(losses) if runs_away(record, loss)), None)


TURN = judged(LOSSES)


def noise(steps, seed):
    return torch.randn(steps, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---- runs_away ----


@pytest.mark.parametrize("scale, shift", [(1000.0, 0.0), (1.0, -50.0), (1000.0, -50.0), (1e-6, 3e-6)])
def test_neither_scale_nor_sign_of_the_loss_matters(scale, shift):
    runs = [noise(120, seed).cumsum(0) for seed in range(60)]
    found = [judged(run.tolist()) for run in runs]
    assert [judged((scale * run + shift).tolist()) for run in runs] == found
    assert 10 < sum(turn is not None for turn in found) < 60 and len(set(found)) > 10


DECREASING = {
    "hyperbola": lambda t: 1 / (1 + t),
    "exponential": lambda t: (-t / 50).exp(),
    "line": lambda t: 1 - t / 1000,
    "plateaus": lambda t: 0.5 ** (t // 100),
}


@pytest.mark.parametrize("size", [0.0, 0.02, 0.05])
@pytest.mark.parametrize("curve", DECREASING)
def test_a_decreasing_noisy_loss_does_not_run_away(curve, size):
    t = torch.arange(1000, dtype=torch.float64)
    assert [judged((DECREASING[curve](t) + size * noise(1000, seed)).tolist()) for seed in range(10)] == [None] * 10


@pytest.mark.parametrize("slope", [0.0, 0.002])
def test_a_loss_that_falls_slowly_or_not_at_all_under_its_noise_does_not_run_away(slope):
    t = torch.arange(1000, dtype=torch.float64)
    assert [judged((noise(1000, seed) - slope * t).tolist()) for seed in range(20)] == [None] * 20


def test_half_of_what_was_gained_may_be_lost_and_no_more():
    gained = [1.0] * 10 + [0.0] * 200
    assert judged(gained + [0.48] * 500) is None
    assert len(gained) < judged(gained + [0.52] * 500) < len(gained) + 40
    # Gains count from what the loss was at first: it may have been higher in between.
    assert judged([1.0] * 10 + [0.9] * 100 + [0.0] * 200 + [0.48] * 500) is None


def test_what_was_lost_again_and_won_back_counts_no_longer():
    assert judged(([1.0] * 10 + [0.0] * 100 + [0.45] * 30) + ([0.0] * 60 + [0.45] * 30) * 5) is None


@pytest.mark.parametrize(
    "losses", [[1.5**t for t in range(60)], [-1 + 0.1 * t for t in range(60)], [1.0] * 15 + [2.0] * 45]
)
def test_a_rise_from_the_start_runs_away_but_is_not_judged_before_step_20(losses):
    assert 19 <= judged(losses) < 30


def test_a_run_that_explodes_at_once_is_given_a_hundred_steps():
    exploded = (300 + 100 * noise(200, 0)).clamp(min=2.0).tolist()
    assert judged([1.0, *exploded]) == 100
    assert judged([1.0, *exploded[:50], 0.9, *exploded[50:60]]) is None


def test_a_loss_that_never_changes_does_not_run_away():
    assert judged([0.7] * 1000) is None


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_losses_that_are_not_finite_do_not_count(bad):
    record, clean = new_record(), new_record()
    for t, loss in enumerate(LOSSES):
        before = copy.deepcopy(record)
        if t % 3 == 1 or t < 2:
            assert not runs_away(record, bad)
            assert repr(record) == repr(before)
        assert runs_away(record, loss) == runs_away(clean, loss)
    assert TURN is not None and json.loads(json.dumps(record)) == record == clean


def test_a_loss_may_be_any_number():
    for loss in (0.5, torch.tensor(0.5, requires_grad=True), torch.tensor([0.5]), torch.tensor(0.5).bfloat16()):
        assert over_ranks(loss, torch.device("cpu")) == 0.5


def test_all_ranks_go_by_their_mean_loss(tmp_path):
    code = """
        import runpy, sys, torch
        from torch import distributed
        over_ranks = runpy.run_path(sys.argv[1])["over_ranks"]  # without the package, which imports Lightning
        rank = int(sys.argv[3])
        distributed.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2)
        loss = torch.tensor(1.0 + rank)
        print(over_ranks(loss, torch.device("cpu")), float(loss))
        distributed.destroy_process_group()
    """
    command = [sys.executable, "-c", textwrap.dedent(code), safeguards.__file__, str(tmp_path / "store")]
    ranks = [subprocess.Popen([*command, rank], stdout=subprocess.PIPE, text=True) for rank in "01"]
    assert [rank.communicate(timeout=120)[0].split() for rank in ranks] == [["1.5", "1.0"], ["1.5", "2.0"]]


# ---- the fallback ----


@pytest.fixture
def rule():
    torch.manual_seed(0)
    return CoordinatewiseLSTM(hidden_size=4)


def give(params, t):
    for k, p in enumerate(params):
        p.grad = normal(*p.shape, seed=31 * t + k, dtype=p.dtype)


def run(optimizer, params, first=0, last=None):
    """Inner steps with drawn gradients and the losses above."""
    for t in range(len(LOSSES))[first:last]:
        give(params, t)
        optimizer.step(loss=LOSSES[t])


OPTIONS = {
    "plain": ({}, {"lr": FALLBACK}),
    "lr": ({"lr": 0.5}, {"lr": 0.5 * FALLBACK}),
    "tensor-lr": ({"lr": torch.tensor(0.5)}, {"lr": torch.tensor(0.5 * FALLBACK)}),
    "decay": ({"weight_decay": DECAY}, {"lr": FALLBACK, "weight_decay": DECAY / FALLBACK}),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("options", OPTIONS)
def test_when_the_loss_runs_away_a_new_adam_takes_over_for_good(rule, options, dtype, caplog):
    own, of_adam = OPTIONS[options]
    params, wanted = parameters(dtype), parameters(dtype)
    optimizer = LearnedOptimizer(params, rule, fallback_lr=FALLBACK, **own)
    run(optimizer, params, 0, TURN)
    run(LearnedOptimizer(wanted, rule, **own), wanted, 0, TURN)
    assert_same(params, wanted)
    assert not optimizer.handed_over and not caplog.records
    adam = AdamW(wanted, **{"weight_decay": 0.0, **of_adam})
    for t in range(TURN, len(LOSSES)):
        give(params, t)
        give(wanted, t)
        optimizer.step(loss=LOSSES[t] if t == TURN else None)  # it is not needed afterwards
        adam.step()
        assert_same(params, wanted)
        assert optimizer.handed_over
    (record,) = caplog.records
    assert (record.name, record.levelno) == ("lightning_l2l.optim", logging.WARNING)
    assert f"From its step {TURN + 1} on, Adam with lr {FALLBACK:g} takes the place of the rule" in record.message


def test_each_group_keeps_its_lr_and_direction_and_may_be_without_gradients(rule):
    params = parameters()
    groups = [{"params": params[:1], "lr": 0.5}, {"params": params[1:], "maximize": True}]
    optimizer = LearnedOptimizer(groups, rule, weight_decay=DECAY, fallback_lr=FALLBACK)
    run(optimizer, params, 0, TURN)
    wanted = clones(params)
    adam = AdamW(
        [
            {"params": wanted[:1], "lr": 0.5 * FALLBACK},
            {"params": wanted[1:], "lr": FALLBACK, "maximize": True},
        ],
        weight_decay=DECAY / FALLBACK,
    )
    for t in range(TURN, TURN + 10):
        for one in (params, wanted):
            give(one, t)
            one[t % 3].grad = None
        optimizer.step(loss=LOSSES[t])
        adam.step()
    assert_same(params, wanted)
    late = [nn.Parameter(torch.ones(3)) for _ in range(2)]
    optimizer.add_param_group({"params": late[:1]})
    adam.add_param_group({"params": late[1:], "lr": FALLBACK})
    for t in range(3):
        give(late[:1], t)
        give(late[1:], t)
        optimizer.step()
        adam.step()
    assert_same(late[:1], late[1:])


@pytest.mark.parametrize("way", ["state-dict", "file", "deepcopy", "pickle"])
@pytest.mark.parametrize("at", [5, TURN - 1, TURN + 1, TURN + 10])
def test_it_can_be_brought_back_before_and_after(rule, at, way):
    def make(params):
        return LearnedOptimizer(params, rule, fallback_lr=FALLBACK)

    straight, params = parameters(torch.bfloat16), parameters(torch.bfloat16)
    run(make(straight), straight)
    optimizer = make(params)
    run(optimizer, params, 0, at)
    twins, twin = brought_back(way, make, params, optimizer)
    assert twin.handed_over == optimizer.handed_over == (at > TURN)
    run(twin, twins, at)
    assert_same(twins, straight)
    run(optimizer, params, at)
    assert_same(params, straight)


def test_a_state_from_before_brings_the_rule_back(rule):
    params, wanted = parameters(), parameters()
    optimizer = LearnedOptimizer(params, rule, fallback_lr=FALLBACK)
    run(optimizer, params, 0, TURN - 5)
    saved, weights = copy.deepcopy(optimizer.state_dict()), values(params)
    run(optimizer, params, TURN - 5)
    assert optimizer.handed_over
    optimizer.load_state_dict(saved)
    with torch.no_grad():
        for p, weight in zip(params, weights, strict=True):
            p.copy_(weight)
    run(optimizer, params, TURN - 5, TURN)
    run(LearnedOptimizer(wanted, rule), wanted, 0, TURN)
    assert not optimizer.handed_over
    assert_same(params, wanted)


@pytest.mark.parametrize("by", ["closure", "loss", "scaler"])
def test_a_run_that_is_made_to_run_away_is_saved(by, caplog):
    torch.manual_seed(0)
    rule = CoordinatewiseLSTM(hidden_size=4, output_scale=5.0)
    p, losses = nn.Parameter(torch.zeros(6)), []
    optimizer, scaler = LearnedOptimizer([p], rule, fallback_lr=0.5), torch.amp.GradScaler("cpu", init_scale=4.0)

    def closure(scale=1.0):
        optimizer.zero_grad()
        loss = (p - 1).square().sum()
        (scale * loss).backward()
        losses.append(loss.item())
        return loss

    for _ in range(400):
        if by == "closure":
            assert optimizer.step(closure) == losses[-1]
        elif by == "loss":
            assert optimizer.step(loss=closure()) == losses[-1]
        else:
            scaler.scale(torch.ones(()))
            assert scaler.step(optimizer, loss=closure(scaler.get_scale())) == losses[-1]
            scaler.update()
    turn = judged(losses)
    assert optimizer.handed_over and len(caplog.records) == 1
    assert losses[turn] > 10 * losses[0] and losses[-1] < 0.01 * losses[0]


def test_to_run_away_when_maximizing_is_to_fall(rule):
    for maximize, sign in ((False, 1), (True, -1), (False, -1), (True, 1)):
        (p,) = params = [nn.Parameter(torch.zeros(3))]
        optimizer = LearnedOptimizer(params, rule, maximize=maximize, fallback_lr=FALLBACK)
        for t in range(60):
            p.grad = torch.ones(3)
            optimizer.step(loss=sign * (1.0 + t))
        assert optimizer.handed_over == (maximize == (sign < 0)), f"{maximize=}, {sign=}"


def test_a_loss_that_is_given_beside_a_closure_is_the_one_that_counts(rule):
    params = parameters()
    optimizer = LearnedOptimizer(params, rule, fallback_lr=FALLBACK)
    for t, loss in enumerate(LOSSES):
        give(params, t)
        assert optimizer.step(lambda: 1.0, loss=loss) is loss
    assert optimizer.handed_over


def test_a_first_group_without_parameters_is_no_hindrance(rule):
    params = parameters()
    optimizer = LearnedOptimizer([{"params": []}, {"params": params}], rule, fallback_lr=FALLBACK)
    run(optimizer, params)
    assert optimizer.handed_over


def test_without_a_loss_the_fallback_says_so_and_nothing_changes(rule):
    params = parameters()
    optimizer = LearnedOptimizer(params, rule, fallback_lr=FALLBACK)
    give(params, 0)
    before = values(params)
    with pytest.raises(RuntimeError, match=r"fallback_lr is set, but .* use step\(closure\) or step\(loss=loss\)"):
        optimizer.step()
    assert_same(values(params), before)
    with pytest.warns(UserWarning, match="there is no loss to watch"):
        assert optimizer.step(lambda: None) is None
    assert not torch.equal(params[0], before[0])


@pytest.mark.parametrize("fallback_lr", [0.0, -1.0, math.nan])
def test_the_fallbacks_lr_is_above_zero(rule, fallback_lr):
    with pytest.raises(ValueError, match=rf"fallback_lr={fallback_lr} is not above 0"):
        LearnedOptimizer(parameters(), rule, fallback_lr=fallback_lr)


def test_without_a_fallback_the_rule_stays_whatever_the_loss(rule, caplog):
    params = parameters()
    optimizer = LearnedOptimizer(params, rule)
    run(optimizer, params)
    assert not optimizer.handed_over and not caplog.records
    assert optimizer.param_groups[0].keys() == {"params", *optimizer.defaults}


# ---- gradients with inf or nan ----


def poison(params, value):
    params[3].grad[2] = value


@pytest.mark.parametrize("handed_over", [False, True], ids=["rule", "adam"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_step_with_nonfinite_gradients_is_left_out_as_if_it_had_not_been(rule, value, handed_over):
    params, wanted = parameters(), parameters()
    options = {"weight_decay": DECAY, "fallback_lr": FALLBACK if handed_over else None}
    optimizer, helper = LearnedOptimizer(params, rule, **options), LearnedOptimizer(wanted, rule, **options)
    if handed_over:
        run(optimizer, params, 0, TURN + 1)
        run(helper, wanted, 0, TURN + 1)
        assert optimizer.handed_over
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for t, bad in enumerate([True, False, True, True, False]):
            give(params, t)
            if bad:
                poison(params, value)
                before = values(params), copy.deepcopy([list(optimizer.state[p].values()) for p in params])
            assert optimizer.step(loss=2.5) == 2.5
            if bad and t:
                assert_same(values(params), before[0])
                for p, state in zip(params, before[1], strict=True):
                    assert_same(list(optimizer.state[p].values()), state)
            if not bad:
                give(wanted, t)
                helper.step(loss=2.5)
            assert_same(params, wanted)
    assert optimizer.num_skipped == 3 and copy.deepcopy(optimizer).num_skipped == 3 and helper.num_skipped == 0
    before = helper.state_dict()
    helper.load_state_dict(through_a_file(optimizer.state_dict()))
    assert helper.num_skipped == 3
    poison(wanted, value)
    helper.step(loss=2.5)  # without another warning
    assert helper.num_skipped == 4 and optimizer.num_skipped == 3
    helper.load_state_dict(before)
    assert helper.num_skipped == 0
    assert ["inf or nan" in str(one.message) for one in caught] == [True]


def test_a_gradient_too_large_for_float32_is_infinite(rule):
    params = [nn.Parameter(torch.zeros(3, dtype=torch.float64))]
    optimizer = LearnedOptimizer(params, rule)
    params[0].grad = torch.tensor([1.0, 1e300, 1.0], dtype=torch.float64)
    with pytest.warns(UserWarning, match="this inner step is left out"):
        optimizer.step()
    assert optimizer.num_skipped == 1 and params[0].tolist() == [0.0] * 3


def test_if_told_to_it_lets_nan_through_to_its_own_coordinate_alone(rule):
    params, wanted = parameters(), parameters()
    optimizer, helper = LearnedOptimizer(params, rule, skip_nonfinite=False), LearnedOptimizer(wanted, rule)
    for t in range(3):
        give(params, t)
        give(wanted, t)
        if t == 1:
            poison(params, math.nan)
        optimizer.step()
        helper.step()
    assert params[3].isnan().tolist() == [False, False, True, False, False] and optimizer.num_skipped == 0
    with torch.no_grad():
        params[3][2] = wanted[3][2]
    assert_same(params, wanted)
