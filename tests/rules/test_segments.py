"""How states are laid side by side; what an optimizer makes of that is in test_optim.py."""

from collections import defaultdict

import pytest
import torch

from lightning_l2l.rules.segments import STATE, Segment, lay_out, runs
from optimizers import LearnedMomentum, Momentum, clones, parameters

RULE = Momentum()


def one_rule(p):
    return RULE


def laid_out(params, rule_of=one_rule):
    """All of them at once, and their states, each of which has the number of its parameter."""
    states = defaultdict(dict)
    segments = lay_out([], params, params, states, rule_of)
    for k, p in enumerate(params):
        states[p][STATE].fill_(k + 1)
    return segments, states


def assert_side_by_side(segment, states):
    assert segment.offsets == [sum(p.numel() for p in segment.params[:k]) for k in range(len(segment.params) + 1)]
    assert segment.state.shape == (segment.rule.state_size, segment.offsets[-1])
    for p, view, first in zip(segment.params, segment.views, segment.offsets, strict=False):
        assert states[p][STATE] is view and view.shape == (segment.rule.state_size, p.numel())
        assert view._base is segment.state and (p.numel() == 0 or view.storage_offset() == first)


def test_states_are_parts_of_one_tensor_in_the_order_of_the_parameters():
    params = parameters()
    states = defaultdict(dict)
    (segment,) = lay_out([], {params[3], params[0], params[1]}, params, states, one_rule)
    assert segment.params == [params[0], params[1], params[3]] and list(states) == segment.params
    assert_side_by_side(segment, states)


def test_what_is_in_order_stays_as_it_is():
    params = parameters()
    segments, states = laid_out(params)
    assert lay_out(segments, params, iter(()), states, one_rule) == segments  # compared by identity
    assert lay_out(segments, params[:1], iter(()), states, one_rule) == segments
    late = [*parameters(), *params]
    first, second = lay_out(segments, late[:2], late, states, one_rule)
    assert first is segments[0] and second.params == late[:2]
    assert_side_by_side(second, states)


@pytest.mark.parametrize("what", ["replaced", "lost", "moved"])
def test_states_that_lie_apart_are_brought_together_with_their_values(what):
    params, other = parameters(), parameters()
    segments, states = laid_out(params)
    (beside,) = lay_out([], other, other, states, one_rule)
    if what == "replaced":
        states[params[0]][STATE] = torch.full((1, 12), 7.0, dtype=torch.float64)
    elif what == "lost":
        del states[params[0]]
    else:
        there = params[0].to("meta")  # as if it were the same one still
        states[there] = states.pop(params[0])
        segments[0].params[0] = params[0] = there
    kept, *found = lay_out([*segments, beside], params, [*params, *other], states, one_rule)
    assert kept is beside
    wanted = [params[:1], params[1:]] if what == "moved" else [params]
    assert [segment.params for segment in found] == wanted
    for segment in found:
        assert_side_by_side(segment, states)
    value = {"replaced": 7.0, "lost": 0.0}
    for k, p in enumerate(params):
        if not p.is_meta:
            state = states[p][STATE]
            assert state.dtype == torch.float32 and (state == (value.get(what) if k == 0 else k + 1)).all()


def test_each_rule_and_device_has_its_own():
    params = [*parameters(), *[p.to("meta") for p in parameters()]]
    rules = {Momentum(): torch.float32, LearnedMomentum().double(): torch.float64}
    of = {p: rule for k, rule in enumerate(rules) for p in params[k::2]}
    states = defaultdict(dict)
    segments = lay_out([], params, params, states, of.__getitem__)
    found = {(segment.rule, segment.state.device.type, segment.state.dtype) for segment in segments}
    assert found == {(rule, device, dtype) for device in ("cpu", "meta") for rule, dtype in rules.items()}
    assert len(segments) == len(found)
    assert sorted(map(id, of)) == sorted(id(p) for segment in segments for p in segment.params)
    for segment in segments:
        assert all(of[p] is segment.rule and p.device == segment.state.device for p in segment.params)
        assert_side_by_side(segment, states)


@pytest.mark.parametrize(
    "present, wanted",
    [([], []), ([0, 1, 2, 3, 4], [(0, 5)]), ([0, 2, 3], [(0, 1), (2, 4)]), ([1, 4], [(1, 2), (4, 5)])],
)
def test_runs_are_neighbours_that_are_present(present, wanted):
    params = parameters()
    segment = Segment(RULE, params, [], torch.empty(0), [])
    other = Segment(RULE, clones(params), [], torch.empty(0), [])
    chosen = {params[k] for k in present} | {other.params[-1]}
    assert list(runs([segment, other], chosen)) == [*((segment, *run) for run in wanted), (other, 4, 5)]
